"""The placement of a model's weights: devices, memory and folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .arguments import CondenseArguments
from .folders import check_writable


def check_placement(args: CondenseArguments) -> None:
    """Check the options that say where weights go.

    Raises:
        ValueError: naming the option, what was found and what to do.
    """
    if args.offload_folder is not None:
        offload, output = Path(args.offload_folder).resolve(), Path(args.output_dir or "").resolve()
        if offload.is_relative_to(output) or output.is_relative_to(offload):
            raise ValueError(
                f"`--offload_folder` {args.offload_folder} and `--output_dir` {args.output_dir} should not lie in each "
                "other: the first is for temporary files."
            )
        check_writable(offload, f"`--offload_folder` {args.offload_folder}")
        if args.max_memory is not None and args.device_map is None:
            raise ValueError(
                "`--max_memory` does nothing with `--offload_folder` alone, which keeps all decoder layers on disk: "
                "add `--device_map auto`."
            )
    read_max_memory(args.max_memory)
    check_device_map(args.device_map)
    check_shard_size(args.max_shard_size)


def check_shard_size(size: str | None) -> None:
    """Check the size of the saved files, which is used only after the search.

    Raises:
        ValueError: naming the option, if it is no size.
    """
    from huggingface_hub.serialization._base import parse_size_to_int

    try:
        is_size = size is None or parse_size_to_int(size) > 0
    except ValueError:
        is_size = False
    if not is_size:
        raise ValueError(f"`--max_shard_size` should be a size such as 5GB or 500MB, but is {size!r}.")


def check_device_map(device_map: str | None) -> None:
    """Check that a device can be used.

    Raises:
        ValueError: naming the option, if torch has no such device.
    """
    import torch

    kind = (device_map or "").partition(":")[0]
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind in ("cuda", "mps", "xpu", "npu") and (found is None or found.type != kind):
        raise ValueError(
            f"`--device_map` is {device_map!r}, but torch {torch.__version__} can't use such a device here: use 'cpu' "
            "or 'auto', or install a build of torch for the device."
        )


def placement(args: CondenseArguments, accelerator: Any) -> dict[str, Any]:
    """Return the arguments that tell `from_pretrained` where the weights go, and how to run them."""
    device_map: Any = args.device_map
    if device_map is None and accelerator.num_processes > 1:
        device_map = {"": accelerator.device}
    given = {"max_memory": read_max_memory(args.max_memory), "attn_implementation": args.attn_implementation}
    kwargs = {name: value for name, value in given.items() if value is not None}
    if args.offload_folder is None:
        return {"device_map": device_map or "auto", **kwargs}
    # Every process writes files of its own.
    folder = Path(args.offload_folder) / f"process-{accelerator.process_index}"
    return {"offload_folder": str(folder), "device_map": args.device_map, **kwargs}


def read_max_memory(entries: Sequence[str] | None) -> dict[int | str, int] | None:
    """Read sizes by device, such as "0=40GiB", in bytes.

    Raises:
        ValueError: naming the entry that is none, or a device that is not there.
    """
    import torch
    from accelerate.utils import convert_file_size_to_int

    if entries is None:
        return None
    sizes: dict[int | str, int] = {}
    for entry in entries:
        device, _, size = entry.partition("=")
        try:
            size_in_bytes = convert_file_size_to_int(size)
        except ValueError as error:
            raise ValueError(
                f"`--max_memory` should be devices and sizes such as 0=40GiB cpu=100GiB, but has {entry!r}."
            ) from error
        count = torch.accelerator.device_count()
        if not (device in ("cpu", "disk", "mps") or (device.isdigit() and int(device) < count)):
            raise ValueError(
                f"`--max_memory` has {entry!r}, but there is no device {device!r} here: name a device by its number "
                f"(torch finds {count} accelerators), or cpu or disk."
            )
        sizes[int(device) if device.isdigit() else device] = size_in_bytes
    return sizes
