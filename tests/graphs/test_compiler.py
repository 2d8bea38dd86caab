"""How a step is compiled: traced once for all batch sizes, then for each as if it had been traced for it alone."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch._dynamo.utils import counters

from fastdms.graphs import GraphCache, Step, StepBuffers, StepOutput, compiler
from fastdms.graphs.specialise import specialise
from tests.graphs.toys import rows
from tests.models import dms_config, tiny_model
from tests.running import compiled, engine_of


def _reshaping(inputs: StepBuffers) -> StepOutput:
    """Has batch sizes in its code."""
    batch = inputs.tokens.shape[0]
    pairs = torch.stack((inputs.tokens, inputs.positions), 1).view(batch, 2, 1).expand(batch, 2, 3)
    return inputs.tokens + batch, pairs.reshape(2 * batch, 3).sum(1).view(batch, 2).float()


def _branching(inputs: StepBuffers) -> StepOutput:
    if inputs.tokens.shape[0] > 2:
        return inputs.tokens + 1, inputs.min_p[:, None].clone()
    return inputs.tokens + 2, inputs.min_p[:, None].clone()


def _started(step: Step, mode: str, buckets: tuple[int, ...] = (1, 2, 4, 8)) -> tuple[GraphCache, int]:
    """And how often it was traced."""
    graphs = GraphCache(step, mode=mode, buckets=buckets, device=torch.device("cpu"), backend="eager")
    traces = counters["stats"]["unique_graphs"]
    graphs.warm_up()
    return graphs, counters["stats"]["unique_graphs"] - traces


@pytest.mark.parametrize(("step", "traces"), [(_reshaping, 1), (_branching, 2)])
def test_traced_once_for_each_path(step: Step, traces: int) -> None:
    graphs, traced = _started(step, "compile")
    plain, _ = _started(step, "eager")
    assert traced == traces
    for count in (3, 1, 8, 2, 1, 5):
        inputs = rows(count, token=count)
        for mine, other in zip(graphs.run(inputs), plain.run(inputs), strict=True):
            assert torch.equal(mine, other)
    stats = graphs.stats()
    assert (stats["compiles"], stats["recompiles"]) == (4, 0)
    known = [stats[f"{part}_seconds"] for part in ("trace", "compile", "capture")]
    assert known[0] > 0 < known[1]
    assert known[2] == 0, "this mode captures nothing"
    assert sum(known) <= sum(stats["seconds"].values())


def test_a_single_bucket() -> None:
    for bucket in (1, 4):
        graphs, traced = _started(_reshaping, "compile", (bucket,))
        assert traced == graphs.stats()["compiles"] == 1
        assert graphs.run(rows(1, token=5))[0].tolist() == [5 + bucket]


@pytest.mark.parametrize("closes", [True, False])
def test_what_was_compiled_goes_with_its_cache(closes: bool) -> None:
    """The compiler puts it among the globals of the code that it compiled."""
    gc.collect()
    before = set(vars(compiler))
    graphs, _ = _started(_reshaping, "compile")
    assert [name for name in set(vars(compiler)) - before if name.startswith("__compiled_fn")]
    if closes:
        graphs.close()
    else:
        del graphs
    gc.collect()
    assert not set(vars(compiler)) - before


def test_the_compiler_sees_no_symbol(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.fx.GraphModule, list[Any]]] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Any], _: Callable[..., Any]) -> Any:
        seen.append((graph, inputs))
        return graph.forward

    monkeypatch.setattr(compiler, "compile_pieces", keep)
    _started(_reshaping, "compile")
    assert [inputs[0].shape[0] for _, inputs in seen] == [8, 4, 2, 1]
    for graph, inputs in seen:
        for node in graph.graph.nodes:
            for value in pytree.tree_leaves(node.meta["example_value"]):
                sizes = (*value.shape, *value.stride()) if isinstance(value, torch.Tensor) else (value,)
                assert {type(size) for size in sizes} == {int}
        placeholders = [node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"]
        assert all(mine is other for mine, other in zip(placeholders, inputs, strict=True))


def test_sizes_become_numbers() -> None:
    def reshape(x: torch.Tensor, size: int) -> torch.Tensor:
        return x.view(size, -1)

    graph = torch.fx.symbolic_trace(reshape)
    fixed, (fake,) = specialise(graph, [torch.zeros(6), 2])
    assert fake.shape == (6,)
    assert [node.meta["example_value"].shape for node in fixed.graph.nodes][:2] == [(6,), (2, 3)]
    assert torch.equal(fixed(torch.arange(6)), torch.arange(6).view(2, 3))
    assert torch.equal(graph(torch.arange(6), 3), torch.arange(6).view(3, 2)), "the given graph stays as it was"


def test_a_model_is_traced_once_for_decode_linear_and_once_beyond_its_rows() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    with compiled(model, dms=dms_config("nvidia", 7), weights="fp8", max_concurrency=17) as eager:
        step = engine_of(eager).runner.graphs._step
        assert step is not None
        graphs, traced = _started(step, "compile", (1, 2, 16, 17))
        assert (traced, graphs.stats()["compiles"]) == (2, 4)
