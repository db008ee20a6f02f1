"""A finished search costs nothing twice: errors come before it, and its plan outlives a save that fails."""

from __future__ import annotations

import errno
import json
from collections import namedtuple
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from cdmoe_plugin import CondensePlan, condense_pretrained
from cdmoe_plugin.integrations.lm_eval_model import CDMoELM
from cdmoe_plugin.scripts import folders, main, recover_stages
from cdmoe_plugin.search.plan_search import PlanSearch
from tests.helpers.plans import some_plan
from tests.helpers.recovery import lm_rows, word_tokenizer
from tests.helpers.tiny_models import tiny_model

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse model with a tokenizer and texts."""
    folder = tmp_path_factory.mktemp("sparse")
    tiny_model("qwen2_moe").save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    (folder / "texts.txt").write_text("\n".join(row["text"] for row in lm_rows(12)))
    return folder


def condense(sparse: Path, *more: object) -> int:
    start = ("--model_name_or_path", sparse, "--calibration", sparse / "texts.txt")
    small = ("--num_layers", 2, "--num_experts", 2, "--num_samples", 4)
    return main.main(["condense", *map(str, (*start, *small, *more))])


@pytest.mark.parametrize("stop", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_save_that_fails(
    stop: BaseException,
    sparse: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output, state = tmp_path / "out", tmp_path / "out.search"

    def fail(*_args: object, **_kwargs: object) -> None:
        raise stop

    monkeypatch.setattr(main.signal, "signal", lambda *_: None)
    with monkeypatch.context() as patched:
        patched.setattr("safetensors.torch.save_file", fail)
        patched.setattr("transformers.modeling_utils.safe_save_file", fail)
        assert condense(sparse, "--output_dir", output) == (130 if isinstance(stop, KeyboardInterrupt) else 2)
    said = capsys.readouterr().err
    assert f"The search is done and its plan is in {state}" in said
    assert "Traceback" not in said
    assert not output.exists()
    plan = CondensePlan.load(state)

    monkeypatch.setattr(PlanSearch, "_experts_of", fail)  # nothing is searched again
    assert condense(sparse, "--output_dir", output) == 0
    assert CondensePlan.load(output) == plan
    assert not state.exists()


def test_a_named_state_folder_stays(sparse: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    assert condense(sparse, "--output_dir", tmp_path / "out", "--state_dir", state) == 0
    assert CondensePlan.load(state) == CondensePlan.load(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "state"]


def test_other_files_in_the_default_state_folder_stay(sparse: Path, tmp_path: Path) -> None:
    (tmp_path / "out.search").mkdir()
    (tmp_path / "out.search" / "notes.txt").write_text("mine")
    assert condense(sparse, "--output_dir", tmp_path / "out") == 0
    assert [path.name for path in (tmp_path / "out.search").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--output_dir", "{tmp}/file"], "`--output_dir` {tmp}/file is a file"),
        (["--output_dir", "{tmp}/file/out"], "`--output_dir` {tmp}/file/out can't be written to: Not a directory"),
        (["--output_dir", "{tmp}/out", "--state_dir", "{tmp}/file/s"], "`--state_dir` {tmp}/file/s can't be written"),
        (["--output_dir", "{tmp}/out", "--offload_folder", "{tmp}/out"], "should not lie in each other"),
        (["--output_dir", "{tmp}/out", "--offload_folder", "{tmp}/file/o"], "`--offload_folder` {tmp}/file/o can't be"),
        (["--output_dir", "{tmp}/out", "--offload_folder", "{tmp}/o", "--max_memory", "0=1GB"], "`--max_memory` does"),
        (["--output_dir", "{tmp}/out", "--max_memory", "0:1GB"], "0=40GiB cpu=100GiB, but has '0:1GB'"),
        (
            ["--output_dir", "{tmp}/out", "--max_memory", "cpu=1GB", "99=1GB"],
            "but there is no device '99' here",
        ),
        (["--output_dir", "{tmp}/out", "--max_memory", "gpu=1GB"], "has 'gpu=1GB', but there is no device 'gpu' here"),
        (["--output_dir", "{tmp}/out", "--max_memory", "cpu=9KB"], "Please provide an `offload_folder`"),
        (["--output_dir", "{tmp}/out", "--max_shard_size", "5"], "`--max_shard_size` should be a size such as 5GB"),
        (["--output_dir", "{tmp}/out", "--max_shard_size", "0GB"], "or 500MB, but is '0GB'"),
        (["--output_dir", "{tmp}/out", "--device_map", "xpu:1"], "`--device_map` is 'xpu:1', but torch"),
        (
            ["--output_dir", "{tmp}/out", "--attn_implementation", "fast"],
            "`attn_implementation` is 'fast', which can't",
        ),
        (["--output_dir", "{tmp}/out", "--layers", "2,3"], "values are separated by spaces: 2 3, not 2,3"),
    ],
)
def test_refused_before_the_search(
    more: list[str], message: str, sparse: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert condense(sparse, *(word.format(tmp=tmp_path) for word in more)) == 2
    assert message.format(tmp=tmp_path) in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_small_disk(
    sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(sparse)
    size = plain.num_parameters() * plain.dtype.itemsize  # more than the condensed model's
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: Usage(size, size // 2, size // 2))
    assert condense(sparse, "--output_dir", tmp_path / "out") == 2
    assert "only" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: Usage(size, 0, size))
    assert condense(sparse, "--output_dir", tmp_path / "out") == 0
    stock = ("--plan", tmp_path / "out", "--output_dir", tmp_path / "again", "--export_stock", tmp_path / "stock")
    words = map(str, ("--model_name_or_path", sparse, *stock, "--export_approximate", "--num_samples", 4))
    assert main.main(["condense", *words, "--calibration", str(sparse / "texts.txt")]) == 2
    assert "`--output_dir` and `--export_stock` together" in capsys.readouterr().err


def test_loading_options_reach_the_model(sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}
    original = AutoModelForCausalLM.from_pretrained.__func__

    def note(cls: type, *args: object, **kwargs: object) -> object:
        seen.update(kwargs)
        return original(cls, *args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", classmethod(note))
    options = ("--attn_implementation", "eager", "--max_memory", "cpu=1GB", "--cache_dir", tmp_path / "cache")
    assert condense(sparse, "--output_dir", tmp_path / "out", *options, "--token", "secret") == 0
    assert seen["attn_implementation"] == "eager"
    assert seen["max_memory"] == {"cpu": 10**9}
    assert (seen["cache_dir"], seen["token"]) == (str(tmp_path / "cache"), "secret")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 104


def test_no_dequantising(sparse: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((sparse / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = ["--model_name_or_path", str(tmp_path), "--num_layers", "2", "--num_experts", "2", "--dry_run"]
    assert main.main(["condense", *words]) == 0
    assert main.main(["condense", *words, "--dequantize", "false"]) == 2
    assert "stored quantised (fp8), and `--dequantize` is false" in capsys.readouterr().err


def test_processor_files_are_copied(sparse: Path, tmp_path: Path) -> None:
    files = {"processor_config.json": "{}", "preprocessor_config.json": '{"size": 3}', "chat_template.jinja": "{{ x }}"}
    for name, text in files.items():
        (sparse / name).write_text(text)
    assert condense(sparse, "--output_dir", tmp_path / "out") == 0
    assert (
        main.main(
            [
                "export",
                str(tmp_path / "out"),
                "--output_dir",
                str(tmp_path / "stock"),
                "--approximate",
                "--calibration",
                str(sparse / "texts.txt"),
            ]
        )
        == 0
    )
    for folder in ("out", "stock"):
        assert {name: (tmp_path / folder / name).read_text() for name in files} == files


def test_tools_without_a_tokenizer(sparse: Path, tmp_path: Path) -> None:
    """They name the folder, and the base model to copy the tokenizer from."""
    condensed = tmp_path / "cd"
    condense_pretrained(sparse, plan=some_plan([1])).save_pretrained(condensed)
    said = rf"No tokenizer can be opened from '{condensed}' .*Copy that of {sparse.name}: "
    (tmp_path / "sft.jsonl").write_text("\n".join(json.dumps({"text": row["text"]}) for row in lm_rows(20)))
    words = ["--sft_dataset", tmp_path / "sft.jsonl", "--output_dir", tmp_path / "out", "--use_cpu", "--bf16", "false"]
    with pytest.raises(ValueError, match=said):
        recover_stages.train(["--model_name_or_path", str(condensed), "--stages", "sft", *map(str, words)])
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=said):
        CDMoELM(str(condensed), device="cpu")


@pytest.mark.parametrize(
    ("dtype", "meant"), [("fp16", "'float16'"), ("bf16", "'bfloat16'"), ("int8", "'auto'"), ("half16", "'auto'")]
)
def test_dtypes_by_other_names(dtype: str, meant: str, sparse: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"`dtype` is '{dtype}', .*: use {meant}"):
        condense_pretrained(sparse, plan=some_plan([1]), dtype=dtype)
