"""The command `cdmoe`: its options, its errors, and what it passes to accelerate and lm-eval."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from transformers import AutoModelForCausalLM

from cdmoe_plugin import CondenseConfig, CondensedLayer, CondensePlan, apply_plan
from cdmoe_plugin.scripts import condense, estimate, export, main, recover, recover_stages
from cdmoe_plugin.scripts.evaluate import lm_eval_arguments
from cdmoe_plugin.scripts.parsing import CONFIGS, Parser, given_fields
from tests.helpers.models import sparse_model
from tests.helpers.plans import some_plan
from tests.helpers.tiny_models import random_ids, tiny_model

PARSERS: dict[str, Callable[[], Parser]] = {
    "condense": condense.make_parser,
    "estimate": estimate.make_parser,
    "export": export.make_parser,
    "recover": recover_stages.make_parser,
}


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("sparse")
    tiny_model("qwen2_moe").save_pretrained(folder)
    return str(folder)


def run(*words: object) -> int:
    return main.main([str(word) for word in words])


# --- starting ---


@pytest.mark.parametrize("words", [["--help"], ["estimate", "--help"], ["plan", "--help"], ["plan", "show", "--help"]])
def test_help_does_not_import_torch(words: list[str]) -> None:
    program = f"""
import sys
from cdmoe_plugin.scripts.main import main
try:
    code = main({words})
except SystemExit as end:
    code = end.code
assert not {{"torch", "trl", "peft", "datasets", "lm_eval"}} & sys.modules.keys()
sys.exit(code)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: cdmoe")
    assert "\n  cdmoe " in done.stdout


def test_estimate_imports_one_architecture(tmp_path: Path) -> None:
    """transformers has hundreds, whose modules take seconds to import."""
    tiny_model("qwen2_moe").save_pretrained(tmp_path)
    program = f"""
import sys
from cdmoe_plugin.scripts.main import main
assert main(["estimate", "--model_name_or_path", {str(tmp_path)!r}, "--num_layers", "1", "--num_experts", "1"]) == 0
print(*(name for name in sys.modules if name.startswith("transformers.models.") and ".configuration_" in name))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    imported = done.stdout.splitlines()[-1].split()
    assert "transformers.models.qwen2_moe.configuration_qwen2_moe" in imported
    assert len(imported) < 40, imported


def test_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    assert run("condens") == 2
    said = capsys.readouterr()
    assert all(f"\n  {name}" in said.out for name in main.COMMANDS)
    assert "unknown command 'condens'" in said.err
    for name in main.COMMANDS:
        assert (Path(main.__file__).parent / f"{name}.py").exists()


# --- help and options ---


@pytest.mark.parametrize("name", PARSERS)
def test_help_explains_every_option_in_groups(name: str) -> None:
    parser = PARSERS[name]()
    text = parser.format_help()
    description, *groups = text.split("\n\n")[1:]
    assert description
    assert groups[0].startswith(f"  cdmoe {name} ")
    # What is in no group of its own is about the command line itself, or about none of the dataclasses.
    assert {action.dest for action in parser._optionals._group_actions} == {"help", "config"}
    unexplained = [a.dest for a in parser._actions if not a.help]
    assert unexplained == []
    for action in parser._actions:
        assert f"--{action.dest}" in text or action.dest == "help"
    assert "(default: None)" not in text


def test_values_of_a_file_and_of_the_command_line(tmp_path: Path) -> None:
    args, search = condense.make_parser().parse_args_and_config(["--config", "deepseek-moe-16b", "--num_experts", "2"])
    assert args.model_name_or_path == "deepseek-ai/deepseek-moe-16b-base"
    expected = {"num_layers": 9, "num_experts": 2, "num_samples": 100, "max_length": 512}
    assert given_fields(search) == expected
    (tmp_path / "own.yaml").write_text("model_name_or_path: x\nlayers: [3, 1]\nnum_experts: auto\nexpert_budget: 4\n")
    _, search = condense.make_parser().parse_args_and_config([f"--config={tmp_path / 'own.yaml'}", "--metric=kl"])
    assert given_fields(search) == {"layers": [3, 1], "num_experts": "auto", "expert_budget": 4, "metric": "kl"}


def test_two_checkpoints_are_kept_by_default() -> None:
    words = ["--model_name_or_path", "m", "--output_dir", "o", "--use_cpu", "--bf16", "false"]
    parse = recover_stages.make_parser().parse_args_and_config
    assert parse(words)[1].save_total_limit == 2
    assert parse([*words, "--save_total_limit", "none"])[1].save_total_limit is None


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_by_name(path: Path) -> None:
    name = "recover" if path.stem.startswith("recover-") else "condense"
    more = ["--use_cpu", "--bf16", "false"] if name == "recover" else []
    by_name, by_path = (PARSERS[name]().parse_args_and_config(["--config", x, *more]) for x in (path.stem, str(path)))
    assert [vars(each).keys() for each in by_name] == [vars(each).keys() for each in by_path]
    assert by_name[0] == by_path[0]
    if name == "condense":  # and the sizes of what it condenses
        args, budget = estimate.make_parser().parse_args_and_config(["--config", path.stem])
        assert args.model_name_or_path == by_name[0].model_name_or_path
        assert given_fields(budget).items() <= given_fields(by_name[1]).items()


def test_none_is_no_text() -> None:
    """As in TRL's parser: "all rows" can be asked for on the command line, and "none" can be a name."""
    words = ["--use_cpu", "--bf16", "false", "--lm_num_examples", "none", "--report_to", "none", "--plan", "none"]
    args, training, *_ = recover_stages.make_parser().parse_args_and_config(words)
    assert (args.lm_num_examples, args.plan, training.report_to) == (None, "none", [])


