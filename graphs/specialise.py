"""A graph that was traced for any batch size, made into that of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses import FakeTensorMode

__all__ = ["specialise"]


def specialise(graph: torch.fx.GraphModule, arguments: Sequence[Any]) -> tuple[torch.fx.GraphModule, list[Any]]:
    """``graph`` for ``arguments``, its sizes written into it as numbers, and what is left of its arguments, as fakes.

    Each node's ``example_value`` is what it makes of them.
    """
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # not above: it takes long, which "eager" does without

    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    given = dict(zip(placeholders, arguments, strict=True))
    values: dict[torch.fx.Node, Any] = {node: size for node, size in given.items() if isinstance(size, int)}
    fixed = torch.fx.Graph()
    fixed.output(fixed.graph_copy(graph.graph, values))
    module = torch.fx.GraphModule(graph, fixed)
    with FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True) as mode:
        fakes = [mode.from_tensor(tensor) for tensor in arguments if not isinstance(tensor, int)]
        _Propagation(module).run(*fakes)
    return module, fakes


class _Propagation(torch.fx.Interpreter):
    def run_node(self, n: torch.fx.Node) -> Any:
        n.meta["example_value"] = result = super().run_node(n)
        return result
