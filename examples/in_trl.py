"""
Fine-tune a condensed checkpoint with TRL's SFTTrainer. The script needs one more line: `import cdmoe_plugin`.

python examples/in_trl.py qwen-cd9 conversations.jsonl outputs/tuned

The data may have any format that TRL supports, such as {"prompt": ..., "completion": ...} per line.
"""

from __future__ import annotations

import sys

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import cdmoe_plugin  # noqa: F401  (from here on, the auto classes open condensed checkpoints)


def main(checkpoint: str, conversations: str, output_dir: str) -> None:
    bf16 = torch.cuda.is_available()  # TRL's default; not supported on CPUs
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto"),
        SFTConfig(output_dir, num_train_epochs=1, learning_rate=5e-5, max_length=512, bf16=bf16, report_to="none"),
        train_dataset=load_dataset("json", data_files=conversations, split="train"),
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
    )
    trainer.train()
    trainer.save_model()  # a condensed checkpoint, as before


if __name__ == "__main__":
    main(*sys.argv[1:])
