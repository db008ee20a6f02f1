"""A request to recover a model: its options, checked and described before the first weight is read."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import parse_flag_from_env
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ..config import CondenseConfig, unused_with_plan
from ..estimate import dry_run
from ..model.training import unfreeze_condensed
from ..plan import CondensePlan
from ..recovery.distillation import check_distillation
from .parsing import help_field

STAGES = ["lm", "sft"]
Options = dict[str, Any]


@dataclass
class RecoveryArguments:
    """The options of a recovery, beside those of TRL, of the model and of a search."""

    plan: str | None = help_field("For a base model: the condense_plan.json (or a folder with one) to apply first.")
    calibration: str | None = help_field("For a base model without a plan: data to search on; C4 if unset.")
    stages: str = help_field("Stages to run, in this order: lm,sft or one of them.", "lm,sft")
    lm_dataset: str | None = help_field(
        "Data of the LM stage: a hub dataset (name:config@split), or a local .json, .jsonl, .parquet, .csv, .tsv or "
        ".arrow file or folder; C4 if unset."
    )
    sft_dataset: str | None = help_field("The same for the SFT stage: commonsense170k, or any format that TRL knows.")
    lm_eval_dataset: str | None = help_field("Rows to measure the LM stage on; a part of `lm_dataset` if unset.")
    sft_eval_dataset: str | None = help_field("Rows to measure the SFT stage on; a part of `sft_dataset` if unset.")
    lm_num_examples: int | None = help_field("Rows of the LM stage, drawn at random; unset for all.", 100_000)
    sft_num_examples: int | None = help_field("Rows of the SFT stage, drawn at random; unset for all.")
    num_held_out: int = help_field("Rows of each stage to measure on, at most; they are never trained on.", 512)
    lm_learning_rate: float | None = help_field("Learning rate of the LM stage; `learning_rate` if unset.")
    sft_learning_rate: float | None = help_field("Learning rate of the SFT stage; `learning_rate` if unset.")
    lm_num_train_epochs: float | None = help_field("Epochs of the LM stage; `num_train_epochs` if unset.")
    sft_num_train_epochs: float | None = help_field("Epochs of the SFT stage; `num_train_epochs` if unset.")
    lm_max_steps: int | None = help_field("Steps of the LM stage; `max_steps` if unset.")
    sft_max_steps: int | None = help_field("Steps of the SFT stage; `max_steps` if unset.")
    distillation: Literal["none", "logits", "blocks"] = help_field(
        "The sparse model as teacher in the LM stage: on the logits, or on each replaced sparse block's output.", "none"
    )
    distillation_weight: float = help_field("Share of distillation in the LM stage's loss.", 0.5)
    distillation_temperature: float = help_field("Temperature of distillation on the logits.", 1.0)
    teacher_name_or_path: str | None = help_field("The sparse base model; needed if the input is condensed already.")
    merge_adapter: bool = help_field("With --use_peft: merge LoRA into the weights at the end, or keep it apart.", True)
    dry_run: bool = help_field("Print what would be done, from configs alone, and stop.", False)


def check(args: RecoveryArguments, training_args: Any, model_args: Any, condense: Options, hub: Options) -> list[str]:
    """Check what can be wrong before anything is opened but configs; return the stages.

    Raises:
        ValueError: naming the option, what was found and what to do.
    """
    named = args.stages if isinstance(args.stages, list) else args.stages.split(",")  # a YAML file may hold a list
    stages = [stage.strip() for stage in named]
    if stages not in (STAGES, ["lm"], ["sft"]):
        raise ValueError(f"`--stages` should be lm,sft or lm or sft, but is {args.stages!r}.")
    if "sft" in stages and args.sft_dataset is None:
        raise ValueError("`--sft_dataset` is needed: commonsense170k or the like. Or leave the stage out: --stages lm")
    if model_args.model_name_or_path is None:
        raise ValueError("`--model_name_or_path` is needed: a condensed checkpoint, or a base model.")
    condensed = is_condensed(model_args.model_name_or_path, hub)
    fields = [f"condense_{name}" for name in condense]
    given = [name for name in ("plan", "calibration") if getattr(args, name)] + fields
    if condensed and given:
        raise ValueError(f"{model_args.model_name_or_path} is condensed already: {given} would do nothing.")
    unused = [f"condense_{name}" for name in unused_with_plan(condense)]
    unused += [] if condense.get("refit") or not args.calibration else ["calibration"]
    if args.plan and unused:
        raise ValueError(f"With `--plan` there is no search: {unused} would do nothing.")
    if condense.get("form", "condense") != "condense":
        raise ValueError(f"`--condense_form {condense['form']}` leaves nothing to train; evaluate it as it is.")
    if args.distillation != "none":
        check_distillation(args.distillation, args.distillation_weight, args.distillation_temperature)
        if "lm" not in stages:
            raise ValueError("`--distillation` belongs to the stage lm, which `--stages` leaves out.")
        if condensed and args.teacher_name_or_path is None:
            raise ValueError("`--distillation` needs `--teacher_name_or_path`: the sparse model, as it was before.")
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "DeepSpeed ZeRO-3 would split the model whenever it is opened, also where one process alone writes it: use "
            "ZeRO-2 or FSDP (recipes/accelerate/)."
        )
    kind, quantised = sharding(training_args), ("load_in_4bit", "load_in_8bit")
    asked = [name for name in quantised if getattr(model_args, name)]
    asked += ["distillation"] if args.distillation != "none" else []
    if kind and asked:
        raise ValueError(f"`--{asked[0]}` does not go with {kind}, which splits the weights: use data parallelism.")
    return stages


def is_condensed(name_or_path: str, hub: Options) -> bool:
    return bool(getattr(AutoConfig.from_pretrained(name_or_path, **hub), "condense_config", None))


def sharding(training_args: Any) -> str | None:
    """The one of FSDP and DeepSpeed that holds the weights, if any; accelerate says so by environment variables."""
    if training_args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return "FSDP"
    return "DeepSpeed" if training_args.deepspeed or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") else None


def describe(
    stages: list[str], args: RecoveryArguments, training_args: Any, model_args: Any, condense: Options, hub: Options
) -> str:
    """Tell from configs alone what will be done; raise a `ValueError` if plan or budget do not fit the model."""
    name = model_args.model_name_or_path
    if is_condensed(name, hub):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name, **hub))
        trained = unfreeze_condensed(model)
        learns = sum(p.numel() for p in model.parameters() if p.requires_grad)
        lines = [f"{learns:,} of {model.num_parameters():,} parameters would learn, such as {trained[0]}."]
    else:
        plan = plan_of(args, condense) or CondenseConfig(**condense)
        lines = [dry_run(name, plan, dtype=model_args.dtype or "auto", **hub)]
    state = training_args.distributed_state
    batch = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps * state.num_processes
    kind = sharding(training_args) or "data parallel"
    lines.append(f"{state.num_processes} processes ({kind}) on {state.device.type}, {batch} sequences per step.")
    for stage in stages:
        own = stage_arguments(stage, args, training_args)
        source = getattr(args, f"{stage}_dataset") or "C4"
        length = f"up to {own.max_steps} steps" if own.max_steps > 0 else f"{own.num_train_epochs} epochs"
        lines.append(f"{stage}: {source}, {length}, learning rate {own.learning_rate}, {own.lr_scheduler_type.value}.")
    return "\n".join(lines)


def plan_of(args: RecoveryArguments, condense: Options) -> CondensePlan | None:
    """The plan that was given, cut to the budget that was given."""
    if args.plan is None:
        return None
    budget = (condense.get(name) for name in ("num_layers", "num_experts", "target_size"))
    return CondensePlan.load(args.plan).truncate(*budget)


def identity(args: RecoveryArguments, training_args: Any, model_args: Any, condense: Options) -> Options:
    """The settings that a run which goes on must share with the one that was interrupted."""
    shared = {name: value for name, value in vars(args).items() if name not in ("dry_run", "merge_adapter")}
    names = ("model_name_or_path", "model_revision", "use_peft", "lora_r", "lora_alpha", "load_in_4bit", "load_in_8bit")
    shared |= {name: getattr(model_args, name) for name in names}
    # Which rows are held out and what a step is made of: with others, a checkpoint's place in the data means nothing.
    training = ("seed", "max_length", "packing", "packing_strategy", "completion_only_loss", "assistant_only_loss")
    return {**shared, **{name: getattr(training_args, name) for name in training}, "condense": condense}


def stage_arguments(stage: str, args: RecoveryArguments, training_args: Any) -> Any:
    """TRL's arguments for one stage."""
    own = {name: getattr(args, f"{stage}_{name}") for name in ("learning_rate", "num_train_epochs", "max_steps")}
    own = {name: value for name, value in own.items() if value is not None}
    if stage == "lm":
        # Whole documents: cut into pieces of `max_length`, not after the first one.
        own["packing"] = True
        own["assistant_only_loss"] = False
        if training_args.packing_strategy == "bfd":
            own["packing_strategy"] = "bfd_split"
    # Packed without padding, and without a mask: the padding token is then often the end of a document.
    unpadded = own.get("packing", training_args.packing) and training_args.packing_strategy != "wrapped"
    return dataclasses.replace(
        training_args,
        output_dir=str(Path(training_args.output_dir) / stage),
        run_name=f"{training_args.run_name or Path(training_args.output_dir).name}-{stage}",
        eval_on_start=True,
        include_num_input_tokens_seen="all" if unpadded else "non_padding",
        push_to_hub=False,  # what is pushed is the recovered model
        model_init_kwargs=None,
        **own,
    )
