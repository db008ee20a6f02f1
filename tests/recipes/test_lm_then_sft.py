"""recipes/lm_then_sft.py as a user would call it: both stages, resumed, in two processes, with adapters, in 4 bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cdmoe_plugin import CondensePlan, apply_plan
from cdmoe_plugin.recovery import condensed_parameters
from tests.helpers.models import build
from tests.helpers.plans import some_plan
from tests.helpers.programs import Programs
from tests.helpers.recovery import RECIPES, lm_then_sft, run, word_tokenizer, write_data
from tests.helpers.states import differing, state
from tests.helpers.tiny_models import tiny_model

__all__ = ["lm_then_sft"]  # a fixture

RECIPE = RECIPES / "lm_then_sft.py"
COMMON = ["--use_cpu", "--bf16=false", "--max_length=32", "--learning_rate=1e-2", "--report_to=none"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse model and its condensed form with a tokenizer, a plan, and data for both stages."""
    folder = tmp_path_factory.mktemp("recovery")
    write_data(folder)
    sparse = build("deepseek", num_experts=8, hidden_size=64, expert_width=64, shared_width=64)
    sparse.save_pretrained(folder / "sparse")
    plan = some_plan([1, 3])
    plan.save(folder / "plan.json")
    apply_plan(sparse, plan).save_pretrained(folder / "condensed")
    for name in ("sparse", "condensed"):
        word_tokenizer().save_pretrained(folder / name)
    return folder


