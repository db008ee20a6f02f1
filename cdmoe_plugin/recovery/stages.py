"""The stages of recovery. A stage is one run of one trainer in one folder, complete once it has a summary."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import AutoModelForCausalLM
from transformers.trainer_utils import sort_checkpoints
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, logging

from ..atomic import STAGING, read_json, replacing_files, write_json
from ..cards.card import is_someones_card
from ..loading.processing import save_processing
from .trainer import CondensedSFTTrainer
from .weights import load_condensed_weights

logger = logging.get_logger(__name__)

IDENTITY_FILE = "recipe.json"
SUMMARY_FILE = "summary.json"
# The files of a run that failed before it produced anything.
_BEGINNING = re.compile(rf"\.?{re.escape(IDENTITY_FILE)}.*|{STAGING.pattern}")
# A resumed run may end with an adapter instead of merged weights, or the other way round.
_EARLIER_END = re.compile(r".*\.safetensors(\.index\.json)?|(adapter_)?config\.json")


@dataclass(frozen=True)
class StageSummary:
    """The result of a stage."""

    stage: str  # "lm" or "sft"
    held_out_before: float  # mean loss per token of the held-out rows before training, in nats
    held_out_after: float
    tokens: int  # seen in training, without padding, over all processes
    trained: int  # number of trained parameters
    parameters: int
    dropped_rows: int  # training rows that were dropped for their length

    def __str__(self) -> str:
        dropped = f", {self.dropped_rows:,} rows dropped for their length" if self.dropped_rows else ""
        return (
            f"{self.stage}: held-out loss {self.held_out_before:.4f} -> {self.held_out_after:.4f}, "
            f"{self.tokens:,} tokens seen, {self.trained:,} of {self.parameters:,} parameters trained{dropped}"
        )


def claim_output_dir(output_dir: Path, identity: dict[str, Any], resume: bool) -> None:
    """Create the folder of a run, or check that it belongs to the run that is resumed. All processes call this.

    Args:
        output_dir (`Path`): The folder.
        identity (`dict`): Settings that must not change when a run is resumed.
        resume (`bool`): Whether a run may be resumed.

    Raises:
        ValueError: if the folder has anything else in it.
    """
    state = PartialState()
    if state.is_main_process:
        file = output_dir / IDENTITY_FILE
        begun = output_dir.is_file() or any(not _BEGINNING.fullmatch(path.name) for path in output_dir.glob("*"))
        if begun and not resume:
            raise ValueError(
                f"`--output_dir` {output_dir} is not an empty folder: choose another, or resume the run in it with "
                "`--resume_from_checkpoint true`."
            )
        identity = json.loads(json.dumps(identity))
        before = read_json(file) if begun and file.is_file() else {}
        changed = [name for name, value in identity.items() if name not in before or before[name] != value]
        if begun and changed:
            listed = "; ".join(f"{name} was {before.get(name)!r} and is {identity[name]!r}" for name in changed)
            raise ValueError(f"`--output_dir` {output_dir} holds another run: {listed}.")
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(file, identity)
    state.wait_for_everyone()


def find_progress(
    output_dir: Path, stages: Sequence[str], resume: str | bool | None
) -> tuple[list[StageSummary], Path | None]:
    """Read the summaries of the complete stages, and find the checkpoint from which the next stage resumes, if any.

    Args:
        output_dir (`Path`): The run's folder.
        stages (`Sequence[str]`): Names of all stages, in their order.
        resume (`str` or `bool`, *optional*): "true" or None for the last complete checkpoint, or the path of one.

    Raises:
        ValueError: if the path is not a complete checkpoint of this run, or if there are results of later training.
    """
    folders = [output_dir.resolve() / stage for stage in stages]
    made = [Path(name) for folder in folders for name in (*sort_checkpoints(str(folder)), str(folder / SUMMARY_FILE))]
    made = [path for path in made if path.exists()]
    complete = takewhile(Path.is_file, (folder / SUMMARY_FILE for folder in folders))
    done = [StageSummary(**read_json(file)) for file in complete]
    here = [path for path in made if path.parent in folders[len(done) : len(done) + 1]]
    if not resume or str(resume).lower() == "true":  # in a YAML file, `true` is not a string
        for path in reversed(here):
            if _is_complete(path):
                return done, path
            logger.warning(f"The checkpoint {path} is incomplete and is not used.")
        return done, None
    path = Path(str(resume)).resolve()
    if path not in made or not _is_complete(path):
        raise ValueError(
            f"`--resume_from_checkpoint` {resume} should be `true`, or a complete checkpoint "
            f"{output_dir}/<{' or '.join(stages)}>/checkpoint-<step>."
        )
    later = made[made.index(path) + 1 :]
    if later or path not in here:
        raise ValueError(
            f"`--resume_from_checkpoint` {resume} is not where this run stopped. To go back to it, remove the results "
            f"trained later: {', '.join(map(str, later))}."
        )
    return done, path


def _is_complete(checkpoint: Path) -> bool:
    """Return whether a checkpoint was written completely and with the optimiser.

    `Trainer` writes trainer_state.json last. With `--save_only_model`, there are no random states and no optimiser.
    """
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return any(checkpoint.glob("rng_state*.pth"))


def run_stage(
    stage: str, trainer: CondensedSFTTrainer, previous: Path | None = None, checkpoint: Path | None = None
) -> StageSummary:
    """Train, and write weights, logs and, last, a summary to the trainer's `output_dir`.

    Args:
        stage (`str`): Name of the stage.
        trainer (`CondensedSFTTrainer`): A trainer with an `eval_dataset` and `eval_on_start=True`.
        previous (`Path`, *optional*): Folder of the previous stage, whose result is the start of this one.
        checkpoint (`Path`, *optional*): Checkpoint of this stage to resume from.

    Raises:
        ValueError: if the held-out loss is not finite.
    """
    folder = Path(str(trainer.args.output_dir))
    if previous is not None:
        trainer.load_result(previous)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.evaluate()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    if not math.isfinite(losses[0] + losses[-1]):
        raise ValueError(
            f"The held-out loss of {stage} should be finite, but is {losses[0]} before and {losses[-1]} after "
            f"training. Lower `--{stage}_learning_rate`, or choose another `--dtype`."
        )
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
    trainer.accelerator.free_memory()
    return summary


def finish(start: str | Path, output_dir: Path, done: Sequence[StageSummary], merge: bool, **model_kwargs: Any) -> None:
    """Write the recovered checkpoint: `start` with the condensed layers of the last stage.

    All other weights, the config and the dtype are those of `start`, even if it was quantised for training.

    Args:
        start (`str` or `Path`): The condensed checkpoint at the start of the first stage.
        output_dir (`Path`): The output folder, with the stages' folders in it.
        done (`Sequence[StageSummary]`): The stages' results, for the config and the model card.
        merge (`bool`): Whether an adapter is merged into the weights, or kept as an adapter of `start`.
        **model_kwargs: `revision`, `trust_remote_code` and the like.
    """
    last = output_dir / done[-1].stage
    has_adapter = (last / ADAPTER_CONFIG_NAME).is_file()
    with replacing_files(output_dir, _EARLIER_END, keep=is_someones_card) as folder:
        if has_adapter and not merge:
            for name in (ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME):
                shutil.copyfile(last / name, folder / name)
        else:
            model: Any = AutoModelForCausalLM.from_pretrained(start, dtype="auto", **model_kwargs)
            if has_adapter:
                from peft import PeftModel

                model = PeftModel.from_pretrained(model, last).merge_and_unload()
            else:
                load_condensed_weights(model, last)
            earlier = model.config.condense_config.get("recovery") or []
            model.config.condense_config["recovery"] = [*earlier, *map(asdict, done)]
            model.save_pretrained(folder)
        save_processing(start, folder, **model_kwargs)
