"""The benchmarks of speed and memory in recipes/benchmarks/ at tiny sizes, and the numbers they count."""

from __future__ import annotations

import importlib
import json
import re
import statistics
import sys
from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cdmoe_plugin import CondensedLayer, CondensePlan, apply_plan
from cdmoe_plugin.blocks import find_sparse_blocks
from cdmoe_plugin.model.lookup import condensed_layers
from tests.helpers.models import sparse_model

BENCHMARKS = Path(__file__).parents[2] / "recipes" / "benchmarks"
# Without a shared expert, with one, with a gated one, and with one that the decoder layer owns.
TYPES = ["mixtral", "deepseek", "qwen2_moe", "granitemoeshared"]
MICRO = ["--hidden_size=32", "--num_layers=4", "--experts=8", "--device=cpu"]


@pytest.fixture(scope="module")
def bench() -> Any:
    """The scripts, which are in no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        names = ("common", "inference_speed", "search_speed", "memory", "reading_ahead")
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})


@pytest.fixture(scope="module")
def micro(bench: Any) -> Any:
    """A model of DeepSeekMoE's shape: four layers, the first dense; eight experts, six per token."""
    config = bench.common.deepseek_config(bench.common.DEEPSEEK_MOE_16B, 32, 4, 8)
    return bench.common.build_model(config, torch.device("cpu"), torch.float32)


