"""A compiler backend that writes NaN over every value as soon as its graph no longer needs it, as a compiler may.

What an operator keeps of its arguments beyond its call is then seen: Inductor reuses buffers only where sizes happen to fit.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.utils import get_donated_idxs
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves


def _storage(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


class Poisoning(Interpreter):
    """kept: storages that outlive the graph (parameters, a forward graph's inputs)."""

    def __init__(self, module: GraphModule, kept: set[int]) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.kept = kept
        self.last: dict[Node, list[Node]] = {}
        seen: set[Node] = set()
        for node in reversed(module.graph.nodes):
            for used in node.all_input_nodes:
                if used not in seen:
                    seen.add(used)
                    self.last.setdefault(node, []).append(used)
        self.poisoned = 0

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        gone = [self.env.pop(used) for used in self.last.get(n, ())] if n.op != "output" else []
        alive = {_storage(x) for x in tree_leaves((list(self.env.values()), result)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(gone):
            if isinstance(x, torch.Tensor) and x.is_floating_point() and _storage(x) not in alive | self.kept:
                torch.as_strided(x.detach(), (x.untyped_storage().nbytes() // x.itemsize,), (1,), 0).fill_(torch.nan)
                self.poisoned += 1
        return result


def poisoning(parameters: Sequence[torch.Tensor], counts: list[int]) -> Callable[..., Any]:
    """A backend for ``torch.compile`` of a model with these parameters. counts: how many values each backward poisoned."""
    owned = {_storage(p) for p in parameters}

    def forward(module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return module

    def backward(module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        donated = get_donated_idxs() or []

        def run(*args: Any) -> Any:
            # Of what is handed in, only what nobody else holds: as Inductor, which writes there too.
            given = [x for i, x in enumerate(args) if i not in donated]
            interpreter = Poisoning(module, owned | {_storage(x) for x in given if isinstance(x, torch.Tensor)})
            with torch.no_grad():
                out = interpreter.run(*args)
            counts.append(interpreter.poisoned)
            return out

        return run

    return aot_autograd(fw_compiler=forward, bw_compiler=backward)
