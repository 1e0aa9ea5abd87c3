"""The most memory that training has had."""

from __future__ import annotations

import resource
import sys

import torch


def peak_gib() -> float:
    """The most memory that this process has had so far, in GiB: of its GPUs, where it has any, else its own."""
    if torch.cuda.is_available():
        return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())) / 2**30
    # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)