def read_table(text: str, column: str) -> dict[str, str]:
    """Return a column of the last Markdown table that has it, by the first column."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    header = max(i for i, line in enumerate(lines) if f"| {column} |" in " ".join(line.split()))
    names, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[header:])
    return {row[0]: row[names.index(column)] for row in rows if len(row) == len(names)}


@pytest.mark.parametrize(("experts", "top_k", "tokens"), [(5, 2, 3), (4, 1, 4), (3, 3, 2), (6, 2, 1)])
def test_experts_read_are_the_mean_over_all_draws(bench: Any, experts: int, top_k: int, tokens: int) -> None:
    draws = list(product(combinations(range(experts), top_k), repeat=tokens))
    mean = sum(len(set().union(*draw)) for draw in draws) / len(draws)
    sizes = dict.fromkeys(("total", "hidden", "always", "cache", "router"), 0)
    counts = bench.inference_speed.Counts(**sizes, sparse=1, expert=1, num_experts=experts, top_k=top_k)
    assert counts.weights_read(tokens) == pytest.approx(mean)


@pytest.mark.parametrize("model_type", TYPES)
def test_parameters_are_the_models(bench: Any, model_type: str) -> None:
    model = sparse_model(model_type)
    counts, layers = bench.inference_speed.count(model), [block.layer for block in find_sparse_blocks(model)]
    assert (counts.total, counts.sparse) == (model.num_parameters(), len(layers))
    for number, kept in ((1, 0), (2, 3), (len(layers), 2)):
        if kept or model_type != "mixtral":  # nothing would be left of its layer
            rows = [CondensedLayer(layer, list(range(kept)), [0.5] * kept) for layer in layers[:number]]
            condensed = apply_plan(sparse_model(model_type), CondensePlan(rows))
            assert counts.condensed(number, kept).total == condensed.num_parameters()


def test_deepseek_moe_16b_by_hand(bench: Any) -> None:
    config = bench.common.deepseek_config(bench.common.DEEPSEEK_MOE_16B)
    counts = bench.inference_speed.count(bench.common.build_model(config, torch.device("meta"), torch.bfloat16))
    expert, head = 3 * 2048 * 1408, 102400 * 2048
    rest = 28 * (4 * 2048**2 + 2 * 2048) + 2048 + 3 * 2048 * 10944  # attention and norms; the first layer's MLP
    assert counts.total == 2 * head + rest + 27 * (66 * expert + 64 * 2048) == 16_375_728_128
    condensed = counts.condensed(9, 6)
    assert condensed.total == 11_858_855_936
    sparse = 18 * ((2 + 64 * (1 - (58 / 64) ** 8)) * expert + 64 * 2048)
    read = 8 * 2048 + head + rest + 9 * 8 * expert + sparse + 8 * 100 * 28 * 2 * 2048
    assert condensed.step(8, context=100) == pytest.approx(read)


def test_a_twin_shares_weights_and_leaves_the_sparse_model(bench: Any, micro: Any) -> None:
    before = micro.num_parameters()
    twin = bench.inference_speed.condensed_twin(micro, [1, 2], 2)
    assert list(condensed_layers(twin)) == [1, 2]
    own = {id(p) for p in twin.parameters()} - {id(p) for p in micro.parameters()}
    assert own == {id(p) for mlp in condensed_layers(twin).values() for p in mlp.parameters()}
    assert micro.num_parameters() == before


@pytest.mark.parametrize("backend", [None, "eager"])
def test_decoding_is_the_forward_pass_token_by_token(bench: Any, micro: Any, backend: str | None) -> None:
    ids = bench.common.random_ids(micro.config.vocab_size, 3, 8)
    inference = bench.inference_speed.Inference(micro, ids, 5, backend)
    for model in (micro, bench.inference_speed.condensed_twin(micro, [1], 2)):
        runs = [inference.run(model, "grouped_mm", "batched_mm") for _ in range(2)]  # the second one with a used cache
        assert all(run.prefill > 0 and run.decoding > 0 for run in runs)
        step, logits = (inference.compiled(model, "batched_mm") if backend else model), []
        with torch.no_grad():
            if inference.cache is not None:
                inference.cache.reset()
            cache = model(input_ids=ids[:, :5], past_key_values=inference.cache, use_cache=True).past_key_values
            inference.decode(lambda s=step, to=logits, **given: to.append(s(**given).logits), cache)
            expected = model(input_ids=ids).logits[:, 5:]
        torch.testing.assert_close(torch.cat(logits, 1), expected, atol=1e-5, rtol=1e-4)


def test_turns_are_paired_by_round(bench: Any) -> None:
    clock = iter(range(100))
    turns = bench.common.take_turns({name: lambda: next(clock) for name in "abc"}, repeats=3)
    # The warm-up comes first, and every other round runs backwards.
    assert turns == {"a": [5, 6, 11], "b": [4, 7, 10], "c": [3, 8, 9]}
    assert bench.common.paired_ratios([6.0, 6.0, 9.0], [3.0, 2.0, 3.0]) == [2.0, 3.0, 3.0]
    assert bench.common.mean_and_spread([1.0, 2.0], "{:.2f}") == f"1.50 ± {statistics.stdev([1.0, 2.0]):.2f}"
    assert bench.common.mean_and_spread([1.0]) == "1.0000"


def test_memory_of_a_run_leaves_out_what_was_there_before(
    bench: Any, micro: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = iter([10_070, 10_050])
    memory = SimpleNamespace(
        memory_allocated=lambda _device: 10_000,
        reset_peak_memory_stats=lambda _device: None,
        max_memory_allocated=lambda _device: next(peaks),
    )
    monkeypatch.setattr(bench.common, "memory_of", lambda _device: memory)
    run = bench.inference_speed.Inference(micro, torch.ones(1, 5, dtype=torch.int64), 3).run(micro, "eager", "eager")
    assert (run.prefill_peak, run.decoding_peak) == (70, 50)


def test_an_implementation_that_fails_is_left_out(bench: Any, micro: Any) -> None:
    inference = bench.inference_speed.Inference(micro, bench.common.random_ids(micro.config.vocab_size, 1, 4), 2)
    prefill, _, failed = inference.try_experts(micro, ["batched_mm", "grouped_mm", "no_such_thing"], 1)
    assert prefill == "grouped_mm"
    assert list(failed) == ["no_such_thing"]
    assert failed["no_such_thing"].startswith("ValueError: ")
    with pytest.raises(RuntimeError, match="no_such_thing"):
        inference.try_experts(micro, ["no_such_thing"], 1)


def test_the_whole_run(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--layers=1,3", "--kept=0,6", "--batch_sizes=4", "--prompt_tokens=8", "--new_tokens=2", "--repeats=3"]
    bench.inference_speed.main([*MICRO, *sizes, f"--json={tmp_path / 'speed.json'}"])
    text, rows = capsys.readouterr().out, json.loads((tmp_path / "speed.json").read_text())
    models = ["sparse", "E(2+0) L1", "E(2+0) L3", "E(2+6) L1", "E(2+6) L3"]
    assert list(read_table(text, "parameters")) == list(read_table(text, "by bytes")) == models
    assert [(row["phase"], row["model"]) for row in rows] == list(product(("prefill", "decoding"), models))
    for row in rows:
        assert row["ratio"] == sorted(row["ratios"])[1]
    assert read_table(text, "speed") == {row["model"]: f"{row['ratio']:.2f}x" for row in rows[5:]}
    config = bench.common.deepseek_config(bench.common.DEEPSEEK_MOE_16B, 32, 4, 8)
    counts = bench.inference_speed.count(bench.common.build_model(config, torch.device("meta"), torch.float32))
    expected = counts.step(4, 9.5) / counts.condensed(3, 6).step(4, 9.5)
    assert read_table(text, "by bytes")["E(2+6) L3"] == f"{expected:.2f}x"


def test_a_checkpoint(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sparse_model("qwen2_moe").save_pretrained(tmp_path)
    sizes = ["--layers=2", "--kept=1", "--batch_sizes=2", "--prompt_tokens=4", "--new_tokens=1", "--repeats=1"]
    given = [f"--model_name_or_path={tmp_path}", "--experts_implementations=eager", *sizes, "--device=cpu"]
    bench.inference_speed.main(given)
    assert list(read_table(capsys.readouterr().out, "tokens/s")) == ["sparse", "E(shared+1) L2"]
    for wrong, message in ((["--layers=9"], "`layers` asks for 9"), (["--kept=99"], "`kept` asks for 99")):
        with pytest.raises(ValueError, match=message):
            bench.inference_speed.main([*given, *wrong])
    with pytest.raises(SystemExit):
        bench.inference_speed.main([*given, "--hidden_size=64"])


def test_counts_of_the_real_sizes_need_no_device(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    bench.inference_speed.main(["--counts_only"])
    text = capsys.readouterr().out
    assert "no device" in text.splitlines()[0]
    assert read_table(text, "parameters")["E(2+6) L9"] == "11,858,855,936"
    assert read_table(text, "weights")["sparse"] == "32.8 GB"


def test_search_speed(bench: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = [*MICRO, "--tokens=64", "--length=16", "--condensed=2"]
    bench.search_speed.main(["--preset=deepseek-moe-16b", *tiny])
    text = capsys.readouterr().out
    assert "4 layers, 8 experts, hidden 32, 64 tokens, K = 6, 2 layers condensed" in text
    searches = ["expert search", "layer search, race", "layer search, full"]
    assert list(read_table(text, "time")) == searches
    # The small preset runs the naive searches, too, and compares what they choose.
    bench.search_speed.main(["--kept=2", *tiny])
    assert list(read_table(capsys.readouterr().out, "ratio")) == searches
    bench.search_speed.main(["--preset=layers", *tiny, "--tokens=320"])
    work = read_table(capsys.readouterr().out, "token-layers")
    race, full = (int(work[name].replace(",", "")) for name in searches[1:])
    assert race <= full in (320 * 19, 320 * 20)  # 4, 9 and 6 or 7 layers
    monkeypatch.setattr(bench.search_speed, "search_plan", None)  # the mistake is found before any search
    with pytest.raises(ValueError, match="`num_layers` is 4, but the model has 3 sparse layers"):
        bench.search_speed.main([*tiny, "--condensed=4"])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_opening(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the search, layer by layer, in tests/models/test_offload.py."""
    sizes = ["--hidden_size=128", "--num_layers=4", "--experts=16", "--condensed=2", "--kept=2", "--samples=2"]
    bench.memory.main(
        [*sizes, "--length=16", "--ways=sparse,plan", f"--folder={tmp_path}", f"--json={tmp_path / 'memory.json'}"]
    )
    found = json.loads((tmp_path / "memory.json").read_text())
    assert list(read_table(capsys.readouterr().out, "anonymous memory")) == [
        bench.memory.WAYS[way] for way in ("sparse", "plan")
    ]
    config = bench.common.deepseek_config(bench.memory.SMALL, 128, 4, 16)
    model = bench.common.build_model(config, torch.device("meta"), torch.bfloat16)
    assert found["checkpoint"] == 2 * model.num_parameters()
    for run in found["ways"].values():
        assert run["resident"] >= run["anonymous"] > 0


