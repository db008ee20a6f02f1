"""recipes/benchmarks/inference_speed.py and search_speed.py: what they count, and that they run on any device."""

from __future__ import annotations

import copy
import importlib
from contextlib import ExitStack
from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cdmoe_plugin import CondensedLayer, CondensePlan, apply_plan
from cdmoe_plugin.blocks import find_sparse_blocks
from cdmoe_plugin.model.lookup import condensed_layers
from tests.helpers.models import sparse_model

BENCHMARKS = Path(__file__).parents[2] / "recipes" / "benchmarks"
MODULES = ("speed_models", "inference_counts", "inference_timing", "inference_speed", "search_speed")
# Without a shared expert, with one, with a gated one, and with one that the decoder layer owns.
TYPES = ["mixtral", "deepseek", "qwen2_moe", "granitemoeshared"]
MICRO = ["--hidden_size=32", "--num_layers=4", "--experts=8"]


@pytest.fixture(scope="module")
def bench() -> Any:
    """The scripts and their modules, which are no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})


@pytest.fixture(scope="module")
def micro(bench: Any) -> Any:
    """A model of DeepSeekMoE's form: four layers, the first dense; eight experts, six per token."""
    config = bench.speed_models.DEEPSEEK_MOE_16B.changed(32, 4, 8).config()
    return bench.speed_models.build_model(config, torch.device("cpu"), torch.float32)


def condense(model: Any, layers: list[int], experts: int) -> Any:
    kept = list(range(experts))
    return apply_plan(model, CondensePlan([CondensedLayer(layer, kept, [0.5] * experts) for layer in layers]))


