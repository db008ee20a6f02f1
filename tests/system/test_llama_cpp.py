"""Exports converted by llama.cpp's own converter and run by its engine, against transformers.

They run where `llama_cpp` (llama-cpp-python) is installed and `LLAMA_CPP` names the folder of llama.cpp's source, which
has the converter (`vendor/llama.cpp` of the package's source); not in CI. The package loads another library of the same
interface from `LLAMA_CPP_LIB_PATH`. `LLAMA_CPP_BUILD` names the engine's build in the table of docs/serve.md.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from cdmoe_plugin import CondensedLayer, CondensePlan, apply_plan
from cdmoe_plugin.blocks import find_sparse_blocks
from cdmoe_plugin.export.gguf import TESTED
from cdmoe_plugin.registry import EXPORT_TARGETS
from tests.helpers.models import build
from tests.helpers.plans import some_plan
from tests.helpers.served import record
from tests.helpers.tiny_models import ARCHITECTURES, tiny_model

CONVERTER = Path(os.environ.get("LLAMA_CPP", "no folder"), "convert_hf_to_gguf.py")
llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
sentencepiece = pytest.importorskip(
    "sentencepiece", reason="sentencepiece, which the converter needs, is not installed"
)
pytestmark = pytest.mark.skipif(not CONVERTER.exists(), reason="LLAMA_CPP does not name llama.cpp's source")

TEXT = ["the condensed experts of a layer " * 3] * 9
IDS = torch.randint(3, 300, (24,), generator=torch.Generator().manual_seed(5)).tolist()
SIZES = {"vocab": 320, "hidden": 64, "head_width": 16, "expert_width": 32, "dense_width": 96}
MLA = {"kv_rank": 32, "q_rank": 32, "rope_dim": 16, "nope_dim": 16, "v_dim": 16}
YARN = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "original_max_position_embeddings": 4096}
YARN |= {"beta_fast": 32.0, "beta_slow": 1.0}
# Fields whose values in tiny models llama.cpp does not read, as all published checkpoints have the same.
OWN: dict[str, dict[str, Any]] = {
    "deepseek_v2": MLA,
    "deepseek_v3": {**MLA, "groups": 1, "scoring_func": "sigmoid"},
    "ernie4_5_moe": {"dense_width": 128},  # the converter takes a part of it for the shared experts' width
    "gpt_oss": {"swiglu_limit": 7.0, "max_positions": 131072, "rope_parameters": {**YARN, "truncate": True}},
    "lfm2_moe": {"routed_scale": 1.0},
}
FORMS = {"dense": "dense", "top_k": "top-K", "gguf": "stock, first layers"}
ENGINE = f"llama.cpp {os.environ.get('LLAMA_CPP_BUILD', 'of unknown build')} (llama-cpp-python {llama_cpp.__version__})"
# The converter knows the tokenizers of published models by a hash, and a tiny one by no name.
CONVERT = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda *_: "gpt-2"
sys.argv = [sys.argv[1] + "/convert_hf_to_gguf.py", *sys.argv[2:]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 300 tokens."""
    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<bos>", "<eos>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    tokens.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def save_vocabulary(folder: Path, model_type: str) -> None:
    """Save a tokenizer of a kind that the converter reads for a model type."""
    tokens = tokenizer()
    if model_type == "glm4_moe":
        tokens.add_tokens(["[gMASK]", "<sop>", "<|endoftext|>", "<|user|>", "<|observation|>"], special_tokens=True)
    tokens.save_pretrained(folder)
    if model_type == "ernie4_5_moe":
        with open(folder / "tokenizer.model", "wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(TEXT), model_writer=file, vocab_size=60, hard_vocab_limit=False, minloglevel=2
            )