# --- errors ---


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["condense", "--num_layer", "2"], "unknown option --num_layer; did you mean --num_layers?"),
        (["condense", "--num-layer=2"], "unknown option --num-layer=2; did you mean --num-layers?"),
        (["condense", "--calib", "x"], "unknown option --calib"),  # not an abbreviation
        (["condense", "--model_name_or_path", "x", "there"], "unknown argument there"),
        (["condense"], "required: --model_name_or_path"),
        (["condense", "--model_name_or_path", "x", "--num_layers", "two"], "invalid int value: 'two'"),
        (["condense", "--config", "deepseek-moe"], "did you mean deepseek-moe-16b?"),
        (["condense", "--config"], "--config: expected one argument"),
        (["estimate", "--config", "{typo}"], "key 'num_expert', which is no option; did you mean num_experts?"),
        (["estimate", "--config", "{broken}"], "is no YAML file"),
        (["estimate", "--config", "{list}"], "should hold options"),
        (["estimate", "--model_name_or_path", "{sparse}", "--num_layers", "99"], "`num_layers` is 99"),
        (["estimate", "--model_name_or_path", "{list}/missing"], "missing"),
        (["export", "{sparse}"], "`--output_dir` is needed"),
        (["export", "{sparse}", "--output_dir", "{new}"], "is not condensed"),
        (
            ["export", "{sparse}", "--output_dir", "{new}", "--to", "onnx"],
            "but only 'stock', 'dense', 'gguf', 'top_k' exist",
        ),
        (["export", "{sparse}", "--output_dir", "{new}", "--seed", "1"], "Without `--approximate`, ['seed']"),
        (["plan", "show", "{new}"], "No such file or directory: "),
        (["plan", "show", "{list}"], "is not a valid condense plan"),
        (["plan", "merge"], "`cdmoe plan merge` does not exist"),
        (["plan", "truncate", "{plan}", "--output_file", "{new}"], "`--num_experts` or `--target_size` is needed"),
        (["plan", "truncate", "{plan}", "--num_layers", "9", "--output_file", "{new}"], "between 1 and the plan's 2"),
    ],
)
def test_user_errors_are_one_line(
    words: list[str], message: str, sparse: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "typo.yaml").write_text("model_name_or_path: x\nnum_samples: 3\nnum_expert: 2\n")
    (tmp_path / "broken.yaml").write_text("a: [")
    (tmp_path / "list.yaml").write_text("[1]")
    some_plan([1, 2]).save(tmp_path / "plan.json")
    places = {name: str(tmp_path / f"{name}.yaml") for name in ("typo", "broken", "list")}
    places |= {"sparse": sparse, "new": str(tmp_path / "new"), "plan": str(tmp_path / "plan.json")}
    assert run(*(word.format(**places) for word in words)) == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith(f"cdmoe {words[0]}: error: ")
    assert message in line
    assert not (tmp_path / "new").exists()


