"""Models whose decoder layers are on disk: the same plans and weights as in memory, one layer at a time."""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from cdmoe_plugin import CondenseConfig, CondensePlan, apply_plan, condense_pretrained, search_plan
from cdmoe_plugin.loading.ahead import ReadAhead, byte_ranges
from cdmoe_plugin.loading.layers_on_disk import CheckpointLayers
from cdmoe_plugin.loading.load import sketch_model
from cdmoe_plugin.loading.tensors import unread_tensors
from tests.helpers.models import build
from tests.helpers.naive import close
from tests.helpers.recovery import RECIPES, load_recipe
from tests.helpers.tiny_models import available, random_ids, tiny_model

IDS = random_ids(5)
CONFIG = CondenseConfig(num_layers=2, num_experts=2, batch_size=2)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sparse")
    tiny_model("qwen2_moe").save_pretrained(folder)
    return folder


def on_disk(sparse: Path, folder: Path, config: CondenseConfig | None = CONFIG, **kwargs: Any) -> PreTrainedModel:
    if config is not None:
        kwargs["calibration"] = IDS
    return condense_pretrained(sparse, config, offload_folder=str(folder), **kwargs)


def in_layers(model: PreTrainedModel) -> set[str]:
    """The devices of the decoder layers' weights."""
    return {p.device.type for name, p in model.named_parameters() if ".layers." in name or ".blocks." in name}


def assert_same_plan(one: CondensePlan, other: CondensePlan) -> None:
    """Numbers may differ by rounding: matrix products depend on where in memory a matrix begins."""
    assert [layer.layer for layer in one.layers] == [layer.layer for layer in other.layers]
    for mine, its in zip(one.layers, other.layers, strict=True):
        assert mine.experts == its.experts
        assert mine.gates == pytest.approx(its.gates, rel=1e-6)
        assert mine.score == close(its.score)


def assert_same_weights(one: PreTrainedModel, other: PreTrainedModel, folder: Path, rtol: float = 0) -> None:
    """As saved, and opened again."""
    states = []
    for name, model in (("one", one), ("other", other)):
        model.save_pretrained(folder / name, max_shard_size="20KB")
        states.append(AutoModelForCausalLM.from_pretrained(folder / name).state_dict())
    assert states[0].keys() == states[1].keys()
    for name, weight in states[0].items():
        torch.testing.assert_close(states[1][name], weight, rtol=rtol, atol=rtol)


# Experts on disk one by one (deepseek, mixtral) or stacked (granite), a shared expert of the layer (granitemoeshared),
# layers of several kinds (jamba), experts whose weights another module reads (dbrx), buffers that have another name on
# disk (hy_v3), several residual streams (hy_v4, deepseek_v4), weights of layers that are not with these on disk
# (inkling2_text), a norm that condensed layers keep (axk1), and experts and router of the layer itself (gemma4_text).
ARCHS = ["qwen2_moe", "granitemoeshared", "mixtral", "jamba", "dbrx", "hy_v3", "hy_v4", "deepseek_v4", "inkling2_text"]
ARCHS += ["axk1", "gemma4_text"]


@pytest.mark.parametrize("arch", ["deepseek", *filter(available, ARCHS)])
def test_the_same_plan_and_weights(arch: str, tmp_path: Path) -> None:
    (build(arch) if arch == "deepseek" else tiny_model(arch)).save_pretrained(tmp_path / "sparse")
    plain = condense_pretrained(tmp_path / "sparse", CONFIG, calibration=IDS)
    model = on_disk(tmp_path / "sparse", tmp_path / "offload")
    assert_same_plan(model.condense_plan, plain.condense_plan)
    assert in_layers(model) == {"meta"}
    # Of all others, no copy is made.
    layers = sorted(layer.layer for layer in plain.condense_plan.layers)
    assert sorted(path.name for path in (tmp_path / "offload").iterdir()) == [
        f"condensed-{i}.safetensors" for i in layers
    ]
    model = on_disk(tmp_path / "sparse", tmp_path / "again", None, plan=plain.condense_plan)
    assert in_layers(model) == {"meta"}
    assert_same_weights(plain, model, tmp_path)
    if arch != "dbrx":  # which transformers itself can't run from disk
        ids = torch.tensor(IDS[0])[None]
        torch.testing.assert_close(model(ids).logits, plain(ids).logits)


