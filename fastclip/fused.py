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
    devices = {p.device for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    if len(devices) != 1 or not _has_kernel(device := devices.pop()):
        return None
    for group in optimizer.param_groups:
        if group["maximize"] or group["differentiable"] or (adam and not _plain_adamw(group)):
            return None
        for p in group["params"]:
            if p.requires_grad and not all(_plain(x, device) for x in (p, *_state(optimizer, p).values())):
                return None
    return _adamw(optimizer) if adam else _sgd(optimizer)


def _plain_adamw(group: dict[str, Any]) -> bool:
    decoupled = group.get("decoupled_weight_decay", False) or group["weight_decay"] == 0
    return decoupled and not group["amsgrad"] and not group["capturable"]


def _has_kernel(device: torch.device) -> bool:
    backends = ops.backends()
    return {"cpu": backends["cpp"], "cuda": backends["triton"]}.get(device.type, {}).get("state") == "used"


def _plain(x: Any, device: torch.device) -> bool:
    if not isinstance(x, Tensor):
        return True
    if x.dim() == 0:
        return x.device.type == "cpu"  # a number of steps, which the host reads
    return x.dtype == torch.float32 and x.device == device and x.layout == torch.strided and x.is_contiguous()


def _state(optimizer: Optimizer, p: Tensor) -> dict[str, Any]:
    return optimizer.state.get(p, {})


def _adamw(optimizer: Optimizer) -> Update:
    def update(group: dict[str, Any], params: list[Tensor], sums: list[Tensor], draws: list[ops.Draw]) -> None:
        states = [optimizer.state[p] for p in params]
        for p, state in zip(params, states, strict=True):
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            state["step"] += 1
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
            steps=[int(state["step"]) for state in states],
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
