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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import broadcast_object_list, parse_flag_from_env, release_memory
from huggingface_hub import HfApi
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl import ModelConfig, SFTConfig, TrlParser, get_peft_config, get_quantization_config

from cdmoe_plugin import CondenseConfig, CondensePlan, condense_pretrained, unfreeze_condensed
from cdmoe_plugin.atomic import replacing_files
from cdmoe_plugin.config import condense_arguments, unused_with_plan
from cdmoe_plugin.estimate import dry_run
from cdmoe_plugin.model.training import quantised_around_condensed
from cdmoe_plugin.recovery import CondensedSFTTrainer, Distillation, load_stage_data, load_teacher_blocks
from cdmoe_plugin.recovery.data import check_tokenizer
from cdmoe_plugin.recovery.distillation import check_distillation
from cdmoe_plugin.recovery.stages import claim_output_dir, find_progress, finish, run_stage

STAGES = ["lm", "sft"]
Options = dict[str, Any]


def _help(text: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class RecoveryArguments:
    """The options of a recovery, beside those of TRL, of the model and of a search."""

    plan: str | None = _help("For a base model: the condense_plan.json (or a folder with one) to apply first.")
    calibration: str | None = _help("For a base model without a plan: data to search on; C4 if unset.")
    stages: str = _help("Stages to run, in this order: lm,sft or one of them.", "lm,sft")
    lm_dataset: str | None = _help("Hub name or local .json, .jsonl or .parquet file for the LM stage; C4 if unset.")
    sft_dataset: str | None = _help("The same for the SFT stage: commonsense170k, or any format that TRL knows.")
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


def make_parser() -> TrlParser:
    arguments = (RecoveryArguments, SFTConfig, ModelConfig, condense_arguments("condense_"))
    parser = TrlParser(arguments, description="Recover a condensed model: language modelling, then fine-tuning.")
    # The paper's settings. Routers are frozen, so the loss that balances them could only disturb.
    parser.set_defaults(
        learning_rate=5e-5, warmup_steps=0.1, lr_scheduler_type="cosine", num_train_epochs=1.0, router_aux_loss_coef=0.0
    )
    # The checkpoint's own dtype; what is trained is float32 all the same. With dropout, every process would drop other
    # values, and the result depend on how many there are. While one of them condenses a base model, the others wait.
    parser.set_defaults(dtype="auto", lora_dropout=0.0, ddp_timeout=4 * 3600)
    return parser


def main(args: RecoveryArguments, training_args: Any, model_args: Any, condense: Options) -> None:
    """Run the recipe; `condense` holds the fields of `CondenseConfig` that were set."""
    # Everything that can be wrong with the request comes before the first weight is read.
    hub = {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code or None}
    stages = check(args, training_args, model_args, condense, hub)
    state, output_dir = training_args.distributed_state, Path(training_args.output_dir)
    state.print(describe(stages, args, training_args, model_args, condense, hub))
    if args.dry_run:
        return
    tokenizer, data = AutoTokenizer.from_pretrained(model_args.model_name_or_path, **hub), {}
    for stage in stages:
        source, held_out, count = (getattr(args, f"{stage}_{x}") for x in ("dataset", "eval_dataset", "num_examples"))
        keywords = {"held_out": held_out, "num_examples": count, "num_held_out": args.num_held_out}
        data[stage] = load_stage_data(stage, source, **keywords, seed=training_args.seed)
        check_tokenizer(stage, data[stage], tokenizer, training_args)
    resume = training_args.resume_from_checkpoint
    claim_output_dir(output_dir, identity(args, training_args, model_args, condense), bool(resume))
    summaries, checkpoint = find_progress(output_dir, stages, resume)
    start, hub = start_checkpoint(args, training_args, model_args, condense, hub)
    for summary in summaries:
        state.print(summary)

    for stage in stages[len(summaries) :]:
        previous = output_dir / summaries[-1].stage if summaries else None
        model = open_model(start, training_args, model_args, hub)
        trainer = CondensedSFTTrainer(
            model,
            args=stage_arguments(stage, args, training_args),
            train_dataset=data[stage].train,
            eval_dataset=data[stage].held_out,
            processing_class=AutoTokenizer.from_pretrained(start, **hub),
            peft_config=get_peft_config(model_args),
            distillation=open_teacher(model, args, training_args, model_args) if stage == "lm" else None,
        )
        summaries.append(run_stage(stage, trainer, previous, checkpoint))
        state.print(summaries[-1])
        checkpoint = None  # it was this stage's
        del model, trainer
        release_memory()

    if state.is_main_process:
        finish(start, output_dir, summaries, args.merge_adapter, **hub)
        print(f"Saved to {output_dir}.")
        if training_args.push_to_hub:
            push(output_dir, training_args)
    state.wait_for_everyone()
    state.destroy_process_group()


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
    return CondensePlan.load(args.plan).truncate(condense.get("num_layers"), condense.get("num_experts"))


def identity(args: RecoveryArguments, training_args: Any, model_args: Any, condense: Options) -> Options:
    """The settings that a run which goes on must share with the one that was interrupted."""
    shared = {name: value for name, value in vars(args).items() if name not in ("dry_run", "merge_adapter")}
    names = ("model_name_or_path", "model_revision", "use_peft", "lora_r", "lora_alpha", "load_in_4bit", "load_in_8bit")
    shared |= {name: getattr(model_args, name) for name in names}
    # Which rows are held out and what a step is made of: with others, a checkpoint's place in the data means nothing.
    names = ("seed", "max_length", "packing", "packing_strategy", "completion_only_loss", "assistant_only_loss")
    return {**shared, **{name: getattr(training_args, name) for name in names}, "condense": condense}


def start_checkpoint(
    args: RecoveryArguments, training_args: Any, model_args: Any, condense: Options, hub: Options
) -> tuple[str, Options]:
    """The condensed checkpoint to begin with, which is the input or made from it once; and how it is opened."""
    path = model_args.model_name_or_path
    if is_condensed(path, hub):
        # An adapter that is kept refers to it, from wherever it is opened.
        return str(Path(path).absolute()) if Path(path).exists() else path, hub

    state, plan, config = training_args.distributed_state, plan_of(args, condense), CondenseConfig(**condense)
    # A model that is split while it is trained may be too large for the device of each process.
    together = plan is None and sharding(training_args) is None
    together = together and 1 < state.num_processes <= -(-config.num_samples // config.batch_size)
    folder = Path(training_args.output_dir).absolute() / "condensed"
    is_there = broadcast_object_list([folder.exists()])[0]
    if not is_there and (together or state.is_main_process):
        if together:
            state.print(f"{state.num_processes} processes share the search.")
        model: Any = condense_pretrained(
            path,
            config if plan is None or config.refit else None,
            plan=plan,
            calibration=args.calibration,
            state_dir=folder.parent / "search",
            accelerator=state if together else None,
            dtype=model_args.dtype,
            device_map={"": state.device} if together else "cpu" if training_args.use_cpu else "auto",
            **hub,
            **(training_args.model_init_kwargs or {}),
        )
        if state.is_main_process:
            with replacing_files(folder) as part:
                model.save_pretrained(part)
                AutoTokenizer.from_pretrained(path, **hub).save_pretrained(part)
    state.wait_for_everyone()
    return str(folder), {**hub, "revision": "main"}  # the revision was the base model's


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


def open_model(start: str, training_args: Any, model_args: Any, hub: Options) -> Any:
    """The model as a stage begins with it; with --load_in_4bit, all but its condensed layers quantised."""
    kwargs = {"attn_implementation": model_args.attn_implementation, "dtype": model_args.dtype, **hub}
    compute = "bfloat16" if training_args.bf16 else "float16" if training_args.fp16 else "float32"
    quantization = get_quantization_config(dataclasses.replace(model_args, dtype=compute))
    if quantization is not None:
        config = AutoConfig.from_pretrained(start, **hub)
        kwargs["quantization_config"] = quantised_around_condensed(quantization, config)
        kwargs["device_map"] = {"": "cpu" if training_args.use_cpu else training_args.local_process_index}
    return AutoModelForCausalLM.from_pretrained(start, **kwargs, **(training_args.model_init_kwargs or {}))


def open_teacher(model: Any, args: RecoveryArguments, training_args: Any, model_args: Any) -> Distillation | None:
    """The sparse model as teacher, if it was asked for."""
    if args.distillation == "none":
        return None
    blocks = load_teacher_blocks(
        args.teacher_name_or_path or model_args.model_name_or_path,
        model.condense_plan,
        revision="main" if args.teacher_name_or_path else model_args.model_revision,
        dtype=model.dtype,
        trust_remote_code=training_args.trust_remote_code or None,
        **(training_args.model_init_kwargs or {}),
    )
    return Distillation(model, blocks, args.distillation, args.distillation_weight, args.distillation_temperature)


def push(output_dir: Path, training_args: Any) -> None:
    """Upload the recovered model without the stages' checkpoints."""
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
