"""DeepSeekMoE against a naive float64 computation, from checkpoints in the original layout."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM, dynamic_module_utils
from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func

from cdmoe_plugin.model import modeling_deepseek as deepseek
from cdmoe_plugin.model.classes import condensed_model_class
from cdmoe_plugin.model.saving import modeling_files

torch.set_num_threads(1)  # the tensors are tiny: more threads only wait for each other
# A config.json as the original release writes it, but tiny
ORIGINAL: dict[str, Any] = json.loads("""{
  "architectures": ["DeepseekForCausalLM"], "model_type": "deepseek",
  "auto_map": {
    "AutoConfig": "configuration_deepseek.DeepseekConfig",
    "AutoModel": "modeling_deepseek.DeepseekModel",
    "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM"
  },
  "attention_bias": false, "attention_dropout": 0.0, "aux_loss_alpha": 0.01,
  "bos_token_id": 1, "eos_token_id": 2, "first_k_dense_replace": 1, "hidden_act": "silu",
  "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 40,
  "max_position_embeddings": 64, "moe_intermediate_size": 12, "moe_layer_freq": 1,
  "n_routed_experts": 6, "n_shared_experts": 2, "norm_topk_prob": false,
  "num_attention_heads": 4, "num_experts_per_tok": 3, "num_hidden_layers": 4,
  "num_key_value_heads": 4, "pad_token_id": 0, "pretraining_tp": 1, "rms_norm_eps": 1e-6,
  "rope_scaling": null, "rope_theta": 1000.0, "scoring_func": "softmax", "seq_aux": true,
  "tie_word_embeddings": false, "torch_dtype": "float32", "transformers_version": "4.36.0",
  "use_cache": true, "vocab_size": 50
}""")
Weights = dict[str, torch.Tensor]


def is_sparse(cfg: dict[str, Any], layer: int) -> bool:
    late = layer >= cfg["first_k_dense_replace"]
    return cfg["n_routed_experts"] is not None and late and layer % cfg["moe_layer_freq"] == 0


def write_checkpoint(folder: Path, **changes: Any) -> tuple[dict[str, Any], Weights]:
    """Write a random checkpoint in the original layout; returns its config and its tensors."""
    cfg = ORIGINAL | changes
    h, heads, vocab = cfg["hidden_size"], cfg["num_attention_heads"], cfg["vocab_size"]
    kv_width = (cfg["num_key_value_heads"] or heads) * h // heads
    shapes = {"model.embed_tokens": (vocab, h), "model.norm": (h,), "lm_head": (vocab, h)}
    for layer in range(cfg["num_hidden_layers"]):
        pre = f"model.layers.{layer}"
        shapes |= {f"{pre}.input_layernorm": (h,), f"{pre}.post_attention_layernorm": (h,)}
        for name, width in {"q": h, "k": kv_width, "v": kv_width, "o": h}.items():
            shapes[f"{pre}.self_attn.{name}_proj"] = (width, h)
        mlps = {f"{pre}.mlp": cfg["intermediate_size"]}
        if is_sparse(cfg, layer):
            shapes[f"{pre}.mlp.gate"] = (cfg["n_routed_experts"], h)
            width, n_shared = cfg["moe_intermediate_size"], cfg["n_shared_experts"]
            mlps = {f"{pre}.mlp.experts.{e}": width for e in range(cfg["n_routed_experts"])}
            mlps |= {f"{pre}.mlp.shared_experts": n_shared * width} if n_shared else {}
        for name, width in mlps.items():
            shapes |= {f"{name}.gate_proj": (width, h), f"{name}.up_proj": (width, h)}
            shapes[f"{name}.down_proj"] = (h, width)
    weights, generator = {}, torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        scaled = 1 + 0.2 * values if "norm" in name else values * 1.5 * shape[-1] ** -0.5
        weights[f"{name}.weight"] = scaled  # norms near 1, matrices that keep their input's scale
        if cfg["attention_bias"] and "self_attn" in name:
            weights[f"{name}.bias"] = torch.randn(shape[0], generator=generator)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(cfg))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return cfg, weights


def naive_forward(cfg: dict[str, Any], weights: Weights, ids: list[int]) -> list[torch.Tensor]:
    """Hidden states (embeddings, then each layer, the last one normed), then logits."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    heads, top_k, length = cfg["num_attention_heads"], cfg["num_experts_per_tok"], len(ids)
    groups = heads // (cfg["num_key_value_heads"] or heads)
    dim, scaling = cfg["hidden_size"] // heads, cfg["rope_scaling"] or {"type": None}
    theta, positions = cfg["rope_theta"], torch.arange(length).double()
    if scaling["type"] == "linear":
        positions = positions / scaling["factor"]
    elif scaling["type"] == "dynamic" and length > cfg["max_position_embeddings"]:
        ratio = scaling["factor"] * length / cfg["max_position_embeddings"]
        theta *= (ratio - scaling["factor"] + 1) ** (dim / (dim - 2))
    angles = torch.outer(positions, theta ** (-torch.arange(0, dim, 2).double() / dim))
    cos, sin = angles.cos(), angles.sin()

    def rotate(x: torch.Tensor) -> torch.Tensor:
        a, b = x[:, : dim // 2], x[:, dim // 2 :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + cfg["rms_norm_eps"]).sqrt() * w[name]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def mlp(x: torch.Tensor, name: str) -> torch.Tensor:
        gated = silu(linear(x, f"{name}.gate_proj")) * linear(x, f"{name}.up_proj")
        return linear(gated, f"{name}.down_proj")

    def attention(x: torch.Tensor, name: str) -> torch.Tensor:
        q, k, v = (linear(x, f"{name}.{c}_proj").split(dim, dim=-1) for c in "qkv")
        future = torch.full((length, length), -torch.inf).triu(1)
        outputs = []
        for head in range(heads):
            scores = rotate(q[head]) @ rotate(k[head // groups]).T / dim**0.5
            outputs.append((scores + future).softmax(-1) @ v[head // groups])
        return linear(torch.cat(outputs, dim=-1), f"{name}.o_proj")

    def sparse(x: torch.Tensor, name: str) -> torch.Tensor:
        rows = []
        for token in x:
            scores = linear(token, f"{name}.gate").softmax(-1).tolist()
            best = sorted(range(len(scores)), key=scores.__getitem__)[-top_k:]
            total = sum(scores[e] for e in best) if cfg["norm_topk_prob"] and top_k > 1 else 1.0
            row = sum(scores[e] / total * mlp(token, f"{name}.experts.{e}") for e in best)
            shared = mlp(token, f"{name}.shared_experts") if cfg["n_shared_experts"] else 0
            rows.append(row + shared)
        return torch.stack(rows)

    states = [x := w["model.embed_tokens.weight"][ids]]
    for layer in range(cfg["num_hidden_layers"]):
        pre = f"model.layers.{layer}"
        x = x + attention(norm(x, f"{pre}.input_layernorm.weight"), f"{pre}.self_attn")
        block = sparse if is_sparse(cfg, layer) else mlp
        x = x + block(norm(x, f"{pre}.post_attention_layernorm.weight"), f"{pre}.mlp")
        states.append(x)
    states[-1] = norm(x, "model.norm.weight")
    return [*states, linear(states[-1], "lm_head")]


def random_ids(length: int, seed: int = 1) -> list[int]:
    return torch.randint(3, 50, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "normed": {"norm_topk_prob": True, "first_k_dense_replace": 0},
    "normed top-1": {"norm_topk_prob": True, "num_experts_per_tok": 1},
    "every 2nd": {"moe_layer_freq": 2, "first_k_dense_replace": 0},
    "every 2nd from 2": {"moe_layer_freq": 2, "first_k_dense_replace": 2},
    "no shared": {"n_shared_experts": None, "first_k_dense_replace": 2},
    "all dense": {"n_routed_experts": None, "num_experts_per_tok": None},
    "gqa, bias": {"num_key_value_heads": 2, "attention_bias": True},
    "kv heads null": {"num_key_value_heads": None},
    "linear rope": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "dynamic rope": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "long": {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 10},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_original_checkpoint_matches_naive_computation(tmp_path, changes):
    cfg, weights = write_checkpoint(tmp_path, **changes)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, deepseek.DeepseekForCausalLM)
    assert not any(info.values()), info
    assert model.config._experts_implementation == "grouped_mm"  # not the slow loop
    ids = random_ids(24)
    expected = naive_forward(cfg, weights, ids)
    for experts in ("grouped_mm", "eager"):
        model.set_experts_implementation(experts)
        with torch.no_grad():
            output = model(torch.tensor([ids]), output_hidden_states=True)
        actual = [x[0].double() for x in (*output.hidden_states, output.logits)]
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_round_trip_is_bitwise(tmp_path):
    _, weights = write_checkpoint(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    torch.testing.assert_close(saved, weights, rtol=0, atol=0)
    # The files that the original names are not there any more
    assert "auto_map" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.tensor([random_ids(12)])
    assert torch.equal(model(ids).logits, again(ids).logits)


def test_generate_with_left_padding(tmp_path):
    write_checkpoint(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompts = [random_ids(5, seed=2), random_ids(9, seed=3)]
    ids = torch.tensor([[0] * (9 - len(p)) + p for p in prompts])
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    batched = model.generate(ids, attention_mask=(ids != 0).long(), **options)[:, 9:]
    for row, prompt in zip(batched, prompts, strict=True):
        for use_cache in (True, False):
            alone = model.generate(torch.tensor([prompt]), use_cache=use_cache, **options)
            assert torch.equal(row, alone[0, len(prompt) :])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")  # 5.17 has no other
def test_training_with_load_balancing_loss(tmp_path):
    write_checkpoint(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    ids = torch.tensor([random_ids(10), random_ids(10, seed=2)])
    plain = model(ids, labels=ids)
    grads = []
    for _ in range(2):
        output = model(ids, labels=ids, output_router_logits=True)
        assert [tuple(r.shape) for r in output.router_logits] == [(20, 6)] * 3
        aux_loss = load_balancing_loss_func(output.router_logits, num_experts=6, top_k=3)
        torch.testing.assert_close(output.loss, plain.loss + 0.01 * aux_loss)
        model.zero_grad()
        output.loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
        model.gradient_checkpointing_enable()  # for the second round
    assert all(grad.any() for grad in grads[0].values())
    torch.testing.assert_close(grads[0], grads[1])


def test_config():
    config = deepseek.DeepseekConfig(**ORIGINAL)
    assert (config.num_experts, config.router_aux_loss_coef) == (6, 0.01)
    with pytest.raises(ValueError, match="scoring_func"):
        deepseek.DeepseekConfig(**ORIGINAL | {"scoring_func": "sigmoid"})


def test_copy_beside_weights_opens_as_custom_code(tmp_path, monkeypatch):
    folder = tmp_path / "with_code"
    write_checkpoint(folder, auto_map={"AutoConfig": "modeling_deepseek.DeepseekConfig"})
    for name, text in modeling_files(condensed_model_class(deepseek.DeepseekForCausalLM)).items():
        (folder / name).write_bytes(text)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    get_class = dynamic_module_utils.get_class_from_dynamic_module
    model = get_class("modeling_deepseek.DeepseekForCausalLM", folder).from_pretrained(folder)
    assert type(model) is not deepseek.DeepseekForCausalLM
    assert hasattr(model.config, "auto_map")
    ids = torch.tensor([random_ids(12)])
    assert torch.equal(model(ids).logits, AutoModelForCausalLM.from_pretrained(folder)(ids).logits)
    classifier = get_class("modeling_deepseek.DeepseekForSequenceClassification", folder)
    assert classifier(model.config)(ids).logits.shape == (1, 2)
