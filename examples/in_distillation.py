"""
Train the condensed layers to predict what the sparse model predicts. With the adapter off, the model is its own
teacher, so there is no second copy of it.

python examples/in_distillation.py Qwen/Qwen1.5-MoE-A2.7B qwen-cd9/condense_plan.json texts.jsonl held_out.jsonl \
    outputs/distilled 1e-5

The texts have {"text": ...} per line; the last argument is the learning rate. The script prints the held-out loss of
the sparse model, and of the condensed one before and after training. The result is a condense adapter.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from datasets import load_dataset
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from cdmoe_plugin import CondenseAdapterConfig


class DistillingTrainer(SFTTrainer):
    """An SFTTrainer that minimises the KL divergence from the sparse model's predictions to the condensed model's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The loss below is a mean, which `Trainer` then divides by the number of accumulation steps.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if not model.training:  # the held-out loss is that of the next token
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        rest = {name: value for name, value in inputs.items() if name != "labels"}
        with torch.no_grad(), self.accelerator.unwrap_model(model).disable_adapter():
            teacher = model(**rest).logits
        student = model(**rest)
        predicts = inputs["labels"][:, 1:] != -100
        p, q = (logits[:, :-1][predicts].float().log_softmax(-1) for logits in (teacher, student.logits))
        loss = F.kl_div(q, p, reduction="batchmean", log_target=True)
        return (loss, student) if return_outputs else loss


def main(base: str, plan: str, texts: str, held_out: str, output_dir: str, learning_rate: str = "1e-5") -> None:
    bf16 = torch.cuda.is_available()  # TRL's default; not supported on CPUs
    data = load_dataset("json", data_files={"train": texts, "held_out": held_out})
    length: dict[str, Any] = {"max_length": 256, "packing": True, "packing_strategy": "wrapped"}
    trainer = DistillingTrainer(
        AutoModelForCausalLM.from_pretrained(base, dtype="auto"),
        args=SFTConfig(
            output_dir, num_train_epochs=1, learning_rate=float(learning_rate), bf16=bf16, report_to="none", **length
        ),
        train_dataset=data["train"],
        eval_dataset=data["held_out"],
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=CondenseAdapterConfig(plan=plan, task_type="CAUSAL_LM"),
    )
    with trainer.model.disable_adapter():
        losses = [trainer.evaluate()["eval_loss"]]
    losses.append(trainer.evaluate()["eval_loss"])
    trainer.train()
    losses.append(trainer.evaluate()["eval_loss"])
    trainer.accelerator.print("Held-out loss: sparse {:.4f}, condensed {:.4f} -> {:.4f}".format(*losses))
    trainer.save_model()  # saves only the condensed layers


if __name__ == "__main__":
    main(*sys.argv[1:])
