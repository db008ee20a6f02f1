"""The folder of a recovery run: whose it is, what it begins with, and where an interrupted run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..atomic import STAGING, replacing_files
from .stages import TRAINER_STATE_FILE, StageSummary, unfinished, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.get_logger(__name__)

IDENTITY_FILE = "recipe.json"
START_FOLDER = "condensed"
_OF_A_BEGINNING = (IDENTITY_FILE, unfinished(Path(IDENTITY_FILE)).name)


@dataclass(frozen=True)
class Progress:
    """What is there of a run: summaries of its complete stages, and the checkpoint at which the next one goes on."""

    done: list[StageSummary]
    checkpoint: Path | None


def claim_output_dir(output_dir: Path, identity: dict[str, Any], resume: bool) -> None:
    """Makes a folder a run's own: a new or empty one, or the one that is resumed. All processes call it.

    Args:
        output_dir (`Path`): The folder.
        identity (`dict`): What the run that goes on must have in common with the one that was interrupted.
        resume (`bool`): Whether there should be something to go on with.

    Raises:
        ValueError: if the folder holds anything else.
    """
    state = PartialState()
    if state.is_main_process:
        file = output_dir / IDENTITY_FILE
        identity = json.loads(json.dumps(identity))
        # A run that failed before it made anything leaves no more than its identity.
        begun = output_dir.exists() and (
            not output_dir.is_dir() or any(not _is_of_a_beginning(p.name) for p in output_dir.iterdir())
        )
        if begun and not resume:
            raise ValueError(
                f"`--output_dir` {output_dir} is not an empty folder: choose another, or go on with the run in it by "
                "`--resume_from_checkpoint true`."
            )
        if begun:
            before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            changed = [
                f"{name} was {before.get(name)!r} and is {value!r}"
                for name, value in identity.items()
                if name not in before or before[name] != value
            ]
            if changed:
                raise ValueError(f"`--output_dir` {output_dir} holds another run: {'; '.join(changed)}.")
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(file, identity)
    state.wait_for_everyone()


def _is_of_a_beginning(name: str) -> bool:
    return name in _OF_A_BEGINNING or STAGING.fullmatch(name) is not None


def find_progress(output_dir: Path, stages: Sequence[str], resume: str | bool | None) -> Progress:
    """Where a run goes on.

    Args:
        output_dir (`Path`): The run's folder.
        stages (`Sequence[str]`): Names of all stages, in their order.
        resume (`str` or `bool`, *optional*): None begins, "true" goes on at the last checkpoint, and a path at that
            one.

    Raises:
        ValueError: if the path is not a whole checkpoint of this run, or if what was trained after it is still there.
    """
    done = []
    for stage in stages:
        summary = StageSummary.load(output_dir / stage)
        if summary is None:
            break
        done.append(summary)
    if not resume or str(resume).lower() == "true":  # in a YAML file, `true` is no string
        checkpoint = last_checkpoint(output_dir / stages[len(done)]) if len(done) < len(stages) else None
        return Progress(done, checkpoint)
    path = Path(str(resume)).resolve()
    if path.parent.parent != output_dir.resolve() or path.parent.name not in stages or not _is_whole(path):
        raise ValueError(
            f"`--resume_from_checkpoint` {resume} should be `true`, or a whole checkpoint "
            f"{output_dir}/<{' or '.join(stages)}>/{PREFIX_CHECKPOINT_DIR}-<step>."
        )
    index = list(stages).index(path.parent.name)
    later = [p for p in _checkpoints(path.parent) if _step(p) > _step(path)]
    later += [output_dir / stage for stage in stages[index + 1 :] if (output_dir / stage).exists()]
    later += [p for p in [path.parent / "summary.json"] if p.exists()]
    if later or len(done) < index:
        raise ValueError(
            f"`--resume_from_checkpoint` {resume} is not where this run stopped. To go back to it, remove what was "
            f"trained later: {', '.join(map(str, later))}."
        )
    return Progress(done[:index], path)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a stage that was written to its end; None where there is none."""
    for path in sorted(_checkpoints(folder), key=_step, reverse=True):
        if _is_whole(path):
            return path
        logger.warning(f"The checkpoint {path} is not whole and is not used.")
    return None


def _checkpoints(folder: Path) -> list[Path]:
    return [p for p in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if p.name.rpartition("-")[2].isdigit()]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _is_whole(checkpoint: Path) -> bool:
    """`Trainer` writes a checkpoint's trainer_state.json last, so one without was interrupted.

    With `--save_only_model`, there is no random state, and neither are the optimiser and the learning rate.
    """
    try:
        json.loads((checkpoint / TRAINER_STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return any(checkpoint.glob("rng_state*.pth"))


def condense_once(
    output_dir: Path, make: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]], together: bool = False
) -> Path:
    """The condensed checkpoint that a run on a base model begins with; it is made once, and one process writes it.

    Args:
        output_dir (`Path`): The run's folder.
        make (`Callable`): Gives the condensed model and its tokenizer.
        together (`bool`, defaults to `False`): Whether all processes call `make`, or the main one alone.
    """
    folder = (output_dir / START_FOLDER).absolute()
    state = PartialState()
    is_there = broadcast_object_list([folder.exists()])[0]
    if not is_there and (together or state.is_main_process):
        model, tokenizer = make()
        if state.is_main_process:
            with replacing_files(folder) as part:
                model.save_pretrained(part)
                tokenizer.save_pretrained(part)
    state.wait_for_everyone()
    return folder
