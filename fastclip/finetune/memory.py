"""Peak memory of this process."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import torch


def peak_bytes(device: torch.device) -> int:
    """The most memory held at once so far: on CUDA the allocator's, elsewhere the process's resident set.

    Linux reports it for this program alone; the portable figure also remembers the process that started it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if found:
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
