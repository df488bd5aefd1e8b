"""What the Edgeworth estimate is worth: the noise that EW-Tune logged, judged by other accountants; accuracy; time.

    python bench/edgeworth.py [--rounds R]

Logged are the noise multipliers of star-ailab/LLM_Tune's runs for epsilon 8: RoBERTa on four tasks, 2000 examples a step,
20 epochs of N // 2000 steps, by its "ew" (first order, removal only), "prv" and "rdp" accountants. There is no log of
SST-2 at delta 1e-6. JSON goes to bench/results/edgeworth.json, tables to docs/edgeworth.md between its two markers.
About a minute, of which all but the times is the same on every machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import dp_accounting
from scipy import optimize
from step import machine

from fastclip.accounting import StepEvent, finite_sample, get_epsilon, get_noise_multiplier, moments, pld
from fastclip.accounting import edgeworth as estimates

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parent.parent / "docs" / "edgeworth.md"
BEGIN, END = "<!-- bench/edgeworth.py writes from here -->", "<!-- to here -->"
TARGET = 8.0
SIZES = {"MNLI": 392702, "QNLI": 104743, "QQP": 363849, "SST-2": 67349}
# task, delta; noise multipliers by ew, prv and rdp
LOGGED = [
    ("MNLI", 1e-5, 0.557, 0.581, 0.6255),
    ("QNLI", 1e-5, 0.711, 0.7295, 0.793),
    ("QQP", 1e-5, 0.5635, 0.587, 0.6325),
    ("SST-2", 1e-5, 0.7865, 0.817, 0.8775),
    ("MNLI", 1e-6, 0.573, 0.607, 0.65),
    ("QNLI", 1e-6, 0.7395, 0.768, 0.829),
    ("QQP", 1e-6, 0.58, 0.6135, 0.6575),
]
CLASSES = [(0.0, 0.005), (0.005, 0.05), (0.05, 0.3), (0.3, 1.0)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    runs = [judged(*logged) for logged in LOGGED]
    result = {"machine": machine(), "runs": runs, "accuracy": accuracy(), "times": times(rounds)}
    RESULTS.joinpath("edgeworth.json").write_text(json.dumps(result, indent=2) + "\n")
    before, rest = DOCS.read_text().split(BEGIN)
    DOCS.write_text(before + BEGIN + "\n" + tables(result) + END + rest.split(END)[1])
    print(tables(result))


def judged(task: str, delta: float, ew: float, prv: float, rdp: float) -> dict[str, object]:
    """One logged run beside what it really spends and what it would really have needed."""
    rate, steps = 2000 / SIZES[task], 20 * (SIZES[task] // 2000)
    first = estimates.edgeworth([StepEvent(ew, rate, steps)], delta, 1, interval=True)
    second = estimates.edgeworth([StepEvent(ew, rate, steps)], delta, 2)
    sums = moments.pairs_of([StepEvent(ew, rate, steps)], 1)[0]
    needed = get_noise_multiplier(TARGET, delta, rate, steps)
    verified = estimates.calibrate_verified(TARGET, delta, rate, steps)
    return {
        "task": task,
        "delta": delta,
        "sample_rate": rate,
        "steps": steps,
        "logged_noise": {"ew": ew, "prv": prv, "rdp": rdp},
        "first_order_removal": first.remove,
        "first_order": first.epsilon,
        "second_order": second.epsilon,
        "kurtosis": first.kurtosis,
        "interval": [first.lower, None if first.vacuous else first.upper],
        "expansion_error": [finite_sample.law_error(law, equal=True) for law in sums],
        "pld_epsilon": {
            "ew": get_epsilon(ew, rate, steps, delta),
            "prv": get_epsilon(prv, rate, steps, delta),
            "rdp": get_epsilon(rdp, rate, steps, delta),
        },
        "needed_noise": {"pld": needed, "rdp": rdp_noise(rate, steps, delta)},
        "proposed_noise": verified.proposed,
        "proposed_spends": verified.spent,
        "verified_noise": verified.noise_multiplier,
        "claimed_saving": 1 - ew / prv,
        "real_saving": 1 - needed / prv,
        "short_by": 1 - ew / needed,
    }


def rdp_noise(rate: float, steps: int, delta: float) -> float:
    """The noise that dp_accounting's Renyi accountant asks for."""

    def excess(noise: float) -> float:
        accountant = dp_accounting.rdp.RdpAccountant()
        sampled = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
        return accountant.compose(sampled, steps).get_epsilon(delta) - TARGET

    return float(optimize.brentq(excess, 0.3, 3.0, xtol=1e-5))


def accuracy() -> list[dict[str, object]]:
    """The smallest, median and largest ratio of estimate to truth, by kurtosis and order."""
    ratios: dict[tuple[float, float], list[list[float]]] = {bounds: [] for bounds in CLASSES}
    noises, rates, counts = (0.5, 0.6, 0.8, 1.0, 1.5, 2.0, 5.0), (0.001, 0.005, 0.01, 0.03, 0.1), (50, 200, 1000, 4000)
    for noise, rate, count, delta in itertools.product(noises, rates, counts, (1e-5, 1e-7)):
        found = [estimates.edgeworth([StepEvent(noise, rate, count)], delta, order).epsilon for order in (1, 2, 3)]
        kurtosis = estimates.edgeworth([StepEvent(noise, rate, count)], delta).kurtosis
        if kurtosis > 1:
            continue
        truth = get_epsilon(noise, rate, count, delta)
        if 0.1 < truth < 30:
            bounds = next((low, high) for low, high in CLASSES if low <= kurtosis <= high)
            ratios[bounds].append([epsilon / truth for epsilon in found])
    return [
        {
            "kurtosis": list(bounds),
            "settings": len(rows),
            "ratio_by_order": [[min(r), statistics.median(r), max(r)] for r in zip(*rows, strict=True)],
        }
        for bounds, rows in ratios.items()
    ]


