"""The model of `lm_eval --model cdmoe`: condensed checkpoints, and base models condensed by a plan.

Evaluation itself is that of lm-eval's `hf` model. This class loads the weights, shares work among processes where `hf`
repeats it, and adds speed and memory to the results.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from inspect import signature
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, PreTrainedModel

from cdmoe_plugin_lm_eval import register

from ..api import condense_pretrained
from ..cards.tables import format_table
from ..loading.adapter_weights import plan_or_adapter
from ..loading.load import hub_kwargs
from ..model.registration import is_ours
from ..plan import CondensePlan
from ..sizes import format_bytes
from ..tokenizing import required_tokenizer
from .lm_eval_arguments import check_with_plan, explain_unexpected, pop_quantisation, read_plan
from .measure import generation_speed, peak_memory, reset_peak_memory, weight_bytes

# A logger below lm-eval's, which shows it on the command line.
logger = logging.getLogger("lm_eval.models.cdmoe")


# Without lm-eval's `@register_model`: the entry point or the bridge registers this class, and the decorator would
# conflict with either.
class CDMoELM(HFLM):
    """The `hf` model of lm-eval for condensed models.

    Args:
        pretrained (`str`, `os.PathLike` or `PreTrainedModel`): A condensed checkpoint, or a sparse base model.
        plan (`str`, `os.PathLike` or `CondensePlan`, *optional*): A condense_plan.json, or the folder of a condensed
            checkpoint or a condense adapter. `pretrained` is then a sparse base model, which is condensed while it is
            read; an adapter also brings its weights.
        num_layers (`int`, *optional*): Condense only the plan's first layers.
        num_experts (`int`, *optional*): Keep only the plan's first experts of each layer.
        **kwargs: The arguments of `hf` (`dtype`, `peft`, `parallelize`, `batch_size`, ...), of `from_pretrained`, and
            `quantization_config`. With a plan and quantisation, the condensed model is first saved to a temporary
            folder (see `TMPDIR`), which takes as much disk space as its weights before quantisation.

    Raises:
        ValueError: naming the argument that is wrong or unknown, before weights are read.
        FileNotFoundError: if there is no plan at that path.
    """

    AUTO_MODEL_CLASS: Any = None

    def __init__(
        self,
        pretrained: str | os.PathLike | PreTrainedModel,
        plan: str | os.PathLike | CondensePlan | None = None,
        num_layers: int | None = None,
        num_experts: int | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(pretrained, os.PathLike):
            pretrained = os.fspath(pretrained)
        self._plan = read_plan(plan, num_layers, num_experts)
        if self._plan is not None:
            check_with_plan(pretrained, kwargs)
        self._source = plan_or_adapter(plan, self._plan)
        self._quantisation = pop_quantisation(kwargs)
        if self._quantisation is not None and not isinstance(pretrained, str):
            raise ValueError(
                f"`pretrained` is a loaded {type(pretrained).__name__}, which can't be quantised any more."
            )
        # The default of lm-eval's command line: the first GPU, or the CPU without one. `hf` in a script requires a GPU.
        kwargs.setdefault("device", "cuda:0")
        super().__init__(pretrained, **kwargs)
        if isinstance(pretrained, str):
            self._share_work()
        reset_peak_memory(self.model)
        if kwargs.get("tp_plan") is not None:
            # Now, as all processes must take part: `get_model_info` is called in one of them only.
            _ = self._speed

    def _get_config(self, pretrained: str, **kwargs: Any) -> None:
        super()._get_config(pretrained, **kwargs)
        condensed = getattr(self._config, "condense_config", None)
        if self._plan is not None and condensed:
            base = condensed.get("base_model") or "which its config does not name"
            raise ValueError(
                f"`pretrained={pretrained}` is condensed already (decoder layers {_layers(condensed)}): leave `plan` "
                f"out, or set `pretrained` to the sparse base model ({base})."
            )

    def _get_backend(self, config: Any, backend: Any = "default", trust_remote_code: bool | None = False) -> None:
        if backend == "default" and is_ours(config.model_type):
            backend = "causal"  # lm-eval uses a fixed table of transformers, and warns
        super()._get_backend(config, backend=backend, trust_remote_code=trust_remote_code)

    def _create_tokenizer(self, pretrained: Any, tokenizer: Any, *args: Any, **kwargs: Any) -> None:
        if tokenizer is None and isinstance(pretrained, str):
            places = ("revision", "trust_remote_code", "subfolder")
            required_tokenizer(pretrained, **{name: kwargs[name] for name in places if kwargs.get(name) is not None})
        super()._create_tokenizer(pretrained, tokenizer, *args, **kwargs)

    def _create_model(
        self, pretrained: str, quantization_config: Any = None, peft: str | None = None, **kwargs: Any
    ) -> None:
        auto_class = self.AUTO_MODEL_CLASS
        # `hf` cuts the embeddings to the length of the tokenizer before it loads any adapter, which changes all logits.
        condense_adapter = peft if peft and _adapter_type(peft) == "CDMOE" else None
        kwargs["peft"] = None if condense_adapter else peft
        if self._plan is not None:
            self.AUTO_MODEL_CLASS = _CondensingAutoClass(self._source)
        own = {name: value for name, value in kwargs.items() if name not in signature(HFLM._create_model).parameters}
        try:
            super()._create_model(pretrained, quantization_config=self._quantisation or quantization_config, **kwargs)
        except TypeError as error:
            names = {*signature(HFLM).parameters, "plan", "num_layers", "num_experts", "quantization_config"}
            explained = explain_unexpected(error, own, names)
            if explained is None:
                raise
            raise explained from error
        finally:
            self.AUTO_MODEL_CLASS = auto_class
        if condense_adapter is not None:
            from peft import PeftModel  # an optional dependency

            self._model: Any = PeftModel.from_pretrained(self._model, condense_adapter)
        self._config = self._model.config

    def _share_work(self) -> None:
        """Give every process its part of the samples: with fewer than two GPUs, `hf` gives all of them to each."""
        if self.world_size == 1 and hasattr(self, "accelerator"):
            self._rank = self.accelerator.process_index
            self._world_size = self.accelerator.num_processes

    def get_model_info(self) -> dict[str, Any]:
        """Return the entries for `config` in lm-eval's results, including size, memory and speed.

        lm-eval calls this once, after all tasks, in the main process. Memory and speed are those of this process; with
        several processes, each of the others has a copy of the model.
        """
        peak, peak_of = peak_memory(self.model)
        condensed = getattr(self.model.config, "condense_config", None)
        adapter: Any = getattr(self.model, "active_peft_config", None)
        if getattr(adapter, "peft_type", None) == "CDMOE":
            condensed = {"condensed_layers": adapter.layers}
        info = {
            **super().get_model_info(),
            "condensed_layers": _layers(condensed) if condensed else [],
            "model_weight_bytes": weight_bytes(self.model),
            "peak_memory_bytes": peak,
            "peak_memory_of": peak_of,
            "generation": self._speed,
        }
        logger.info("Size, memory and speed:\n%s", _table(info))
        return info

    @cached_property
    def _speed(self) -> dict[str, Any]:
        try:
            with torch.autocast(
                device_type=self.device.type,
                dtype=self.mixed_precision_dtype,
                enabled=self.mixed_precision_dtype is not None,
            ):
                embeddings = self.model.get_input_embeddings().weight.shape[0]
                return generation_speed(
                    self.model,
                    self.device,
                    vocabulary_size=min(len(self.tokenizer), embeddings),
                    max_length=self.max_length,
                    avoid=self.tokenizer.all_special_ids,
                )
        except Exception as error:
            # Any error, even out of memory: lm-eval writes its results only after this, maybe after hours of
            # evaluation. The traceback is logged, and the results name the error.
            logger.warning("The speed of generation could not be measured: %r", error, exc_info=True)
            return {"tokens_per_second": None, "error": repr(error)}


class _CondensingAutoClass:
    """A replacement for `AutoModelForCausalLM` in `hf` that condenses models by a plan."""

    def __init__(self, plan: Any) -> None:
        self.plan = plan  # or the folder of a condense adapter

    def from_pretrained(self, path: str, quantization_config: Any = None, **kwargs: Any) -> PreTrainedModel:
        if quantization_config is None:
            return condense_pretrained(path, plan=self.plan, **kwargs)
        # Quantised weights can't be folded, and folded weights in memory can't be quantised.
        with _condensed_checkpoint(path, self.plan, kwargs) as folder:
            elsewhere = {name: kwargs[name] for name in kwargs if name not in hub_kwargs(kwargs)}
            trust = {"trust_remote_code": kwargs.get("trust_remote_code")}
            model = AutoModelForCausalLM.from_pretrained(
                folder, quantization_config=quantization_config, **trust, **elsewhere
            )
        model.config._name_or_path = model.name_or_path = path
        return model


@contextmanager
def _condensed_checkpoint(path: str, plan: Any, model_kwargs: dict[str, Any]) -> Iterator[str]:
    """Write the condensed checkpoint to a temporary folder, one for all processes of a machine."""
    # Condensed on the CPU; loading the checkpoint places the model.
    placed = {"device_map": "cpu", "max_memory": None, "offload_folder": None}
    state = PartialState()
    with tempfile.TemporaryDirectory(prefix="cdmoe-", ignore_cleanup_errors=True) as folder:
        failure = None
        if state.is_local_main_process:
            try:
                condense_pretrained(path, plan=plan, **{**model_kwargs, **placed}).save_pretrained(folder)
            except Exception as error:
                if state.num_processes == 1:
                    raise
                failure = error
        # The other processes wait here, and must fail as well.
        results: list[tuple[str, str | None]] = gather_object([(folder, failure and repr(failure))])
        written, reason = results[state.process_index - state.local_process_index]
        if failure is not None:
            raise failure
        if reason is not None:
            raise RuntimeError(f"The main process could not condense {path!r}: {reason}")
        yield written
        state.wait_for_everyone()  # until all processes have read it


def _adapter_type(path: str) -> str:
    from peft import PeftConfig

    return str(PeftConfig._get_peft_type(path))


def _layers(condense_config: dict[str, Any]) -> list[int]:
    return sorted(map(int, condense_config["condensed_layers"]))


def _table(info: dict[str, Any]) -> str:
    speed, peak = info["generation"]["tokens_per_second"], info["peak_memory_bytes"]
    header = ["parameters", "weights", "peak memory", "tokens/s"]
    row = (
        f"{info['model_num_parameters']:,}",
        format_bytes(info["model_weight_bytes"]),
        "unknown" if peak is None else f"{format_bytes(peak)} ({info['peak_memory_of']})",
        "not measured" if speed is None else f"{speed:,.1f}",
    )
    return format_table(header, [row])


register()  # for `simple_evaluate(model="cdmoe")` if the .pth file was not read
