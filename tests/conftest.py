"""Settings and helpers that several test files share."""

from __future__ import annotations

import copy
import os
import random
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network, and none should wait for it
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait leave the core to other tests

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from cdmoe_plugin import CondenseConfig, CondensedLayer, CondensePlan, apply_plan, search_plan
from cdmoe_plugin.blocks import find_sparse_blocks
from cdmoe_plugin.loading import tensors as unread
from cdmoe_plugin.search.experts.greedy import EXPERT_SELECTIONS
from cdmoe_plugin.search.layers.methods import LAYER_SELECTIONS

from .tiny_models import (
    ARCHITECTURES,
    _randomize,
    available,
    random_ids,
    tiny_config,
    tiny_inputs,
    tiny_model,
)

torch.set_num_threads(1)  # the tensors are tiny: more threads only wait for each other
logging.disable_progress_bar()


TYPES = [name for name in ARCHITECTURES if available(name)]
SEARCHABLE = [name for name in TYPES if not ARCHITECTURES[name].inputs_embeds]
# AutoModelForCausalLM does not know mistral4
FROM_DISK = ["deepseek", *(name for name in TYPES if ARCHITECTURES[name].causal_lm and name != "mistral4")]
FOLDS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in TYPES),
    ("ernie4_5_moe", {"use_bias": True}),
    ("hy_v3", {"mlp_bias": True}),
    ("granitemoeshared", {"shared_width": 0}),
    ("qwen2_moe", {"hidden_act": "gelu"}),
    ("nemotron_h", {"moe_latent_size": 24}),
    ("nemotron_h", {"moe_latent_size": 24, "mlp_bias": True}),
]
IDS = random_ids(3, 9)


def build(model_type: str, norm: bool | None = None, **overrides: Any) -> PreTrainedModel:
    """A tiny model whose layers and experts differ in size, so that orders are no matter of course."""
    overrides = {"num_experts": 6, **overrides} | ({} if norm is None else {"norm_topk_prob": norm})
    if model_type == "deepseek":
        like = tiny_config("dots1", **overrides).to_dict()
        config = AutoConfig.for_model("deepseek", **{name: like[name] for name in like if name != "model_type"})
        model = AutoModelForCausalLM.from_config(config).eval()
        _randomize(model, seed=3)
    else:
        model = tiny_model(model_type, seed=3, **overrides)
    for index, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "experts"):
            sizes = torch.linspace(0.7, 1.3, len(layer.mlp.experts.down_proj)).roll(index)[:, None, None]
            layer.mlp.experts.down_proj.data *= sizes * (1.2 if index == 1 + len(model_type) % 3 else 2.5)
    return model


def sparse_model(model_type: str) -> PreTrainedModel:
    """`tiny_model`, which does not know "deepseek"."""
    return build("deepseek", num_experts=8) if model_type == "deepseek" else tiny_model(model_type)


@dataclass
class Record:
    """What the searches saw and gave."""

    gates: dict[int, Tensor]
    experts: dict[int, Any]
    layers: list[Any]


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Record:
    """Everything that passes through the registered greedy functions."""
    kept = Record({}, {}, [])
    by_expert, by_layer = EXPERT_SELECTIONS["greedy"], LAYER_SELECTIONS["greedy"]

    def spy_experts(data: Any, num_experts: int) -> Any:
        kept.gates[data.block.layer] = data.gates
        kept.experts[data.block.layer] = by_expert(data, num_experts)
        return kept.experts[data.block.layer]

    def spy_layers(data: Any, num_layers: int) -> Any:
        kept.layers.append(by_layer(data, num_layers))
        return kept.layers[-1]

    monkeypatch.setitem(EXPERT_SELECTIONS, "greedy", spy_experts)
    monkeypatch.setitem(LAYER_SELECTIONS, "greedy", spy_layers)
    return kept


# --- models, plans and checkpoints ---


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in (*model.named_parameters(), *model.named_buffers())}


def state_of(model: PreTrainedModel) -> tuple[dict[str, Tensor], Any]:
    """Everything about a model that a search could change: its tensors, and the rest."""
    tensors = {name: (t, t.detach().clone()) for name, t in (*model.named_parameters(), *model.named_buffers())}
    modules = {
        name: (id(m), type(m), m.training, sorted(vars(m)), {k: len(v) for k, v in vars(m).items() if _is_sized(v)})
        for name, m in model.named_modules()
    }
    about = {name: (id(t), t.requires_grad, t.grad) for name, (t, _) in tensors.items()}
    config = copy.deepcopy(model.config.to_dict())
    values = {name: value for name, (_, value) in tensors.items()} | {"random state": torch.get_rng_state()}
    return values, (about, modules, config)