@pytest.mark.parametrize(("refit", "neurons"), [("down_proj", "least_squares"), ("distill", "experts")])
def test_refit(refit: str, neurons: str, sparse: Path, tmp_path: Path) -> None:
    given = {"refit": refit, "refit_neurons": neurons, "refit_steps": 5}
    config = CondenseConfig(num_layers=2, num_experts=2, batch_size=2, **given)
    plain = condense_pretrained(sparse, config, calibration=IDS)
    model = on_disk(sparse, tmp_path / "offload", config, plan=plain.condense_plan)
    errors = [each.config.condense_config["refit_errors"] for each in (plain, model)]
    assert all(errors[0][layer] == pytest.approx(errors[1][layer], rel=1e-3) for layer in errors[0])
    assert_same_weights(plain, model, tmp_path, rtol=1e-3)


@pytest.mark.parametrize("form", ["trim_layer", "trim_block"])
def test_trimming(form: str, sparse: Path, tmp_path: Path) -> None:
    config = CondenseConfig(num_layers=2, num_experts=0, form=form, layer_selection="similarity", batch_size=2)
    assert_same_weights(
        condense_pretrained(sparse, config, calibration=IDS), on_disk(sparse, tmp_path / "offload", config), tmp_path
    )


def test_a_device_map_of_transformers(sparse: Path, tmp_path: Path) -> None:
    """What fits stays in memory, the rest is on disk: transformers decides."""
    plain = AutoModelForCausalLM.from_pretrained(sparse)
    kwargs = {"device_map": "auto", "max_memory": {"cpu": "120KB"}, "offload_folder": str(tmp_path / "offload")}
    model = AutoModelForCausalLM.from_pretrained(sparse, **kwargs)
    assert in_layers(model) == {"cpu", "meta"}
    plan = search_plan(model, CONFIG, calibration=IDS, state_dir=tmp_path / "state")
    # The state's fingerprint is that of the weights, wherever they are.
    assert plan == search_plan(plain, CONFIG, calibration=IDS, state_dir=tmp_path / "state")
    assert_same_plan(plan, search_plan(plain, CONFIG, calibration=IDS))
    assert in_layers(model) == {"cpu", "meta"}
    assert_same_weights(apply_plan(plain, plan), apply_plan(model, plan), tmp_path)


