"""
Train LoRA adapters on a condensed model. The script needs one more line: `apply_plan` after `from_pretrained`.

python examples/in_peft.py Qwen/Qwen1.5-MoE-A2.7B qwen-cd9/condense_plan.json texts.jsonl outputs/adapters

The plan is the result of an earlier search (`search_plan`, `condense_pretrained` or `cdmoe condense`). To load the
saved adapters, apply the same plan to the same model first.
"""

from __future__ import annotations

import sys

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from cdmoe_plugin import apply_plan, condensed_module_names


def main(base: str, plan: str, texts: str, output_dir: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    model = apply_plan(model, plan)  # the new line
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=condensed_module_names(model)))

    data = load_dataset("json", data_files=texts, split="train")
    data = data.map(lambda row: tokenizer(row["text"], truncation=True, max_length=512), remove_columns=["text"])
    trainer = Trainer(
        model,
        TrainingArguments(output_dir, num_train_epochs=1, learning_rate=1e-4, report_to="none"),
        DataCollatorForLanguageModeling(tokenizer, mlm=False),
        data,
    )
    trainer.train()
    trainer.save_model()  # saves only the adapters


if __name__ == "__main__":
    main(*sys.argv[1:])