def times(rounds: int) -> dict[str, float]:
    """Milliseconds, medians of rounds over all logged runs, every cache emptied before each."""
    cases = [(delta, 2000 / SIZES[task], 20 * (SIZES[task] // 2000), ew) for task, delta, ew, _, _ in LOGGED]
    runs: dict[str, Callable[[float, float, int, float], object]] = {
        "epsilon, edgeworth": lambda d, q, t, s: estimates.edgeworth([StepEvent(s, q, t)], d),
        "epsilon, pld": lambda d, q, t, s: get_epsilon(s, q, t, d),
        "noise, edgeworth verified by pld": lambda d, q, t, s: estimates.calibrate_verified(TARGET, d, q, t),
        "noise, pld": lambda d, q, t, s: get_noise_multiplier(TARGET, d, q, t),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _, case in itertools.product(range(rounds), cases):
        for name, run in runs.items():
            moments._laws.cache_clear()
            pld._one_step.cache_clear()
            started = time.perf_counter()
            run(*case)
            seconds[name].append(time.perf_counter() - started)
    return {name: 1e3 * statistics.median(taken) for name, taken in seconds.items()}


def tables(result: dict) -> str:
    """The results as Markdown."""
    runs, took = result["runs"], result["times"]
    lines = [
        "Noise logged for epsilon 8, and what `pld` finds. *Claimed* is the noise saved against the logged `prv`, *real* what",
        "an exact accountant saves against it, *short by* how much more noise epsilon 8 takes than the run had.",
        "",
        "| task | delta | ew | prv | rdp | ew really spends | prv spends | rdp spends | needed: pld | rdp | claimed | real "
        "| short by |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        noise, spent, needed = run["logged_noise"], run["pld_epsilon"], run["needed_noise"]
        lines.append(
            f"| {run['task']} | {run['delta']:g} | {noise['ew']:g} | {noise['prv']:g} | {noise['rdp']:g} "
            f"| {spent['ew']:.2f} | {spent['prv']:.2f} | {spent['rdp']:.2f} "
            f"| {needed['pld']:.4f} | {needed['rdp']:.4f} "
            f"| {run['claimed_saving']:.1%} | {run['real_saving']:.1%} | {run['short_by']:.1%} |"
        )
    lines += [
        "",
        "The estimates at the logged `ew` noise, their kurtosis, the proven interval, and noise by `calibrate_verified`.",
        "",
        "| task | delta | order 1, removal | order 1 | order 2 | kurtosis | D_X, D_Y | interval "
        "| proposed | spends | verified |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        low, high = (math.inf if end is None else end for end in run["interval"])
        errors = ", ".join(f"{error:.2f}" for error in run["expansion_error"])
        lines.append(
            f"| {run['task']} | {run['delta']:g} | {run['first_order_removal']:.2f} | {run['first_order']:.2f} "
            f"| {run['second_order']:.2f} | {run['kurtosis']:.2f} | {errors} | {low:.2f} to {high:.2f} "
            f"| {run['proposed_noise']:.4f} | {run['proposed_spends']:.2f} | {run['verified_noise']:.4f} |"
        )
    lines += [
        "",
        "Estimate over `pld` by kurtosis of the summed loss: smallest, median and largest of all settings of a sweep.",
        "",
        "| kurtosis | settings | order 1 | order 2 | order 3 |",
        "|---|---|---|---|---|",
    ]
    for row in result["accuracy"]:
        cells = " | ".join(" / ".join(f"{ratio:.3f}" for ratio in ratios) for ratios in row["ratio_by_order"])
        lines.append(f"| {row['kurtosis'][0]:g} to {row['kurtosis'][1]:g} | {row['settings']} | {cells} |")
    spent = [run["pld_epsilon"]["ew"] for run in runs]
    epsilon_ratio = took["epsilon, pld"] / took["epsilon, edgeworth"]
    noise_ratio = took["noise, pld"] / took["noise, edgeworth verified by pld"]
    cpu = result["machine"]["cpu"]
    lines += [
        "",
        f"The logged runs spend {min(spent):.1f} to {max(spent):.1f}, not 8.",
        "",
        f"Time on one thread of {cpu}, medians over the logged runs with caches empty: one epsilon by `edgeworth`",
        f"takes {took['epsilon, edgeworth']:.1f} ms, by `pld` {epsilon_ratio:.0f} times that; noise for epsilon 8 by "
        "`calibrate_verified` takes",
        f"{took['noise, edgeworth verified by pld']:.0f} ms, by `get_noise_multiplier` with `pld` {noise_ratio:.1f} times "
        "that.",
        "",
    ]
    assert all(math.isfinite(value) for value in took.values())
    return "\n".join(lines)


if __name__ == "__main__":
    main()
