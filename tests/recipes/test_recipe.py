"""recipes/condense.py: search, plan and dry run on a small checkpoint, as a user would call it."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from itertools import count
from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from cdmoe_plugin import CondenseConfig, CondensePlan
from cdmoe_plugin.scripts import condense
from tests.helpers.killing import dying_before
from tests.helpers.killing import run as run_process
from tests.helpers.plans import some_plan
from tests.helpers.recovery import WORDS, word_tokenizer
from tests.helpers.tiny_models import tiny_model

RECIPE = Path(__file__).parents[2] / "recipes" / "condense.py"


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    return condense


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse model with a tokenizer of 100 words, and calibration text beside it."""
    folder = tmp_path_factory.mktemp("sparse")
    tiny_model("qwen2_moe").save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    texts = [" ".join(WORDS[(7 * i + j * j) % 100] for j in range(10 + i)) for i in range(20)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def run(recipe: ModuleType, *arguments: object) -> None:
    args, search = recipe.make_parser().parse_args_and_config(args=[str(a) for a in arguments])
    recipe.run(args, {name: value for name, value in vars(search).items() if value is not None})


def test_trimming(recipe: ModuleType, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = ("--model_name_or_path", checkpoint, "--calibration", checkpoint / "texts.jsonl", "--num_layers", 2)
    how = ("--form", "trim_block", "--layer_selection", "similarity")
    run(recipe, *start, *how, "--dry_run")
    dry = capsys.readouterr().out
    run(recipe, *start, *how, "--output_dir", tmp_path / "blocks")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "blocks")
    assert (type(model).__name__, model.config.num_hidden_layers) == ("Qwen2MoeForCausalLM", 2)
    assert f"{model.num_parameters():,}" in dry
    assert "2 layers dropped" in dry
    plan = CondensePlan.load(tmp_path / "blocks")
    assert plan.form == "trim_block"
    assert plan.layer_similarities is not None

    base = ("--model_name_or_path", checkpoint, "--plan", tmp_path / "blocks", "--num_layers", 1)
    run(recipe, *base, "--form", "trim_layer", "--output_dir", tmp_path / "mlps")
    assert CondensePlan.load(tmp_path / "mlps") == plan.truncate(num_layers=1).as_trimming("trim_layer")
    trimmed = AutoModelForCausalLM.from_pretrained(tmp_path / "mlps")
    assert type(trimmed).__name__ == "CDMoEQwen2MoeForCausalLM"
    with pytest.raises(ValueError, match="'trim_layer' or 'trim_block'"):
        run(recipe, *base, "--form", "condense", "--output_dir", tmp_path / "none")


def test_search_and_save_from_a_config_file(recipe: ModuleType, checkpoint: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model_name_or_path: {checkpoint}\ncalibration: {checkpoint / 'texts.jsonl'}\nnum_layers: 3\nnum_experts: 2\n"
    )
    run(
        recipe,
        "--config",
        config,
        "--num_layers",
        2,
        "--output_dir",
        tmp_path / "out",
        "--state_dir",
        tmp_path / "state",
    )
    assert json.loads((tmp_path / "state" / "search_state.json").read_text())["results"]
    plan = CondensePlan.load(tmp_path / "out")
    assert [len(layer.experts) for layer in plan.layers] == [2, 2]
    assert plan.calibration is not None
    assert plan.calibration["num_samples"] == 20
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "CDMoEQwen2MoeForCausalLM"
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 104
    assert plan.config == {**CondenseConfig().to_dict(), "num_layers": 2, "num_experts": 2}

    run(recipe, "--model_name_or_path", checkpoint, "--plan", tmp_path / "out", "--output_dir", tmp_path / "again")
    assert CondensePlan.load(tmp_path / "again") == plan
    smaller = ("--num_layers", 1, "--num_experts", 0, "--output_dir", tmp_path / "smaller")
    run(recipe, "--model_name_or_path", checkpoint, "--plan", tmp_path / "out", *smaller)
    assert CondensePlan.load(tmp_path / "smaller") == plan.truncate(num_layers=1, num_experts=0)


def test_a_plan_with_a_refit(recipe: ModuleType, checkpoint: Path, tmp_path: Path) -> None:
    some_plan([1, 2]).save(tmp_path / "plan.json")
    given = ("--model_name_or_path", checkpoint, "--plan", tmp_path / "plan.json", "--refit", "down_proj")
    data = ("--calibration", checkpoint / "texts.jsonl", "--num_samples", 12)
    run(recipe, *given, *data, "--output_dir", tmp_path / "out")
    noted = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.condense_config
    assert (noted["refit"], set(noted["refit_errors"])) == ("down_proj", {"1", "2"})
    with pytest.raises(ValueError, match=r"no search: \['metric'\]"):
        run(recipe, *given, *data, "--metric", "kl", "--output_dir", tmp_path / "other")


def test_dry_run_needs_the_config_alone(
    recipe: ModuleType, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    run(recipe, "--model_name_or_path", tmp_path, "--dry_run", "--num_layers", 2, "--num_experts", 3)
    before = tiny_model("qwen2_moe").num_parameters()
    # Of 8 experts with 3 * 32 * 16 weights each, 5 go, and the router of 8 * 32; in two layers.
    after = before - 2 * (5 * 3 * 32 * 16 + 8 * 32)
    table = capsys.readouterr().out
    assert f"{before:,}" in table
    assert f"{after:,}" in table
    assert f"{1 - after / before:.1%}" in table


def test_dry_run_refuses_a_condensed_checkpoint(recipe: ModuleType, checkpoint: Path, tmp_path: Path) -> None:
    calibration = ("--calibration", checkpoint / "texts.jsonl", "--layers", 1, "--num_experts", 1)
    run(recipe, "--model_name_or_path", checkpoint, *calibration, "--output_dir", tmp_path / "out")
    with pytest.raises(ValueError, match="condensed already"):
        run(recipe, "--model_name_or_path", tmp_path / "out", "--dry_run", "--num_layers", 1)


def test_deepseek_moe_16b_as_in_the_paper(
    recipe: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "vocab_size": 102400}
    experts = {"n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1}
    heads = {"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 16}
    config = {"model_type": "deepseek", "torch_dtype": "bfloat16", **sizes, **experts, **heads}
    (tmp_path / "config.json").write_text(json.dumps(config))
    run(recipe, "--model_name_or_path", tmp_path, "--dry_run")
    table = capsys.readouterr().out
    for figure in ("16.38 B", "11.86 B", "27.6%", "30.50 GiB", "22.09 GiB"):
        assert figure in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output_dir", "{full}"], "not an empty folder"),
        ([], "--output_dir"),
        (["--output_dir", "{new}", "--num_experts", "9"], "num_experts"),
        (["--output_dir", "{new}", "--metric", "cosine"], "'js', 'kl', 'mse'"),
        (["--output_dir", "{new}", "--calibration", "missing.jsonl"], "does not exist"),
    ],
)
def test_bad_requests_leave_nothing(
    recipe: ModuleType, checkpoint: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    full, new = tmp_path / "full", tmp_path / "new"
    full.mkdir()
    (full / "precious.txt").write_text("mine")
    places = {"full": full, "new": new}
    with pytest.raises(ValueError, match=message):
        run(recipe, "--model_name_or_path", checkpoint, "--num_layers", 2, *(a.format(**places) for a in arguments))
    assert not new.exists()
    assert [file.name for file in full.iterdir()] == ["precious.txt"]


@pytest.mark.parametrize("form", ["condense", "trim_block"])
def test_killed_while_it_saves(recipe: ModuleType, checkpoint: Path, tmp_path: Path, form: str) -> None:
    (tmp_path / "empty").mkdir()
    some_plan([1, 2]).save(tmp_path / "plan.json")
    start = ("--model_name_or_path", checkpoint, "--plan", tmp_path / "plan.json", "--form", form)
    for name in ("empty", "new"):
        output = tmp_path / name
        for moment in count():
            action = partial(run, recipe, *start, "--output_dir", output)
            if run_process(dying_before(moment, action, frozenset({"os.rename"}))) == 0:
                break
            assert not (output / "config.json").exists()
        assert moment > 0
        AutoModelForCausalLM.from_pretrained(output)
        assert len(AutoTokenizer.from_pretrained(output)) > 100
        assert len(CondensePlan.load(output).layers) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "new", "plan.json"}


def test_unknown_keys_of_a_config_file_are_refused(recipe: ModuleType, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"model_name_or_path: {checkpoint}\nnum_expert: 2\n")
    with pytest.raises(ValueError, match="num_expert"):
        run(recipe, "--config", tmp_path / "config.yaml")


@pytest.mark.slow
def test_help_explains_every_field() -> None:
    result = subprocess.run([sys.executable, RECIPE, "--help"], capture_output=True, text=True, check=True)
    for name in ("output_dir", "plan", "calibration", "dry_run", *CondenseConfig.__dataclass_fields__):
        assert f"--{name}" in result.stdout
    assert "(default: 9)" in result.stdout
    assert "(default: None)" not in result.stdout
