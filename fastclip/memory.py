"""How much memory is left, for choices between time and memory."""

from __future__ import annotations

import math

import torch


def free_memory(device: torch.device) -> float:
    """Bytes that a tensor on the device could have; infinity where the system does not say.

    On a CPU what the kernel calls available, whatever limit the process has; on a GPU what is free and what torch's allocator
    holds unused.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + unused)
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            found = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    except OSError:
        return math.inf
    return math.inf if found is None else 1024.0 * int(found)
