"""Distillation from the sparse model to the condensed one (Hinton et al., 2015, arXiv 1503.02531).

Both have the same weights except in the condensed layers. The teacher is therefore the student with the sparse blocks
put back during a forward pass, and only these blocks take additional memory.

A condense adapter (docs/adapter.md) also has both in one model, with the same loss in the same memory, and without the
45 lines here that open, move and put back blocks (`model.disable_adapter()` instead). It is not used here because a
stage would have to turn a condensed checkpoint into an adapter and back, and because PEFT allows no LoRA on it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..blocks import SparseBlock, decoder_of, find_sparse_blocks, hidden_of, model_shape
from ..condense.place import standing_in
from ..decoder.whole import last_hidden_state, searching
from ..loading.load import check_whole
from ..model.adapters import refuse_adapter_files
from ..model.lookup import condensed_layers
from ..plan import CondensePlan

DistillationTarget = Literal["logits", "blocks"]
# Tokens whose logits are in memory at once.
_CHUNK = 512


class Distillation:
    """A distillation loss with the sparse model as teacher.

    Args:
        model (`PreTrainedModel`): The condensed model, without a PEFT wrapper.
        blocks (`list[SparseBlock]`): The base model's sparse blocks of the condensed layers. They follow the condensed
            layers to their devices.
        target (`str`): "logits": KL divergence of the next token's distributions, `KL(teacher || student)`, both
            softened by the temperature. "blocks": at every condensed layer, the squared error between its output and
            the sparse block's for the same input, relative to the sparse block's output, per token, mean over layers.
            Each layer learns from its own error only, so no gradient flows between layers.
        weight (`float`, defaults to 0.5): Weight w of distillation in the loss, `(1 - w) · LM + w · distillation`.
        temperature (`float`, defaults to 1.0): Temperature T of the target "logits"; its loss is multiplied by T².

    Raises:
        ValueError: if an argument is out of range, if blocks of condensed layers are missing, or, for "blocks", if the
            blocks' outputs depend on more than their inputs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: list[SparseBlock],
        target: str,
        weight: float = 0.5,
        temperature: float = 1.0,
    ) -> None:
        check_distillation(target, weight, temperature)
        self.model = model
        self.target = target
        self.weight = weight
        self.temperature = temperature
        self.students = condensed_layers(model)
        by_layer = {block.layer: block for block in blocks}
        missing = [layer for layer in self.students if layer not in by_layer]
        if missing:
            raise ValueError(f"`blocks` has no sparse blocks of the condensed decoder layers {missing}.")
        self.blocks = {layer: by_layer[layer] for layer in self.students}
        if target == "blocks" and not all(block.follows_inputs for block in self.blocks.values()):
            raise ValueError(
                "`distillation` is 'blocks', which needs routers inside the sparse blocks, but in "
                f"{type(model).__name__} the decoder layers have routers of their own. Use 'logits'."
            )
        for block in self.blocks.values():
            for module in block.modules:
                module.eval().requires_grad_(False)
        self._follow()
        self._scale = self._logit_scale() if target == "logits" else 1.0

    def _follow(self) -> None:
        """Move the blocks to the devices of the condensed layers: a trainer moves the model, which lacks the blocks."""
        for layer, block in self.blocks.items():
            device = next(self.students[layer].parameters()).device
            for module in block.modules:
                module.to(device)

    @contextmanager
    def watching(self) -> Iterator[dict[Any, Tensor]]:
        """Record the student's last hidden state, or the inputs of its condensed layers, in one forward pass.

        Gradient checkpointing runs layers again in the backward pass, outside of this context.
        """
        self._follow()
        seen: dict[Any, Tensor] = {}

        def keep(key: Any) -> Callable[..., None]:
            def hook(_module: nn.Module, args: tuple[Any, ...], output: Any = None) -> None:
                seen[key] = output.last_hidden_state if key == "hidden" else args[0].detach()

            return hook

        with ExitStack() as stack:
            if self.target == "logits":
                stack.callback(decoder_of(self.model).register_forward_hook(keep("hidden")).remove)
            else:
                for layer, mlp in self.students.items():
                    stack.callback(mlp.register_forward_pre_hook(keep(layer)).remove)
            yield seen

    def loss(self, seen: dict[Any, Tensor], inputs: dict[str, Any], labels: Tensor) -> Tensor:
        """Compute the loss, summed over the tokens that predict a label: a float32 scalar.

        Args:
            seen (`dict`): The record of `watching` from the student's forward pass.
            inputs (`dict`): Arguments of that forward pass, without labels.
            labels (`Tensor`): int64 `[B, S]`, -100 for tokens to ignore.
        """
        predicts = torch.zeros_like(labels, dtype=torch.bool)
        predicts[:, :-1] = labels[:, 1:] != -100
        if self.target == "logits":
            return self._logits_loss(seen["hidden"], inputs, predicts)
        return self._blocks_loss(seen, inputs, predicts)

    def _logits_loss(self, student: Tensor, inputs: dict[str, Any], predicts: Tensor) -> Tensor:
        with torch.no_grad(), self._sparse_again():
            teacher = last_hidden_state(self.model, **inputs)
        total = student.new_zeros((), dtype=torch.float32)
        pairs = zip(student[predicts].split(_CHUNK), teacher[predicts].split(_CHUNK), strict=True)
        for of_student, of_teacher in pairs:
            # Recomputed in the backward pass: logits are by far the largest tensors here.
            total = total + checkpoint(self._divergence, of_student, of_teacher, use_reentrant=False)
        return total * self.temperature**2

    def _divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute the sum over tokens of `KL(teacher || student)` from last hidden states `[T, H]`."""
        head: Any = self.model.get_output_embeddings()
        p, q = (F.log_softmax(head(h).float() * self._scale / self.temperature, dim=-1) for h in (teacher, student))
        return F.kl_div(q, p, reduction="sum", log_target=True)

    def _blocks_loss(self, seen: dict[Any, Tensor], inputs: dict[str, Any], predicts: Tensor) -> Tensor:
        errors = []
        for layer, mlp in self.students.items():
            x = seen[layer].view(*predicts.shape, -1)
            with torch.no_grad():
                target = self.blocks[layer].run(x, inputs.get("input_ids"))[predicts]
            error = (hidden_of(mlp(x)).float()[predicts] - target).square().sum(-1)
            # Relative to each token's size: a few tokens have outputs a thousand times larger than the others.
            errors.append((error / target.square().sum(-1).clamp_min(1e-8)).sum())
        return torch.stack([error.to(errors[0].device) for error in errors]).mean()

    @contextmanager
    def _sparse_again(self) -> Iterator[None]:
        """Put the sparse blocks back into the student inside the context."""
        with ExitStack() as stack:
            for block in self.blocks.values():
                stack.enter_context(standing_in(self.model, block, None))
            yield

    @torch.no_grad()
    def _logit_scale(self) -> float:
        """Measure the constant factor of the model's logits, for which configs have many names."""
        head: Any = self.model.get_output_embeddings()
        ids = torch.arange(2, 6, device=head.weight.device)[None]
        with searching(self.model):
            output = self.model(input_ids=ids, output_hidden_states=True, use_cache=False)
            raw = head(last_hidden_state(self.model, input_ids=ids, use_cache=False)).float()
        logits = output.logits.float()
        scale = float((raw * logits).sum() / raw.square().sum())
        if not torch.allclose(raw * scale, logits, rtol=0.02, atol=0.02 * float(logits.abs().max())):
            raise ValueError(
                "`distillation` is 'logits', which needs logits that are the head's output times a constant, but those "
                f"of {type(self.model).__name__} are not. Use 'blocks'."
            )
        return 1.0 if abs(scale - 1.0) < 0.01 else scale


