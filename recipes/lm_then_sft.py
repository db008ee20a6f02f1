# /// script
# dependencies = ["cdmoe_plugin[recipes]"]
# ///
"""
Recover a condensed model (CD-MoE, section 4.3): language modelling on C4, then fine-tuning on commonsense170k. Only the
condensed layers learn. The defaults are the paper's: learning rate 5e-5, 10 % warm-up, cosine, bf16, one epoch each.

A condensed checkpoint, both stages, on all GPUs of this machine:

accelerate launch recipes/lm_then_sft.py --model_name_or_path deepseek-moe-cd9 \
    --sft_dataset commonsense_170k.json --output_dir deepseek-moe-cd9-recovered

A base model, condensed first by a plan (or, without one, by a search; see the --condense_... options):

accelerate launch recipes/lm_then_sft.py --config recipes/configs/recover-deepseek-moe-16b.yaml \
    --plan deepseek-moe-cd9/condense_plan.json --output_dir deepseek-moe-cd9-recovered

LoRA on the condensed layers, all else in 4 bit, the second stage alone:

accelerate launch recipes/lm_then_sft.py --model_name_or_path deepseek-moe-cd9 --stages sft --use_peft --load_in_4bit \
    --sft_dataset commonsense_170k.json --output_dir deepseek-moe-cd9-lora

An interrupted run goes on with the same command and --resume_from_checkpoint true.
"""

from __future__ import annotations

import dataclasses
import gc
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

STAGES = ["lm", "sft"]


