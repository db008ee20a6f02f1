"""The processes that share a search: each works on some of the calibration batches, and all get the sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

T = TypeVar("T")


class Processes:
    """The processes of a search; a single one without an accelerator.

    Sums are over batches in a fixed order, so results are bitwise equal for any number of processes.

    Args:
        accelerator (`Accelerator` or `PartialState`, *optional*): The processes of `accelerate launch`. All of them
            must take part in the search.
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

    def total(self, parts: Sequence[Tensor]) -> Tensor:
        """Compute the sum over the batches of all processes, float64, in every process.

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
        return stacked.sum(0)

    def agreed(self, value: T) -> T:
        """Return the main process's value, which must be JSON-like, in every process."""
        if self.accelerator is None:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]
