"""The processes that share a search or a refit: each works on some of the batches, and all get the sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

T = TypeVar("T")


class Processes:
    """The processes of a search or a refit; a single one without an accelerator.

    Sums by `total` are over batches in a fixed order, so results are bitwise equal for any number of processes; those
    by `add_up` need no memory for each batch, and are equal to rounding.

    Args:
        accelerator (`Accelerator` or `PartialState`, *optional*): The processes of `accelerate launch`. All of them
            must take part.
        num_batches (`int`): Number of calibration batches of all processes together.

    Raises:
        ValueError: if there are fewer batches than processes.
    """

    def __init__(self, accelerator: Accelerator | PartialState | None = None, num_batches: int = 1) -> None:
        self.accelerator = accelerator if accelerator is not None and accelerator.num_processes > 1 else None
        self.count = 1 if self.accelerator is None else self.accelerator.num_processes
        self.index = 0 if self.accelerator is None else self.accelerator.process_index
        self.num_batches = num_batches
        if num_batches < self.count:
            raise ValueError(
                f"The calibration data makes {num_batches} batches, too few for {self.count} processes: use a smaller "
                "`batch_size`, more samples, or fewer processes."
            )

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files."""
        return self.index == 0

    def mine(self, batches: Sequence[T]) -> list[T]:
        """Select the batches of this process."""
        return list(batches[self.index :: self.count])

    def part(self, rows: Tensor) -> Tensor:
        """Select the rows of a tensor that this process works on."""
        return rows[self.index :: self.count]

    def total(self, parts: Sequence[Tensor]) -> Tensor:
        """Compute the sum over the batches of all processes, float64, in every process; see `gathered`."""
        return self.gathered(parts).sum(0)

    def gathered(self, parts: Sequence[Tensor]) -> Tensor:
        """Gather tensors of the batches of all processes in every process, `[number of batches, ...]` float64.

        Args:
            parts (`Sequence[Tensor]`): Tensors of one shape, one for each of this process's batches, in their order.
        """
        device = parts[0].device if self.accelerator is None else self.accelerator.device
        stacked = torch.stack([part.detach().to(device, torch.float64) for part in parts])
        if self.accelerator is not None:
            from accelerate.utils import gather

            places = -(-self.num_batches // self.count)
            padded = stacked.new_zeros(places, *stacked.shape[1:])
            padded[: len(stacked)] = stacked
            gathered: Any = gather(padded)
            in_order = gathered.unflatten(0, (self.count, places)).transpose(0, 1).flatten(0, 1)
            stacked = in_order[: self.num_batches].contiguous()
        return stacked

    def add_up(self, *sums: Tensor) -> None:
        """Replace sums over the batches of each process by those over all batches, in place, in every process."""
        if self.accelerator is not None:
            for own in sums:
                there = own.to(self.accelerator.device)
                torch.distributed.all_reduce(there)
                own.copy_(there)

    def send(self, source: int, *tensors: Tensor) -> None:
        """Replace tensors by those of the process with the index `source`, in place, in every process."""
        if self.accelerator is not None:
            for own in tensors:
                there = own.to(self.accelerator.device)
                torch.distributed.broadcast(there, source)
                own.copy_(there)

    def in_order(self, own: Sequence[int]) -> list[int]:
        """Return a whole number for each batch of all processes, from those for this process's batches."""
        found = torch.zeros(self.num_batches, dtype=torch.int64)
        found[self.index :: self.count] = torch.tensor(own)
        self.add_up(found)
        return found.tolist()

    def agreed(self, value: T) -> T:
        """Return the main process's value, which must be JSON-like, in every process."""
        if self.accelerator is None:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]
