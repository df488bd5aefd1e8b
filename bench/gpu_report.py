"""The tables of docs/gpu.md from bench/results/<gpu>.json: python bench/gpu_report.py. No torch here.

Every cell without a measurement says "not measured"; results of a dry run are refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "bench" / "results", ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- bench/gpu_report.py writes from here -->", "<!-- to here -->"
NONE = "not measured"
DTYPES = ("fp32", "fp16", "bf16")
STEPS = {
    "GPT-2 124M": (128, 512, 1024),
    "GPT-2 355M": (128, 512, 1024),
    "RoBERTa-large": (128, 512),
    "Llama 1B, LoRA": (128, 512, 1024, 4096),
    "Llama 1B": (128, 512, 1024, 4096),
}
# The first form of each in bench/gpu_formulas.py, when there is no results file to name them.
KERNELS = (
    "linear_norms",
    "clipped_gemm",
    "layer_norm_backward",
    "head_losses",
    "head_gradient",
    "tied_cross",
    "clipped_sum",
    "affine_norm",
    "segment_sum",
    "row_norm_products",
    "embedding_norm",
    "clipped_embedding",
    "add_noise",
    "noise_adamw",
    "noise_sgd",
    "clip_accumulate_noise",
)
Items = dict[str, dict[str, Any]]


def read(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Results of GPUs by name. Raises ValueError on those of a dry run."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    gpus = [x for x in found if isinstance(x, dict) and x.get("bench") == "gpu"]
    for x in gpus:
        if x["dry_run"]:
            raise ValueError(f"{folder} holds results of a dry run, which measured nothing: delete its dry-run.json")
    return gpus


def render(results: Sequence[dict[str, Any]]) -> str:
    return "\n".join(_gpu(x) for x in results or [{"sections": {}}])


def page(text: str, results: Sequence[dict[str, Any]]) -> str:
    """The page with its tables made anew."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + "\n\n" + render(results) + "\n" + END + rest.split(END)[1]


def _gpu(result: dict[str, Any]) -> str:
    here, sections = result.get("machine"), result["sections"]
    lines = [f"### {here['gpu']}" if here else "### No GPU yet", ""]
    if here:
        lines += [f"torch {here['torch']}, triton {here['triton']}, Python {here['python']}.", *_sources(sections), ""]
    names = ("correctness", "rates", "noise_adamw", "syncs", "steps", "kernels")
    correctness, rates, noise, syncs, steps, kernels = (sections.get(name, {}).get("items", {}) for name in names)
    tables = (_correctness(correctness), _steps(steps), _syncs(syncs), _noise(noise), _kernels(kernels, rates))
    return "\n".join([*lines, *tables])


def _sources(sections: dict[str, Any]) -> list[str]:
    """What a reader has to know if not all was measured at once."""
    codes = {name: x["source"] for name, x in sections.items()}
    quick = [name for name, x in sections.items() if x["quick"]]
    lines = [f"With --quick: {', '.join(quick)}."] if quick else []
    if len(set(codes.values())) > 1:
        lines.append("Sections of different code: " + ", ".join(f"{name} {code}" for name, code in codes.items()) + ".")
    return lines


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in x) + " |" for x in lines) + "\n"


def _correctness(items: Items) -> str:
    by_op: dict[str, dict[str, str]] = {}
    for name, x in items.items():
        op, _, dtype = name.rpartition(" ")
        if dtype not in DTYPES:
            op, dtype = name, "fp32"
        held = f"{x.get('cases')} cases hold"
        wrong = f"{len(x.get('failures', []))} of {x.get('cases')} cases fail"
        by_op.setdefault(op, {})[dtype] = _why(x) or (wrong if x["failures"] else held)
    rows = [[op, *(found.get(dtype, "") for dtype in DTYPES)] for op, found in by_op.items()]
    return _table(("correct", *DTYPES), rows or [["every kernel", NONE, NONE, NONE]])