def test_one_layer_at_a_time_and_once_per_round(sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        sparse,
        device_map={"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
        | {"lm_head": "cpu"},
        offload_folder=str(tmp_path),
    )
    reads: Counter[int] = Counter()
    most = 0
    bring = AlignDevicesHook.pre_forward

    def counting(self: AlignDevicesHook, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        nonlocal most
        reading = self.offload
        given = bring(self, module, *args, **kwargs)
        layers = list(model.model.layers)
        for i, layer in enumerate(layers):
            if reading and module is getattr(layer.mlp, "experts", None):
                reads[i] += 1
        most = max(most, sum(any(not p.is_meta for p in layer.parameters()) for layer in layers))
        return given

    monkeypatch.setattr(AlignDevicesHook, "pre_forward", counting)
    search_plan(model, CONFIG, calibration=IDS)  # of three batches
    assert most == 1
    # Twice to learn how the decoder runs, once to probe the first block, once for its experts, once for the unmodified
    # model's output, and once in each of two rounds.
    first, *others = sorted(reads)
    assert dict(reads) == {first: 7, **dict.fromkeys(others, 6)}


def test_a_layer_is_read_from_the_checkpoint_once_per_round(
    sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: Counter[int] = Counter()
    read = CheckpointLayers._read

    def counting(self: CheckpointLayers, layer: int) -> dict[str, torch.Tensor]:
        reads[layer] += 1
        return read(self, layer)

    monkeypatch.setattr(CheckpointLayers, "_read", counting)
    model = on_disk(sparse, tmp_path)
    # As above, and once more where it is condensed; the first block is probed again then.
    condensed = {layer.layer for layer in model.condense_plan.layers}
    assert reads == {0: 6, **{layer: 6 + 2 * (layer == 1) + (layer in condensed) for layer in (1, 2, 3)}}


def test_the_next_layer_is_read_ahead(sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each layer, the bytes of the next one are read from the disk, all of them and no others."""
    begun: list[int] = []
    start = ReadAhead.start

    def noting(self: ReadAhead, layer: int) -> None:
        begun.append(layer)
        start(self, layer)

    monkeypatch.setattr(ReadAhead, "start", noting)
    on_disk(sparse, tmp_path)
    assert begun[:10] == [2, 1, 2, 3, 0, 1, 2, 3, 0, 1]  # first, the first sparse block is probed
    found = unread_tensors([str(sparse / "model.safetensors")])
    layer = [tensor for key, tensor in found.items() if ".layers.2." in key]
    [(file, ranges)] = byte_ranges(layer).items()
    content = Path(file).read_bytes()
    assert sum(end - start for start, end in ranges) == sum(tensor[...].nbytes for tensor in layer)
    for tensor in layer:
        assert any(tensor[...].numpy().tobytes() in content[start:end] for start, end in ranges)
    lost = replace(layer[0], file=str(tmp_path / "lost"))
    ahead = ReadAhead({0: layer, 1: [lost]})
    for number in (0, 1, 2):  # lost files are reported by who needs them; there is no layer 2
        ahead.start(number)
        copy.deepcopy(ahead).wait()
        ahead.wait()


def test_weights_of_a_layer_are_converted_one_by_one(
    sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would convert several in threads, each of which takes memory."""
    read = CheckpointLayers._read

    def without_threads(self: CheckpointLayers, layer: int) -> dict[str, torch.Tensor]:
        with monkeypatch.context() as patch:
            patch.setattr("transformers.core_model_loading.ThreadPoolExecutor", None)
            return read(self, layer)

    monkeypatch.delenv("HF_DEACTIVATE_ASYNC_LOAD", raising=False)
    monkeypatch.setattr(CheckpointLayers, "_read", without_threads)
    on_disk(sparse, tmp_path)
    assert "HF_DEACTIVATE_ASYNC_LOAD" not in os.environ


def test_a_checkpoint_that_lacks_weights_is_refused(sparse: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(sparse, broken)
    weights = load_file(broken / "model.safetensors")
    lost = next(name for name in weights if "layers.2" in name and "layernorm" in name)
    save_file({name: weight for name, weight in weights.items() if name != lost}, broken / "model.safetensors")
    with pytest.raises(ValueError, match="lacks 1 of its weights"):
        on_disk(broken, tmp_path / "offload")


def test_weights_that_are_nowhere_are_refused(sparse: Path) -> None:
    sketch, _ = sketch_model(sparse, {})
    with pytest.raises(ValueError, match=r"weights of the model are on the meta device, such as .*offload_folder"):
        search_plan(sketch, CONFIG, calibration=IDS)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a checkpoint of 0.5 GB, a process that condenses it layer by layer never holds half."""
    monkeypatch.syspath_prepend(str(RECIPES / "benchmarks"))
    arguments = ["--hidden_size=512", "--num_layers=13", "--experts=32", "--samples=2", "--length=16", "--condensed=2"]
    arguments += ["--kept=2", "--ways=layers", f"--folder={tmp_path}", f"--json={tmp_path / 'memory.json'}"]
    load_recipe("benchmarks/memory").main(arguments)
    found = json.loads((tmp_path / "memory.json").read_text())
    size, peak = found["checkpoint"], found["ways"]["layers"]["anonymous_own"]
    assert peak < size / 2
    assert [path.name for path in tmp_path.iterdir()] == ["memory.json"]