@pytest.mark.skipif(sys.platform != "linux", reason="drops pages of the file cache")
def test_reading_ahead(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dropped: list[str] = []
    drop = bench.reading_ahead.drop

    def noting(files: Any) -> None:
        files = list(files)
        dropped.extend(Path(file).name for file in files)
        drop(files)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.reading_ahead, "drop", noting)
        sizes = ["--hidden_size=128", "--num_layers=3", "--experts=8", "--condensed=1", "--kept=1", "--samples=2"]
        bench.reading_ahead.main([*sizes, "--length=16", "--repeats=1", f"--folder={tmp_path}"])
    said = capsys.readouterr().out
    assert list(read_table(said, "search and condensing")) == ["in turn", "read ahead"]
    assert re.search(r"\nratio: [0-9.]+ \(", said)
    assert {f"model-{i}.safetensors" for i in range(3)} <= set(dropped)
    assert len(dropped) > 4 * 4  # beside all four files at the beginning of four runs
    assert not list(tmp_path.iterdir())


def test_sizes_in_proportion(bench: Any) -> None:
    sizes = bench.common.DEEPSEEK_MOE_16B
    small = bench.common.deepseek_config(sizes, hidden_size=256)
    assert (small.intermediate_size, small.moe_intermediate_size, small.vocab_size) == (1368, 176, 12800)
    assert small.hidden_size // small.num_attention_heads == 2048 // 16
    for field, wrong in (("hidden_size", 33), ("num_layers", 1), ("experts", 4)):
        with pytest.raises(ValueError, match=f"`{field}` is {wrong}"):
            bench.common.deepseek_config(sizes, **{field: wrong})
