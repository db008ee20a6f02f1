"""`cdmoe condense`: condense a sparse model and save it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic import replacing_files
from ..config import CondenseConfig, condense_arguments
from .arguments import GROUPS, CondenseArguments
from .estimate import print_estimate, requested
from .export import export
from .folders import check_output, has_tokenizer
from .parsing import Parser, given_fields

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from ..plan import CondensePlan

EXAMPLE = """
condense --config deepseek-moe-16b --output_dir deepseek-moe-cd9
condense --model_name_or_path deepseek-ai/deepseek-moe-16b-base --plan deepseek-moe-cd9 --num_layers 6 --output_dir cd6
"""


def make_parser() -> Parser:
    """Return the parser of `cdmoe condense`."""
    return Parser(
        (CondenseArguments, condense_arguments()),
        GROUPS,
        command="condense",
        description="Condense a sparse Mixture-of-Experts model, by a search or by a plan, and save it.",
        example=EXAMPLE,
    )


def main(arguments: Sequence[str]) -> None:
    """Run `cdmoe condense` with the arguments of its command line."""
    args, search = make_parser().parse_args_and_config(arguments)
    run(args, given_fields(search))


def check_export_folder(args: CondenseArguments) -> Path | None:
    """Return the folder for the stock checkpoint, if it was asked for."""
    if args.export_stock is None:
        return None
    path, other = check_output(args.export_stock, "export_stock"), Path(args.output_dir or "")
    if path.resolve().is_relative_to(other.resolve()) or other.resolve().is_relative_to(path.resolve()):
        raise ValueError(f"`--export_stock` {path} and `--output_dir` {other} should not lie in each other.")
    return path


def run(args: CondenseArguments, given: dict[str, Any]) -> None:
    """Condense a model and save it.

    Args:
        args (`CondenseArguments`): The options.
        given (`dict[str, Any]`): The fields of `CondenseConfig` that were set.

    Raises:
        ValueError: naming the option, what was found and what to do, before anything expensive.
        KeyboardInterrupt: saying what was kept.
    """
    from accelerate import Accelerator

    from ..export.check import check_export

    if args.export_approximate and args.export_stock is None:
        raise ValueError("`--export_approximate` does nothing without `--export_stock`.")
    plan, config = requested(args, given, args.calibration, args.export_approximate)
    if args.export_stock is not None:
        check_export(args.model_name_or_path, plan or config, args.export_approximate, **args.hub)
    if args.dry_run:
        print_estimate(args, plan or config)
        return
    output_dir, export_dir = check_output(args.output_dir), check_export_folder(args)
    accelerator = Accelerator()
    if plan is not None and accelerator.num_processes > 1:
        raise ValueError("With `--plan` there is no search to share: run one process, without `accelerate launch`.")
    try:
        model = condense(args, plan, config, accelerator)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(kept(args, plan)) from None
    if not accelerator.is_main_process:
        return
    save(model, output_dir, args)
    if export_dir is not None:
        export(
            in_one_place(model, output_dir),
            export_dir,
            output_dir,
            args.export_approximate,
            config=config,
            calibration=args.calibration,
            max_shard_size=args.max_shard_size or "5GB",
        )


def kept(args: CondenseArguments, plan: CondensePlan | None) -> str:
    """Return what an interrupted run leaves, and how to go on."""
    if plan is not None:
        return "Nothing was saved; run the same command again."
    if args.state_dir is None:
        return "Nothing was kept. With `--state_dir FOLDER`, an interrupted search goes on where it stopped."
    return f"The search's results so far are in {args.state_dir}; the same command goes on from there."


def condense(
    args: CondenseArguments, plan: CondensePlan | None, config: CondenseConfig, accelerator: Accelerator
) -> PreTrainedModel:
    """Search, or take the plan, and condense."""
    from ..api import condense_pretrained

    return condense_pretrained(
        args.model_name_or_path,
        config if plan is None or config.refit else None,
        plan=plan,
        calibration=args.calibration,
        state_dir=args.state_dir,
        accelerator=accelerator,
        dtype=args.dtype,
        **placement(args, accelerator),
        **args.hub,
    )


def save(model: Any, output_dir: Path, args: CondenseArguments) -> None:
    """Save the condensed model with its plan and the tokenizer, and print both."""
    from transformers import AutoTokenizer

    from ..cards.card import is_someones_card
    from ..cards.tables import plan_table

    with replacing_files(output_dir, keep=is_someones_card) as folder:  # all of it is there at once, or nothing
        # What is offloaded is read again for one file at a time.
        model.save_pretrained(folder, max_shard_size=args.max_shard_size or ("1GB" if args.offload_folder else "5GB"))
        model.condense_plan.save(folder / "condense_plan.json")  # a model with fewer layers does not bring its own
        if has_tokenizer(args.model_name_or_path):
            AutoTokenizer.from_pretrained(args.model_name_or_path, **args.hub).save_pretrained(folder)
    print(plan_table(model.condense_plan))
    print(f"Saved to {output_dir}: {model.num_parameters():,} parameters.")


def in_one_place(model: Any, saved: Path) -> Any:
    """Return the model, or, if its weights are on several devices or on disk, its checkpoint opened on the CPU."""
    from transformers import AutoModelForCausalLM

    from ..model.modeling_cdmoe import CondensedModelMixin
    from ..offload import is_offloaded

    is_one = len({parameter.device for parameter in model.parameters()}) == 1 and not is_offloaded(model)
    if is_one or not isinstance(model, CondensedModelMixin):
        return model
    return AutoModelForCausalLM.from_pretrained(saved, device_map="cpu")


def placement(args: CondenseArguments, accelerator: Any) -> dict[str, Any]:
    """Return the arguments that tell `from_pretrained` where the weights go."""
    device_map: Any = args.device_map
    if device_map is None and accelerator.num_processes > 1:
        device_map = {"": accelerator.device}
    if args.offload_folder is None:
        return {"device_map": device_map or "auto"}
    # Every process writes files of its own.
    folder = Path(args.offload_folder) / f"process-{accelerator.process_index}"
    return {"offload_folder": str(folder), "device_map": args.device_map}
