"""Measures of a model against the sparse one that it was made from: loss, divergence, agreement and speed."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import common
import torch
from inference_speed import Inference
from torch.nn import functional as F

PHASES = ("prefill", "decoding")


class HeldOut:
    """Held-out rows, and the sparse model's distributions of the next token on them.

    Args:
        sparse (`PreTrainedModel`): The sparse model.
        rows (`torch.Tensor`): Token ids `[R, S]`, int64, without padding.
        batch_size (`int`): Rows per forward pass.
        memory (`float`, defaults to 2e9): Bytes of the sparse model's distributions to keep between models; those
            beyond it are computed again for each model.
    """

    def __init__(self, sparse: Any, rows: torch.Tensor, batch_size: int, memory: float = 2e9) -> None:
        self.sparse, self.batches = sparse, rows.split(batch_size)
        self.memory, self.kept = memory, dict[int, torch.Tensor]()

    @torch.inference_mode()
    def measure(self, model: Any) -> dict[str, float]:
        """Measure a model on all tokens but the first of each row.

        Returns:
            `dict[str, float]`: `loss`, in nats per token; `above`, the loss above the sparse model's; `KL`, the
                divergence of the model's distribution from the sparse model's in nats per token; `top-1`, the share of
                tokens for which both find the same token most likely.
        """
        sums = torch.zeros(4, dtype=torch.float64)
        for index, ids in enumerate(self.batches):
            teacher, student = self._sparse(index), log_probabilities(model, ids)
            labels = ids[:, 1:].to(student.device)
            losses = [F.nll_loss(each.flatten(0, 1), labels.flatten(), reduction="sum") for each in (student, teacher)]
            divergence = F.kl_div(student, teacher, reduction="sum", log_target=True)
            same = (student.argmax(-1) == teacher.argmax(-1)).sum()
            sums += torch.stack([*losses, divergence, same]).double().cpu()
        loss, sparse, divergence, same = (sums / sum(ids[:, 1:].numel() for ids in self.batches)).tolist()
        return {"loss": loss, "above": loss - sparse, "KL": divergence, "top-1": same}

    def _sparse(self, index: int) -> torch.Tensor:
        if index in self.kept:
            return self.kept[index]
        found = log_probabilities(self.sparse, self.batches[index])
        if sum(each.nbytes for each in self.kept.values()) + found.nbytes <= self.memory:
            self.kept[index] = found
        return found


def log_probabilities(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the log probabilities `[B, S - 1, V]` of every token after the first, float32."""
    logits = model(input_ids=ids.to(model.device), use_cache=False).logits[:, :-1]
    return logits.float().log_softmax(-1)


class Speed:
    """Speeds of prefill and decoding relative to the sparse model's; both take turns.

    Args:
        sparse (`PreTrainedModel`): The sparse model.
        prompt (`int`), new (`int`): Tokens of the prompt, and tokens decoded after it one by one.
        batch (`int`): Sequences at a time.
        repeats (`int`): Turns, whose median is returned.
    """

    def __init__(self, sparse: Any, prompt: int, new: int, batch: int, repeats: int) -> None:
        ids = common.random_ids(sparse.config.get_text_config().vocab_size, batch, prompt + new)
        self.sparse, self.repeats, self.inference = sparse, repeats, Inference(sparse, ids, prompt)
        self.experts: tuple[str, str] | None = None
        self.known: dict[tuple[Any, ...], dict[str, float]] = {}

    def measure(self, model: Any) -> dict[str, float]:
        """Return how many times as fast the model is, in `prefill` and `decoding`.

        Models of the same shapes, in whatever layers, are as fast as the first one: they are not measured again.
        """
        key = (type(model), *sorted(tuple(p.shape) for p in model.parameters()))
        if key not in self.known:
            self.known[key] = self._measure(model)
        return self.known[key]

    def _measure(self, model: Any) -> dict[str, float]:
        if self.experts is None:
            self.experts = self.inference.try_experts(self.sparse, ["grouped_mm", "batched_mm", "eager"], 2)[:2]
        runs = {
            "sparse": partial(self.inference.run, self.sparse, *self.experts),
            "own": partial(self.inference.run, model, *self.experts),
        }
        turns = common.take_turns(runs, self.repeats)
        seconds = {phase: [[getattr(run, phase) for run in turns[name]] for name in runs] for phase in PHASES}
        self.sparse.set_experts_implementation(self.experts[0])  # that of prefill, for the measures after this one
        return {phase: statistics.median(common.paired_ratios(*both)) for phase, both in seconds.items()}
