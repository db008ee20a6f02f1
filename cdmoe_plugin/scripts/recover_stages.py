"""The training of `cdmoe recover`, one stage after the other; it runs in every process that accelerate starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, release_memory
from huggingface_hub import HfApi
from transformers import AutoConfig, AutoModelForCausalLM
from trl import ModelConfig, SFTConfig, get_peft_config, get_quantization_config

from ..api import condense_pretrained
from ..atomic import replacing_files
from ..config import CondenseConfig, condense_arguments
from ..loading.adapter_weights import plan_or_adapter
from ..loading.processing import save_processing
from ..model.training import quantised_around_condensed
from ..recovery import CondensedSFTTrainer, Distillation, load_stage_data, load_teacher_blocks
from ..recovery.data import StageData, check_tokenizer
from ..recovery.stages import StageSummary, claim_output_dir, find_progress, finish, run_stage
from ..tokenizing import required_tokenizer
from .parsing import Parser, given_fields
from .recover_request import (
    STAGES,
    Options,
    RecoveryArguments,
    check,
    describe,
    identity,
    is_condensed,
    plan_of,
    sharding,
    stage_arguments,
)

EXAMPLE = """
recover --model_name_or_path deepseek-moe-cd9 --sft_dataset commonsense_170k.json --output_dir recovered
recover --config recover-deepseek-moe-16b --plan deepseek-moe-cd9 --output_dir recovered --num_processes 8
recover --model_name_or_path deepseek-moe-cd9 --stages sft --use_peft --load_in_4bit --sft_dataset ... --output_dir lora
"""


def make_parser() -> Parser:
    """Return the parser of `cdmoe recover`; the defaults are the paper's."""
    search: Any = condense_arguments("condense_")
    names = ("dataset", "eval_dataset", "num_examples", "learning_rate", "num_train_epochs", "max_steps")
    by_stage = [f"{stage}_{name}" for name in names for stage in STAGES]
    groups = {
        "stages and data": ("output_dir", "resume_from_checkpoint", "dry_run", "stages", *by_stage, "num_held_out"),
        "teacher": ("distillation", "distillation_weight", "distillation_temperature", "teacher_name_or_path"),
        "model and adapters (TRL's ModelConfig)": ("merge_adapter", *ModelConfig.__dataclass_fields__),
        "a base model is condensed first": ("plan", "calibration", *search.__dataclass_fields__),
        "training (TRL's SFTConfig)": SFTConfig.__dataclass_fields__,
    }
    parser = Parser(
        (RecoveryArguments, SFTConfig, ModelConfig, search),
        groups,
        command="recover",
        description="Recover a condensed model (CD-MoE, section 4.3): language modelling on C4, then fine-tuning on "
        "commonsense170k.\nOnly the condensed layers learn. An interrupted run goes on with the same command and "
        "--resume_from_checkpoint true.\nOptions of `accelerate launch` (--num_processes, --config_file, ...) say how "
        "it is started.",
        example=EXAMPLE,
    )
    # The paper's settings. Routers are frozen, so the loss that balances them could only disturb.
    parser.set_defaults(
        learning_rate=5e-5, warmup_steps=0.1, lr_scheduler_type="cosine", num_train_epochs=1.0, router_aux_loss_coef=0.0
    )
    # The checkpoint's own dtype; what is trained is float32 all the same. With dropout, every process would drop other
    # values, and the result depend on how many there are. While one of them condenses a base model, the others wait.
    parser.set_defaults(dtype="auto", lora_dropout=0.0, ddp_timeout=4 * 3600)
    parser.set_defaults(save_total_limit=2)  # each checkpoint is as large as the model with its optimiser
    return parser


def train(arguments: Sequence[str]) -> None:
    """Run the training with the arguments of the command line."""
    args, training_args, model_args, search = make_parser().parse_args_and_config(arguments)
    run(args, training_args, model_args, given_fields(search, "condense_"))