def _help(text: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class RecoveryArguments:
    """What is recovered, on which data, and how it differs between the stages."""

    plan: str | None = _help("For a base model: the condense_plan.json (or a folder with one) to apply first.")
    calibration: str | None = _help("For a base model without a plan: data to search on; C4 if unset.")
    stages: str = _help("Stages to run, in this order: lm,sft or one of them.", "lm,sft")
    lm_dataset: str | None = _help("Hub name or local .json, .jsonl or .parquet file for the LM stage; C4 if unset.")
    sft_dataset: str | None = _help("The same for the SFT stage: commonsense170k, or any form that TRL knows.")
    lm_eval_dataset: str | None = _help("Rows to measure the LM stage on; a part of `lm_dataset` if unset.")
    sft_eval_dataset: str | None = _help("Rows to measure the SFT stage on; a part of `sft_dataset` if unset.")
    lm_num_examples: int | None = _help("Rows of the LM stage, drawn at random; unset for all.", 100_000)
    sft_num_examples: int | None = _help("Rows of the SFT stage, drawn at random; unset for all.")
    num_held_out: int = _help("Rows of each stage to measure on, at most; they are never trained on.", 512)
    lm_learning_rate: float | None = _help("Learning rate of the LM stage; `learning_rate` if unset.")
    sft_learning_rate: float | None = _help("Learning rate of the SFT stage; `learning_rate` if unset.")
    lm_num_train_epochs: float | None = _help("Epochs of the LM stage; `num_train_epochs` if unset.")
    sft_num_train_epochs: float | None = _help("Epochs of the SFT stage; `num_train_epochs` if unset.")
    lm_max_steps: int | None = _help("Steps of the LM stage; `max_steps` if unset.")
    sft_max_steps: int | None = _help("Steps of the SFT stage; `max_steps` if unset.")
    distillation: Literal["none", "logits", "blocks"] = _help(
        "The sparse model as teacher in the LM stage: on the logits, or on each replaced sparse block's output.", "none"
    )
    distillation_weight: float = _help("Share of distillation in the LM stage's loss.", 0.5)
    distillation_temperature: float = _help("Temperature of distillation on the logits.", 1.0)
    teacher_name_or_path: str | None = _help("The sparse base model; needed if the input is condensed already.")
    merge_adapter: bool = _help("With --use_peft: merge LoRA into the weights at the end, or keep it apart.", True)
    dry_run: bool = _help("Print what would be done, from configs alone, and stop.", False)


def make_parser() -> Any:
    from trl import ModelConfig, SFTConfig, TrlParser

    from cdmoe_plugin.config import condense_arguments

    arguments = (RecoveryArguments, SFTConfig, ModelConfig, condense_arguments("condense_"))
    parser = TrlParser(arguments, description="Recover a condensed model: language modelling, then fine-tuning.")
    # The paper's settings. Routers are frozen, so the loss that balances them could only disturb.
    parser.set_defaults(
        learning_rate=5e-5, warmup_steps=0.1, lr_scheduler_type="cosine", num_train_epochs=1.0, router_aux_loss_coef=0.0
    )
    # The checkpoint's own dtype; what is trained is float32 all the same.
    parser.set_defaults(dtype="auto")
    # Every process would drop other values, and the result depend on how many there are.
    parser.set_defaults(lora_dropout=0.0)
    # Where a base model is condensed first, by one process alone, the others wait for it.
    parser.set_defaults(ddp_timeout=4 * 3600)
    return parser


def check(
    args: RecoveryArguments, training_args: Any, model_args: Any, condense: dict[str, Any], hub: dict[str, Any]
) -> list[str]:
    """Checks what can be wrong before anything is opened but configs; returns the stages.

    Raises:
        ValueError: naming the option, what was found and what to do.
    """
    from transformers import AutoConfig
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    from cdmoe_plugin.config import unused_with_plan
    from cdmoe_plugin.recovery import check_distillation

    named = args.stages if isinstance(args.stages, list) else args.stages.split(",")  # a YAML file may hold a list
    stages = [stage.strip() for stage in named]
    if stages not in (STAGES, ["lm"], ["sft"]):
        raise ValueError(f"`--stages` should be lm,sft or lm or sft, but is {args.stages!r}.")
    if "sft" in stages and args.sft_dataset is None:
        raise ValueError("`--sft_dataset` is needed: commonsense170k or the like. Or leave the stage out: --stages lm")
    if model_args.model_name_or_path is None:
        raise ValueError("`--model_name_or_path` is needed: a condensed checkpoint, or a base model.")
    given = [name for name in ("plan", "calibration") if getattr(args, name)] + [
        f"condense_{name}" for name in condense
    ]
    condensed = is_condensed(AutoConfig.from_pretrained(model_args.model_name_or_path, **hub))
    if condensed and given:
        raise ValueError(f"{model_args.model_name_or_path} is condensed already: {given} would do nothing.")
    unused = [f"condense_{name}" for name in unused_with_plan(condense)]
    unused += [] if condense.get("refit") or not args.calibration else ["calibration"]
    if args.plan and unused:
        raise ValueError(f"With `--plan` there is no search: {unused} would do nothing.")
    if condense.get("form", "condense") != "condense":
        raise ValueError(f"`--condense_form {condense['form']}` leaves nothing to train; evaluate it as it is.")
    if not condensed:
        describe_base(args, model_args, condense, hub)  # raises where plan or budget do not fit the model
    if args.distillation != "none":
        check_distillation(args.distillation, args.distillation_weight, args.distillation_temperature)
        if "lm" not in stages:
            raise ValueError("`--distillation` belongs to the stage lm, which `--stages` leaves out.")
        if condensed and args.teacher_name_or_path is None:
            raise ValueError("`--distillation` needs `--teacher_name_or_path`: the sparse model, as it was before.")
    kind = sharding(training_args)
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "DeepSpeed ZeRO-3 would split the model whenever it is opened, also where one process alone writes it: use "
            "ZeRO-2 or FSDP (recipes/accelerate/)."
        )
    quantised = {name: getattr(model_args, name) for name in ("load_in_4bit", "load_in_8bit")}
    for name, asked in {"distillation": args.distillation != "none", **quantised}.items():
        if kind and asked:
            raise ValueError(
                f"`--{name}` does not go with {kind}, which splits the weights: use plain data parallelism."
            )
    return stages


def sharding(training_args: Any) -> str | None:
    """Which of FSDP and DeepSpeed holds the weights, if any; accelerate says so by environment variables."""
    from accelerate.utils import parse_flag_from_env

    if training_args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return "FSDP"
    return "DeepSpeed" if training_args.deepspeed or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") else None


def is_condensed(config: Any) -> bool:
    return bool(getattr(config, "condense_config", None))


