# /// script
# dependencies = ["cdmoe_plugin[recipes]"]
# ///
"""
Condense a sparse Mixture-of-Experts model (CD-MoE).

What it would save, from the config alone:

python recipes/condense.py --model_name_or_path deepseek-ai/deepseek-moe-16b-base --dry_run

Search on C4 as in the paper, condense 9 layers to 6 routed experts each, and save:

python recipes/condense.py --config recipes/configs/deepseek-moe-16b.yaml --output_dir deepseek-moe-cd9

Apply a plan, or a smaller budget from it, without a search:

python recipes/condense.py --model_name_or_path deepseek-ai/deepseek-moe-16b-base \
    --plan deepseek-moe-cd9/condense_plan.json --num_layers 6 --output_dir deepseek-moe-cd6

A model that is larger than memory, one decoder layer at a time; and the calibration tokens split over 8 processes:

python recipes/condense.py --config recipes/configs/deepseek-moe-16b.yaml --output_dir deepseek-moe-cd9 \
    --offload_folder offload --max_shard_size 1GB
accelerate launch --num_processes 8 recipes/condense.py --config recipes/configs/deepseek-moe-16b.yaml \
    --output_dir deepseek-moe-cd9

As a checkpoint of the base architecture, too, which opens without this package (see `export_stock`):

python recipes/condense.py --model_name_or_path Qwen/Qwen3-30B-A3B --output_dir qwen3-cd9 --export_stock qwen3-cd9-stock

The paper's baselines drop layers instead, chosen by similarity or in a plan's own order:

python recipes/condense.py --config recipes/configs/deepseek-moe-16b.yaml --form trim_block \
    --layer_selection similarity --output_dir deepseek-moe-trimmed
python recipes/condense.py --model_name_or_path deepseek-ai/deepseek-moe-16b-base \
    --plan deepseek-moe-cd9/condense_plan.json --form trim_layer --output_dir deepseek-moe-trimmed
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cdmoe_plugin import CondenseConfig
from cdmoe_plugin.atomic import STAGING, replacing_files
from cdmoe_plugin.config import condense_arguments, unused_with_plan


@dataclass
class CondenseArguments:
    """What to condense, and where to."""

    model_name_or_path: str = field(metadata={"help": "Hub name or folder of the sparse checkpoint."})
    output_dir: str | None = field(
        default=None,
        metadata={"help": "Folder for the condensed checkpoint; new or empty. Not needed with --dry_run."},
    )
    plan: str | None = field(
        default=None,
        metadata={"help": "A condense_plan.json (or a condensed checkpoint's folder) to apply instead of a search."},
    )
    calibration: str | None = field(
        default=None,
        metadata={"help": "Hub dataset or local .txt, .json, .jsonl or .parquet file to search on; C4 if unset."},
    )
    export_stock: str | None = field(
        default=None,
        metadata={
            "help": "Folder for a second checkpoint, one of the base architecture, which opens without this package; "
            "new or empty. Where that can't be had, it is said before the search."
        },
    )
    export_approximate: bool = field(
        default=False,
        metadata={
            "help": "With --export_stock: replace shared experts' gates per token, which dense layers do not have, by "
            "their means over the calibration tokens."
        },
    )
    state_dir: str | None = field(
        default=None,
        metadata={"help": "Folder in which the search keeps its results; one that was interrupted goes on from there."},
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Print sizes before and after from the config alone, and stop."}
    )
    dtype: str = field(default="auto", metadata={"help": "Dtype to load the model in, such as bfloat16."})
    device_map: str | None = field(
        default=None, metadata={"help": "Where to load the model: auto (if unset), cpu, cuda, ..."}
    )
    offload_folder: str | None = field(
        default=None,
        metadata={
            "help": "Folder for weights that are not in memory, to be deleted afterwards. Without --device_map, "
            "decoder layers stay in the checkpoint's own files, and only condensed layers are written there."
        },
    )
    revision: str = field(default="main", metadata={"help": "Revision of the checkpoint on the hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the checkpoint."})
    max_shard_size: str | None = field(
        default=None,
        metadata={"help": "Size of the saved checkpoint's files, at most: 5GB if unset, 1GB with --offload_folder."},
    )


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but not None, which stands for "not given"."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def make_parser() -> Any:
    from trl import TrlParser

    return TrlParser(
        (CondenseArguments, condense_arguments()),
        description="Condense a sparse Mixture-of-Experts model.",
        formatter_class=HelpFormatter,
    )


def check_output(folder: str | None, option: str = "output_dir") -> Path:
    """A folder to write to, which must be new or empty."""
    if folder is None:
        raise ValueError(f"`--{option}` is needed: a new or empty folder for the condensed checkpoint.")
    path = Path(folder)
    # A run that was killed while it saved may have left an unfinished folder, which the next save removes.
    if path.exists() and (not path.is_dir() or any(not STAGING.fullmatch(inner.name) for inner in path.iterdir())):
        raise ValueError(f"`--{option}` {folder} is not an empty folder; choose another, or empty it.")
    return path


def check_export_folder(args: CondenseArguments) -> Path | None:
    """The folder for the stock checkpoint, if it was asked for."""
    if args.export_stock is None:
        return None
    path, other = check_output(args.export_stock, "export_stock"), Path(args.output_dir or "")
    if path.resolve().is_relative_to(other.resolve()) or other.resolve().is_relative_to(path.resolve()):
        raise ValueError(f"`--export_stock` {path} and `--output_dir` {other} should not lie in each other.")
    return path


def main(args: CondenseArguments, given: dict[str, Any]) -> None:
    """Runs the recipe; `given` holds the fields of `CondenseConfig` that were set."""
    from accelerate import Accelerator
    from transformers import AutoTokenizer

    from cdmoe_plugin import CondensePlan, condense_pretrained
    from cdmoe_plugin.cards.card import is_someones_card
    from cdmoe_plugin.cards.tables import plan_table
    from cdmoe_plugin.estimate import dry_run
    from cdmoe_plugin.export.check import check_export

    if args.export_approximate and args.export_stock is None:
        raise ValueError("`--export_approximate` does nothing without `--export_stock`.")
    # A plan brings its own budget, which may be cut; a search takes the defaults for what is not given.
    plan = CondensePlan.load(args.plan) if args.plan else None
    if plan is not None:
        form = given.get("form", plan.form)
        unused = unused_with_plan(given, reads=args.export_approximate)
        if unused or (args.calibration and not given.get("refit") and not args.export_approximate):
            raise ValueError(f"With `--plan` there is no search: {unused or ['calibration']} would do nothing.")
        plan = plan.truncate(given.get("num_layers"), given.get("num_experts"))
        plan = plan if form == plan.form else plan.as_trimming(form)
    config = CondenseConfig(**given)
    hub = {"revision": args.revision, "trust_remote_code": args.trust_remote_code or None}
    if args.export_stock is not None:
        check_export(args.model_name_or_path, plan or config, args.export_approximate, **hub)
    if args.dry_run:
        print(dry_run(args.model_name_or_path, plan or config, dtype=args.dtype, **hub))
        return
    output_dir, export_dir = check_output(args.output_dir), check_export_folder(args)
    accelerator = Accelerator()
    if plan is not None and accelerator.num_processes > 1:
        raise ValueError("With `--plan` there is no search to share: run one process, without `accelerate launch`.")
    model = condense_pretrained(
        args.model_name_or_path,
        config if plan is None or config.refit else None,
        plan=plan,
        calibration=args.calibration,
        state_dir=args.state_dir,
        accelerator=accelerator,
        dtype=args.dtype,
        **placement(args, accelerator),
        **hub,
    )
    if not accelerator.is_main_process:
        return
    with replacing_files(output_dir, keep=is_someones_card) as folder:  # all of it is there at once, or nothing
        # What is offloaded is read again for one file at a time.
        model.save_pretrained(folder, max_shard_size=args.max_shard_size or ("1GB" if args.offload_folder else "5GB"))
        model.condense_plan.save(folder / "condense_plan.json")  # a model with fewer layers does not bring its own
        if has_tokenizer(args.model_name_or_path):
            AutoTokenizer.from_pretrained(args.model_name_or_path, **hub).save_pretrained(folder)
    print(plan_table(model.condense_plan))
    print(f"Saved to {output_dir}: {model.num_parameters():,} parameters.")
    if export_dir is not None:
        export(model, output_dir, export_dir, config, args)


def export(model: Any, saved: Path, export_dir: Path, config: CondenseConfig, args: CondenseArguments) -> None:
    """Writes the stock checkpoint, with the tokenizer that was saved beside the condensed one."""
    from transformers import AutoTokenizer

    from cdmoe_plugin import export_stock
    from cdmoe_plugin.cards.card import is_someones_card

    with replacing_files(export_dir, keep=is_someones_card) as folder:
        written = export_stock(
            in_one_place(model, saved),
            folder,
            args.export_approximate,
            config=config,
            calibration=args.calibration,
            max_shard_size=args.max_shard_size or "5GB",
        )
        if has_tokenizer(str(saved)):
            AutoTokenizer.from_pretrained(saved).save_pretrained(folder)
    print(f"Exported to {export_dir} as {written.model_type}: {written.parameters:,} parameters.")


def in_one_place(model: Any, saved: Path) -> Any:
    """The model; where its weights are on several devices or on disk, its checkpoint, opened again on the CPU."""
    from transformers import AutoModelForCausalLM

    from cdmoe_plugin.model.modeling_cdmoe import CondensedModelMixin
    from cdmoe_plugin.offload import is_offloaded

    is_one = len({parameter.device for parameter in model.parameters()}) == 1 and not is_offloaded(model)
    if is_one or not isinstance(model, CondensedModelMixin):
        return model
    return AutoModelForCausalLM.from_pretrained(saved, device_map="cpu")


def placement(args: CondenseArguments, accelerator: Any) -> dict[str, Any]:
    """What tells `from_pretrained` where the weights go."""
    device_map: Any = args.device_map
    if device_map is None and accelerator.num_processes > 1:
        device_map = {"": accelerator.device}
    if args.offload_folder is None:
        return {"device_map": device_map or "auto"}
    # Every process writes files of its own.
    folder = Path(args.offload_folder) / f"process-{accelerator.process_index}"
    return {"offload_folder": str(folder), "device_map": args.device_map}


def has_tokenizer(name_or_path: str) -> bool:
    """Whether a checkpoint comes with a tokenizer; a folder may hold weights alone."""
    return not os.path.isdir(name_or_path) or any(Path(name_or_path).glob("tokenizer*"))


if __name__ == "__main__":
    parser = make_parser()
    arguments, search = parser.parse_args_and_config()
    main(arguments, {name: value for name, value in vars(search).items() if value is not None})