def _is_sized(value: Any) -> bool:
    return isinstance(value, (dict, list, set))


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not bitwise equal, or not on both sides."""
    both = [k for k in one if k in other and one[k].dtype == other[k].dtype and torch.equal(one[k], other[k])]
    return sorted((one.keys() | other.keys()) - set(both))


@torch.no_grad()
def output(model: PreTrainedModel) -> Tensor:
    """Logits (hidden states without a head) of all tokens that are no padding."""
    inputs = tiny_inputs(model, IDS)
    result = model(**inputs)
    return (result.logits if "logits" in result else result.last_hidden_state)[inputs["attention_mask"].bool()]


def uniform_sparse(model_type: str, **overrides: Any) -> PreTrainedModel:
    """A model whose routers give every expert the same constant weight, and choose all (also by token ids)."""
    count = 2 if model_type == "phimoe" else 4  # its router always takes two, with weights 0.5 and 1
    model = tiny_model(model_type, num_experts=count, top_k=count, **overrides)
    for block in find_sparse_blocks(model):
        for name, tensor in (*block.module.named_parameters(), *block.module.named_buffers()):
            if name.startswith(("gate.", "router.")) or name.endswith(("expert_bias", "correction_bias")):
                tensor.data.zero_()
            if name.endswith("tid2eid"):
                tensor.copy_(torch.arange(count).expand_as(tensor))
        if block.router is not None:  # gemma4's, of the decoder layer; a scale per expert stays
            block.router.proj.weight.data.zero_()
    return model


@cache
def uniform(model_type: str) -> tuple[PreTrainedModel, CondensePlan, Tensor]:
    """`uniform_sparse` with all condensed; its plan; its output before."""
    model = uniform_sparse(model_type)
    before = output(model)
    layers, count = ARCHITECTURES[model_type].sparse_layers, find_sparse_blocks(model)[0].num_experts
    config = CondenseConfig(len(layers), count, batch_size=2)
    plan = search_plan(model, config, calibration=IDS)
    return apply_plan(model, plan), plan, before


def some_plan(layers: list[int], num_experts: int = 8) -> CondensePlan:
    rng = random.Random(0)
    rows = [(layer, rng.sample(range(num_experts), 3)) for layer in layers]
    return CondensePlan([CondensedLayer(i, experts, [rng.uniform(-1, 1) for _ in experts]) for i, experts in rows])


def keys_on_disk(folder: Path) -> set[str]:
    return {key for file in folder.glob("*.safetensors") for key in safe_open(file, "pt").keys()}  # noqa: SIM118


Reads = list[tuple[str, Any, list[int]]]  # names of tensors, which rows of them, and their shapes


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """What the package reads from safetensors files."""
    log: Reads = []

    class Watched:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.file = safe_open(*args, **kwargs)

        def __enter__(self) -> Watched:
            return self

        def __exit__(self, *error: object) -> None:
            self.file.__exit__(*error)

        def keys(self) -> list[str]:
            return self.file.keys()

        def get_slice(self, key: str) -> Any:
            part = self.file.get_slice(key)

            class Slice:
                get_shape, get_dtype = part.get_shape, part.get_dtype

                def __getitem__(self, index: Any) -> Tensor:
                    log.append((key, index, part.get_shape()))
                    return part[index]

            return Slice()

    monkeypatch.setattr(unread, "safe_open", Watched)
    return log


def in_layer(key: str, layer: int) -> bool:
    return re.search(rf"(layers|blocks)\.{layer}\.", key) is not None


def experts_read(reads: Reads, layer: int) -> list[int]:
    """Which of a layer's 8 routed experts have been read, once per tensor."""
    found = []
    for key, index, shape in reads:
        is_expert = re.search(r"\.experts\.|\.(block_sparse_moe|mlp)\.(in|out)put_linear", key) and len(shape) > 1
        if not is_expert or not in_layer(key, layer) or ".self_attention.experts." in key:
            continue
        own = re.search(r"\.experts\.(\d+)\.", key)
        rows = list(range(shape[0])[index]) if isinstance(index, slice) else list(range(shape[0]))
        found += [int(own[1])] if own else sorted({row // (shape[0] // 8) for row in rows})
    return found
