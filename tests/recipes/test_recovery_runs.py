"""Recovery runs out of the ordinary: YAML values, changed settings, checkpoints that can't be used, odd tokenizers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from cdmoe_plugin.recovery import condensed_parameters, load_stage_data
from cdmoe_plugin.recovery.data import check_tokenizer
from cdmoe_plugin.recovery.stages import find_progress
from tests.helpers.recovery import condensed_model, lm_then_sft, make_trainer, run, sft_rows, word_tokenizer, write_data
from tests.helpers.states import differing, state

__all__ = ["lm_then_sft"]  # a fixture

CHAT = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_data(folder)
    (folder / "chat.json").write_text(json.dumps([{"messages": CHAT}] * 10))
    condensed_model().save_pretrained(folder / "condensed")
    word_tokenizer().save_pretrained(folder / "condensed")
    return folder


def arguments(place: Path, output: Path, *more: object, stages: str = "lm", model: Any = "condensed") -> list[Any]:
    data = ["--lm_dataset", place / "lm.jsonl", "--sft_dataset", place / "sft.json", "--stages", stages]
    given = ["--model_name_or_path", place / model, "--output_dir", output, "--max_steps", 2, "--save_steps", 1]
    return [*given, *data, "--use_cpu", "--bf16=false", "--learning_rate=1e-2", "--disable_tqdm=true", *more]


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def stop_after_one_step(output: Path) -> None:
    """Makes a run look as if it had been killed after its first checkpoint."""
    shutil.rmtree(output / "lm" / "checkpoint-2")
    for path in (*output.iterdir(), *(output / "lm").iterdir()):
        if path.is_file() and path.name != "recipe.json":
            path.unlink()


def test_values_of_a_yaml_file(place: Path, tmp_path: Path, lm_then_sft: ModuleType) -> None:
    (tmp_path / "run.yaml").write_text("resume_from_checkpoint: true\n")
    args = arguments(place, tmp_path / "out", "--config", tmp_path / "run.yaml")
    run(lm_then_sft, args)
    run(lm_then_sft, args)  # nothing is left to do
    (tmp_path / "run.yaml").write_text("stages: [lm, sft]\nresume_from_checkpoint: false\n")
    args = arguments(place, tmp_path / "both", "--config", tmp_path / "run.yaml")
    del args[args.index("--stages") : args.index("--stages") + 2]
    run(lm_then_sft, args)
    assert summary(tmp_path / "both" / "sft")["stage"] == "sft"


def test_a_checkpoint_is_found_by_any_path_to_it(place: Path, tmp_path: Path, lm_then_sft: ModuleType) -> None:
    run(lm_then_sft, arguments(place, tmp_path / "out"))
    stop_after_one_step(tmp_path / "out")
    checkpoint = tmp_path / "out" / "lm" / "checkpoint-1"
    around = tmp_path / "out" / ".." / "out" / "lm" / "checkpoint-1"
    assert find_progress(tmp_path / "out", ["lm"], str(around)) == ([], checkpoint.resolve())
    # One of a stage before which another is not complete is no place to go on.
    shutil.copytree(checkpoint, tmp_path / "out" / "sft" / "checkpoint-1")
    with pytest.raises(ValueError, match="not where this run stopped"):
        find_progress(tmp_path / "out", ["lm", "sft"], str(tmp_path / "out" / "sft" / "checkpoint-1"))


def test_checkpoints_without_optimiser_are_not_gone_on_from(
    place: Path, tmp_path: Path, lm_then_sft: ModuleType
) -> None:
    run(lm_then_sft, arguments(place, tmp_path / "whole"))
    args = arguments(place, tmp_path / "out", "--save_only_model", "true")
    run(lm_then_sft, args)
    stop_after_one_step(tmp_path / "out")
    run(lm_then_sft, [*args, "--resume_from_checkpoint", "true"])
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("whole", "out")]
    assert differing(*map(state, models)) == []


@pytest.mark.parametrize("change", [("--seed", "7"), ("--max_length", "16"), ("--completion_only_loss", "false")])
def test_other_rows_are_another_run(
    change: tuple[str, str], place: Path, tmp_path: Path, lm_then_sft: ModuleType
) -> None:
    run(lm_then_sft, arguments(place, tmp_path / "out"))
    with pytest.raises(ValueError, match=f"holds another run: {change[0].removeprefix('--')} was"):
        run(lm_then_sft, arguments(place, tmp_path / "out", "--resume_from_checkpoint", "true", *change))


def test_a_kept_adapter_can_be_merged_later_and_back(place: Path, tmp_path: Path, lm_then_sft: ModuleType) -> None:
    args = arguments(place, tmp_path, "--use_peft", "--lora_r", 2)
    run(lm_then_sft, [*args, "--no_merge_adapter"])
    kept, args = {path.name for path in tmp_path.iterdir()}, [*args, "--resume_from_checkpoint", "true"]
    assert {"adapter_config.json", "adapter_model.safetensors"} < kept
    run(lm_then_sft, args)
    merged = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors"} < merged
    assert not any(name.startswith("adapter") for name in merged)
    run(lm_then_sft, [*args, "--no_merge_adapter"])
    assert not {"config.json", "model.safetensors"} & {path.name for path in tmp_path.iterdir()}


def save_weights(trainer: Any, folder: str) -> None:
    trainer.model.save_pretrained(folder)


def test_lora_begins_from_the_seed(place: Path, tmp_path: Path, lm_then_sft: ModuleType) -> None:
    for name in ("a", "b"):
        torch.manual_seed(ord(name))
        run(lm_then_sft, arguments(place, tmp_path / name, "--use_peft"))
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("a", "b")]
    assert differing(*map(state, models)) == []


def test_an_end_that_fails_leaves_no_checkpoint(
    place: Path, tmp_path: Path, lm_then_sft: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    args = arguments(place, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerBase, "save_pretrained", full)
        patch.setattr("cdmoe_plugin.recovery.CondensedSFTTrainer.save_model", save_weights)
        with pytest.raises(OSError, match="no space left"):
            run(lm_then_sft, [*args, "--save_strategy", "no"])
    assert not {"config.json", "model.safetensors"} & {path.name for path in tmp_path.iterdir()}
    run(lm_then_sft, [*args, "--resume_from_checkpoint", "true"])
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
    AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_second_recovery_keeps_the_record_of_the_first(place: Path, tmp_path: Path, lm_then_sft: ModuleType) -> None:
    run(lm_then_sft, arguments(place, tmp_path / "first"))
    run(lm_then_sft, arguments(place, tmp_path / "second", stages="sft", model=tmp_path / "first"))
    recorded = AutoModelForCausalLM.from_pretrained(tmp_path / "second").config.condense_config["recovery"]
    assert recorded == [summary(tmp_path / "first" / "lm"), summary(tmp_path / "second" / "sft")]


def test_loss_before_is_that_before_the_first_step(place: Path, tmp_path: Path, lm_then_sft: ModuleType) -> None:
    often = ("--eval_strategy", "steps", "--eval_steps", 1)
    run(lm_then_sft, arguments(place, tmp_path / "often", *often))
    stop_after_one_step(tmp_path / "often")  # the loss is measured again where the run goes on
    run(lm_then_sft, arguments(place, tmp_path / "often", *often, "--resume_from_checkpoint", "true"))
    run(lm_then_sft, arguments(place, tmp_path / "once"))
    assert summary(tmp_path / "often" / "lm") == summary(tmp_path / "once" / "lm")


def test_a_stage_that_diverges_is_not_complete(place: Path, tmp_path: Path, lm_then_sft: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"held-out loss of lm should be finite.*`--lm_learning_rate`"):
        run(lm_then_sft, arguments(place, tmp_path / "out", "--lm_learning_rate", 1e30))
    assert not (tmp_path / "out" / "lm" / "summary.json").exists()


def test_the_next_stage_begins_with_all_digits_of_the_last(tmp_path: Path) -> None:
    model = condensed_model().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "start")
    for parameter in condensed_parameters(model).values():
        parameter.data = parameter.data.float() * 1.001
    model.save_pretrained(tmp_path / "lm")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "start")
    make_trainer(opened, tmp_path / "sft").load_result(tmp_path / "lm")
    assert differing(*(dict(each.named_parameters()) for each in (model, opened))) == []


def test_tokens_are_counted_alike_whatever_pads(place: Path, tmp_path: Path, lm_then_sft: ModuleType) -> None:
    shutil.copytree(place / "condensed", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "model")
    run(lm_then_sft, arguments(place, tmp_path / "a", stages="lm,sft"))
    run(lm_then_sft, arguments(place, tmp_path / "b", stages="lm,sft", model=tmp_path / "model"))
    for stage in ("lm", "sft"):
        assert summary(tmp_path / "a" / stage)["tokens"] == summary(tmp_path / "b" / stage)["tokens"]


def test_what_a_tokenizer_lacks_is_said_first(place: Path, tmp_path: Path, lm_then_sft: ModuleType) -> None:
    args = arguments(place, tmp_path / "out", "--sft_dataset", place / "chat.json", stages="lm,sft")
    with pytest.raises(ValueError, match="no chat template"):
        run(lm_then_sft, args)
    assert not (tmp_path / "out").exists()
    *_, training, _, _ = lm_then_sft.make_parser().parse_args_and_config(args=[str(each) for each in args])
    tokenizer = word_tokenizer()
    chats, texts, ids = (load_stage_data("sft", dataset(rows)) for rows in ([{"messages": CHAT}], sft_rows(2), [IDS]))
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="--eos_token"):
        check_tokenizer("sft", texts, tokenizer, training)
    check_tokenizer("sft", ids, tokenizer, training)
    tokenizer.chat_template = "{{ messages }}"
    check_tokenizer("sft", chats, tokenizer, training)


IDS = {"input_ids": [5, 6, 7]}


def dataset(rows: list[dict[str, Any]]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(rows * 5)


def test_loss_on_answers_of_chats_is_for_the_second_stage(place: Path, tmp_path: Path, lm_then_sft: ModuleType) -> None:
    given = [str(each) for each in arguments(place, tmp_path, "--assistant_only_loss", "true")]
    args, training, *_ = lm_then_sft.make_parser().parse_args_and_config(args=given)
    stages = [lm_then_sft.stage_arguments(stage, args, training) for stage in ("lm", "sft")]
    assert [stage.assistant_only_loss for stage in stages] == [False, True]


@pytest.mark.parametrize(("named", "revision"), [(None, "v2"), ("elsewhere", "main")])
def test_revision_of_the_teacher(
    named: str | None, revision: str, place: Path, lm_then_sft: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}
    monkeypatch.setattr(lm_then_sft, "load_teacher_blocks", lambda *_, **kwargs: asked.update(kwargs))
    monkeypatch.setattr(lm_then_sft, "Distillation", lambda *_: None)
    more = ["--distillation", "blocks", "--model_revision", "v2"]
    more += [] if named is None else ["--teacher_name_or_path", named]
    given = [str(each) for each in arguments(place, place / "out", *more)]
    args, training, model_args, _ = lm_then_sft.make_parser().parse_args_and_config(args=given)
    lm_then_sft.open_teacher(condensed_model(), args, training, model_args)
    assert asked["revision"] == revision
