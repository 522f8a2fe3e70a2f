"""What launchers ask of a GPU."""

from __future__ import annotations

import torch


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; in Triton's interpreter, on a CPU, that of Hopper."""
    return (9, 0) if device.type == "cpu" else torch.cuda.get_device_capability(device)


def multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
