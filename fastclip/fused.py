"""Release and update in one pass, where the wrapped optimizer is one whose update is written down here.

Guarantee: what is released has the same bits as without (`NoiseSource.add_`, then the optimizer's own step), the optimizer's
state stands where torch puts it, and an optimizer that does anything else than the plain update (AMSGrad, hooks, a step that
somebody wrapped, parameters that are not contiguous fp32 on CPU) is left to its own step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from fastclip import ops

# update(group, parameter, its sum, its draw): the sum becomes the noisy gradient, and the parameter is updated with it.
Update = Callable[[dict[str, Any], Tensor, Tensor, ops.Draw], None]


def update_of(optimizer: Optimizer) -> Update | None:
    """The fused pass for this optimizer as it is now; None where it has to make its own step."""
    if ops.backends()["cpp"]["state"] == "absent" or "step" in vars(optimizer):
        return None
    # One pre-hook is DPOptimizer's own, which guards the step that is left out here.
    if len(optimizer._optimizer_step_pre_hooks) > 1 or optimizer._optimizer_step_post_hooks:
        return None
    if type(optimizer) not in (Adam, AdamW, SGD):
        return None
    adam = type(optimizer) is not SGD
    for group in optimizer.param_groups:
        if group["maximize"] or group["differentiable"] or (adam and not _plain_adamw(group)):
            return None
        for p in group["params"]:
            if p.requires_grad and not all(_plain(x) for x in (p, *_state(optimizer, p).values())):
                return None
    return _adamw(optimizer) if adam else _sgd(optimizer)


def _plain_adamw(group: dict[str, Any]) -> bool:
    decoupled = group.get("decoupled_weight_decay", False) or group["weight_decay"] == 0
    return decoupled and not group["amsgrad"] and not group["capturable"]


def _plain(x: Any) -> bool:
    if not isinstance(x, Tensor) or x.dim() == 0:
        return not isinstance(x, Tensor) or x.device.type == "cpu"
    return x.dtype == torch.float32 and x.device.type == "cpu" and x.layout == torch.strided and x.is_contiguous()


def _state(optimizer: Optimizer, p: Tensor) -> dict[str, Any]:
    return optimizer.state.get(p, {})


def _adamw(optimizer: Optimizer) -> Update:
    def update(group: dict[str, Any], p: Tensor, total: Tensor, draw: ops.Draw) -> None:
        state = optimizer.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        ops.noise_adamw(
            p.detach(),
            total,
            state["exp_avg"],
            state["exp_avg_sq"],
            draw,
            lr=float(group["lr"]),
            betas=(float(group["betas"][0]), float(group["betas"][1])),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=int(state["step"]),
        )

    return update


def _sgd(optimizer: Optimizer) -> Update:
    def update(group: dict[str, Any], p: Tensor, total: Tensor, draw: ops.Draw) -> None:
        buffer, first = None, False
        if group["momentum"] != 0:
            state = optimizer.state[p]
            first = state.get("momentum_buffer") is None
            if first:
                state["momentum_buffer"] = torch.zeros_like(p)
            buffer = state["momentum_buffer"]
        ops.noise_sgd(
            p.detach(),
            total,
            buffer,
            draw,
            lr=float(group["lr"]),
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            first=first,
        )

    return update