def read_table(text: str, column: str) -> dict[str, str]:
    """A column of the last Markdown table in a text, by the first column."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    header = max(i for i, line in enumerate(lines) if f"| {column} |" in " ".join(line.split()))
    names, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[header:])
    return {row[0]: row[names.index(column)] for row in rows if len(row) == len(names)}


# --- what the shapes predict ---


@pytest.mark.parametrize(("experts", "top_k", "tokens"), [(5, 2, 3), (4, 1, 4), (3, 3, 2), (6, 2, 1)])
def test_expected_experts_are_the_mean_over_all_draws(bench: Any, experts: int, top_k: int, tokens: int) -> None:
    draws = list(product(combinations(range(experts), top_k), repeat=tokens))
    mean = sum(len(set().union(*draw)) for draw in draws) / len(draws)
    assert bench.inference_counts.expected_experts(experts, top_k, tokens) == pytest.approx(mean)


@pytest.mark.parametrize("model_type", TYPES)
def test_parameters_are_the_models(bench: Any, model_type: str) -> None:
    model = sparse_model(model_type)
    counts = bench.inference_counts.count_model(model)
    assert counts.total == model.num_parameters()
    layers = sorted(counts.sparse)
    assert layers == [block.layer for block in find_sparse_blocks(model)]
    for chosen, experts in ((layers[:1], 0), (layers[-2:], 3), (layers, 2)):
        if experts == 0 and model_type == "mixtral":  # nothing would be left of the layer
            continue
        condensed = condense(sparse_model(model_type), chosen, experts)
        assert counts.condensed(chosen, experts).total == condensed.num_parameters()


def test_a_tied_head_counts_once(bench: Any) -> None:
    config = bench.speed_models.DEEPSEEK_MOE_16B.changed(32, 4, 8).config(tie_word_embeddings=True)
    model = bench.speed_models.build_model(config, torch.device("cpu"), torch.float32)
    counts = bench.inference_counts.count_model(model)
    assert counts.head == counts.embedding == 1600 * 32
    assert counts.total == model.num_parameters()


def weights_used(model: Any, ids: torch.Tensor) -> tuple[int, dict[int, int]]:
    """Parameters of the modules that a forward pass calls, rows and experts one by one; experts used by layer."""
    used = 0

    def note(module: nn.Module, args: Any, _output: Any) -> None:
        nonlocal used
        own = sum(p.numel() for p in module.parameters(recurse=False))
        if isinstance(module, nn.Embedding):
            own = args[0].numel() * module.embedding_dim
        elif module in experts:
            own = own // len(module.down_proj) * len(args[1].unique())
            chosen[experts[module]] = len(args[1].unique())
        used += own

    chosen: dict[int, int] = {}
    experts = {block.experts: block.layer for block in find_sparse_blocks(model)}
    handles = [module.register_forward_hook(note) for module in model.modules()]
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return used, chosen


@pytest.mark.parametrize("layers", [[], [1, 3]])
def test_weights_read_are_those_of_the_modules_called(bench: Any, micro: Any, layers: list[int]) -> None:
    counts = bench.inference_counts.count_model(micro).condensed(layers, 2)
    model = bench.inference_timing.condensed_twin(micro, layers, 2) if layers else micro
    used, chosen = weights_used(model, torch.tensor([[5], [9], [17]]))
    assert counts.weights_read(3, chosen) == used
    one, _ = weights_used(model, torch.tensor([[5]]))
    assert counts.active == one


@pytest.mark.parametrize("layers", [[], [1, 3]])
def test_operations_are_those_of_the_matrix_products(bench: Any, micro: Any, layers: list[int]) -> None:
    counts = bench.inference_counts.count_model(micro).condensed(layers, 2)
    model = bench.inference_timing.condensed_twin(micro, layers, 2) if layers else copy.deepcopy(micro)
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    batch, length = 2, 5
    ids = torch.arange(1, 1 + batch * length).view(batch, length)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, logits_to_keep=1)
    # transformers 5.17 has the angles of positions computed by a matrix product.
    by_module = counter.get_flop_counts().items()
    angles = sum(sum(flops.values()) for name, flops in by_module if name.endswith("rotary_emb"))
    # This attention compares all pairs and drops those that look ahead.
    assert counter.get_total_flops() - angles == counts.flops(batch * length, batch * length**2, batch)
    causal = counts.prefill(batch, length).flops
    assert causal == counts.flops(batch * length, batch * sum(range(1, length + 1)), batch)


def test_deepseek_moe_16b_by_hand(bench: Any) -> None:
    config = bench.speed_models.DEEPSEEK_MOE_16B.config()
    model = bench.speed_models.build_model(config, torch.device("meta"), torch.bfloat16)
    counts = bench.inference_counts.count_model(model)
    expert = 3 * 2048 * 1408
    rest = 28 * (4 * 2048**2 + 2 * 2048) + 2048 + 3 * 2048 * 10944  # attention and norms; the first layer's MLP
    head = 102400 * 2048
    assert counts.total == 2 * head + rest + 27 * (66 * expert + 64 * 2048) == 16_375_728_128
    assert counts.active == 2048 + head + rest + 27 * (8 * expert + 64 * 2048)
    condensed = counts.condensed(range(1, 10), 6)
    assert condensed.total == 11_858_855_936
    step = condensed.step(8, context=100)
    experts = 64 * (1 - (58 / 64) ** 8)
    assert step.weights == pytest.approx(
        8 * 2048 + head + rest + 9 * 8 * expert + 18 * ((2 + experts) * expert + 64 * 2048)
    )
    assert step.cache == 8 * 100 * 28 * 2 * 2048
    assert step.bytes_read(2) == 2 * (step.weights + step.cache)


def test_counts_refuse_what_is_not_there(bench: Any, micro: Any) -> None:
    counts = bench.inference_counts.count_model(micro)
    with pytest.raises(ValueError, match="Layer 0 is not sparse"):
        counts.condensed([0], 2)
    with pytest.raises(ValueError, match="has 8 experts, not 9"):
        counts.condensed([1], 9)


# --- what is timed ---


def test_a_twin_shares_weights_and_leaves_the_sparse_model(bench: Any, micro: Any) -> None:
    before = micro.num_parameters()
    twin = bench.inference_timing.condensed_twin(micro, [1, 2], 2)
    assert list(condensed_layers(twin)) == [1, 2]
    own = {id(p) for p in twin.parameters()} - {id(p) for p in micro.parameters()}
    assert own == {id(p) for mlp in condensed_layers(twin).values() for p in mlp.parameters()}
    assert micro.num_parameters() == before
    assert [block.layer for block in find_sparse_blocks(micro)] == [1, 2, 3]
    twin.set_experts_implementation("batched_mm")
    assert micro.config._experts_implementation != "batched_mm"


@pytest.mark.parametrize("backend", [None, "eager"])
def test_decoding_gives_the_logits_of_one_forward_pass(bench: Any, micro: Any, backend: str | None) -> None:
    ids = bench.speed_models.random_ids(micro.config.vocab_size, 3, 9)
    inference = bench.inference_timing.Inference(micro, ids, 6, backend)
    twin = bench.inference_timing.condensed_twin(micro, [1], 2)
    for model in (micro, twin):
        for name in ("grouped_mm", "batched_mm"):
            experts = bench.inference_timing.Experts("grouped_mm", name)
            seconds = [inference.run(model, experts) for _ in range(2)]  # the second one with a used cache
            assert all(s.prefill > 0 and s.decoding > 0 for s in seconds)
            if inference.cache is not None:
                inference.cache.reset()
            step, logits = inference._step(model, name), []
            with torch.no_grad():
                cache = inference.prefill(model, inference.cache)
                inference.decode(lambda s=step, to=logits, **call: to.append(s(**call).logits), cache, inference.new)
                expected = model(input_ids=ids).logits[:, 6:]
            torch.testing.assert_close(torch.cat(logits, 1), expected, atol=1e-5, rtol=1e-4)


def test_chosen_experts_are_those_of_the_last_step(bench: Any) -> None:
    config = bench.speed_models.DEEPSEEK_MOE_16B.changed(32, 4, 64).config()
    model = bench.speed_models.build_model(config, torch.device("cpu"), torch.float32)
    ids = bench.speed_models.random_ids(config.vocab_size, 5, 6)
    blocks = find_sparse_blocks(model)
    with ExitStack() as stack, torch.no_grad():
        routes = {block.layer: stack.enter_context(block.recording()) for block in blocks}
        model(input_ids=ids)
    last = {layer: len(seen.routing.experts.view(5, 6, -1)[:, -1].unique()) for layer, seen in routes.items()}
    assert bench.inference_timing.Inference(model, ids, 4).chosen_experts(model) == last


def test_a_table_of_given_times(bench: Any, micro: Any) -> None:
    args = bench.inference_speed.parse_arguments(["--prompt_tokens=3", "--new_tokens=2", "--dtype=bfloat16"])
    counts = bench.inference_counts.count_model(micro)
    counts = {"sparse": counts, "half": counts.condensed([1], 0)}
    inference = bench.inference_timing.Inference(micro, torch.ones(4, 5, dtype=torch.int64), 3)
    times = {"sparse": ((6.0, 1.0), (6.0, 1.0), (9.0, 3.0)), "half": ((3.0, 1.0), (3.0, 0.5), (3.0, 1.0))}
    seconds = {name: [bench.inference_timing.Seconds(*pair) for pair in pairs] for name, pairs in times.items()}
    peaks = dict.fromkeys(counts, bench.inference_timing.Peaks(prefill=4_560_000_000, decoding=1_230_000_000))

    def row(phase: str) -> dict[str, str]:
        table = bench.inference_speed.speed_table(args, counts, phase, inference, seconds, peaks)
        return {
            name: read_table(table, name)["half"] for name in ("tokens/s", "speed", "of single turns", "peak memory")
        }

    # 4 sequences of 3 and 2 tokens
    assert row("prefill") == {
        "tokens/s": "4.0", "speed": "2.00x", "of single turns": "2.00-3.00", "peak memory": "4.56 GB"
    }  # fmt: skip
    assert row("decoding") == {
        "tokens/s": "8.0", "speed": "2.00x", "of single turns": "1.00-3.00", "peak memory": "1.23 GB"
    }  # fmt: skip


def test_peak_memory_leaves_out_what_other_models_hold(bench: Any, micro: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # What an accelerator's allocator would tell.
    weights = sum(p.numel() * p.element_size() for p in micro.parameters())
    others, peaks = 10_000, iter([weights + 10_000 + 70, weights + 10_000 + 50])
    memory = SimpleNamespace(
        empty_cache=lambda: None,
        memory_allocated=lambda _device: weights + others,
        reset_peak_memory_stats=lambda _device: None,
        max_memory_allocated=lambda _device: next(peaks),
    )
    inference = bench.inference_timing.Inference(micro, torch.ones(1, 5, dtype=torch.int64), 3)
    experts = bench.inference_timing.Experts("grouped_mm", "batched_mm")
    assert inference.peaks(micro, experts) is None
    monkeypatch.setattr(bench.inference_timing, "memory_of", lambda _device: memory)
    assert inference.peaks(micro, experts) == bench.inference_timing.Peaks(weights + 70, weights + 50)


def test_an_implementation_that_fails_is_left_out(bench: Any, micro: Any) -> None:
    ids = bench.speed_models.random_ids(micro.config.vocab_size, 1, 4)
    inference = bench.inference_timing.Inference(micro, ids, 2)
    trial = inference.try_experts(micro, ["batched_mm", "grouped_mm", "no_such_thing"], 1)
    assert list(trial.failed) == ["no_such_thing"]
    assert trial.failed["no_such_thing"].startswith("ValueError: ")
    assert trial.fastest().prefill == "grouped_mm"
    with pytest.raises(RuntimeError, match="no_such_thing"):
        inference.try_experts(micro, ["no_such_thing"], 1).fastest()


# --- the scripts ---


def test_the_whole_run(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--layers=1,3", "--kept=0,6", "--batch_sizes=1,4", "--prompt_tokens=8", "--new_tokens=2", "--repeats=2"]
    bench.inference_speed.main([*MICRO, *sizes, "--device=cpu", f"--output={tmp_path / 'speed.md'}"])
    text = (tmp_path / "speed.md").read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    head = text.splitlines()[0]
    for part in ("thread(s)", torch.__version__, "float32", "attention sdpa", "hidden size 32", "--layers=1,3"):
        assert part in head
    models = ["sparse", "E(2+0) L1", "E(2+0) L3", "E(2+6) L1", "E(2+6) L3"]
    counts, *batches = text.split("### ")[1:]
    assert list(read_table(counts, "parameters")) == models
    assert len(batches) == 2
    config = bench.speed_models.DEEPSEEK_MOE_16B.changed(32, 4, 8).config()
    model = bench.speed_models.build_model(config, torch.device("meta"), torch.float32)
    sparse = bench.inference_counts.count_model(model)
    condensed = sparse.condensed([1, 2, 3], 6)
    assert read_table(counts, "parameters")["E(2+6) L3"] == f"{condensed.total:,}"
    for batch, section in zip((1, 4), batches, strict=True):
        tried = read_table(section.split("By uniform")[0], "decoding tokens/s")
        assert {"eager", "grouped_mm", "batched_mm"} <= set(tried)
        prefill, decoding = section.split(f"Decoding, batch {batch}")
        assert list(read_table(prefill, "tokens/s")) == list(read_table(decoding, "tokens/s")) == models
        assert read_table(decoding, "speed")["sparse"] == "1.00x"
        expected = sparse.step(batch, 9.5).bytes_read(4) / condensed.step(batch, 9.5).bytes_read(4)
        assert read_table(decoding, "by bytes")["E(2+6) L3"] == f"{expected:.2f}x"
        expected = sparse.prefill(batch, 8).flops / condensed.prefill(batch, 8).flops
        assert read_table(prefill, "by operations")["E(2+6) L3"] == f"{expected:.2f}x"
        assert set(read_table(decoding, "peak memory").values()) == {""}  # nothing of a CPU's


def test_a_checkpoint(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sparse_model("qwen2_moe").save_pretrained(tmp_path)
    sizes = ["--layers=2", "--kept=1", "--batch_sizes=2", "--prompt_tokens=4", "--new_tokens=1", "--repeats=1"]
    given = [f"--model_name_or_path={tmp_path}", "--experts_implementations=eager", *sizes, "--device=cpu"]
    bench.inference_speed.main(given)
    assert list(read_table(capsys.readouterr().out, "tokens/s")) == ["sparse", "E(shared+1) L2"]
    with pytest.raises(ValueError, match=r"`layers` asks for 9, but the model has \d+ sparse layers"):
        bench.inference_speed.main([*given, "--layers=9"])
    with pytest.raises(SystemExit):
        bench.inference_speed.main([*given, "--hidden_size=64"])


def test_counts_of_the_real_sizes_need_no_device(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    bench.inference_speed.main(["--counts_only"])
    text = capsys.readouterr().out
    assert "no device" in text.splitlines()[0]
    assert read_table(text, "parameters")["E(2+6) L9"] == "11,858,855,936"
    assert read_table(text, "weights")["sparse"] == "32.8 GB"


def test_search_speed(bench: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = [*MICRO, "--tokens=64", "--length=16", "--condensed=2", "--device=cpu"]
    bench.search_speed.main(["--preset=deepseek-moe-16b", *tiny])
    text = capsys.readouterr().out
    assert "4 layers, 8 experts, hidden 32, 64 tokens, K = 6, 2 layers condensed" in text
    assert list(read_table(text, "time")) == ["expert search", "layer search"]
    # The small preset runs the naive searches, too, and compares what they choose.
    bench.search_speed.main(["--kept=2", *tiny])
    assert list(read_table(capsys.readouterr().out, "ratio")) == ["expert search", "layer search"]
    monkeypatch.setattr(bench.search_speed, "search_plan", None)  # the mistake is found before any search
    with pytest.raises(ValueError, match="`num_layers` is 4, but the model has 3 sparse layers"):
        bench.search_speed.main([*tiny, "--condensed=4"])


def test_sizes_in_proportion(bench: Any) -> None:
    sizes = bench.speed_models.DEEPSEEK_MOE_16B
    small = sizes.changed(hidden_size=256)
    assert (small.intermediate_size, small.moe_intermediate_size, small.vocab_size) == (1368, 176, 12800)
    assert small.hidden_size // small.num_attention_heads == sizes.hidden_size // sizes.num_attention_heads
    for wrong, field in (({"hidden_size": 33}, "hidden_size"), ({"num_layers": 1}, "num_layers")):
        with pytest.raises(ValueError, match=f"`{field}` is"):
            sizes.changed(**wrong)
    with pytest.raises(ValueError, match="`experts` is 4"):
        sizes.changed(experts=4)
