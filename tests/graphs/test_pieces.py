"""A step's graph in pieces: what is compiled, and that every layer still has its own weights and its own spans."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastdms import DMSConfig, SamplingParams
from fastdms.graphs import compiler
from fastdms.graphs.pieces import _signature, compile_pieces
from tests.models import tiny_model, tiny_tokens
from tests.running import compiled, one
from tests.tolerance import assert_logits_close

_EVICTING = DMSConfig(
    window_tokens=7, alpha_scale=100.0, alpha_offset=5.0, shift=1, zero_borrowed="pre_rope", source="borrowed_q",
    prefill="masked",
)  # fmt: skip


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many graphs each bucket's compilation handed to the compiler; they run as they are."""
    counts: list[int] = []

    def counting(graph: torch.fx.GraphModule, inputs: Any, _: Callable[..., Any]) -> Any:
        counts.append(0)

        def count(piece: torch.fx.GraphModule, examples: list[Any]) -> Any:
            assert [tuple(example.shape) for example in examples] == [
                tuple(node.meta["example_value"].shape) for node in piece.graph.nodes if node.op == "placeholder"
            ]
            counts[-1] += 1
            return piece.forward

        return compile_pieces(graph, inputs, count)

    monkeypatch.setattr(compiler, "compile_pieces", counting)
    return counts


@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_equal_layers_are_compiled_once(layers: int, family: str, compilations: list[int]) -> None:
    model, ids = tiny_model(family, num_hidden_layers=layers), tiny_tokens(60)
    options: dict[str, Any] = {"dms": _EVICTING, "max_concurrency": 2}
    with compiled(model, **options) as eager, compiled(model, mode="compile", **options) as pieces:
        assert compilations == [min(layers + 1, 3)] * 2
        assert_logits_close(pieces.score(ids, 9), eager.score(ids, 9))
        assert pieces.kv_report().live_tokens.tolist() == eager.kv_report().live_tokens.tolist()
        params = SamplingParams(temperature=0.0, max_tokens=20)
        assert one(pieces(ids[:20], params)).token_ids == one(eager(ids[:20], params)).token_ids


def _described(factor: float, example: torch.Tensor) -> object:
    def scaled(x: torch.Tensor) -> torch.Tensor:
        return x * factor

    graph = torch.fx.symbolic_trace(scaled)
    next(iter(graph.graph.nodes)).meta["example_value"] = example
    return _signature(graph)


def test_pieces_that_differ_in_anything_are_apart() -> None:
    square = torch.zeros(4, 4)
    assert _described(2.0, square) == _described(2.0, torch.ones(4, 4))
    others = [square[:3], square[:, :3], square.T[:, :3], square.double(), square.to("meta")]
    described = [_described(3.0, square), *(_described(2.0, other) for other in others)]
    assert len({_described(2.0, square), *described}) == 1 + len(described)


def test_a_graph_without_attention_stays_whole() -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    graph, given = torch.fx.symbolic_trace(double), []

    def compile_whole(whole: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        given.append(whole)
        return whole.forward

    run = compile_pieces(graph, [torch.ones(2)], compile_whole)
    assert given == [graph]
    assert torch.equal(run(torch.ones(2)), 2 * torch.ones(2))
