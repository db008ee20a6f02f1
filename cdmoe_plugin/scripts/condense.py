"""`cdmoe condense`: condense a sparse model and save it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic import replacing_files
from ..config import CondenseConfig, condense_arguments
from ..plan_files import PLAN_FILE
from .arguments import GROUPS, CondenseArguments
from .estimate import print_estimate, requested
from .export import export
from .folders import (
    check_output,
    check_space,
    check_writable,
    default_state_dir,
    disk_of,
    remove_state,
)
from .parsing import Parser, given_fields
from .placement import check_placement, placement

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

    from ..export.check import check_export, refuse_gated_request
    from ..loading.dequantize import refuse_stored

    if args.export_approximate and args.export_stock is None:
        raise ValueError("`--export_approximate` does nothing without `--export_stock`.")
    plan, config = requested(args, given, args.calibration, args.export_approximate)
    if not args.dequantize:
        refuse_stored(args.model_name_or_path, **args.hub)
    if args.export_stock is not None:
        refuse_gated_request(config)  # also with a plan, which has no such gates
        opening = {"text_only": args.text_only, **args.hub}
        check_export(args.model_name_or_path, plan or config, args.export_approximate, **opening)
    if args.dry_run:
        print_estimate(args, plan or config)
        return
    output_dir, export_dir = check_output(args.output_dir), check_export_folder(args)
    check_placement(args)
    check_disk(args, plan or config, [folder for folder in (output_dir, export_dir) if folder is not None])
    state_dir = None if plan is not None else search_folder(args)
    accelerator = Accelerator()
    if plan is not None and config.refit is None and accelerator.num_processes > 1:
        raise ValueError(
            "With `--plan` and no `--refit`, there is nothing to share: run one process, without `accelerate launch`."
        )
    with keeping(state_dir):
        model = condense(args, plan, config, accelerator, state_dir)
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
    if state_dir is not None and args.state_dir is None:
        remove_state(state_dir)


def check_disk(args: CondenseArguments, request: CondensePlan | CondenseConfig, folders: Sequence[Path]) -> None:
    """Check that the checkpoints will fit on the disk.

    Raises:
        ValueError: naming the needed and the free space.
    """
    from ..estimate import estimate

    sizes = estimate(args.model_name_or_path, request, dtype=args.dtype, text_only=args.text_only, **args.hub)
    needed = sizes.after * sizes.width
    for folder in folders:
        check_space(folder, needed, f"The condensed model in {folder}")
    if len({disk_of(folder) for folder in folders}) < len(folders):
        check_space(folders[0], needed * len(folders), f"`--output_dir` and `--export_stock` together ({folders[0]})")


def search_folder(args: CondenseArguments) -> Path:
    """Return the folder for the search's state, in which files can be made."""
    if args.state_dir is not None:
        check_writable(Path(args.state_dir), f"`--state_dir` {args.state_dir}")
        return Path(args.state_dir)
    folder = default_state_dir(Path(args.output_dir or ""))
    check_writable(folder, f"Choose a folder for the search's results by `--state_dir`: the default, {folder},")
    return folder


@contextmanager
def keeping(state_dir: Path | None) -> Iterator[None]:
    """Add to an interruption, or to an error of the disk, what was kept and how to go on."""
    from safetensors import SafetensorError

    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(kept(state_dir)) from None
    except (OSError, SafetensorError) as error:
        if isinstance(error, SafetensorError) and "os error" not in str(error):
            raise
        raise OSError(f"{error}. {kept(state_dir)}") from error


def kept(state_dir: Path | None) -> str:
    """Return what a run that did not end well leaves, and how to go on."""
    if state_dir is None:
        return "Nothing was saved; run the same command again."
    if (state_dir / PLAN_FILE).exists():
        return f"The search is done and its plan is in {state_dir}; the same command only condenses and saves."
    if any(state_dir.glob("*")):
        return f"The search's results so far are in {state_dir}; the same command goes on from there."
    return "There are no results of the search yet; run the same command again."


def condense(
    args: CondenseArguments,
    plan: CondensePlan | None,
    config: CondenseConfig,
    accelerator: Accelerator,
    state_dir: Path | None,
) -> PreTrainedModel:
    """Search, or take the plan, and condense."""
    from ..api import condense_pretrained
    from ..loading.adapter_weights import plan_or_adapter

    return condense_pretrained(
        args.model_name_or_path,
        config if plan is None or config.refit else None,
        plan=plan_or_adapter(args.plan, plan),
        calibration=args.calibration,
        state_dir=state_dir,
        accelerator=accelerator,
        text_only=args.text_only,
        keep_extra=args.keep_extra,
        dtype=args.dtype,
        **placement(args, accelerator),
        **args.hub,
    )


def save(model: Any, output_dir: Path, args: CondenseArguments) -> None:
    """Save the condensed model with its plan and the tokenizer, and print both."""
    from ..cards.card import is_someones_card
    from ..cards.tables import plan_table
    from ..loading.processing import save_processing

    with replacing_files(output_dir, keep=is_someones_card) as folder:  # all of it is there at once, or nothing
        # What is offloaded is read again for one file at a time.
        model.save_pretrained(folder, max_shard_size=args.max_shard_size or ("1GB" if args.offload_folder else "5GB"))
        model.condense_plan.save(folder / "condense_plan.json")  # a model with fewer layers does not bring its own
        save_processing(args.model_name_or_path, folder, processor=not args.text_only, **args.hub)
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
