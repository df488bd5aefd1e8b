"""Clipped gradients the slow way: fp64, one unit at a time, one backward each.

Nothing here knows the engine. A unit's examples are cut out of the batch and run alone through the model, so that what
comes out cannot depend on any other unit. The model handed in must not be attached: a copy of an attached model clips.
Models that compute some parts in fp32 whatever their dtype (RMSNorm, rotary angles) do so here too: that costs 1e-7.
"""

import copy
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import nn

Batch = dict[str, torch.Tensor]
LossFn = Callable[[nn.Module, Batch], torch.Tensor]
Gradients = dict[str, torch.Tensor]

TOLERANCE = 1e-5
AUTO_S_GAMMA = 0.01


def batch_size(batch: Batch) -> int:
    """Number of examples. Tensors with one row beside it are broadcast over them."""
    return max(value.shape[0] for value in batch.values())


def take(batch: Batch, examples: Sequence[int]) -> Batch:
    """The batch of these examples alone; what is broadcast over the batch (one row) stays whole."""
    size = batch_size(batch)
    return {name: value[list(examples)] if value.shape[0] == size else value for name, value in batch.items()}


def units_of(ids: Sequence[int]) -> list[list[int]]:
    """Indices of each unit's examples, units in order of first appearance."""
    units: dict[int, list[int]] = {}
    for example, unit in enumerate(ids):
        units.setdefault(int(unit), []).append(example)
    return list(units.values())


def plain_gradients(model: nn.Module, loss_fn: LossFn, batch: Batch, dtype: torch.dtype = torch.float64) -> Gradients:
    """Gradient of the sum of the batch's losses for every trainable parameter, in `dtype`, zeros where it has none."""
    twin = copy.deepcopy(model).to(dtype)
    twin.zero_grad(set_to_none=True)
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
    loss_fn(twin, inputs).sum().backward()
    return collect(twin)


