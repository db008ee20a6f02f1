"""One stage of recovery after the other: open, train, save, go on where an interrupted run stopped, and finish."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from ..atomic import replacing_files
from ..cards.card import is_someones_card
from ..model.lookup import condensed_layers
from .trainer import CondensedSFTTrainer
from .weights import condensed_parameters, load_condensed_weights

SUMMARY_FILE = "summary.json"
TRAINER_STATE_FILE = "trainer_state.json"
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# A run that goes on may end in another form than before.
_EARLIER_END = re.compile(r".*\.safetensors(\.index\.json)?|(adapter_)?config\.json")


@dataclass(frozen=True)
class StageSummary:
    """What a stage did.

    Args:
        stage (`str`): "lm" or "sft".
        held_out_before (`float`): Mean loss per token of the stage's held-out rows before training, in nats.
        held_out_after (`float`): The same after training.
        tokens (`int`): Tokens seen in training, without padding, over all processes.
        trained (`int`): Number of parameters that were trained.
        parameters (`int`): Number of parameters of the model.
        dropped_rows (`int`): Training rows that were dropped for their length.
    """

    stage: str
    held_out_before: float
    held_out_after: float
    tokens: int
    trained: int
    parameters: int
    dropped_rows: int

    def __str__(self) -> str:
        dropped = f", {self.dropped_rows:,} rows dropped for their length" if self.dropped_rows else ""
        return (
            f"{self.stage}: held-out loss {self.held_out_before:.4f} -> {self.held_out_after:.4f}, "
            f"{self.tokens:,} tokens seen, {self.trained:,} of {self.parameters:,} parameters trained{dropped}"
        )

    @classmethod
    def load(cls, folder: Path) -> StageSummary | None:
        """The summary of a stage that is complete; None of one that is not."""
        file = folder / SUMMARY_FILE
        return cls(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def run_stage(stage: str, trainer: CondensedSFTTrainer, checkpoint: Path | None = None) -> StageSummary:
    """Trains, and writes weights, logs and summary to the trainer's `output_dir`, the summary last.

    Args:
        stage (`str`): Its name.
        trainer (`CondensedSFTTrainer`): With `eval_dataset`, and `eval_on_start=True` among its arguments.
        checkpoint (`Path`, *optional*): Where to go on.
    """
    folder = Path(str(trainer.args.output_dir))
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.evaluate()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(folder))
    trainer.save_state()
    summary = StageSummary(
        stage=stage,
        held_out_before=losses[0],
        held_out_after=losses[-1],
        tokens=int(trainer.state.num_input_tokens_seen),
        trained=trainer.num_trained,
        parameters=trainer.num_parameters,
        dropped_rows=trainer.dropped_rows.get("train", 0),
    )
    if trainer.args.should_save:
        write_json(folder / SUMMARY_FILE, asdict(summary))
    trainer.accelerator.wait_for_everyone()
    return summary


def open_stage_model(
    start: str | os.PathLike, previous: Path | None, sharded: bool = False, **model_kwargs: Any
) -> Any:
    """A condensed checkpoint, with what an earlier stage of this run made of it.

    Args:
        start (`str` or `os.PathLike`): Hub name or folder of the condensed checkpoint.
        previous (`Path`, *optional*): Folder of the stage before: condensed layers' weights, or an adapter.
        sharded (`bool`, defaults to `False`): Whether FSDP or DeepSpeed will hold the weights; all keep one dtype then.
        **model_kwargs: Passed to `AutoModelForCausalLM.from_pretrained`.

    Raises:
        ValueError: if the checkpoint is not condensed, or if the weights of the earlier stage do not fit.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(start, **model_kwargs)
    condensed_layers(model)
    if previous is None:
        return model
    if (previous / _ADAPTER_FILES[0]).is_file():
        from peft import PeftModel

        return PeftModel.from_pretrained(model, previous, is_trainable=True)
    if not sharded:  # the stage before trained in float32; so does the next
        for parameter in condensed_parameters(model).values():
            parameter.data = parameter.data.float()
    load_condensed_weights(model, previous)
    return model


def finish(
    start: str | os.PathLike,
    output_dir: Path,
    summaries: Sequence[StageSummary],
    merge: bool = True,
    **model_kwargs: Any,
) -> None:
    """Writes the recovered checkpoint: `start` with what the last stage made of its condensed layers.

    All other weights, the config and the dtype are those of `start`, whatever they were trained around.

    Args:
        start (`str` or `os.PathLike`): The condensed checkpoint that the first stage began with.
        output_dir (`Path`): Where to write to; the stages' folders are in it.
        summaries (`Sequence[StageSummary]`): What each stage did; the config and the model card tell of it.
        merge (`bool`, defaults to `True`): Whether an adapter is merged into the weights, or kept as an adapter of
            `start`.
        **model_kwargs: `revision`, `trust_remote_code` and the like.
    """
    last = output_dir / summaries[-1].stage
    with replacing_files(output_dir, _EARLIER_END, keep=is_someones_card) as folder:
        if (last / _ADAPTER_FILES[0]).is_file() and not merge:
            for name in _ADAPTER_FILES:
                shutil.copyfile(last / name, folder / name)
        else:
            model: Any = AutoModelForCausalLM.from_pretrained(start, dtype="auto", **model_kwargs)
            if (last / _ADAPTER_FILES[0]).is_file():
                from peft import PeftModel

                model = PeftModel.from_pretrained(model, last).merge_and_unload()
            else:
                load_condensed_weights(model, last)
            earlier = model.config.condense_config.get("recovery") or []
            model.config.condense_config["recovery"] = [*earlier, *(asdict(summary) for summary in summaries)]
            model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(start, **model_kwargs).save_pretrained(folder)


def write_json(path: Path, content: Any) -> None:
    """Writes a file that is there whole or not at all."""
    part = unfinished(path)
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    part.replace(path)


def unfinished(path: Path) -> Path:
    """Where something is written before it gets its name."""
    return path.with_name(f".{path.name}.unfinished")
