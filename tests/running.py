"""Tiny compiled models under watch: page accounting whenever the cache has changed, and requests one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import fastdms
from fastdms.cache import CompactCache
from fastdms.engine import Engine
from fastdms.request import Request
from fastdms.sampling_params import SamplingParams
from tests.models import VOCAB_SIZE, AdapterWeights, adapter_weights, save_checkpoint, tiny_model

STEP_LIMIT = 5000  # far above what any test needs: an engine that makes no progress fails instead of hanging


def engine_of(model: fastdms.CompiledModel) -> Engine:
    assert model._engine is not None
    return model._engine


def compiled(model: PreTrainedModel | Any, *, pages: int | None = None, **given: Any) -> fastdms.CompiledModel:
    """``fastdms.compile`` for the tests: fp32 on the CPU unless told otherwise; ``pages``: size of the pool."""
    options: dict[str, Any] = {"device": "cpu", "max_context": 256, "max_concurrency": 4} | given
    if pages is None:
        return fastdms.compile(model, **options)
    with fastdms.compile(model, **options | {"mode": "eager"}) as sized:
        num_bytes = kv_bytes(sized, pages)
    result = fastdms.compile(model, **options, kv_memory=num_bytes)
    assert engine_of(result).cache.config.num_pages == pages
    return result


def kv_bytes(model: fastdms.CompiledModel, pages: int) -> int:
    """``kv_memory`` that buys so many pages beside the metadata."""
    config = engine_of(model).cache.config
    return config.fixed_bytes + pages * (config.page_bytes + 4)


def check_pool(cache: CompactCache) -> None:
    """Each page of the pool is owned exactly once: by one span, or by the free stack."""
    config = cache.config
    held = -(-cache.live_len // config.page_size)
    index = torch.arange(config.max_pages, device=held.device)
    owned = torch.cat((cache.page_table[index < held[..., None]], cache.free_pages[: int(cache.num_free)]))
    assert int(cache.num_free) + int(held.sum()) == config.num_pages
    assert owned.sort().values.tolist() == list(range(config.num_pages))


def check_idle(model: fastdms.CompiledModel) -> None:
    """Nothing runs, nothing waits, nothing is held."""
    engine = engine_of(model)
    assert not engine.running
    assert not engine._waiting
    assert engine._free_rows() == list(range(engine.cache.config.num_rows))
    assert engine.cache.pages_in_use() == 0
    assert not engine.cache.live_len.any()
    assert not engine.cache.starved.any()
    check_pool(engine.cache)


class Watch:
    """Checks a model's pool after every call of its runner, and counts what happens.

    counts: calls of ``prefill``, ``decode``, ``release`` and ``step``, rows ``starved``, and of these such as were
        ``starved while decoding``. most_rows: that ran at once.
    admitted: requests in the order in which they first got a row.
    """

    def __init__(self, model: fastdms.CompiledModel) -> None:
        self.engine = engine_of(model)
        self.counts: Counter[str] = Counter()
        self.most_rows = 0
        self.admitted: list[Request] = []
        for name in ("prefill", "decode", "release"):
            self._wrap(self.engine.runner, name, name, check_pool)
        self._wrap(self.engine, "_starve", "starved", check_pool)
        self._wrap(self.engine, "step", "step", self._check_step)
        self._wrap(self.engine, "_admit", "admit", self._see_rows)

    def _wrap(self, owner: Any, name: str, count: str, check: Any) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            self.counts[count] += 1
            if count == "starved" and args[0].output_ids and args[0].prefilled:
                self.counts["starved while decoding"] += 1
            result = original(*args, **options)
            check(self.engine.cache)
            return result

        setattr(owner, name, call)

    def _see_rows(self, cache: CompactCache) -> None:
        rows = [request.row for request in self.engine.running]
        assert len(set(rows)) == len(rows)
        self.most_rows = max(self.most_rows, len(rows))
        self.admitted += [request for request in self.engine.running if request not in self.admitted]

    def _check_step(self, cache: CompactCache) -> None:
        assert self.counts["step"] < STEP_LIMIT, "the engine makes no progress"
        check_pool(cache)
        rows = {request.row for request in self.engine.running}
        held = {row for row in range(cache.config.num_rows) if cache.live_len[:, row].any()}
        assert held <= rows, "a row without a request holds tokens"
        for request in self.engine.running:
            assert not request.finished


def submit(model: fastdms.CompiledModel, ids: Sequence[int], params: SamplingParams) -> Request:
    """Queue a request without waiting for it."""
    request = model._request(list(ids), params, answers=False)
    engine_of(model).add(request)
    return request


def drain(model: fastdms.CompiledModel, requests: Sequence[Request]) -> None:
    """Step until all ``requests`` are finished."""
    for _ in range(STEP_LIMIT):
        if all(request.finished for request in requests):
            return
        engine_of(model).step()
    raise AssertionError("the engine makes no progress")


def one(result: fastdms.Completion | list[fastdms.Completion]) -> fastdms.Completion:
    assert isinstance(result, fastdms.Completion)
    return result


def many(result: fastdms.Completion | list[fastdms.Completion]) -> list[fastdms.Completion]:
    assert isinstance(result, list)
    return result


Alone = Callable[[str, Sequence[list[int]], SamplingParams], list[list[int]]]


def lone_runs(model: PreTrainedModel, rules: dict[str, Any]) -> Alone:
    """Rule, prompts and parameters -> the tokens of each prompt, run alone in a model of one row; each runs once."""
    known: dict[tuple[str, tuple[int, ...], SamplingParams], list[int]] = {}

    def tokens(rule: str, prompts: Sequence[list[int]], params: SamplingParams) -> list[list[int]]:
        keys = [(rule, tuple(prompt), params) for prompt in prompts]
        if any(key not in known for key in keys):
            with compiled(model, dms=rules[rule], max_context=512, max_concurrency=1) as runtime:
                engine_of(runtime)._run_ahead = False
                for key, prompt in zip(keys, prompts, strict=True):
                    if key not in known:
                        known[key] = one(runtime(prompt, params)).token_ids
        return [known[key] for key in keys]

    return tokens


FIRST_FLAGGED = VOCAB_SIZE // 2


def steered_checkpoint(folder: Path, **overrides: Any) -> tuple[PreTrainedModel, AdapterWeights, Path]:
    """A model that flags exactly the tokens from ``FIRST_FLAGGED`` on, in every layer and KV head.

    Residual channel 0 says so: the embedding sets it, no layer writes it, and the adapter reads nothing else.
    Use it under a rule with ``source="adapter"`` and ``shift=0``.
    """
    model: Any = tiny_model("qwen3", **overrides)
    with torch.no_grad():
        model.model.embed_tokens.weight[:FIRST_FLAGGED, 0] = -1.0
        model.model.embed_tokens.weight[FIRST_FLAGGED:, 0] = 1.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
    adapter = adapter_weights(model)
    for _, projection in adapter.values():
        projection.zero_()
        projection[:, 0] = 1.0
    return model, adapter, save_checkpoint(model, folder, "adapter", adapter=adapter)


def steered_tokens(flags: Sequence[bool], *, seed: int = 0) -> list[int]:
    """Random tokens of which exactly those are flagged."""
    dice = torch.Generator().manual_seed(seed)
    kept = torch.randint(3, FIRST_FLAGGED, (len(flags),), generator=dice)
    flagged = torch.randint(FIRST_FLAGGED, VOCAB_SIZE, (len(flags),), generator=dice)
    ids: list[int] = torch.where(torch.tensor(flags), flagged, kept).tolist()
    return ids
