"""
Train the condensed layers with DPO, with the sparse model as reference, which needs no second copy of the model. The
script needs one more argument: `peft_config`.

python examples/in_dpo.py Qwen/Qwen1.5-MoE-A2.7B qwen-cd9/condense_plan.json preferences.jsonl outputs/adapter

The data has {"prompt": ..., "chosen": ..., "rejected": ...} per line. The result is a condense adapter; `cdmoe_plugin.
condense_pretrained(base, plan="outputs/adapter")` opens it as a small model. KTO and GRPO take the same argument.
"""

from __future__ import annotations

import sys

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from cdmoe_plugin import CondenseAdapterConfig


def main(base: str, plan: str, preferences: str, output_dir: str) -> None:
    bf16 = torch.cuda.is_available()  # TRL's default; not supported on CPUs
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(base, dtype="auto"),
        args=DPOConfig(output_dir, num_train_epochs=1, learning_rate=1e-5, bf16=bf16, report_to="none"),
        train_dataset=load_dataset("json", data_files=preferences, split="train"),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=CondenseAdapterConfig(plan=plan, task_type="CAUSAL_LM"),  # the new line
    )
    trainer.train()
    trainer.save_model()  # saves only the condensed layers


if __name__ == "__main__":
    main(*sys.argv[1:])
