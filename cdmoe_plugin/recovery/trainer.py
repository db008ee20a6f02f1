"""TRL's SFTTrainer for condensed models: only the condensed layers are trained."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, concatenate_datasets
from transformers import AutoModelForCausalLM, AutoProcessor, PreTrainedModel, set_seed
from transformers.trainer_utils import unwrap_peft_model
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from ..model.adapters import refuse_left_adapter
from ..model.training import condensed_module_names, unfreeze_condensed
from ..naming import base_checkpoint
from .distillation import Distillation
from .weights import load_condensed_weights

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

logger = logging.get_logger(__name__)

# Of the positional arguments of `trl.SFTTrainer` after `args`.
_PLACE_OF_PROCESSING_CLASS = 4


class CondensedSFTTrainer(SFTTrainer):
    """A `trl.SFTTrainer` that trains only the condensed layers of a model, or LoRA on them.

    It also keeps the trained weights in float32 (half precision would round most of a small update away), counts the
    rows that TRL drops for their length, gives every held-out token the same weight, computes the same result for any
    number of processes with the same rows per step, and reads only the condensed layers' weights when it resumes from a
    checkpoint: the others never change.

    Args:
        model (`str`, `os.PathLike`, `PreTrainedModel` or `PeftModel`): A condensed checkpoint, which is opened with
            `args.model_init_kwargs`, or a condensed model. If it is quantised, its condensed layers must not be (see
            `quantised_around_condensed`), unless they have LoRA.
        args (`SFTConfig`, *optional*), *more, **kwargs: As for `trl.SFTTrainer`.
        peft_config (`PeftConfig`, *optional*): LoRA or the like. Its default `target_modules` are the condensed layers'
            projections.
        distillation (`Distillation`, *optional*): Distillation from the sparse model.

    Raises:
        ValueError: if the model is not condensed, or if there is nothing to train.
    """

    _tag_names = ["trl", "sft", "cdmoe"]

    def __init__(
        self,
        model: str | os.PathLike | PreTrainedModel | PeftModel,
        args: SFTConfig | None = None,
        *more: Any,
        peft_config: PeftConfig | None = None,
        distillation: Distillation | None = None,
        **kwargs: Any,
    ) -> None:
        revision = None
        if isinstance(model, (str, os.PathLike)):
            model_kwargs: Any = (args and args.model_init_kwargs) or {}
            revision = model_kwargs.get("revision")
            if kwargs.get("quantization_config") is not None:
                model_kwargs = {**model_kwargs, "quantization_config": kwargs.pop("quantization_config")}
            # In float32 as `trl.SFTTrainer` opens it, unless `model_init_kwargs` say otherwise.
            model = AutoModelForCausalLM.from_pretrained(model, **{"dtype": "float32", **model_kwargs})
            if model_kwargs:  # TRL would warn that it ignores them
                args = copy.copy(args)
                args.model_init_kwargs = None  # type: ignore[union-attr]
        condensed: Any = unwrap_peft_model(model)
        if not isinstance(condensed, PreTrainedModel):
            raise ValueError(
                "`model` should be a condensed checkpoint, a loaded PreTrainedModel or a PeftModel, but is a "
                f"{type(model).__name__}."
            )
        place = base_checkpoint(condensed)
        # TRL looks the tokenizer up by the model's name, which is no checkpoint after condensing in memory.
        if kwargs.get("processing_class") is None and len(more) < _PLACE_OF_PROCESSING_CLASS and place:
            kwargs["processing_class"] = AutoProcessor.from_pretrained(place, revision=revision)
        has_adapters = peft_config is not None or is_peft_model(model)
        self.distillation = distillation
        self.dropped_rows: dict[str, int] = {}
        self._held_out_sum = [0.0, 0.0]
        kwargs["peft_config"] = peft_config
        if peft_config is not None:
            set_seed(42 if args is None else args.seed)  # LoRA begins at random; trl 1.15 and later do this themselves
            if getattr(peft_config, "target_modules", None) is None:
                peft_config.target_modules = condensed_module_names(condensed)  # type: ignore[attr-defined]
        if not has_adapters:
            unfreeze_condensed(condensed)
        with _trainable_although_quantised(model, has_adapters):
            super().__init__(model, args, *more, **kwargs)
        if not has_adapters:
            refuse_left_adapter(str(self.args.output_dir))  # before training, not when the result is saved
        if self.aux_loss_enabled and condensed.config.condense_config["all_condensed"]:
            raise ValueError("`router_aux_loss_coef` should be 0: all sparse layers are condensed, no router is left.")
        per_step = self.args.train_batch_size * self.accelerator.num_processes * self.args.gradient_accumulation_steps
        self.train_dataset = fill_up(self.train_dataset, per_step)
        self.eval_dataset = fill_up(self.eval_dataset, self.args.eval_batch_size * self.accelerator.num_processes)
        trained = [p for p in self._inside.parameters() if p.requires_grad]
        self.num_trained = sum(p.numel() for p in trained)
        self.num_parameters = self._inside.num_parameters()
        if not self.num_trained:
            raise ValueError("There is nothing to train: the condensed layers of this model have no parameters.")
        if not self.is_fsdp_enabled and not self.is_deepspeed_enabled:  # these choose their own precision
            for parameter in trained:
                parameter.data = parameter.data.float()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute TRL's loss and, in training, add the distillation loss."""
        if self.distillation is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        with self.distillation.watching() as seen:
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        with self.accelerator.autocast():
            rest = {name: value for name, value in inputs.items() if name != "labels"}
            distance = self.distillation.loss(seen, rest, labels)
        # Normalised like TRL's loss: by the tokens of all processes and accumulation steps, if known.
        if num_items_in_batch is None:
            distance = distance / (labels[:, 1:] != -100).sum().clamp_min(1)
        else:
            distance = distance / torch.as_tensor(num_items_in_batch).clamp_min(1).to(distance.device)
            if self.args.average_tokens_across_devices:
                distance = distance * self.accelerator.num_processes
        self._metrics["train"]["distillation"].append(self.accelerator.reduce(distance.detach(), "mean").item())
        weight = self.distillation.weight
        return (1.0 - weight) * loss + weight * distance.to(loss.device)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        """Prepare data as TRL, and count the rows that it drops: those without anything to learn in `max_length`."""
        rest = (formatting_func, dataset_name)
        self.dropped_rows[dataset_name] = 0
        # "bfd" packing truncates rows at `max_length` too, but keeps rows without anything left to learn: drop these
        # first. Other strategies neither truncate nor drop.
        if packing and args.packing_strategy != "bfd":
            return super()._prepare_dataset(dataset, processing_class, args, packing, *rest)
        before = len(dataset) if hasattr(dataset, "__len__") else None
        dataset = super()._prepare_dataset(dataset, processing_class, args, False, *rest)
        dropped = 0 if before is None else before - len(dataset)
        if dropped:
            self.dropped_rows[dataset_name] = dropped
            logger.warning(
                f"{dropped} of {before} rows of the {dataset_name} data are dropped: their first {args.max_length} "
                "tokens have nothing to learn. A larger `max_length` keeps them."
            )
        if dropped == before:
            raise ValueError(f"No row of the {dataset_name} data is left: set a larger `max_length`.")
        return super()._prepare_dataset(dataset, processing_class, args, True, *rest) if packing else dataset

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        tokens = (inputs["labels"][:, 1:] != -100).sum().to(loss.device)
        sums = self.accelerator.reduce(torch.stack([loss.detach().float() * tokens, tokens.float()]).double(), "sum")
        for i, value in enumerate(sums.tolist()):
            self._held_out_sum[i] += value
        return loss, logits, labels

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as `Trainer`, but with the mean loss over tokens instead of batches of unequal size."""
        self._held_out_sum = [0.0, 0.0]
        output = super().evaluation_loop(*args, **kwargs)
        total, tokens = self._held_out_sum
        if tokens and output.metrics is not None:
            output.metrics[f"{kwargs.get('metric_key_prefix', 'eval')}_loss"] = total / tokens
        return output

    def load_result(self, folder: Path) -> None:
        """Load the weights or the adapter saved by an earlier stage."""
        model: Any = self.model
        if is_peft_model(model):
            model.load_adapter(str(folder), "default", is_trainable=True)
        else:
            load_condensed_weights(self._inside, folder)
        if getattr(self._inside, "is_quantized", False):  # as TRL rounds trained weights beside quantised ones
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "lora_magnitude_vector" not in name:
                    parameter.data = parameter.data.bfloat16().float()

    @property
    def _inside(self) -> Any:
        """The condensed model, without a PEFT wrapper."""
        return unwrap_peft_model(self.model)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._checkpoints_are_plain():
            load_condensed_weights(self._inside, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self._checkpoints_are_plain():
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    def _checkpoints_are_plain(self) -> bool:
        """Return whether checkpoints are those of `save_pretrained`, not adapters or shards of FSDP or DeepSpeed."""
        return not (is_peft_model(self.model) or self.is_fsdp_enabled or self.is_deepspeed_enabled)


def fill_up(dataset: Any, multiple: int) -> Any:
    """Pad a prepared dataset with rows without labels, to a multiple of the rows per step.

    With several processes, the last step would otherwise use some rows twice, with another result than with one
    process. A dataset without a length, or None, is returned unchanged.
    """
    if not isinstance(dataset, Dataset) or len(dataset) % multiple == 0:
        return dataset
    blank = {"input_ids": dataset[0]["input_ids"][:1], "labels": [-100], "seq_lengths": [1]}
    row = {name: blank.get(name) for name in dataset.column_names}
    rows = Dataset.from_list([row] * (-len(dataset) % multiple), features=dataset.features)
    return concatenate_datasets([dataset, rows])


@contextmanager
def _trainable_although_quantised(model: Any, has_adapters: bool) -> Iterator[None]:
    """Make `Trainer` accept a quantised model without adapters, after `unfreeze_condensed` found weights to train."""
    hides = getattr(model, "is_quantized", False) and not has_adapters
    if hides:
        model.is_quantized = False
    try:
        yield
    finally:
        if hides:
            model.is_quantized = True
