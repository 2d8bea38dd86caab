"""The suite's own safety net: uninitialised memory is poisoned in eager code, and compiled code is left as it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from tests.poison import POISON_INT

FLOATING = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e8m0fnu,
)
MAKERS: dict[str, Callable[[torch.dtype], torch.Tensor]] = {
    "empty": lambda dtype: torch.empty(3, 5, dtype=dtype),
    "empty_like": lambda dtype: torch.empty_like(torch.zeros(3, 5), dtype=dtype),
    "empty_strided": lambda dtype: torch.empty_strided((3, 5), (1, 3), dtype=dtype),
    "new_empty": lambda dtype: torch.zeros(1).new_empty(3, 5, dtype=dtype),
    "new_empty_strided": lambda dtype: torch.zeros(1).new_empty_strided((3, 5), (1, 3), dtype=dtype),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_unwritten_memory_is_recognisable(maker: str) -> None:
    make = MAKERS[maker]
    for dtype in FLOATING:
        assert make(dtype).float().isnan().all(), dtype
    for dtype in (torch.int32, torch.int64):
        assert (make(dtype) == POISON_INT).all(), dtype
    assert make(torch.bool).all()
    assert (make(torch.uint8) == 255).all()


def test_parameters_and_empty_shapes_still_work() -> None:
    layer = torch.nn.Linear(4, 3)
    assert layer.weight.isfinite().all()
    assert torch.empty(0, 4).shape == (0, 4)
    assert torch.empty(2, 2, requires_grad=True).requires_grad
    with torch.inference_mode():
        assert torch.empty(2).isnan().all()


def _fills_what_it_allocates(x: torch.Tensor) -> torch.Tensor:
    pieces = [torch.empty(4), torch.empty_like(x), x.new_empty(4)]
    for i, piece in enumerate(pieces):
        piece.copy_(x + i)
    return torch.stack(pieces)


def test_compiled_code_is_not_poisoned() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def record(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    x = torch.arange(4.0)
    compiled = torch.compile(_fills_what_it_allocates, fullgraph=True, backend=aot_autograd(fw_compiler=record))
    torch.testing.assert_close(compiled(x), _fills_what_it_allocates(x), rtol=0, atol=0)
    (graph,) = graphs
    operations = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert operations
    assert not [name for name in operations if "fill" in name or "full" in name]
