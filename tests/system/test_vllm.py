"""vLLM, where it is installed: it opens condensed checkpoints by its transformers backend, exported ones as its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from cdmoe_plugin import CondenseConfig, apply_plan, export_dense, export_stock, search_plan
from cdmoe_plugin.export.top_k import export_top_k
from tests.helpers.recovery import word_tokenizer
from tests.helpers.served import record

pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM")]

# Its kernels for CPUs want heads of 32 and more.
COMMON = {"vocab_size": 104, "hidden_size": 128, "num_hidden_layers": 4, "max_position_embeddings": 256}
COMMON |= {"num_attention_heads": 4, "num_key_value_heads": 4, "num_experts_per_tok": 2, "eos_token_id": 2}
EXPERTS = {"moe_intermediate_size": 32, "intermediate_size": 128}
MODELS = {
    "qwen2_moe": {**EXPERTS, "num_experts": 8, "shared_expert_intermediate_size": 64},
    "qwen3_moe": {**EXPERTS, "num_experts": 8, "head_dim": 32},
    "mixtral": {"intermediate_size": 32, "num_local_experts": 8},
    "deepseek": {**EXPERTS, "n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 1},
    "glm4_moe": {**EXPERTS, "head_dim": 32, "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1},
}
EXPORTS = {"exported": export_stock, "dense": export_dense, "top_k": export_top_k}
# Prints the class that vLLM chose, and leaves the tokens that it chose greedily and the prompts' log-probabilities.
PROGRAM = """
import json, os, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from vllm import LLM, SamplingParams

def main():
    folder, processes = Path(sys.argv[1]), int(sys.argv[2])
    ids = load_file(folder.parent / "expected.safetensors")["ids"].tolist()
    llm = LLM(
        model=str(folder), dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=8,
        tensor_parallel_size=processes,
    )
    wish = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, prompt_logprobs=0)
    found = llm.generate([{"prompt_token_ids": row} for row in ids], wish, use_tqdm=False)
    tokens = torch.tensor([list(f.outputs[0].token_ids) for f in found])
    logprobs = [[f.prompt_logprobs[t][row[t]].logprob for t in range(1, len(row))] for f, row in zip(found, ids)]
    save_file({"tokens": tokens, "logprobs": torch.tensor(logprobs)}, folder.parent / "found.safetensors")

if __name__ == "__main__":
    main()
"""


def checkpoint(model_type: str, form: str, folder: Path) -> None:
    """A checkpoint with all sparse layers condensed or two, or exported, and what transformers makes of it."""
    config = AutoConfig.for_model(model_type, **COMMON, **MODELS[model_type])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 4  # what comes out should not be nearly the same for every token
    ids = torch.randint(4, 104, (4, 20), generator=torch.Generator().manual_seed(0))
    first = MODELS[model_type].get("first_k_dense_replace", 0)
    layers = list(range(first, 4 if form in ("fully", "dense", "top_k") else first + 2))
    model = apply_plan(
        model, search_plan(model, CondenseConfig(layers=layers, num_experts=2), calibration=ids.tolist())
    )
    if form in EXPORTS:
        EXPORTS[form](model, folder)
    else:
        model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    with torch.no_grad():
        logprobs = model(ids).logits.float().log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
        tokens = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)[:, 20:]
    expected = {"ids": ids, "logprobs": logprobs.contiguous(), "tokens": tokens.contiguous()}
    save_file(expected, folder.parent / "expected.safetensors")


@pytest.mark.parametrize(
    ("model_type", "form", "processes"),
    [
        ("qwen2_moe", "fully", 2),  # with a gate per token
        ("qwen2_moe", "partly", 1),
        ("mixtral", "partly", 2),
        ("deepseek", "partly", 2),
        ("qwen3_moe", "exported", 1),
        ("glm4_moe", "exported", 1),
        ("mixtral", "dense", 1),
        ("deepseek", "dense", 1),
        ("qwen2_moe", "top_k", 1),
    ],
)
def test_what_transformers_computes(model_type: str, form: str, processes: int, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    checkpoint(model_type, form, folder)
    (tmp_path / "program.py").write_text(PROGRAM)
    threads = "|".join(map(str, range(processes))) if processes > 1 else "auto"
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": threads, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(tmp_path / "program.py"), str(folder), str(processes)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    wanted, found = (load_file(tmp_path / f"{name}.safetensors") for name in ("expected", "found"))
    worst = float((found["logprobs"] - wanted["logprobs"]).abs().max())
    shown = {"exported": "stock", "dense": "dense", "top_k": "top-K"}.get(form, "condensed")
    record(f"vLLM {version('vllm')}", shown, model_type, worst)
    torch.testing.assert_close(found["logprobs"], wanted["logprobs"], rtol=1e-4, atol=1e-5)
    assert torch.equal(found["tokens"], wanted["tokens"])
    config = json.loads((folder / "config.json").read_text())
    siblings = {"mixtral": "mistral", "deepseek": "llama"}
    written = {"exported": model_type, "top_k": model_type, "dense": siblings.get(model_type)}
    assert config["model_type"] == written.get(form, f"cdmoe_{model_type}")
