"""TRL's SFTTrainer for a condensed model: only the condensed layers learn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedModel
from transformers.trainer_utils import unwrap_peft_model
from transformers.utils import logging
from trl import SFTTrainer

from ..model.training import condensed_module_names, unfreeze_condensed
from .distillation import Distillation
from .weights import load_condensed_weights

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

logger = logging.get_logger(__name__)


class CondensedSFTTrainer(SFTTrainer):
    """`trl.SFTTrainer` that trains the condensed layers of a model, or LoRA on them, and nothing else.

    Besides, it keeps what is trained in float32 (half precision would round most of a small update away), counts the
    rows that TRL drops for their length, weighs every held-out token alike, gives the same result for any number of
    processes with the same rows per step, and resumes from a checkpoint by reading the condensed layers' weights alone:
    the rest never changes.

    Args:
        model (`PreTrainedModel` or `PeftModel`): A condensed model. Of a quantised one, the condensed layers must not
            be quantised (see `quantised_around_condensed`), unless LoRA is put on them.
        *args: As for `trl.SFTTrainer`.
        **kwargs: As for `trl.SFTTrainer`.
        peft_config (`PeftConfig`, *optional*): LoRA or the like; without `target_modules`, it goes on the condensed
            layers' projections.
        distillation (`Distillation`, *optional*): The sparse model as teacher.

    Raises:
        ValueError: if the model is not condensed, or if there is nothing to train.
    """

    _tag_names = ["trl", "sft", "cdmoe"]

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        *args: Any,
        peft_config: PeftConfig | None = None,
        distillation: Distillation | None = None,
        **kwargs: Any,
    ) -> None:
        condensed: Any = unwrap_peft_model(model)
        has_adapters = peft_config is not None or is_peft_model(model)
        self.distillation = distillation
        self.dropped_rows: dict[str, int] = {}
        self._held_out_sum = [0.0, 0.0]
        kwargs["peft_config"] = peft_config
        if peft_config is not None and getattr(peft_config, "target_modules", None) is None:
            peft_config.target_modules = condensed_module_names(condensed)  # type: ignore[attr-defined]
        if not has_adapters:
            unfreeze_condensed(condensed)
        with _trainable_although_quantised(model, has_adapters):
            super().__init__(model, *args, **kwargs)
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
        """TRL's loss and, in training, the share of distillation."""
        if self.distillation is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        with self.distillation.watching() as seen:
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        with self.accelerator.autocast():
            rest = {name: value for name, value in inputs.items() if name != "labels"}
            distance = self.distillation.loss(seen, rest, labels)
        # Normalised as TRL normalises its own: by the tokens of all processes and accumulation steps, where known.
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
        """Prepare data as TRL does, and count the rows that it drops: nothing to learn is left in `max_length`."""
        rest = (formatting_func, dataset_name)
        self.dropped_rows[dataset_name] = 0
        # Packing by "bfd" cuts rows at `max_length` as well, but keeps those with nothing left to learn: they are
        # dropped before. Other strategies neither cut nor drop.
        if packing and args.packing_strategy != "bfd":
            return super()._prepare_dataset(dataset, processing_class, args, packing, *rest)
        before = len(dataset) if hasattr(dataset, "__len__") else None
        dataset = super()._prepare_dataset(dataset, processing_class, args, False, *rest)
        dropped = 0 if before is None else before - len(dataset)
        if dropped:
            self.dropped_rows[dataset_name] = dropped
            logger.warning(
                f"{dropped} of {before} rows of the {dataset_name} data are dropped: nothing to learn is left in "
                f"their first {args.max_length} tokens. A larger `max_length` keeps them."
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
        """Evaluate as `Trainer` does, but with the loss's mean over tokens, not over batches of unequal size."""
        self._held_out_sum = [0.0, 0.0]
        output = super().evaluation_loop(*args, **kwargs)
        total, tokens = self._held_out_sum
        if tokens and output.metrics is not None:
            output.metrics[f"{kwargs.get('metric_key_prefix', 'eval')}_loss"] = total / tokens
        return output

    def load_result(self, folder: Path) -> None:
        """Begin with the weights or the adapter that another stage of training saved."""
        model: Any = self.model
        if is_peft_model(model):
            model.load_adapter(str(folder), "default", is_trainable=True)
        else:
            load_condensed_weights(self._inside, folder)
        if getattr(self._inside, "is_quantized", False):  # as TRL rounds what is trained around quantised weights
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "lora_magnitude_vector" not in name:
                    parameter.data = parameter.data.bfloat16().float()

    @property
    def _inside(self) -> Any:
        """The condensed model itself, of one that PEFT may have wrapped."""
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
        """Whether checkpoints are those of `save_pretrained`: no adapters, not sharded by FSDP or DeepSpeed."""
        return not (is_peft_model(self.model) or self.is_fsdp_enabled or self.is_deepspeed_enabled)


def fill_up(dataset: Any, multiple: int) -> Any:
    """Add rows without labels to a prepared dataset, so that its length is a multiple of the rows per step.

    The last step would otherwise see some rows twice if there are several processes, and so give another result than
    one process does. A dataset without a length, or None, is returned as it is.
    """
    if not isinstance(dataset, Dataset) or len(dataset) % multiple == 0:
        return dataset
    blank = {"input_ids": dataset[0]["input_ids"][:1], "labels": [-100], "seq_lengths": [1]}
    row = {name: blank.get(name) for name in dataset.column_names}
    rows = Dataset.from_list([row] * (-len(dataset) % multiple), features=dataset.features)
    return concatenate_datasets([dataset, rows])


@contextmanager
def _trainable_although_quantised(model: Any, has_adapters: bool) -> Iterator[None]:
    """Let `Trainer` accept a quantised model without adapters: `unfreeze_condensed` found weights to train in it."""
    hides = getattr(model, "is_quantized", False) and not has_adapters
    if hides:
        model.is_quantized = False
    try:
        yield
    finally:
        if hides:
            model.is_quantized = True