def _steps(items: Items) -> str:
    rows = []
    for name in (f"{model}, T {length}" for model, lengths in STEPS.items() for length in lengths):
        x = items.get(name, {})
        plain, ours, ghost = (x if _why(x) else x.get(mode, {}) for mode in ("plain", "ours", "ghost"))
        sizes = [str(y["largest_batch"]) for y in (ours, plain) if "largest_batch" in y]
        times = [_ms(plain), _ms(ours), *(_ratio(y, plain, key) for y in (ours, ghost) for key in ("ms", "peak_bytes"))]
        rows.append([name, *times, " / ".join(sizes) if len(sizes) == 2 else NONE])
    columns = ("plain", "ours", "time", "memory", "Opacus ghost: time", "memory", "largest batch, ours / plain")
    return _table(("step", *columns), rows)


def _syncs(items: Items) -> str:
    rows = []
    for name, x in items.items():
        where = f", first at `{x['first'][-1]}`" if x.get("first") else ""
        rows.append([name, _why(x) or f"{x['syncs']}{where}"])
    return _table(("the host waits in a step", "times"), rows or [["GPT-2 124M, T 1024, ours", NONE]])


def _noise(items: Items) -> str:
    rows = []
    for name, x in (items or {"1e9": {}}).items():
        floor = f"{x['time_to_floor']:.2f}" if "time_to_floor" in x else NONE
        rows.append([name, _ms(x.get("ours", x)), _ms(x.get("torch", x)), floor])
    columns = ("ours", "torch: randn, fused AdamW", "ours to the floor of 28 bytes")
    return _table(("noise_adamw, parameters", *columns), rows)


def _kernels(items: Items, rates: Items) -> str:
    rows = []
    for name, x in (items or {kernel: {} for kernel in KERNELS}).items():
        ours = x.get("ours", {k: x[k] for k in ("error", "not_timed") if k in x})
        others = (_ratio(x.get(other, {}), ours, "ms") for other in ("torch", "compile", "opacus"))
        rows.append([name, _ms(ours), _share(x, ours, rates), *others])
    columns = ("kernel", "time", "of the GEMM or copy rate", "torch / ours", "torch.compile / ours", "Opacus / ours")
    return _table(columns, rows)


def _share(x: dict[str, Any], ours: dict[str, Any], rates: Items) -> str:
    """Of the rate of a GEMM in the same dtype where the formula has FLOPs enough, else of a copy."""
    gemm, copy = (
        rates.get(f"gemm {x.get('dtype')}", {}).get("flops_per_second"),
        rates.get("copy", {}).get("bytes_per_second"),
    )
    if "ms" not in ours or not gemm or not copy:
        return NONE
    seconds = _best(ours) / 1e3
    by_flops, by_bytes = x["flops"] / seconds / gemm, x["bytes"] / seconds / copy
    return f"{by_flops:.0%} of GEMM" if by_flops > by_bytes else f"{by_bytes:.0%} of copy"


def _best(x: dict[str, Any]) -> float:
    return x.get("graph_ms", x["ms"])


def _ms(x: dict[str, Any]) -> str:
    return f"{_best(x):.4g} ms" if "ms" in x else _why(x) or NONE


def _why(x: dict[str, Any]) -> str:
    why = x.get("error") or x.get("absent") or x.get("not_timed") or ""
    return NONE if why == "not reached" else why


def _ratio(x: dict[str, Any], to: dict[str, Any], key: str) -> str:
    """NONE where either is missing, and where one was timed otherwise than the other."""
    if not x.get(key) or not to.get(key):
        return _why(x) or NONE
    if key == "ms" and "graph_ms" in x and "graph_ms" in to:
        return f"{x['graph_ms'] / to['graph_ms']:.2f}"
    return f"{x[key] / to[key]:.2f}"


def main() -> None:
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), read()), encoding="utf-8")


if __name__ == "__main__":
    main()
