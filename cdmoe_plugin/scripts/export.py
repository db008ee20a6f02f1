"""`cdmoe export`: write a condensed model as a checkpoint for readers that do not know condensed models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic import replacing_files
from ..config import CondenseConfig, condense_arguments
from ..registry import EXPORT_TARGETS, ExportTarget
from .arguments import READING
from .folders import check_output
from .parsing import Parser, given_fields, help_field

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXAMPLE = """
export qwen3-cd9 --output_dir qwen3-cd9-stock
export qwen-cd9 --output_dir qwen-cd9-stock --approximate --calibration my_texts.jsonl
"""


@dataclass
class ExportArguments:
    """The options of `cdmoe export`."""

    model_name_or_path: str = help_field(
        "Hub name or folder of the condensed checkpoint; may also be the first argument, without a name.", MISSING
    )
    output_dir: str | None = help_field("Folder for the exported checkpoint; new or empty.")
    to: str = help_field(f"Kind of checkpoint: {EXPORT_TARGETS.summary()}.", EXPORT_TARGETS.first)
    approximate: bool = help_field(
        "Replace shared experts' gates per token, which dense layers do not have, by their means over the calibration "
        "tokens. What this costs is measured.",
        False,
    )
    calibration: str | None = help_field(
        "Hub dataset (name:config@split), local file or folder, as for `cdmoe condense`; C4 if unset."
    )
    dtype: str = help_field("Dtype to load the model in; auto is the checkpoint's own.", "auto")
    max_shard_size: str = help_field("Size of the saved checkpoint's files, at most.", "5GB")
    revision: str = help_field("Revision of the checkpoint on the hub.", "main")


GROUPS = {
    "model": ("model_name_or_path", "revision", "dtype"),
    "output": ("output_dir", "to", "approximate", "max_shard_size"),
    "calibration data, with --approximate": ("calibration", *READING),
}


def make_parser() -> Parser:
    """Return the parser of `cdmoe export`."""
    return Parser(
        (ExportArguments, condense_arguments(names=READING)),
        GROUPS,
        command="export",
        description="Write a condensed model as a checkpoint that opens without this package.",
        example=EXAMPLE,
    )


def main(arguments: Sequence[str]) -> None:
    """Run `cdmoe export` with the arguments of its command line."""
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--model_name_or_path", *arguments]
    args, reading = make_parser().parse_args_and_config(arguments)
    run(args, given_fields(reading))


def run(args: ExportArguments, given: dict[str, Any]) -> None:
    """Export a model.

    Args:
        args (`ExportArguments`): The options.
        given (`dict[str, Any]`): The fields of `CondenseConfig` that were set.

    Raises:
        UnsupportedModelError: if the model can't be exported.
        ValueError: naming the option, what was found and what to do.
    """
    from transformers import AutoModelForCausalLM

    from ..model.modeling_cdmoe import CondensedModelMixin

    target = EXPORT_TARGETS.lookup(args.to)
    output_dir = check_output(args.output_dir)
    if not args.approximate and (given or args.calibration):
        raise ValueError(f"Without `--approximate`, {sorted(given) or ['calibration']} would do nothing.")
    name, revision = args.model_name_or_path, args.revision
    model = AutoModelForCausalLM.from_pretrained(name, dtype=args.dtype, device_map="cpu", revision=revision)
    if not isinstance(model, CondensedModelMixin):
        raise ValueError(f"{name} is not condensed: make a condensed checkpoint first, by `cdmoe condense`.")
    export(
        model,
        output_dir,
        name,
        args.approximate,
        target,
        revision=revision,
        config=CondenseConfig(**given),
        calibration=args.calibration,
        max_shard_size=args.max_shard_size,
    )


def export(
    model: PreTrainedModel,
    folder: Path,
    condensed: str | Path,
    approximate: bool,
    target: ExportTarget | None = None,
    revision: str = "main",
    **options: Any,
) -> None:
    """Write an exported checkpoint with the tokenizer of the condensed one, and print its size.

    Args:
        model (`PreTrainedModel`): The condensed model.
        folder (`Path`): Folder to write to.
        condensed (`str` or `Path`): The condensed checkpoint.
        approximate (`bool`): As in `export_stock`.
        target (`ExportTarget`, *optional*): The kind of checkpoint; "stock" by default.
        revision (`str`, defaults to `"main"`): Revision of the condensed checkpoint.
        **options: Further arguments of `export_stock`.
    """
    from ..cards.card import is_someones_card
    from ..loading.processing import save_processing

    target = target or EXPORT_TARGETS["stock"]
    with replacing_files(folder, keep=is_someones_card) as staging:
        written = target.write(model, staging, approximate, **options)
        save_processing(condensed, staging, revision=revision)
    print(f"Exported to {folder} as {written.model_type}: {written.parameters:,} parameters.")
