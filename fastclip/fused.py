"""Release and update in one pass, where the wrapped optimizer is one whose update is written down here.

Guarantee: what is released has the same bits as without (`NoiseSource.add_`, then the optimizer's own step), the optimizer's
state stands where torch puts it, and an optimizer that does anything else than the plain update (AMSGrad, hooks, a step that
somebody wrapped, parameters that are not contiguous fp32 on one device that has a kernel) is left to its own step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from fastclip import ops

# update(group, parameters, their sums, their draws): sums become noisy gradients, and parameters are updated with them.
Update = Callable[[dict[str, Any], list[Tensor], list[Tensor], list[ops.Draw]], None]


def update_of(optimizer: Optimizer) -> Update | None:
    """The fused pass for this optimizer as it is now; None where it has to make its own step."""
    if "step" in vars(optimizer):
        return None
    # One pre-hook is DPOptimizer's own, which guards the step that is left out here.
    if len(optimizer._optimizer_step_pre_hooks) > 1 or optimizer._optimizer_step_post_hooks:
        return None
    if type(optimizer) not in (Adam, AdamW, SGD):
        return None
    adam = type(optimizer) is not SGD
    params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if not params or not _has_kernel(device := params[0].device):
        return None
    for group in optimizer.param_groups:
        if group["maximize"] or group["differentiable"] or (adam and not _plain_adamw(group)):
            return None
    for p in params:
        if not _plain(p, device):
            return None
        for name, x in optimizer.state.get(p, {}).items():
            if x is not None and not (_on_host(x) if name == "step" else _plain(x, device)):
                return None
    return _adamw(optimizer) if adam else _sgd(optimizer)


def _plain_adamw(group: dict[str, Any]) -> bool:
    decoupled = group.get("decoupled_weight_decay", False) or group["weight_decay"] == 0
    return decoupled and not group["amsgrad"] and not group["capturable"]


def _has_kernel(device: torch.device) -> bool:
    backends = ops.backends()
    return {"cpu": backends["cpp"], "cuda": backends["triton"]}.get(device.type, {}).get("state") == "used"


def _plain(x: Any, device: torch.device) -> bool:
    return (
        isinstance(x, Tensor)
        and x.dtype == torch.float32
        and x.device == device
        and x.layout == torch.strided
        and x.is_contiguous()
    )


def _on_host(steps: Any) -> bool:
    """Whether this is a number of steps as torch keeps it, and the host can read it."""
    return isinstance(steps, Tensor) and steps.dim() == 0 and steps.device.type == "cpu"


def _adamw(optimizer: Optimizer) -> Update:
    def update(group: dict[str, Any], params: list[Tensor], sums: list[Tensor], draws: list[ops.Draw]) -> None:
        states = [optimizer.state[p] for p in params]
        for p, state in zip(params, states, strict=True):
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        ops.noise_adamw(
            [p.detach() for p in params],
            sums,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            draws,
            lr=float(group["lr"]),
            betas=(float(group["betas"][0]), float(group["betas"][1])),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            steps=[int(step) for step in torch.stack(steps).tolist()],
        )

    return update


def _sgd(optimizer: Optimizer) -> Update:
    def update(group: dict[str, Any], params: list[Tensor], sums: list[Tensor], draws: list[ops.Draw]) -> None:
        # A parameter that joins later has no momentum yet.
        fresh = [p for p in params if group["momentum"] != 0 and optimizer.state[p].get("momentum_buffer") is None]
        for p in fresh:
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        new = set(fresh)
        for first in (True, False):
            chosen = [i for i, p in enumerate(params) if (p in new) == first]
            if not chosen:
                continue
            ops.noise_sgd(
                [params[i].detach() for i in chosen],
                [sums[i] for i in chosen],
                [optimizer.state[params[i]]["momentum_buffer"] for i in chosen] if group["momentum"] != 0 else [],
                [draws[i] for i in chosen],
                lr=float(group["lr"]),
                momentum=group["momentum"],
                dampening=group["dampening"],
                weight_decay=group["weight_decay"],
                nesterov=group["nesterov"],
                first=first,
            )

    return update