def fail(error: BaseException) -> Callable[[], None]:
    def command() -> None:
        raise error

    return command


def bug_in_a_library() -> None:
    torch.zeros(2).view(3, 5)
    json.loads("{")  # a ValueError, too


@pytest.mark.parametrize("bug", [bug_in_a_library, fail(ValueError("bug")), fail(ModuleNotFoundError(name="torch.x"))])
def test_bugs_keep_their_traceback(bug: Callable[[], None], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((RuntimeError, ValueError, ModuleNotFoundError)):
        main.run_command("condense", bug)
    assert capsys.readouterr().err == ""


def test_debug_shows_every_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CDMOE_DEBUG", "1")
    with pytest.raises(ValueError, match="unknown option"):
        run("estimate", "--num_layer", 1)


@pytest.mark.parametrize(
    ("library", "extra"), [("trl", "recipes"), ("datasets", "calibration"), ("lm_eval", "lm-eval")]
)
def test_missing_extras_are_named(
    library: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setitem(sys.modules, f"{library}.models", None)

    def command() -> None:
        __import__(library)

    assert main.run_command("recover", command) == 2
    assert f"{library}, which is not installed: pip install 'cdmoe_plugin[{extra}]'" in capsys.readouterr().err


def test_the_main_process_speaks_first(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    waited: list[float] = []
    monkeypatch.setattr(main.time, "sleep", waited.append)
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert main.run_command("recover", fail(FileNotFoundError(2, "No such file", "x"))) == 2
        assert len(waited) == int(rank)
    assert capsys.readouterr().err == "cdmoe recover: error: No such file: x\n" * 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--num_layers", "2", "--state_dir", "{tmp}/state"],
            "results so far are in {tmp}/state; the same command goes on",
        ),
        (["--num_layers", "2", "--state_dir", "{tmp}/new"], "no results of the search yet; run the same command again"),
        (["--plan", "{tmp}/plan.json"], "Nothing was saved"),
    ],
)
def test_interrupted(
    more: list[str],
    message: str,
    sparse: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(main.signal, "signal", lambda *_: None)
    monkeypatch.setattr("cdmoe_plugin.api.condense_pretrained", lambda *_, **__: fail(KeyboardInterrupt())())
    some_plan([1]).save(tmp_path / "plan.json")
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "search_state.json").write_text("{}")
    words = ["--model_name_or_path", sparse, "--output_dir", tmp_path / "out", *more]
    assert run("condense", *(str(word).format(tmp=tmp_path) for word in words)) == 130
    assert message.format(tmp=tmp_path) in capsys.readouterr().err


# --- other programs' options ---


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        ("--tasks piqa", "run --model cdmoe --tasks piqa"),
        ("run --tasks piqa", "run --model cdmoe --tasks piqa"),
        ("--model hf --tasks piqa", "run --model hf --tasks piqa"),
        ("--model=hf", "run --model=hf"),
        ("--config x.yaml", "run --config x.yaml"),
        ("ls tasks", "ls tasks"),
        ("", "run --model cdmoe --help"),
    ],
)
def test_arguments_for_lm_eval(given: str, passed: str) -> None:
    assert lm_eval_arguments(given.split()) == passed.split()


def test_arguments_for_accelerate() -> None:
    own = ["--model_name_or_path", "x", "--gradient_accumulation_steps", "4", "--max_steps", "-1", "--bf16=false"]
    args = recover.split_arguments(["--num_processes", "2", *own[:4], "--config_file", "fsdp.yaml", *own[4:], "--cpu"])
    assert (args.num_processes, args.config_file, args.cpu) == (2, "fsdp.yaml", True)
    assert (args.module, args.training_script) == (True, "cdmoe_plugin")
    assert args.training_script_args == ["recover", *own]


def test_options_that_accelerate_has_too() -> None:
    ours, theirs = (each._option_string_actions for each in (recover_stages.make_parser(), launch_command_parser()))
    assert ours.keys() & theirs.keys() == {"-h", "--help", *recover.SHARED}


