"""The results file of bench/gpu.py, written after every measurement, and what of it is printed on the way."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from gpu_bench import ROOT, Bench, installed


@dataclass
class Results:
    """The file, and what is told while it grows."""

    path: Path
    content: dict[str, Any]
    lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self, section: str, names: Sequence[str], quick: bool) -> None:
        self.content["sections"][section] = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "source": source(),
            "quick": quick,
            "items": {name: {"error": "not reached"} for name in names},
        }

    def put(self, section: str, name: str, value: dict[str, Any]) -> None:
        with self.lock:
            self.content["sections"][section]["items"][name] = value
            other = self.path.with_suffix(".part")
            other.write_text(json.dumps(self.content, indent=1) + "\n")
            other.replace(self.path)
            print(line(section, name, value), flush=True)

    def failed(self) -> dict[str, str]:
        """What correctness did not find right, and why: "op dtype", or "op" for noise. What other code found does not count."""
        section = self.content["sections"].get("correctness", {})
        if section.get("source") != source():
            return {}
        found = {name: x.get("error") or ("failed" if x["failures"] else "") for name, x in section["items"].items()}
        return {name: why for name, why in found.items() if why}


def line(section: str, name: str, value: dict[str, Any]) -> str:
    if "error" in value:
        said = value["error"]
    elif "not_timed" in value:
        said = f"not timed: {value['not_timed']}"
    elif section == "correctness":
        said = f"{value['cases']} cases" + "".join(f"\n    FAILED {x['case']}: {x['why']}" for x in value["failures"])
    elif section == "steps":
        told = {
            m: v.get("error") or v.get("absent") or f"{v['ms']:.1f} ms" for m, v in value.items() if isinstance(v, dict)
        }
        said = ", ".join(f"{m} {text}" for m, text in told.items())
    elif section == "syncs":
        said = value.get("absent") or f"{value['syncs']} syncs" + (
            f", first {value['first'][-1]}" if value["first"] else ""
        )
    else:
        times = {k: v for k, v in {"": value, **value}.items() if isinstance(v, dict) and "ms" in v}
        said = ", ".join(f"{k} {v['ms']:.4g} ms".strip() for k, v in times.items())
    return f"{section}: {name}: {said}"


def source() -> str:
    """Which code: a hash of all that is measured, whether committed or not."""
    files = sorted(
        x for folder in ("fastclip", "kernels", "tests/kernel_cases.py", "bench") for x in _python(ROOT / folder)
    )
    whole = hashlib.sha256(
        b"".join(x.read_bytes() for x in files if x.parent.name != "bench" or x.name.startswith("gpu"))
    )
    return whole.hexdigest()[:16]


def _python(path: Path) -> list[Path]:
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


def machine(bench: Bench) -> dict[str, Any]:
    import torch
    import triton

    found = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    found |= {x: version(x) for x in ("transformers", "peft", "opacus")} | {"cores": os.cpu_count()}
    if bench.dry:
        return found | {"gpu": "dry run"}
    properties = torch.cuda.get_device_properties(0)
    asked = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        driver = subprocess.run(asked, capture_output=True, text=True, timeout=20).stdout.strip()
    except OSError:
        driver = "unknown"
    return found | {
        "gpu": properties.name,
        "memory_bytes": properties.total_memory,
        "processors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "driver, clock, power": driver,
    }


def version(distribution: str) -> str | None:
    return importlib.metadata.version(distribution) if installed(distribution) else None
