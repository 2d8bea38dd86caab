"""What holds for every op alike: schema, fake, compiling, capture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdms.ops import decode_linear
from tests.ops.calls import Call
from tests.ops.harness import DEVICE, OPS, assert_same_state

_STORING = ("decode_append", "decode_attention", "prefill_append", "prefill_attention")


class _Recorder(TorchDispatchMode):
    """The FastDMS ops that run inside, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastdms":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def _equal(actual: Any, expected: Any) -> None:
    """Bit for bit; None, a tensor, or a tuple of them."""
    if isinstance(expected, torch.Tensor):
        assert actual.dtype == expected.dtype
        assert actual.stride() == expected.stride()
        assert torch.equal(actual, expected)
    elif expected is None:
        assert actual is None
    else:
        for mine, other in zip(actual, expected, strict=True):
            _equal(mine, other)


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str) -> None:
    torch.library.opcheck(*_raw(Call(op, DEVICE)))


@pytest.mark.parametrize("op", _STORING)
def test_opcheck_in_fp8(op: str) -> None:
    """All but ``test_schema``, which can't compare fp8; what that one is for follows: an attend changes no state."""
    call = Call(op, DEVICE, kv_dtype=torch.float8_e4m3fn)
    before = call.cache.copy_to(DEVICE)
    function, args = _raw(call)
    if "attention" in op:
        for mine, other in zip(call.cache.layer(0), before.layer(0), strict=True):
            assert torch.equal(mine.view(torch.uint8), other.view(torch.uint8))
    torch.library.opcheck(function, args, test_utils=("test_faketensor", "test_aot_dispatch_dynamic"))


def _raw(call: Call) -> tuple[Any, tuple[Any, ...]]:
    """The dispatcher's op behind a call and its arguments, which the call has run once."""
    with _Recorder() as recorder:
        call.run(call.inputs, call.state())
    [(function, args)] = recorder.calls
    assert function is getattr(torch.ops.fastdms, call.op).default
    return function, args


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("op", OPS)
def test_compiles_without_a_break(op: str, dynamic: bool) -> None:
    """Equal to eager bit for bit, outputs and state, for two sizes and other data."""
    torch._dynamo.reset()
    for size in (3, 5):
        eager, traced = (Call(op, DEVICE, seed=size, size=size) for _ in range(2))
        if size == 3:
            compiled = torch.compile(traced.run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        with torch.no_grad():
            expected = eager.run(eager.inputs, eager.state())
            _equal(compiled(traced.inputs, traced.state()), expected)
        _equal(list(traced.inputs.values()), list(eager.inputs.values()))
        traced.cache.check_guards()
        assert_same_state(traced.cache, eager.cache)


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_replays_with_other_data(op: str) -> None:
    """Captured once, a graph serves whatever its tensors hold at replay."""
    static = Call(op, DEVICE, seed=0)
    static.run(static.inputs, static.state())  # compiles the kernel
    static.copy_from(Call(op, DEVICE, seed=1))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = static.run(static.inputs, static.state())
    for seed in (2, 3):
        eager = Call(op, DEVICE, seed=seed)
        static.copy_from(eager)
        expected = eager.run(eager.inputs, eager.state())
        graph.replay()
        torch.cuda.synchronize()
        _equal(outputs, expected)
        _equal(list(static.inputs.values()), list(eager.inputs.values()))
        static.cache.check_guards()
        assert_same_state(static.cache, eager.cache)


def test_ops_of_a_decode_step_check_whoever_calls_them() -> None:
    """By the dispatcher or while compiling, when no line of the public function's is in between."""
    x, weight = torch.zeros(2, 8), torch.zeros(6, 7)
    with pytest.raises(ValueError, match="weight must be contiguous"):
        torch.ops.fastdms.decode_linear.default(x, weight, None, None, None, 0.0, None, False, False)
    compiled = torch.compile(decode_linear, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="weight must be contiguous"):
        compiled(x, weight)