def start_checkpoint(
    args: RecoveryArguments, training_args: Any, model_args: Any, condense: dict[str, Any], hub: dict[str, Any]
) -> str:
    """The condensed checkpoint to begin with: the input, or made from it."""
    from transformers import AutoConfig, AutoTokenizer

    from cdmoe_plugin import CondenseConfig, condense_pretrained
    from cdmoe_plugin.recovery import condense_once

    path = model_args.model_name_or_path
    plan = plan_of(args, condense)
    if is_condensed(AutoConfig.from_pretrained(path, **hub)):
        # An adapter that is kept refers to it, from wherever it is opened.
        return str(Path(path).absolute()) if Path(path).exists() else path

    # A model that is split while it is trained may be too large for the device of each process.
    state = training_args.distributed_state
    config = CondenseConfig(**condense)
    together = plan is None and sharding(training_args) is None
    together = together and 1 < state.num_processes <= -(-config.num_samples // config.batch_size)
    alone: Any = "cpu" if training_args.use_cpu else "auto"

    def make() -> Any:
        if together:
            state.print(f"{state.num_processes} processes share the search.")
        model = condense_pretrained(
            path,
            config if plan is None or condense.get("refit") else None,
            plan=plan,
            calibration=args.calibration,
            state_dir=Path(training_args.output_dir) / "search",
            accelerator=state if together else None,
            dtype=model_args.dtype,
            device_map={"": state.device} if together else alone,
            **hub,
            **(training_args.model_init_kwargs or {}),
        )
        return model, AutoTokenizer.from_pretrained(path, **hub)

    return str(condense_once(Path(training_args.output_dir), make, together))


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


def open_model(start: str, previous: Path | None, training_args: Any, model_args: Any, hub: dict[str, Any]) -> Any:
    """The model as a stage begins with it; with --load_in_4bit, all but its condensed layers quantised."""
    from transformers import AutoConfig
    from trl import get_quantization_config

    from cdmoe_plugin.model.training import quantised_around_condensed
    from cdmoe_plugin.recovery import open_stage_model

    kwargs = {"attn_implementation": model_args.attn_implementation, "dtype": model_args.dtype, **hub}
    compute = "bfloat16" if training_args.bf16 else "float16" if training_args.fp16 else "float32"
    quantization = get_quantization_config(dataclasses.replace(model_args, dtype=compute))
    if quantization is not None:
        kwargs["quantization_config"] = quantised_around_condensed(
            quantization, AutoConfig.from_pretrained(start, **hub)
        )
        kwargs["device_map"] = {"": "cpu" if training_args.use_cpu else training_args.local_process_index}
    sharded = sharding(training_args) is not None
    return open_stage_model(start, previous, sharded, **kwargs, **(training_args.model_init_kwargs or {}))


def open_teacher(model: Any, args: RecoveryArguments, training_args: Any, model_args: Any) -> Any:
    """The sparse model as teacher, if it was asked for."""
    from cdmoe_plugin.recovery import Distillation, load_teacher_blocks

    if args.distillation == "none":
        return None
    inside = model.get_base_model() if hasattr(model, "peft_config") else model
    blocks = load_teacher_blocks(
        args.teacher_name_or_path or model_args.model_name_or_path,
        inside.condense_plan,
        revision="main" if args.teacher_name_or_path else model_args.model_revision,
        dtype=inside.dtype,
        trust_remote_code=training_args.trust_remote_code or None,
        **(training_args.model_init_kwargs or {}),
    )
    return Distillation(inside, blocks, args.distillation, args.distillation_weight, args.distillation_temperature)


def main(args: RecoveryArguments, training_args: Any, model_args: Any, condense: dict[str, Any]) -> None:
    """Runs the recipe; `condense` holds the fields of `CondenseConfig` that were set."""
    from transformers import AutoTokenizer
    from trl import get_peft_config

    from cdmoe_plugin.recovery import (
        CondensedSFTTrainer,
        check_tokenizer,
        claim_output_dir,
        find_progress,
        finish,
        load_stage_data,
        run_stage,
    )

    # Everything that can be wrong with the request comes before the first weight is read.
    hub = {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code or None}
    stages = check(args, training_args, model_args, condense, hub)
    say = training_args.distributed_state.print
    if args.dry_run:
        say(describe(stages, args, training_args, model_args, condense, hub))
        return
    data = {
        stage: load_stage_data(
            stage,
            getattr(args, f"{stage}_dataset"),
            held_out=getattr(args, f"{stage}_eval_dataset"),
            num_examples=getattr(args, f"{stage}_num_examples"),
            num_held_out=args.num_held_out,
            seed=training_args.seed,
        )
        for stage in stages
    }
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, **hub)
    for stage in stages:
        check_tokenizer(stage, data[stage], tokenizer, training_args)
    say(describe(stages, args, training_args, model_args, condense, hub))
    output_dir, resume = Path(training_args.output_dir), training_args.resume_from_checkpoint
    claim_output_dir(output_dir, identity(args, training_args, model_args, condense), bool(resume))
    progress = find_progress(output_dir, stages, resume)

    start = start_checkpoint(args, training_args, model_args, condense, hub)
    if start != model_args.model_name_or_path:
        hub = {**hub, "revision": "main"}  # the revision was the base model's
    summaries = progress.done
    for summary in summaries:
        say(summary)

    trainer = None
    for stage in stages[len(summaries) :]:
        checkpoint = progress.checkpoint if trainer is None else None  # an earlier stage's is its own
        done = stages[: stages.index(stage)]
        model = open_model(start, output_dir / done[-1] if done else None, training_args, model_args, hub)
        trainer = CondensedSFTTrainer(
            model,
            args=stage_arguments(stage, args, training_args),
            train_dataset=data[stage].train,
            eval_dataset=data[stage].held_out,
            processing_class=AutoTokenizer.from_pretrained(start, **hub),
            peft_config=None if hasattr(model, "peft_config") else get_peft_config(model_args),
            distillation=open_teacher(model, args, training_args, model_args) if stage == "lm" else None,
        )
        summaries.append(run_stage(stage, trainer, checkpoint))
        say(summaries[-1])
        trainer.accelerator.free_memory()
        del model
        gc.collect()

    if training_args.distributed_state.is_main_process:
        finish(start, output_dir, summaries, merge=args.merge_adapter, **hub)
    say(f"Saved to {output_dir}.")
    if trainer is not None:
        if training_args.push_to_hub:
            push(output_dir, training_args)
        trainer.accelerator.wait_for_everyone()
        if hasattr(trainer, "end"):  # finishes trackers and the process group, so once and last
            trainer.end()