def collect(model: nn.Module) -> Gradients:
    """A copy of `p.grad` of every trainable parameter in fp64, zeros where it is None."""
    return {
        name: torch.zeros_like(p, dtype=torch.float64) if p.grad is None else p.grad.detach().double().clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def unit_gradients(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Batch,
    unit_of: Sequence[int] | None = None,
    reduction: str = "sum",
    dtype: torch.dtype = torch.float64,
) -> list[Gradients]:
    """One dict of gradients a unit (in fp64, computed in `dtype`), units in order of first appearance.

    `unit_of` names the unit of each example; None makes each example a unit. `loss_fn(model, batch)` gives one loss an
    example, and a unit's loss is their sum or, with `reduction="mean"`, their mean.
    """
    ids = range(batch_size(batch)) if unit_of is None else unit_of
    result = []
    for examples in units_of(ids):
        gradients = plain_gradients(model, loss_fn, take(batch, examples), dtype)
        scale = 1 / len(examples) if reduction == "mean" else 1.0
        result.append({name: scale * g for name, g in gradients.items()})
    return result


def segment_gradients(
    model: nn.Module, loss_fn: LossFn, batch: Batch, offsets: Sequence[int], dim: int = 0
) -> list[Gradients]:
    """As `unit_gradients` for a packed batch whose rows lie along `dim`: unit u owns rows offsets[u]:offsets[u + 1]."""
    result = []
    for start, stop in itertools.pairwise(offsets):
        rows = {name: value.narrow(dim, start, stop - start) for name, value in batch.items()}
        result.append(plain_gradients(model, loss_fn, rows))
    return result


def norm(gradients: Gradients, names: Sequence[str] | None = None) -> float:
    """L2 norm over the named parameters (None: all) taken together."""
    chosen = gradients if names is None else names
    return sum(float(gradients[name].square().sum()) for name in chosen) ** 0.5


def norms(units: Sequence[Gradients]) -> torch.Tensor:
    """[U] fp64."""
    return torch.tensor([norm(unit) for unit in units], dtype=torch.float64)


def module_groups(model: nn.Module) -> list[list[str]]:
    """Names of the trainable parameters by the module that owns them; owners that share a parameter are one group."""
    names = {p: name for name, p in model.named_parameters() if p.requires_grad}
    groups: list[list[str]] = []
    for module in model.modules():
        own = [names[p] for p in module.parameters(recurse=False) if p in names]
        if not own:
            continue
        joined = [group for group in groups if set(group) & set(own)]
        groups = [group for group in groups if group not in joined]
        groups.append(list(dict.fromkeys([name for group in joined for name in group] + own)))
    return groups


class Summed(dict[str, torch.Tensor]):
    """A sum of clipped gradients. terms: of each parameter, the sum of its terms' norms."""

    def __init__(self, gradients: Gradients) -> None:
        super().__init__((name, torch.zeros_like(g)) for name, g in gradients.items())
        self.terms = dict.fromkeys(self, 0.0)

    def add(self, name: str, term: torch.Tensor) -> None:
        self[name] += term
        self.terms[name] += float(term.norm())


def clipped_sum(
    units: Sequence[Gradients], max_grad_norm: float, rule: str = "flat", groups: Sequence[Sequence[str]] | None = None
) -> Gradients:
    """Sum of the units' clipped gradients.

    flat: g min(1, C / |g|). automatic: C g / (|g| + 0.01), AUTO-S of Bu et al. 2022 (arXiv 2206.07136), equation 4.
    per_layer: flat in each of the K `groups` with C / sqrt(K).
    """
    total = Summed(units[0])
    parts = groups if rule == "per_layer" and groups is not None else [list(total)]
    limit = max_grad_norm / len(parts) ** 0.5
    for unit in units:
        for part in parts:
            size = norm(unit, part)
            clipped = min(1.0, limit / size) if size else 1.0
            factor = limit / (size + AUTO_S_GAMMA) if rule == "automatic" else clipped
            for name in part:
                total.add(name, factor * unit[name])
    return total


def pick_clipping_norm(sizes: torch.Tensor) -> float:
    """A C between two neighbouring norms, where they differ most: some units are clipped and some are not."""
    ordered = sizes.double().sort().values
    gap = int((ordered[1:] / ordered[:-1].clamp(min=1e-30)).argmax())
    return float((ordered[gap] * ordered[gap + 1]).sqrt()) if ordered[gap] > 0 else float(ordered[gap + 1]) / 2


def errors(actual: Gradients, expected: Gradients) -> dict[str, float]:
    """Relative error of the whole vector under "", and of each parameter.

    A parameter's error is relative to its own norm, or to 1e-3 of the whole where that is larger, or, where units cancel, to
    1e-1 of what they sum to without their signs: fp32 has rounded each of them. Where the exact
    gradient vanishes by symmetry (the bias of attention's keys), what fp32 gives is the rounding of terms that cancel,
    in plain torch up to 1.3e-8 of the whole: there the error is relative to 1e-2 of the whole.
    """
    assert actual.keys() == expected.keys(), f"parameters differ: {sorted(actual.keys() ^ expected.keys())}"
    difference = {name: actual[name].double() - expected[name] for name in expected}
    whole = norm(expected)
    result = {"": norm(difference) / whole}
    for name in expected:
        own = norm(expected, [name]) / whole
        terms = expected.terms[name] / whole if isinstance(expected, Summed) else 0.0
        result[name] = norm(difference, [name]) / whole / (max(own, 1e-3, 1e-1 * terms) if own > 1e-12 else 1e-2)
    return result


def assert_gradients(actual: Gradients, expected: Gradients, tolerance: float = TOLERANCE) -> None:
    """Raise AssertionError naming the parameters that are off, worst first, and how far (NaN counts as off)."""
    found = errors(actual, expected)
    bad = sorted((name for name in found if not found[name] <= tolerance), key=lambda name: -found[name])
    lines = [
        f"  {name or 'whole gradient'}: relative error {found[name]:.3g}, "
        f"norm {norm(actual, [name] if name else None):.6g} instead of {norm(expected, [name] if name else None):.6g}"
        for name in bad
    ]
    assert not bad, f"{len(bad)} of {len(found)} beyond {tolerance:g}:\n" + "\n".join(lines[:12])


def assert_norms(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    """Raise AssertionError unless every unit's norm is within `tolerance` of its own (where 0: of the largest)."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} norms instead of {tuple(expected.shape)}"
    scale = torch.where(expected > 0, expected, expected.max())
    error = (actual.double() - expected).abs() / scale
    assert bool((error <= tolerance).all()), (
        f"unit norms {actual.tolist()} instead of {expected.tolist()}: relative errors {error.tolist()}"
    )
