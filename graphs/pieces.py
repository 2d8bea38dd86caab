"""Compile each distinct layer once: a step's graph, cut after every attention, equal pieces sharing one compilation.

Nothing that the compiler could fuse reaches over a cut, since attention is opaque to it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch.fx.passes.split_module import split_module

__all__ = ["Compiled", "compile_pieces"]

Compiled = Callable[..., Any]
_VIEWS = 0  # the part that takes each layer's views of the cache; it launches nothing


def compile_pieces(
    graph: torch.fx.GraphModule,
    inputs: Sequence[Any],
    compile_graph: Callable[[torch.fx.GraphModule, list[Any]], Compiled],
) -> Compiled:
    """``graph`` with every distinct piece compiled by ``compile_graph``; the whole where nothing attends in it."""
    if not any(_attends(node) for node in graph.graph.nodes):
        return compile_graph(graph, list(inputs))
    parts = _parts(graph)
    split = split_module(graph, graph, lambda node: parts[node])
    compiled: dict[Hashable, Compiled] = {}
    for name, piece in list(split.named_children()):
        assert isinstance(piece, torch.fx.GraphModule)
        if name == f"submod_{_VIEWS}":
            continue
        signature = _signature(piece)
        if signature not in compiled:
            examples = [node.meta["example_value"] for node in piece.graph.nodes if node.op == "placeholder"]
            compiled[signature] = compile_graph(piece, examples)
        setattr(split, name, _Piece(compiled[signature]))
    whole: Compiled = split.forward
    return whole


class _Piece(torch.nn.Module):
    def __init__(self, run: Compiled) -> None:
        super().__init__()
        self.forward = run


def _parts(graph: torch.fx.GraphModule) -> dict[torch.fx.Node, int]:
    """The part that each node goes to: the attentions before it, counted from 1."""
    parts: dict[torch.fx.Node, int] = {}
    part = _VIEWS + 1
    for node in graph.graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        view = (
            node.target is operator.getitem and node.args[0].op == "placeholder" and isinstance(node.args[1], int)
        )  # by a tensor it would be a copy, of what the ops have yet to write
        parts[node] = _VIEWS if view else part
        part += _attends(node)
    return parts


def _attends(node: torch.fx.Node) -> bool:
    return node.target is torch.ops.fastdms.decode_attention.default


def _signature(piece: torch.fx.GraphModule) -> Hashable:
    """Equal for pieces that do the same to inputs of the same kind, whatever their nodes are called.

    Where a view begins in its base is left out: inductor minds only whether it is aligned, and if that of the second
    layer is, all are.
    """
    order: dict[torch.fx.Node, int] = {}
    described: list[Hashable] = []
    for node in piece.graph.nodes:
        arguments = torch.fx.map_arg((node.args, node.kwargs), lambda other: f"%{order[other]}")
        order[node] = len(order)
        if node.op == "placeholder":
            value = node.meta["example_value"]
            described.append((value.shape, value.stride(), value.dtype, value.device))
        else:
            described.append((node.op, node.target, repr(arguments)))
    return tuple(described)
