"""recipes/benchmarks/train_reference.py on a few files, for seconds."""

from __future__ import annotations

import importlib
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

BENCHMARKS = Path(__file__).parents[2] / "recipes" / "benchmarks"
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
SIZES |= {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "vocab_size": 300}


@pytest.fixture(scope="module")
def script() -> Any:
    """The script, which is in no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("train_reference")


@pytest.fixture
def small(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """Small sizes, and a library and packages of a few files; returns the texts of both."""
    rng, texts = random.Random(0), {}
    for folder, count in (("library", 30), ("packages", 40)):
        (tmp_path / folder / "site-packages").mkdir(parents=True)
        texts[folder] = {" ".join(str(rng.randrange(99)) for _ in range(200)) for _ in range(count)}
        for i, text in enumerate(sorted(texts[folder])):
            (tmp_path / folder / f"{i:02}.py").write_text(text)
        (tmp_path / folder / "copy.md").write_text(text)
        (tmp_path / folder / "site-packages" / "other.py").write_text("x" * 300)
        (tmp_path / folder / "binary.py").write_bytes(b"\xff" * 300)
    monkeypatch.setattr(script.sysconfig, "get_path", lambda _: str(tmp_path / "library"))
    monkeypatch.setattr(script.site, "getsitepackages", lambda: [str(tmp_path / "packages")])
    monkeypatch.setattr(script, "SIZES", script.SIZES | SIZES)
    monkeypatch.setattr(script, "VOCABULARY", 300)
    return texts


def test_files_are_in_one_part_each(script: Any, small: dict[str, set[str]]) -> None:
    parts = script.documents(megabytes=0.001)
    texts = [text for part in parts.values() for text in part]
    assert len(texts) == len(set(texts)) == 30  # the library is enough, and is read whole
    assert set(texts) == small["library"]
    assert [len(parts[name]) for name in ("held_out", "calibration", "train")] == [1, 3, 26]
    more = {text for part in script.documents(megabytes=0.025).values() for text in part}
    assert more > small["library"]
    assert 0.025e6 <= sum(map(len, more)) < 0.026e6
    assert more - small["library"] < small["packages"]


def test_balance_is_that_of_transformers_for_each_layer(script: Any) -> None:
    logits = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    expected = load_balancing_loss_func((logits,), num_experts=8, top_k=2)
    assert script.balance_loss(logits, 2).item() == pytest.approx(expected.item() / 2)
    assert script.balance_loss(torch.zeros(50, 8), 2).item() == pytest.approx(1)


def test_rate_is_a_cosine_of_time_after_a_warm_up(script: Any, tmp_path: Path) -> None:
    training = script.Training.__new__(script.Training)
    training.args = script.parse_arguments([f"--output_dir={tmp_path}", "--minutes=2", "--learning_rate=0.5"])
    for steps, seconds, rate in ((0, 0, 0.5 / 200), (199, 0, 0.5), (500, 60, 0.25), (500, 120, 0), (500, 150, 0)):
        training.progress = script.Progress(steps, 0, seconds)
        assert training.learning_rate() == pytest.approx(rate)
    training.progress = script.Progress(500, 0, 40)
    assert training.learning_rate() == pytest.approx(0.25 * (1 + math.cos(math.pi / 3)))


def test_an_interrupted_run_goes_on_and_ends_in_a_model(
    script: Any, small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    given = [f"--output_dir={tmp_path / 'out'}", "--minutes=0.05", "--rows=2", "--checkpoint_minutes=0"]
    given += ["--learning_rate=0.02", "--megabytes=0.03"]
    own = script.Training.step

    def interrupted(training: Any, rows: torch.Tensor) -> dict[str, float]:
        if training.progress.steps == 4:
            raise KeyboardInterrupt
        return own(training, rows)

    monkeypatch.setattr(script.Training, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script.main(given)
    args = script.parse_arguments(given)
    tokenizer, rows = script.prepare(args.output_dir, args.megabytes)
    training = script.Training(args, tokenizer)
    untrained = {name: p.clone() for name, p in training.named.items()}
    training.resume()
    # Its last step was not lost: the checkpoint is written after every step.
    assert (training.progress.steps, training.progress.tokens) == (4, 4 * 2 * 256)
    assert any(not torch.equal(p, untrained[name]) for name, p in training.named.items())
    assert {int(state["step"]) for state in training.optimizer.state.values()} == {4}
    losses = [own(training, rows["train"][:2])["loss"] for _ in range(6)]
    assert losses[-1] < losses[0]

    monkeypatch.setattr(script.Training, "step", own)
    script.main(given)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report == json.loads(capsys.readouterr().out)
    assert report["steps"] > 4
    assert report["seconds"] >= 3
    lines = (tmp_path / "out" / "progress.jsonl").read_text().splitlines()
    assert [json.loads(line)["steps"] for line in lines] == list(range(20, report["steps"] + 1, 20))

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("1 2")["input_ids"][0] == tokenizer.bos_token_id == 0
    held_out = [json.loads(line)["input_ids"] for line in (tmp_path / "out" / "held_out.jsonl").open()]
    assert {(row[0], len(row)) for row in held_out} == {(0, 256)}
    with torch.no_grad():
        loss = sum(model(input_ids=(ids := torch.tensor([row])), labels=ids).loss.item() for row in held_out)
    assert report["held_out_loss"] == pytest.approx(loss / len(held_out), abs=1e-4)
    with pytest.raises(SystemExit, match="finished"):
        script.main(given)