def arguments(place: Path, output: Path, *more: object, model: str = "condensed", batch: int = 4) -> list[str]:
    data = ["--lm_dataset", place / "lm.jsonl", "--sft_dataset", place / "sft.json", "--num_held_out", 6]
    given = ["--model_name_or_path", place / model, "--output_dir", output, "--per_device_train_batch_size", batch]
    kept = ["--save_total_limit", 10]  # the tests go back to earlier checkpoints than the two that are kept by default
    return [str(each) for each in (*given, *data, *COMMON, "--disable_tqdm=true", *kept, *more)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def trained_names(folder: Path) -> list[str]:
    return sorted(condensed_parameters(AutoModelForCausalLM.from_pretrained(folder)))


@pytest.fixture(scope="module")
def whole(place: Path, lm_then_sft: ModuleType) -> Path:
    """An unbroken run of both stages."""
    run(lm_then_sft, arguments(place, place / "whole", "--save_steps", 2))
    return place / "whole"


def test_both_stages(whole: Path, place: Path, lm_then_sft: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert differing(weights(place / "condensed"), weights(whole)) == trained_names(whole)
    # The stages' own checkpoints hold the same frozen weights, bit by bit.
    for checkpoint in (*whole.glob("lm/checkpoint-*"), *whole.glob("sft/checkpoint-*")):
        assert differing(weights(place / "condensed"), weights(checkpoint)) == trained_names(whole)
    for name in ("config.json", "generation_config.json", "condense_plan.json"):
        before, after = (json.loads((folder / name).read_text()) for folder in (place / "condensed", whole))
        after.get("condense_config", {}).pop("recovery", None)
        assert before == after
    assert len(AutoTokenizer.from_pretrained(whole)) == 104

    run(lm_then_sft, arguments(place, whole, "--resume_from_checkpoint", "true"))  # nothing is left to do
    lines = [line for line in capsys.readouterr().out.splitlines() if "held-out" in line]
    for line, stage in zip(lines, ("lm", "sft"), strict=True):
        summary = json.loads((whole / stage / "summary.json").read_text())
        assert summary["held_out_after"] < summary["held_out_before"] - 0.1
        assert summary["trained"] == sum(weights(whole)[name].numel() for name in trained_names(whole))
        assert line.startswith(f"{stage}: held-out loss {summary['held_out_before']:.4f} -> ")
        assert f"{summary['tokens']:,} tokens seen" in line
        history = json.loads((whole / stage / "trainer_state.json").read_text())["log_history"]
        assert next(entry["eval_loss"] for entry in history if "eval_loss" in entry) == summary["held_out_before"]
    assert "8 rows dropped for their length" in lines[1]


def test_card_tells_of_the_recovery(whole: Path) -> None:
    card = (whole / "README.md").read_text()
    summary = json.loads((whole / "sft" / "summary.json").read_text())
    assert f"{summary['held_out_before']:.4f}" in card
    assert f"{summary['held_out_after']:.4f}" in card


def kill_when(path: Path, args: list[str], programs: Programs) -> None:
    """Runs the recipe until a file is there, and kills it."""
    process = subprocess.Popen([programs.python, RECIPE, *args], env=programs.environment, start_new_session=True)
    end = time.monotonic() + 120
    while not path.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    assert process.poll() is None, "the run ended before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_killed_and_resumed(
    whole: Path, place: Path, tmp_path: Path, lm_then_sft: ModuleType, programs: Programs
) -> None:
    args = arguments(place, tmp_path / "out", "--save_steps", 2, "--resume_from_checkpoint", "true")
    kill_when(tmp_path / "out" / "lm" / "checkpoint-4" / "trainer_state.json", args, programs)
    kill_when(tmp_path / "out" / "sft" / "checkpoint-2" / "trainer_state.json", args, programs)
    run(lm_then_sft, args)
    assert differing(weights(whole), weights(tmp_path / "out")) == []
    for stage in ("lm", "sft"):
        one, other = (json.loads((f / stage / "summary.json").read_text()) for f in (whole, tmp_path / "out"))
        assert one == other


def test_resumed_from_a_checkpoint_by_name(whole: Path, place: Path, tmp_path: Path, lm_then_sft: ModuleType) -> None:
    import shutil

    shutil.copytree(whole, tmp_path / "out")
    # A checkpoint that was being written when the run ended is passed over.
    (tmp_path / "out" / "sft" / "checkpoint-4" / "trainer_state.json").write_text("{")
    for path in (tmp_path / "out" / "sft").iterdir():
        if path.is_file():
            path.unlink()
    named = tmp_path / "out" / "sft" / "checkpoint-2"
    with pytest.raises(ValueError, match=r"trained later: .*checkpoint-4"):
        run(lm_then_sft, arguments(place, tmp_path / "out", "--resume_from_checkpoint", named))
    run(lm_then_sft, arguments(place, tmp_path / "out", "--resume_from_checkpoint", "true"))
    assert differing(weights(whole), weights(tmp_path / "out")) == []


@pytest.mark.slow
@pytest.mark.parametrize("searched", [False, True])
def test_two_processes_give_what_one_gives(
    searched: bool, whole: Path, place: Path, tmp_path: Path, lm_then_sft: ModuleType, programs: Programs
) -> None:
    """A condensed checkpoint through both stages; or a base model, whose search they share, with itself as teacher."""
    one, more, stages = whole, [], ["lm", "sft"]
    if searched:
        one, stages = tmp_path / "one", ["lm"]
        more = ["--stages", "lm", "--distillation", "logits", "--calibration", place / "lm.jsonl"]
        more += ["--condense_num_layers", 2, "--condense_num_experts", 2, "--condense_batch_size", 4]
    model = "sparse" if searched else "condensed"
    if searched:
        run(lm_then_sft, arguments(place, one, *more, model=model))
    launch = [programs.python, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    args = arguments(place, tmp_path / "two", *more, "--log_level", "info", model=model, batch=2)
    environment = {**programs.environment, "ACCELERATE_USE_CPU": "1"}
    result = subprocess.run([*launch, RECIPE, *args], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "2 processes" in result.stdout
    assert result.stdout.count("Saved to") == 1
    assert ("2 processes share the search." in result.stdout) == searched
    if searched:  # to the last bit: sums are over the same batches in the same order
        plans, starts = (
            [f(each / "condensed") for each in (one, tmp_path / "two")] for f in (CondensePlan.load, weights)
        )
        assert plans[0] == plans[1]
        assert differing(*starts) == []
    a, b = weights(one), weights(tmp_path / "two")
    frozen = set(a) - set(trained_names(one))
    assert all(torch.equal(a[name], b[name]) for name in frozen)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=2e-5)
    for stage in stages:
        summaries = [json.loads((folder / stage / "summary.json").read_text()) for folder in (one, tmp_path / "two")]
        assert summaries[0].pop("stage") == summaries[1].pop("stage") == stage
        assert summaries[0] == pytest.approx(summaries[1], rel=1e-5)


def test_base_model_with_a_plan_or_a_search(place: Path, tmp_path: Path, lm_then_sft: ModuleType) -> None:
    few = ("--stages", "lm", "--max_steps", 1)
    run(lm_then_sft, arguments(place, tmp_path / "a", *few, "--plan", place / "plan.json", model="sparse"))
    assert differing(weights(place / "condensed"), weights(tmp_path / "a" / "condensed")) == []
    assert not (tmp_path / "a" / "sft").exists()
    search = ("--condense_num_layers", 1, "--condense_num_experts", 2, "--calibration", place / "lm.jsonl")
    run(lm_then_sft, arguments(place, tmp_path / "b", *few, *search, model="sparse"))
    plan = CondensePlan.load(tmp_path / "b")
    # Killed after the search, a run does not search again.
    results = json.loads((tmp_path / "b" / "search" / "search_state.json").read_text())["results"]
    assert {name for name in results if name.startswith("experts")} == {"experts 1", "experts 2", "experts 3"}
    assert [len(layer.experts) for layer in plan.layers] == [2]
    assert plan.calibration is not None
    assert plan.calibration["source"] == str(place / "lm.jsonl")


@pytest.mark.parametrize("more", [(), ("--load_in_4bit",), ("--load_in_8bit",)])
def test_lora_merged_and_kept(more: tuple[str, ...], place: Path, tmp_path: Path, lm_then_sft: ModuleType) -> None:
    few = ("--max_steps", 2, "--use_peft", "--lora_r", 2, *more)
    run(lm_then_sft, arguments(place, tmp_path / "merged", *few))
    run(lm_then_sft, arguments(place, tmp_path / "kept", *few, "--no_merge_adapter"))
    ids = torch.tensor([[5, 9, 33, 71, 18]])
    with torch.no_grad():
        start = AutoModelForCausalLM.from_pretrained(place / "condensed")(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
        for auto_class in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
            kept = auto_class.from_pretrained(tmp_path / "kept")(ids).logits
            torch.testing.assert_close(merged, kept, rtol=1e-4, atol=1e-4)
    assert (merged - start).abs().max() > 1e-2
    projections = [name for name in trained_names(tmp_path / "merged") if "proj" in name]
    assert differing(weights(place / "condensed"), weights(tmp_path / "merged")) == projections


@pytest.mark.parametrize("bits", ["--load_in_4bit", "--load_in_8bit"])
def test_rest_quantised_while_training(bits: str, place: Path, tmp_path: Path, lm_then_sft: ModuleType) -> None:
    run(lm_then_sft, arguments(place, tmp_path / "out", bits, "--optim", "paged_adamw_8bit"))
    # What comes out is the whole checkpoint in its own precision.
    assert differing(weights(place / "condensed"), weights(tmp_path / "out")) == trained_names(tmp_path / "out")
    for stage in ("lm", "sft"):
        summary = json.loads((tmp_path / "out" / stage / "summary.json").read_text())
        assert summary["held_out_after"] < summary["held_out_before"] - 0.1


def test_checkpoint_keeps_its_dtype(place: Path, tmp_path: Path, lm_then_sft: ModuleType) -> None:
    model = apply_plan(tiny_model("qwen2_moe", num_experts=8).to(torch.bfloat16), some_plan([1, 2, 3]))
    model.save_pretrained(tmp_path / "half")
    word_tokenizer().save_pretrained(tmp_path / "half")
    args = arguments(place, tmp_path / "out", "--stages", "sft", "--bf16", "true")
    args[args.index("--model_name_or_path") + 1] = str(tmp_path / "half")
    run(lm_then_sft, args)
    recovered = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert recovered.dtype == torch.bfloat16
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert differing(state(start), state(recovered)) == trained_names(tmp_path / "out")


@pytest.mark.parametrize("target", ["logits", "blocks"])
def test_distillation(target: str, place: Path, tmp_path: Path, lm_then_sft: ModuleType) -> None:
    teacher = ("--distillation", target, "--teacher_name_or_path", place / "sparse", "--logging_steps", 1)
    run(lm_then_sft, arguments(place, tmp_path / "out", *teacher))
    assert differing(weights(place / "condensed"), weights(tmp_path / "out")) == trained_names(tmp_path / "out")
    histories = [json.loads((tmp_path / "out" / s / "trainer_state.json").read_text()) for s in ("lm", "sft")]
    logged = [any("distillation" in entry for entry in history["log_history"]) for history in histories]
    assert logged == [True, False]


def recorded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).config.condense_config.get("recovery")


def test_config_remembers_the_stages(whole: Path) -> None:
    assert recorded(whole) == [json.loads((whole / s / "summary.json").read_text()) for s in ("lm", "sft")]
