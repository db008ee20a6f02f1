"""Times prefill and decoding of models that share their weights, taking turns on one device."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from speed_models import memory_of, synchronize
from transformers import StaticCache

from cdmoe_plugin import CondensedLayer, CondensePlan, apply_plan
from cdmoe_plugin.blocks import describe_sparse_blocks
from cdmoe_plugin.integrations.measure import weight_bytes

# It copies the weights of each token's experts, so that a prefill takes hundreds of times the layer's memory.
DECODING_ONLY = ("batched_mm",)


def condensed_twin(model: Any, layers: Sequence[int], experts: int) -> Any:
    """A condensed model that shares all other weights with the sparse one, which stays as it is.

    Which experts are kept, and with which gates, makes no difference to speed: these are the first ones.

    Args:
        layers (`Sequence[int]`): Decoder layers to condense.
        experts (`int`): Routed experts to keep in each.
    """
    kept = list(range(experts))
    plan = CondensePlan([CondensedLayer(layer, kept, [0.1] * experts) for layer in layers])
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return apply_plan(copy.deepcopy(model, shared), plan)


@dataclass(frozen=True)
class Experts:
    """The experts implementations of one case: transformers lets a model change between prefill and decoding."""

    prefill: str
    decoding: str


@dataclass(frozen=True)
class Seconds:
    """How long one run took."""

    prefill: float
    decoding: float


@dataclass(frozen=True)
class Peaks:
    """The most memory that a model alone would hold at any time, in bytes: weights, cache and intermediate results."""

    prefill: int
    decoding: int


@dataclass
class Trial:
    """The sparse model's experts implementations tried on one batch size.

    Args:
        seconds (`dict[str, Seconds]`): Medians of those that ran; a prefill that was not tried is infinite.
        failed (`dict[str, str]`): Reasons of the others.
    """

    seconds: dict[str, Seconds] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def fastest(self) -> Experts:
        """The fastest one of each phase.

        Raises:
            RuntimeError: if none could run a prefill, with the reasons.
        """
        if all(s.prefill == float("inf") for s in self.seconds.values()):
            raise RuntimeError(f"None of the experts implementations could run a prefill: {self.failed}.")
        return Experts(
            min(self.seconds, key=lambda name: self.seconds[name].prefill),
            min(self.seconds, key=lambda name: self.seconds[name].decoding),
        )


class Inference:
    """Prefill and decoding of one batch of token ids.

    Decoding is one forward pass per new token with the cache of all before. The new tokens are given, not the model's
    own choice: a random model soon repeats itself, and sequences that say the same would share their experts.

    Args:
        model (`PreTrainedModel`): The sparse model, for its config and device.
        ids (`torch.Tensor`): Token ids `[batch, prompt + new]`, int64.
        prompt (`int`): How many of them are prompt.
        backend (`str`, *optional*): What decoding steps are compiled with, as "inductor"; then the cache is static.
    """

    def __init__(self, model: Any, ids: torch.Tensor, prompt: int, backend: str | None = None) -> None:
        self.device = model.device
        self.ids = ids.to(self.device)
        self.prompt = prompt
        self.new = range(prompt, ids.shape[1])
        self.backend = backend
        self.positions = torch.arange(ids.shape[1], device=self.device)[:, None, None]
        # One for all models: it is filled anew in each run, and a compiled step keeps its address.
        self.cache = StaticCache(config=model.config, max_cache_len=ids.shape[1]) if backend else None
        self.steps: dict[tuple[int, str], Callable[..., Any]] = {}

    @property
    def new_tokens(self) -> int:
        """Tokens that one run decodes, of all sequences."""
        return self.ids.shape[0] * len(self.new)

    @property
    def prompt_tokens(self) -> int:
        return self.ids.shape[0] * self.prompt

    @torch.no_grad()
    def run(self, model: Any, experts: Experts) -> Seconds:
        """A prefill of the prompt, then every new token."""
        if self.cache is not None:
            self.cache.reset()
        model.set_experts_implementation(experts.prefill)
        prefill, cache = self._timed(lambda: self.prefill(model, self.cache))
        model.set_experts_implementation(experts.decoding)
        step = self._step(model, experts.decoding)
        decoding, _ = self._timed(lambda: self.decode(step, cache, self.new))
        return Seconds(prefill, decoding)

    @torch.no_grad()
    def peaks(self, model: Any, experts: Experts) -> Peaks | None:
        """Peak memory of the same without compiling; None on devices such as a CPU, where torch does not count it.

        What other models hold, that have their weights in common with this one, is left out.
        """
        memory = memory_of(self.device)
        if memory is None:
            return None
        memory.empty_cache()
        others = memory.memory_allocated(self.device) - weight_bytes(model)
        model.set_experts_implementation(experts.prefill)
        memory.reset_peak_memory_stats(self.device)
        cache = self.prefill(model, None)
        prefill = memory.max_memory_allocated(self.device) - others
        model.set_experts_implementation(experts.decoding)
        memory.reset_peak_memory_stats(self.device)
        self.decode(model, cache, self.new)
        return Peaks(prefill, memory.max_memory_allocated(self.device) - others)

    @torch.no_grad()
    def chosen_experts(self, model: Any) -> dict[int, int]:
        """How many experts the tokens of the last decoding step choose together, by sparse layer."""
        cache = self.prefill(model, None)
        self.decode(model, cache, self.new[:-1])
        with ExitStack() as stack:
            blocks = describe_sparse_blocks(model)
            routes = {block.layer: stack.enter_context(block.recording()) for block in blocks}
            self.decode(model, cache, self.new[-1:])
        return {layer: len(seen.routing.experts.unique()) for layer, seen in routes.items()}

    def prefill(self, model: Any, cache: Any) -> Any:
        """Runs the prompt; returns the cache, a new one where none is given."""
        prompt = self.ids[:, : self.prompt]
        return model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values

    def decode(self, step: Callable[..., Any], cache: Any, places: range) -> None:
        """Runs `step` once for each of these places in the sequences, all of which follow what the cache holds."""
        for at in places:
            ids = self.ids[:, at : at + 1]
            step(input_ids=ids, position_ids=self.positions[at], past_key_values=cache, use_cache=True)

    def _step(self, model: Any, experts: str) -> Callable[..., Any]:
        if self.backend is None:
            return model
        key = (id(model), experts)
        if key not in self.steps:
            # A CUDA graph per step: without it, a GPU waits for Python.
            mode = "reduce-overhead" if self.backend == "inductor" else None
            # Whole or not at all: an implementation that can't be compiled fails.
            self.steps[key] = torch.compile(
                model.forward, backend=self.backend, mode=mode, fullgraph=True, dynamic=False, isolate_recompiles=True
            )
        return self.steps[key]

    def _timed(self, function: Callable[[], Any]) -> tuple[float, Any]:
        synchronize(self.device)
        start = time.perf_counter()
        result = function()
        synchronize(self.device)
        return time.perf_counter() - start, result

    def try_experts(self, model: Any, implementations: Sequence[str], repeats: int) -> Trial:
        """Times the sparse model with each experts implementation: medians after a warm-up.

        One that fails is noted with its reason. Implementations that are for decoding only (`DECODING_ONLY`) have their
        prefill done by the fastest of the others.
        """
        trial = Trial()
        for name in sorted(implementations, key=lambda name: name in DECODING_ONLY):
            alone = name not in DECODING_ONLY
            try:
                experts = Experts(name if alone else trial.fastest().prefill, name)
                self.run(model, experts)
                runs = [self.run(model, experts) for _ in range(repeats)]
            # A kernel from the hub may fail in any way: not installed, not downloaded, not for this device or dtype.
            except Exception as error:
                reason = (str(error).strip() or "no reason given").splitlines()[0]
                trial.failed[name] = f"{type(error).__name__}: {reason[:120]}"
                continue
            prefill = statistics.median(s.prefill for s in runs) if alone else float("inf")
            trial.seconds[name] = Seconds(prefill, statistics.median(s.decoding for s in runs))
        return trial

    def take_turns(self, models: Mapping[str, Any], experts: Experts, repeats: int) -> dict[str, list[Seconds]]:
        """Runs of all models, `repeats` of each after a warm-up, one model after the other in each round.

        Every other round goes backwards, so that no model always follows the same one.
        """
        seconds: dict[str, list[Seconds]] = {name: [] for name in models}
        for turn in range(repeats + 1):
            for name in list(models)[:: -1 if turn % 2 else 1]:
                seconds[name].append(self.run(models[name], experts))
        return {name: runs[1:] for name, runs in seconds.items()}