def check_distillation(target: str, weight: float, temperature: float) -> None:
    """Check the options of distillation.

    Raises:
        ValueError: naming the option that is out of range.
    """
    targets = get_args(DistillationTarget)
    if target not in targets:
        raise ValueError(f"`distillation` should be one of {', '.join(targets)}, but is {target!r}.")
    if not 0.0 < weight <= 1.0:
        raise ValueError(f"`distillation_weight` should be above 0 and at most 1, but is {weight}.")
    if not temperature > 0.0:
        raise ValueError(f"`distillation_temperature` should be above 0, but is {temperature}.")


def load_teacher_blocks(path: str | os.PathLike, plan: CondensePlan, **model_kwargs: Any) -> list[SparseBlock]:
    """Load the sparse blocks of a base model that a plan condenses. The rest of the model is loaded too, and freed.

    Args:
        path (`str` or `os.PathLike`): Hub name or folder of the sparse base model.
        plan (`CondensePlan`): The plan of the condensed model.
        **model_kwargs: Passed to `AutoModelForCausalLM.from_pretrained`.

    Raises:
        UnsupportedModelError: if the model has no sparse layers.
        ValueError: if the plan was made for another model, or the checkpoint is or has an adapter.
    """
    refuse_adapter_files(path, model_kwargs)
    opened: Any = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **model_kwargs)
    teacher, loading_info = opened
    check_whole(teacher, loading_info)
    blocks = find_sparse_blocks(teacher)
    plan.check_fits(model_shape(teacher, blocks))
    condensed = {layer.layer for layer in plan.layers}
    return [block for block in blocks if block.layer in condensed]
