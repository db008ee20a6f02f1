"""A sparse block with fewer routed experts: the tensors and numbers that belong to experts, and a copy of the block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..model.layers_cdmoe import CondensedMLP, add_dense
from ..offload import copy_without_hooks
from .block import SparseBlock
from .weights import UnsupportedModelError, expert_parameters

# Name of the dense part in a block without a shared expert.
BESIDE = "condensed"
# Fields of configs with the number of experts per token, where no module has it.
_CHOSEN = ("num_experts_per_tok", "top_k_experts")


class RoutedPart:
    """The routed experts and the router of a sparse block, to keep some of the experts.

    Names of tensors and attributes are those in the decoder layer, such as "mlp.gate.weight".

    Args:
        block (`SparseBlock`): The block; it is not changed.

    Raises:
        UnsupportedModelError: naming the reason, if experts can't be taken from behind the router.
    """

    def __init__(self, block: SparseBlock) -> None:
        self.block = block
        self.count = block.router_experts
        reason = next(filter(None, (quirk.why_not_mixed(block.shared is not None) for quirk in block.quirks)), None)
        if self.count == block.hidden_size:
            reason = f"it has as many experts as features ({self.count}), so that their weights look alike"
        if reason is not None:
            raise UnsupportedModelError(
                f"Decoder layer {block.layer} ({type(block.module).__name__}) can't keep some of its experts behind "
                f"the router: {reason}. Condense it (`num_routed=0`), or choose other layers."
            )
        own = {id(module): module for module, _, _ in expert_parameters(block.experts, block.num_experts)}
        self._of_experts = {(id(m), name) for m, name, _ in expert_parameters(block.experts, block.num_experts)}
        self.sliced: dict[str, int] = {}
        self.counts: list[str] = []
        for path, module in self._modules():
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                dim = 0 if (id(module), name) in self._of_experts else self._dimension(tensor)
                if dim is not None:
                    self.sliced[f"{path}.{name}"] = dim
            count = block.num_experts if id(module) in own or module is block.experts else self.count
            self.counts += [
                f"{path}.{name}" for name, value in vars(module).items() if self._counts(path, name, value, count)
            ]

    def __deepcopy__(self, _memo: dict[int, Any]) -> RoutedPart:
        """Return the same object: a copy of a mixed layer has no use for copies of all experts of its block."""
        return self

    @property
    def top_k(self) -> int:
        """The number of experts of each token."""
        found = [getattr(module, "top_k", None) for _, module in self._modules()]
        configs = [getattr(module, "config", None) for _, module in self._modules()]
        found += [getattr(config, name, None) for config in configs for name in _CHOSEN]
        return next((number for number in found if isinstance(number, int)), 1)

    @property
    def groups(self) -> tuple[int, int]:
        """The number of groups of the router, and of those that it chooses for a token; 1 and 1 without groups."""
        for _, module in self._modules():
            if getattr(module, "num_group", None):
                return module.num_group, module.topk_group  # type: ignore[return-value]
        return 1, 1

    def check_number(self, number: int, what: str = "`num_routed`") -> None:
        """Check that the router can work with so many experts.

        Args:
            number (`int`): Number of experts that stay.
            what (`str`): Its name in the error.

        Raises:
            ValueError: naming the layer and the numbers that can be used.
        """
        where = f"of decoder layer {self.block.layer}"
        if not self.top_k <= number <= self.count:
            raise ValueError(
                f"{what} is {number}, but the router {where} chooses {self.top_k} of {self.count} experts for each "
                f"token: keep {self.top_k} to {self.count} of them, or none."
            )
        groups, chosen = self.groups
        # Groups are ranked by their two best experts.
        if groups > 1 and (number % groups or number // groups < 2 or number // groups * chosen < self.top_k):
            least = max(2, -(-self.top_k // chosen)) * groups
            raise ValueError(
                f"{what} is {number}, but the router {where} has {groups} groups, which keep the same number of "
                f"experts: use a multiple of {groups} from {least} to {self.count}."
            )

    def check_inputs(self) -> None:
        """Check that the layer can be fitted: that its router and its experts have the same inputs.

        Raises:
            UnsupportedModelError: naming the layer and what to do.
        """
        if not self.block.follows_inputs:
            raise UnsupportedModelError(
                f"Decoder layer {self.block.layer} ({type(self.block.module).__name__}) can't be fitted with experts "
                "behind its router, which has other inputs than the experts. Use `refit=None`, or `num_routed=0`."
            )

    def allows(self, number: int) -> bool:
        """Return whether the router can work with so many experts."""
        try:
            self.check_number(number)
        except ValueError:
            return False
        return True

    def check(self, routed: Sequence[int]) -> None:
        """Check that these experts (by their numbers in the whole block) can stay.

        Raises:
            ValueError: as `check_number`, or if groups would not keep the same number of experts.
        """
        self.check_number(len(routed), "The number of experts in `routed`")
        groups, _ = self.groups
        size = self.count // groups
        if len({sum(expert // size == group for expert in routed) for group in range(groups)}) > 1:
            raise ValueError(
                f"`routed` of decoder layer {self.block.layer} should have the same number of experts of each of the "
                f"router's {groups} groups of {size}, but is {list(routed)}."
            )

    @property
    def dense_place(self) -> str:
        """The name of the dense part: that of the shared expert, or a child of the block without one."""
        for place, module in self.block.places(None).items():
            for name, part in module.named_modules(prefix=place):
                if part is self.block.shared:
                    return name
        return f"{self.block.path.rpartition('.')[2]}.{BESIDE}"

    def spec(self, number: int, dense: CondensedMLP | None) -> dict[str, Any]:
        """Describe the layer with `number` experts and a dense part for config.json, as `layers_cdmoe` reads it."""
        layer = self.block.path.rpartition(".")[0]
        spec: dict[str, Any] = {
            "module": self.block.path,
            "omitted": [],
            "form": "mixed",
            "num_experts": self.count,
            "num_routed": number,
            "per_expert": {**self.sliced, **dict.fromkeys(self.counts)},
            "dense": None,
        }
        if dense is not None:
            own = self.block.beside_spec(dense.intermediate_size, dense.up_proj.bias is not None)
            spec["dense"] = {"module": f"{layer}.{self.dense_place}", **own}
        return spec

    @torch.no_grad()
    def copy(self, routed: Sequence[int], dense: CondensedMLP | None) -> dict[str, nn.Module]:
        """Copy the block with some of its experts and another shared expert; other weights are those of the block.

        Args:
            routed (`Sequence[int]`): The experts that stay, by their numbers in memory, in ascending order.
            dense (`CondensedMLP`, *optional*): The dense part, in place of the shared expert or beside the block.

        Returns:
            The modules by the names of the decoder layer's children that they replace.
        """
        block = self.block
        numbers = routed if block.loaded is None else [block.loaded[expert] for expert in routed]
        memo: dict[int, Any] = {}
        for path, module in self._modules():
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                memo[id(tensor)] = tensor
                if (dim := self.sliced.get(f"{path}.{name}")) is not None:
                    count, chosen = self.count, numbers
                    if (id(module), name) in self._of_experts:
                        count, chosen = block.num_experts, routed
                    memo[id(tensor)] = _chosen(tensor, dim, count, chosen)
        roots = block.places(None)
        for root in roots.values():
            for module in root.modules():
                shared = (value for value in vars(module).values() if isinstance(value, PreTrainedConfig))
                memo |= {id(value): value for value in (*shared, getattr(module, "_hf_hook", None))}
        if block.shared is not None:
            memo[id(block.shared)] = dense
        copies = {place: copy_without_hooks(root, memo) for place, root in roots.items()}
        for name in self.counts:
            place, _, rest = name.partition(".")
            path, _, attribute = rest.rpartition(".")
            setattr(copies[place].get_submodule(path), attribute, len(routed))
        if block.shared is None and dense is not None:
            owner = copies[block.path.rpartition(".")[2]]
            owner.add_module(BESIDE, dense)
            owner.register_forward_hook(add_dense)
        return copies

    def _modules(self) -> Iterator[tuple[str, nn.Module]]:
        """List the modules of the block other than its shared expert and those that quirks know."""
        others = [self.block.shared, *(part for quirk in self.block.quirks for part in quirk.beyond_experts())]
        skipped = {id(module) for part in others if part is not None for module in part.modules()}
        for place, root in self.block.places(None).items():
            yield from (
                (name, module) for name, module in root.named_modules(prefix=place) if id(module) not in skipped
            )

    def _dimension(self, tensor: Tensor) -> int | None:
        """Return the dimension of a router's tensor that counts the experts; those before it have size 1."""
        dim = next((i for i, size in enumerate(tensor.shape) if size != 1), 0)
        return dim if tensor.ndim and tensor.shape[dim] == self.count else None

    def _counts(self, path: str, name: str, value: Any, count: int) -> bool:
        if type(value) is not int or value != count:
            return False
        return ("expert" in name and "per_tok" not in name and "top" not in name) or (
            name == "out_features" and f"{path}.weight" in self.sliced
        )


def _chosen(tensor: Tensor, dim: int, count: int, chosen: Sequence[int]) -> Tensor:
    """Select the slices of some of `count` experts, `size // count` in each."""
    index = torch.tensor(chosen, device=tensor.device)
    slices = tensor.detach().unflatten(dim, (count, -1)).index_select(dim, index).flatten(dim, dim + 1)
    return nn.Parameter(slices, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else slices