def identity(args: RecoveryArguments, training_args: Any, model_args: Any, condense: dict[str, Any]) -> dict[str, Any]:
    """What a run that goes on must have in common with the one that was interrupted."""
    free = ("dry_run", "merge_adapter")
    shared = {name: value for name, value in dataclasses.asdict(args).items() if name not in free}
    names = ("model_name_or_path", "model_revision", "use_peft", "lora_r", "lora_alpha", "load_in_4bit", "load_in_8bit")
    shared |= {name: getattr(model_args, name) for name in names}
    # Which rows are held out and what a step is made of: with others, a checkpoint's place in the data means nothing.
    names = ("seed", "max_length", "packing", "packing_strategy", "completion_only_loss", "assistant_only_loss")
    return {**shared, **{name: getattr(training_args, name) for name in names}, "condense": condense}


def describe(
    stages: list[str],
    args: RecoveryArguments,
    training_args: Any,
    model_args: Any,
    condense: dict[str, Any],
    hub: dict[str, Any],
) -> str:
    """What would be done, from configs alone."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from cdmoe_plugin import unfreeze_condensed

    config = AutoConfig.from_pretrained(model_args.model_name_or_path, **hub)
    if is_condensed(config):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        trained = unfreeze_condensed(model)
        learns = sum(p.numel() for p in model.parameters() if p.requires_grad)
        lines = [f"{learns:,} of {model.num_parameters():,} parameters would learn, such as {trained[0]}."]
    else:
        lines = [describe_base(args, model_args, condense, hub)]
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


def plan_of(args: RecoveryArguments, condense: dict[str, Any]) -> Any:
    """The plan that was given, cut to the budget that was given; None without one."""
    from cdmoe_plugin import CondensePlan

    if args.plan is None:
        return None
    return CondensePlan.load(args.plan).truncate(condense.get("num_layers"), condense.get("num_experts"))


def describe_base(args: RecoveryArguments, model_args: Any, condense: dict[str, Any], hub: dict[str, Any]) -> str:
    """What condensing the base model would save."""
    from cdmoe_plugin import CondenseConfig
    from cdmoe_plugin.estimate import dry_run

    request = plan_of(args, condense) or CondenseConfig(**condense)
    return dry_run(model_args.model_name_or_path, request, dtype=model_args.dtype or "auto", **hub)


def push(output_dir: Path, training_args: Any) -> None:
    """Uploads the recovered model without the stages' checkpoints."""
    from huggingface_hub import HfApi

    if not training_args.distributed_state.is_main_process:
        return
    api = HfApi(token=training_args.hub_token)
    name = training_args.hub_model_id or output_dir.name
    repo = api.create_repo(name, private=training_args.hub_private_repo, exist_ok=True)
    ignored = [f"{folder}/*" for folder in (*STAGES, "condensed", "search")] + ["recipe.json"]
    api.upload_folder(repo_id=repo.repo_id, folder_path=output_dir, ignore_patterns=ignored)


if __name__ == "__main__":
    parser = make_parser()
    recovery, training, model, search = parser.parse_args_and_config()
    given = {name.removeprefix("condense_"): value for name, value in vars(search).items() if value is not None}
    main(recovery, training, model, given)
