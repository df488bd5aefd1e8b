"""docs/benchmarks.md and its plots from bench/results/*.json: nothing is measured here.

python bench/render.py
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from growth import AXES
from step import MODES, ROWS, by_round, ratios
from step_models import MODELS

HERE = Path(__file__).parent
RESULTS, DOCS = HERE / "results", HERE.parent / "docs"
NAMES = {
    "plain": "without privacy, as people have it",
    "best": "without privacy, fused AdamW and torch.compile",
    "fastclip": "fastclip",
    "compiled": "fastclip, torch.compile below the head",
    "lean": "fastclip, without the head's logits",
    "logits": "fastclip, losses from the model's logits",
    "checkpointed": "without privacy, blocks checkpointed",
    "kept": "fastclip, blocks checkpointed, rows kept",
    "replayed": "fastclip, blocks checkpointed, rows formed again",
    "ghost": "Opacus 1.6 ghost",
    "hooks": "Opacus 1.6 hooks",
}


def load(name: str) -> dict[str, Any]:
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else {}


def spread(values: list[float]) -> str:
    return f"{min(values):.2f}-{max(values):.2f}"


def steps_table(results: dict[str, Any]) -> list[str]:
    lines = [
        "| model, batch x tokens, precision | step | time, of rounds | seconds | tokens/s | peak memory of a step | "
        "with the first step |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        name, rest = row.split(":", 1)
        shape, precision = rest.split(":")
        batch, length = (int(x) for x in shape.split("x"))
        title = f"{MODELS[name][0]}, {batch} x {length}, {precision}"
        measured = of_row(results, row)
        if not measured:
            lines.append(f"| {title} | not measured | | | | | |")
        for result in measured:
            lines += step_lines(f"{title} ({short(result['machine'])})", batch * length, result)
    return lines


def step_lines(title: str, tokens: int, result: dict[str, Any]) -> list[str]:
    lines, found = [], ratios(result)
    for mode in MODES:
        if mode in result["failed"]:
            lines.append(f"| {title} | {NAMES[mode]} | did not run beside the others | | | | |")
        if mode not in found:
            continue
        times, ratio = result["seconds"][mode], found[mode]
        lines.append(
            f"| {title} | {NAMES[mode]} | {ratio['time']:.2f}x, {spread(by_round(result, mode))} | {spread(times)} | "
            f"{tokens / statistics.median(times):.0f} | {ratio['memory']:.2f}x | {ratio['memory_with_first_step']:.2f}x |"
        )
        title = ""
    return lines


def of_row(results: dict[str, Any], row: str) -> list[dict[str, Any]]:
    """One of each machine."""
    return [result for result in results.values() if result["row"] == row]


def short(machine: dict[str, Any]) -> str:
    return machine["cpu"].removesuffix(" Processor")


def steps_plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    rows = [result for row in ROWS for result in of_row(results, row)]
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.5 + 0.5 * len(rows)), sharey=True)
    for axis, key, title in zip(axes, ("time", "memory"), ("time of a step", "peak memory of a step"), strict=True):
        for mode, marker in (("fastclip", "o"), ("best", "|"), ("ghost", "x"), ("hooks", "+")):
            found = [(ratios(result).get(mode, {}).get(key), y) for y, result in enumerate(rows)]
            points = [(x, y) for x, y in found if x is not None]
            if points:
                axis.plot(*zip(*points, strict=True), marker, label=NAMES[mode], markersize=8)
        axis.axvline(1.0, color="0.6", linewidth=1)
        axis.set_xlabel(f"{title}, without privacy = 1")
        axis.set_yticks(range(len(rows)), [f"{r['row']}, {short(r['machine'])}" for r in rows], fontsize=8)
        axis.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    axes[1].legend(fontsize=8, loc="best")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def largest_batches(results: dict[str, Any]) -> list[str]:
    modes = [m for m in MODES if any(m in result["modes"] for result in results.values())]
    lines = ["| model, tokens, memory | " + " | ".join(NAMES[m] for m in modes) + " |", "|---|" + "---|" * len(modes)]
    for model, result in results.items():
        cells = [str(result["modes"][m]["largest_batch"]) if m in result["modes"] else "" for m in modes]
        title = f"{MODELS[model][0]}, {result['length']}, {result['gib']:g} GiB ({short(result['machine'])})"
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return lines


def growth_plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    names = [name for name in AXES if name in results]
    figure, panels = plt.subplots(2, len(names), figsize=(3.1 * len(names), 5.6), squeeze=False)
    for column, name in enumerate(names):
        result = results[name]
        for line, key in enumerate(("seconds", "bytes")):
            axis = panels[line][column]
            for mode, style in (("plain", "s--"), ("fastclip", "o-")):
                axis.loglog(result["values"], result[mode][key], style, label=mode, markersize=4)
            last = result["fastclip"][key][-1]
            law = [last * x / result["law"][-1] for x in result["law"]]
            axis.loglog(result["values"], law, ":", color="0.5", label=result["law_name"])
            axis.set_xticks(result["values"], [str(x) for x in result["values"]], fontsize=7)
            axis.minorticks_off()
            if result["law_name"] == "constant":
                axis.set_yscale("linear")
                axis.set_ylim(bottom=0)
            axis.set_xlabel(result["title"])
            axis.set_ylabel({"seconds": "seconds a step", "bytes": "bytes above the idle process"}[key])
            axis.legend(fontsize=7)
            axis.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def machines(results: dict[str, Any]) -> list[str]:
    """Each machine that rows were measured on, once."""
    found = {}
    for row in results.values():
        m = row["machine"]
        found[m["cpu"], m["torch"]] = (
            f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads, torch {m['torch']}, transformers {m['transformers']}, "
            f"Python {m['python']}"
        )
    return list(found.values())


def norms_tables(results: dict[str, Any]) -> list[str]:
    """linear_norm by layer and rows a unit; row-wise norms beside the copy bandwidth. Of one machine."""
    lengths = sorted({row["length"] for row in results["linear_norm"]})
    layers = list(dict.fromkeys(row["layer"] for row in results["linear_norm"]))
    at = {(row["layer"], row["length"]): row for row in results["linear_norm"]}
    lines = [
        f"{results['machine']['cpu']}: time of linear_norm beside plain torch's (no bound on its error), and its rate beside "
        "the sgemm rate, by rows a unit:",
        "",
        "| layer | " + " | ".join(str(n) for n in lengths) + " |",
        "|---|" + "---|" * len(lengths),
    ]
    for layer in layers:
        cells = []
        for n in lengths:
            row = at.get((layer, n))
            cells.append("" if row is None else f"{row['time_to_plain']:.2f}x, {row['rate_to_sgemm']:.2f}")
        lines.append(f"| {layer} | " + " | ".join(cells) + " |")
    lines += ["", "There, bytes read beside the copy bandwidth:", "", "| op | share |", "|---|---|"]
    lines += [f"| {op} | {share:.2f} |" for op, share in results["rowwise"]["bandwidth_to_copy"].items()]
    return [*lines, ""]


def throughput_table(report: dict[str, Any]) -> list[str]:
    """Rates of every case beside the GEMM rate of its dtype and the copy rate of the same run."""
    machine, found = report["machine_info"], [(b["extra_info"], b["stats"]["median"]) for b in report["benchmarks"]]
    gemm = {e["dtype"]: e["flops"] / t for e, t in found if e["case"] == "rate: GEMM"}
    copy = next(e["bytes"] / t for e, t in found if e["case"] == "rate: copy")
    lines = [
        f"`pytest bench/test_throughput.py`, {machine['cpu']['brand_raw']}, {machine['threads']} threads: GEMM "
        + ", ".join(f"{rate / 1e9:.0f} GF/s in {dtype}" for dtype, rate in gemm.items())
        + f", copy {copy / 1e9:.1f} GB/s (read and written). FLOPs are those of a plain formula by its cheaper route.",
        "",
        "| op | dtype | ms | GF/s, beside GEMM | GB/s, beside copy |",
        "|---|---|---|---|---|",
    ]
    for e, seconds in found:
        if e["case"].startswith("rate"):
            continue
        flops, moved = e["flops"] / seconds, e["bytes"] / seconds
        lines.append(
            f"| {e['case']} | {e['dtype']} | {seconds * 1e3:.2f} | {flops / 1e9:.0f}, {flops / gemm[e['dtype']]:.2f} | "
            f"{moved / 1e9:.1f}, {moved / copy:.2f} |"
        )
    return lines


AIMS, OPACUS = (0.75, 0.78, 0.8), "Opacus 1.6 hooks"


def accuracy_table(result: dict[str, Any]) -> list[str]:
    """Steps and seconds until held-out accuracy first reaches each aim, beside the plain run's."""
    header = " | ".join(f"{aim:.0%}" for aim in AIMS)
    lines = [f"| | {header} | all steps, seconds | accuracy at the end |", "|---|" + "---|" * (len(AIMS) + 2)]
    total = result["curves"]["plain"][-1][1]
    for mode, curve in result["curves"].items():
        cells = []
        for aim in AIMS:
            first = next(((step, seconds) for step, seconds, found in curve if found >= aim), None)
            cells.append("not reached" if first is None else f"{first[1]:.0f} s, step {first[0]:.0f}")
        seconds, end = curve[-1][1], curve[-1][2]
        cells += [f"{seconds:.0f} ({seconds / total:.2f}x)", f"{end:.1%}"]
        lines.append(f"| {NAMES.get(mode, OPACUS)} | " + " | ".join(cells) + " |")
    return lines