# --- commands ---


def test_estimate_is_the_dry_run(sparse: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    some_plan([1, 2]).save(tmp_path / "plan.json")
    for more in (["--num_layers", 2, "--num_experts", 3], ["--plan", tmp_path / "plan.json", "--num_layers", 1]):
        assert run("estimate", "--model_name_or_path", sparse, *more) == 0
        table = capsys.readouterr().out
        assert run("condense", "--model_name_or_path", sparse, *more, "--dry_run") == 0
        assert capsys.readouterr().out == table
        assert f"{tiny_model('qwen2_moe').num_parameters():,}" in table


def test_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = apply_plan(sparse_model("qwen3_moe"), some_plan([1, 3]))
    model.save_pretrained(tmp_path / "condensed")
    assert run("export", tmp_path / "condensed", "--output_dir", tmp_path / "stock", "--to", "stock") == 0
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    assert type(stock).__name__ == "Qwen3MoeForCausalLM"
    assert f"as qwen3_moe: {stock.num_parameters():,} parameters" in capsys.readouterr().out
    ids = torch.tensor(random_ids()[:1])
    with torch.no_grad():
        torch.testing.assert_close(stock(ids).logits, model.eval()(ids).logits)


def plan(*layers: tuple[int, list[int], list[float]]) -> CondensePlan:
    return CondensePlan([CondensedLayer(*layer) for layer in layers])


def test_plan_show_and_truncate(tmp_path: Path, sparse: str, capsys: pytest.CaptureFixture[str]) -> None:
    from cdmoe_plugin import search_plan

    config = CondenseConfig(num_layers=2, num_experts=3)
    found = search_plan(AutoModelForCausalLM.from_pretrained(sparse), config, calibration=random_ids())
    found.save(tmp_path / "plan.json")
    capsys.readouterr()
    assert run("plan", "show", tmp_path / "plan.json") == 0
    said = capsys.readouterr().out
    shape = found.model.sparse_layers[0]  # type: ignore[union-attr]
    before = shape.num_experts * shape.intermediate_size + shape.shared_intermediate_size
    after = 3 * shape.intermediate_size + shape.shared_intermediate_size
    row = next(line for line in said.splitlines() if f"{before}" in line and line.startswith("|"))
    assert [cell.strip() for cell in row.split("|")[2:4]] == [str(before), str(after)]
    assert ", ".join(map(str, found.layers[0].experts)) in said
    for name in ("qwen2_moe", "num_experts=3", "token ids"):
        assert name in said
    small = tmp_path / "small.json"
    assert run("plan", "truncate", tmp_path / "plan.json", "--num_layers", 1, "--output_file", small) == 0
    assert CondensePlan.load(small) == found.truncate(num_layers=1)


def test_plan_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan((4, [1, 2], [0.5, 0.25]), (2, [0], [1.0]), (3, [5], [0.1]), (9, [0], [1.0])).save(tmp_path / "a.json")
    plan((4, [2, 7], [0.75, 0.25]), (2, [3], [1.0]), (9, [0], [1.0])).save(tmp_path / "b.json")
    assert run("plan", "compare", tmp_path / "a.json", tmp_path / "b.json") == 0
    said = capsys.readouterr().out
    assert "Layers: 4 and 3, 3 in common; the first 2 are the same, in the same order." in said
    assert "Among the first 3 of both, 2 are the same in any order." in said
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if line.startswith("|")]
    assert rows[2:] == [["4", "2", "2", "1", "5.000e-01"], ["2", "1", "1", "0", ""], ["9", "1", "1", "1", "0.000e+00"]]
    plan((1, [0], [1.0])).save(tmp_path / "c.json")
    assert run("plan", "compare", tmp_path / "a.json", tmp_path / "c.json") == 0
    assert "0 in common" in capsys.readouterr().out


def test_no_abbreviations() -> None:
    parsers: list[argparse.ArgumentParser] = [make() for make in PARSERS.values()]
    assert not any(parser.allow_abbrev for parser in parsers)
    options: Any = condense.make_parser()._option_string_actions
    assert "--calib" not in options
