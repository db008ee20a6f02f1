"""
Train a condensed model with transformers' Trainer. One line changes: `condense_pretrained` replaces `from_pretrained`.

python examples/in_trainer.py Qwen/Qwen1.5-MoE-A2.7B texts.jsonl outputs/trained

The texts ({"text": ...} per line) are used for calibration and for training. Only the condensed layers are trained.
"""

from __future__ import annotations

import sys

from datasets import load_dataset
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, Trainer, TrainingArguments

from cdmoe_plugin import CondenseConfig, condense_pretrained, unfreeze_condensed


def main(base: str, texts: str, output_dir: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)

    # Before: model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    model = condense_pretrained(base, CondenseConfig(num_layers=2, num_experts=2), calibration=texts, dtype="auto")
    unfreeze_condensed(model)  # without this line, all weights are trained

    data = load_dataset("json", data_files=texts, split="train")
    data = data.map(lambda row: tokenizer(row["text"], truncation=True, max_length=512), remove_columns=["text"])
    trainer = Trainer(
        model,
        TrainingArguments(output_dir, num_train_epochs=1, learning_rate=5e-5, report_to="none"),
        DataCollatorForLanguageModeling(tokenizer, mlm=False),
        data,
    )
    trainer.train()
    trainer.save_model()  # a condensed checkpoint
    tokenizer.save_pretrained(output_dir)


if __name__ == "__main__":
    main(*sys.argv[1:])