def run(args: RecoveryArguments, training_args: Any, model_args: Any, condense: Options) -> None:
    """Run the stages that are left to do.

    Args:
        args (`RecoveryArguments`): The options of the recovery.
        training_args (`SFTConfig`): The options of TRL's trainer.
        model_args (`ModelConfig`): TRL's options for the model.
        condense (`dict[str, Any]`): The fields of `CondenseConfig` that were set.

    Raises:
        ValueError: naming the option, what was found and what to do.
        KeyboardInterrupt: saying what was kept.
    """
    # Everything that can be wrong with the request comes before the first weight is read.
    hub = {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code or None}
    stages = check(args, training_args, model_args, condense, hub)
    state, output_dir = training_args.distributed_state, Path(training_args.output_dir)
    state.print(describe(stages, args, training_args, model_args, condense, hub))
    if args.dry_run:
        return
    data = load_data(stages, args, training_args, required_tokenizer(model_args.model_name_or_path, **hub))
    resume = training_args.resume_from_checkpoint
    claim_output_dir(output_dir, identity(args, training_args, model_args, condense), bool(resume))
    try:
        summaries, checkpoint = find_progress(output_dir, stages, resume)
        start, hub = start_checkpoint(args, training_args, model_args, condense, hub)
        for summary in summaries:
            state.print(summary)
        for stage in stages[len(summaries) :]:
            previous = output_dir / summaries[-1].stage if summaries else None
            trainer = make_trainer(stage, data[stage], start, args, training_args, model_args, hub)
            summaries.append(run_stage(stage, trainer, previous, checkpoint))
            state.print(summaries[-1])
            checkpoint = None  # it was this stage's
            del trainer
            release_memory()
        conclude(start, output_dir, summaries, args, training_args, hub)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(kept(output_dir, stages)) from None
    state.wait_for_everyone()
    state.destroy_process_group()


def kept(output_dir: Path, stages: Sequence[str]) -> str:
    """Return what an interrupted run leaves, and how to go on."""
    done, checkpoint = find_progress(output_dir, stages, None)
    parts = [f"the stage {summary.stage}" for summary in done]
    parts += ["the condensed model"] if not done and (output_dir / "condensed").exists() else []
    parts += ["the search's results so far"] if not parts and (output_dir / "search").exists() else []
    parts += [] if checkpoint is None else [str(checkpoint)]
    text = f"{output_dir} keeps {', '.join(parts)}" if parts else "No checkpoint was saved yet"
    return f"{text}; the same command with `--resume_from_checkpoint true` goes on from there."


def load_data(
    stages: Sequence[str], args: RecoveryArguments, training_args: Any, tokenizer: Any
) -> dict[str, StageData]:
    """Load every stage's rows, and check that the tokenizer can encode them."""
    data = {}
    for stage in stages:
        source, held_out, count = (getattr(args, f"{stage}_{x}") for x in ("dataset", "eval_dataset", "num_examples"))
        keywords = {"held_out": held_out, "num_examples": count, "num_held_out": args.num_held_out}
        data[stage] = load_stage_data(stage, source, **keywords, seed=training_args.seed)
        check_tokenizer(stage, data[stage], tokenizer, training_args)
    return data


def make_trainer(
    stage: str, data: StageData, start: str, args: RecoveryArguments, training_args: Any, model_args: Any, hub: Options
) -> CondensedSFTTrainer:
    """Open the model, and the teacher if there is one, for a stage."""
    model = open_model(start, training_args, model_args, hub)
    return CondensedSFTTrainer(
        model,
        args=stage_arguments(stage, args, training_args),
        train_dataset=data.train,
        eval_dataset=data.held_out,
        processing_class=required_tokenizer(start, **hub),
        peft_config=get_peft_config(model_args),
        distillation=open_teacher(model, args, training_args, model_args) if stage == "lm" else None,
    )


def conclude(
    start: str,
    output_dir: Path,
    summaries: Sequence[StageSummary],
    args: RecoveryArguments,
    training_args: Any,
    hub: Options,
) -> None:
    """Write the recovered checkpoint, in the main process, and upload it if that was asked for."""
    if not training_args.distributed_state.is_main_process:
        return
    finish(start, output_dir, summaries, args.merge_adapter, **hub)
    print(f"Saved to {output_dir}.")
    if training_args.push_to_hub:
        push(output_dir, training_args)


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
    together = (plan is None or config.refit is not None) and sharding(training_args) is None
    samples = 100 if config.num_samples == "auto" else config.num_samples
    together = together and 1 < state.num_processes <= -(-samples // config.batch_size)
    folder = Path(training_args.output_dir).absolute() / "condensed"
    is_there = broadcast_object_list([folder.exists()])[0]
    if not is_there and (together or state.is_main_process):
        if together:
            state.print(f"{state.num_processes} processes share the {'search' if plan is None else 'refit'}.")
        model: Any = condense_pretrained(
            path,
            config if plan is None or config.refit else None,
            plan=plan_or_adapter(args.plan, plan),
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
                save_processing(path, part, **hub)
    state.wait_for_everyone()
    return str(folder), {**hub, "revision": "main"}  # the revision was the base model's


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