def converted(folder: Path, kind: str = "f32") -> Path:
    """The GGUF file of an exported checkpoint, by llama.cpp's converter."""
    save_vocabulary(folder, json.loads((folder / "config.json").read_text())["model_type"])
    file = folder / "model.gguf"
    command = [sys.executable, "-c", CONVERT, str(CONVERTER.parent), str(folder), "--outfile", str(file)]
    done = subprocess.run([*command, "--outtype", kind], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return file


def in_llama_cpp(file: Path) -> Tensor:
    """The logits `[T, V]` of a GGUF file in llama.cpp."""
    engine = llama_cpp.Llama(
        str(file), n_ctx=64, logits_all=True, type_k=0, type_v=0, flash_attn=False, n_threads=1, verbose=False
    )
    engine.eval(IDS)
    return torch.tensor(engine.scores[: len(IDS)])


@torch.no_grad()
def in_transformers(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model(input_ids=torch.tensor([IDS])).logits[0]


def sparse(model_type: str) -> Any:
    if model_type == "deepseek":
        return build("deepseek", num_experts=8, **SIZES)
    return tiny_model(model_type, **{**SIZES, **OWN.get(model_type, {})})


def layers_of(model_type: str) -> list[int]:
    return [1, 2, 3] if model_type == "deepseek" else list(ARCHITECTURES[model_type].sparse_layers)


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def compare(model_type: str, layers: list[int], target: str, folder: Path) -> str:
    """Export, convert and run a model; return the model type of the checkpoint."""
    written = EXPORT_TARGETS[target].write(apply_plan(sparse(model_type), some_plan(layers)), folder)
    error = difference(in_llama_cpp(converted(folder)), in_transformers(folder))
    record(ENGINE, FORMS[target], model_type, error)
    assert error < 1e-4
    return str(written.model_type)


def quantised(file: Path) -> Path:
    """The file in Q4_K_M, as `llama-quantize` writes it."""
    wish = llama_cpp.llama_model_quantize_default_params()
    wish.ftype, wish.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M, 1
    smaller = file.with_name("Q4_K_M.gguf")
    assert llama_cpp.llama_model_quantize(bytes(file), bytes(smaller), ctypes.byref(wish)) == 0
    return smaller


@pytest.mark.parametrize(
    ("model_type", "target", "written"),
    [
        ("deepseek", "dense", "llama"),
        ("mixtral", "dense", "mistral"),
        ("qwen3_moe", "dense", "qwen3"),
        ("gpt_oss", "top_k", "gpt_oss"),
    ],
)
def test_fully_condensed(model_type: str, target: str, written: str, tmp_path: Path) -> None:
    assert compare(model_type, layers_of(model_type), target, tmp_path) == written


def test_yarn_of_gpt_oss(tmp_path: Path) -> None:
    """llama.cpp always rounds the bounds of YaRN's ramp, as `truncate` does; published gpt_oss models do not set it."""
    own = {**SIZES, **OWN["gpt_oss"], "rope_parameters": {**YARN, "truncate": False}}
    model = apply_plan(tiny_model("gpt_oss", **own), some_plan(layers_of("gpt_oss")))
    EXPORT_TARGETS["top_k"].write(model, tmp_path)
    found, expected = in_llama_cpp(converted(tmp_path)), in_transformers(tmp_path)
    error = difference(found, expected)
    record(ENGINE, "top-K, YaRN without `truncate`", "gpt_oss", error)
    assert 1e-3 < error < 2e-2
    config = json.loads((tmp_path / "config.json").read_text())
    for spelling in ("rope_parameters", "rope_scaling"):
        config[spelling]["truncate"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert difference(found, in_transformers(tmp_path)) < 1e-4


@pytest.mark.parametrize("model_type", sorted(TESTED))
def test_first_layers(model_type: str, tmp_path: Path) -> None:
    assert compare(model_type, layers_of(model_type)[:2], "gguf", tmp_path) == model_type


@pytest.mark.parametrize(
    ("model_type", "dense"),
    [("deepseek_v2", 1), ("deepseek_v3", 1), ("glm4_moe", 1), ("qwen2_moe", 1), ("mixtral", 0), ("qwen3_moe", 0)],
)
def test_fewer_experts(model_type: str, dense: int, tmp_path: Path) -> None:
    """All layers keep four experts, with one more as dense neurons where there is a shared expert."""
    # As published checkpoints, whose values of the last the engine does not read.
    own = {"qwen2_moe": {"mlp_only_layers": []}, "qwen3_moe": {"mlp_only_layers": [], "norm_topk_prob": True}}
    model = tiny_model(model_type, **{**SIZES, **OWN.get(model_type, {}), **own.get(model_type, {})})
    numbers = [block.layer for block in find_sparse_blocks(model)]
    layers = [CondensedLayer(i, [0] * dense, [0.5] * dense, routed=[1, 3, 4, 6]) for i in numbers]
    written = EXPORT_TARGETS["stock"].write(apply_plan(model, CondensePlan(layers)), tmp_path)
    assert written.model_type == model_type
    error = difference(in_llama_cpp(converted(tmp_path)), in_transformers(tmp_path))
    record(ENGINE, "stock, fewer experts", model_type, error)
    assert error < 1e-4


def test_four_bit(tmp_path: Path) -> None:
    """Widths are multiples of the 256 weights of a block of Q4_K, so that no matrix needs another type."""
    wide = {**SIZES, "hidden": 256, "expert_width": 64, "shared_width": 64}
    model = apply_plan(build("deepseek", num_experts=8, **wide), some_plan([1, 2, 3]))
    EXPORT_TARGETS["dense"].write(model, tmp_path)
    file = converted(tmp_path)
    smaller = quantised(file)
    assert smaller.stat().st_size < 0.4 * file.stat().st_size
    error = difference(in_llama_cpp(smaller), in_transformers(tmp_path))
    record(ENGINE, "dense, Q4_K_M", "deepseek", error)
    assert 1e-3 < error < 0.9  # random layers amplify rounding; logits of an unrelated model differ by 1.4