def accuracy_plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4))
    for mode, curve in result["curves"].items():
        _, seconds, found = zip(*curve, strict=True)
        axis.plot(seconds, found, marker=".", label=NAMES.get(mode, OPACUS))
    axis.set_xlabel("seconds of training steps")
    axis.set_ylabel("accuracy on held-out sentences")
    axis.set_xscale("log")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    accuracy, throughput = load("accuracy_cpu.json"), load("throughput_cpu.json")
    steps, growth, norms = load("steps_cpu.json"), load("growth_cpu.json"), load("norms_cpu.json")
    batches = load("largest_batch_cpu.json")
    images = DOCS / "images"
    images.mkdir(exist_ok=True)
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench` from `bench/results/*.json`. Competitors take turns in one run, step by step; times are "
        "medians over rounds of a step beside the step without privacy of the same round, memory is the peak resident size of "
        "a process of its own beside that of the step without privacy. The first step of fastclip tries the model, once.",
        "",
        "Machines: " + ("; ".join(machines(steps)) or "not measured") + ".",
        "",
        "## Whole steps",
        "",
        *steps_table(steps),
        "",
    ]
    if steps:
        steps_plot(steps, images / "bench-steps.png")
        lines += ["![Time and memory of a step](images/bench-steps.png)", ""]
    lines += [
        "Opacus refuses GPT-2 and tied heads in its ghost mode: there the head is untied and the position embedding frozen. "
        "fastDP, private-transformers, opake, Liger's kernels and every GPU: not measured.",
        "",
        "## Largest batch in a fixed memory",
        "",
        "`python bench/largest_batch.py`: fp32, the first step with fastclip's trial included, one example more does not fit.",
        "",
        *(largest_batches(batches) if batches else ["Not measured."]),
        "",
        "## Growth",
        "",
    ]
    if growth:
        growth_plot(growth, images / "bench-growth.png")
        lines += [
            "A small GPT-2 (2 layers, 128 wide, 2048 words) unless the axis says otherwise; 1 thread; dotted: the law that is "
            "expected, through the last point.",
            "",
            "![Growth of time and memory](images/bench-growth.png)",
            "",
        ]
    else:
        lines += ["Not measured.", ""]
    lines += ["## Norms", "", "`python bench/norms.py`" if norms else "Not measured.", ""]
    for result in norms.values():
        lines += norms_tables(result)
    lines += ["## Throughput of every op", "", *(throughput_table(throughput) if throughput else ["Not measured."]), ""]
    lines += [
        "## Time to an accuracy",
        "",
        "What the main job reaches, private and not, is in [results.md](results.md).",
        "",
    ]
    if accuracy:
        accuracy_plot(accuracy, images / "bench-accuracy.png")
        lines += [
            f"MiniLM on sentences of Amazon reviews, epsilon {accuracy['epsilon']:g} (noise multiplier "
            f"{accuracy['noise_multiplier']:.3g}), one norm over all parameters, {accuracy['machine']['cpu']}. All three see "
            "the same draws and take turns step by step; before training "
            f"{accuracy['before']:.1%}. `{accuracy['command']}`",
            "",
            *accuracy_table(accuracy),
            "",
            "![Accuracy over seconds](images/bench-accuracy.png)",
            "",
        ]
    else:
        lines += ["Against Opacus in the same loop: not measured.", ""]
    (DOCS / "benchmarks.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
