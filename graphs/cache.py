"""The graph cache: one compiled, and on CUDA captured, decode step per bucket, all made before the first request; and
on CUDA prefill chunks of a few sizes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastdms.graphs.artifacts import Artifacts
from fastdms.graphs.bucket import choose_bucket
from fastdms.graphs.buffers import RowInput, Staging, StepBuffers, make_buffers
from fastdms.graphs.capture import GraphRecorder, Recorder
from fastdms.graphs.chunk_graphs import ChunkBuffers, ChunkGraphs, Prefill, RowChunk, chunk_sizes
from fastdms.graphs.compiler import CountingBackend, Step, StepOutput, compile_step, mark_batch, tracing
from fastdms.graphs.key import GraphKey, machine_key, step_inputs
from fastdms.graphs.report import format_report
from fastdms.graphs.ring import RING_SLOTS

__all__ = ["MODES", "GraphCache", "check_mode"]

MODES = ("graphs", "compile", "eager")


@dataclass(slots=True)
class _Bucket:
    """What a bucket keeps while its entries come and go: its key, inputs, warmed-up code and counts."""

    key: GraphKey
    inputs: StepBuffers
    code: Callable[[], StepOutput] | None = None
    runs: int = 0
    padded_rows: int = 0
    captures: int = 0
    kept_bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class _Entry:
    run: Callable[[], StepOutput]
    kept_bytes: int
    addresses: Mapping[str, int]


def check_mode(mode: str, device: torch.device) -> None:
    """ValueError unless ``mode`` is one of ``MODES`` that runs on ``device``."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
    if mode == "graphs" and device.type != "cuda":
        raise ValueError(f"mode 'graphs' needs a CUDA device, got {device}; use 'compile' or 'eager'")


class GraphCache:
    """Runs decode steps of any batch size up to the largest bucket.

    step: the whole decode step over static buffers; padding entries (position -1) touch no state, so that warming up
        with nothing but padding leaves none behind. It may leave the tokens and positions of the next step in them, and
        must leave the slots after its own.
    mode: ``"eager"`` calls it, ``"compile"`` compiles it with ``fullgraph=True`` for each bucket, ``"graphs"`` captures
        that into one CUDA graph per bucket, which a step then replays.
    model: the ``fingerprint`` of what the step is built from; kv_dtype: of its cache. Both enter the keys.
    state: the tensors by name that the step reads and writes beside its buffers; only debugging asks for them.
    memory_limit: bytes that all steps' graphs may keep beside the pool's shared scratch. Above it the least recently
        used are dropped, and captured again when they are next needed; a single one that is too large stays. None: no
        limit.
    artifacts: folder of the compiler's artifacts; None: none are read or written.
    backend: of ``torch.compile``. recorder: captures; None: CUDA graphs.
    debug: before each replay, AssertionError unless all tensors lie where they did at capture.

    slot: the one that the next run finds in its buffers.
    """

    def __init__(
        self,
        step: Step,
        *,
        mode: str,
        buckets: Sequence[int],
        device: torch.device,
        model: str = "",
        kv_dtype: str = "",
        state: Callable[[], Mapping[str, torch.Tensor]] = dict,
        memory_limit: int | None = None,
        artifacts: Path | None = None,
        backend: str = "inductor",
        recorder: Recorder | None = None,
        debug: bool = False,
    ) -> None:
        if recorder is None:
            check_mode(mode, device)
            recorder = GraphRecorder() if mode == "graphs" else None
        if memory_limit is not None and memory_limit < 0:
            raise ValueError(f"memory_limit must be a number of bytes, at least 0, got {memory_limit}")
        self._step: Step | None = step
        self._state, self._mode, self._debug, self._device = state, mode, debug, device
        self._memory_limit, self._recorder = memory_limit, recorder
        self._chunks: ChunkGraphs | None = None
        self._chunk_addresses: Mapping[str, int] = {}
        self._backend = CountingBackend(backend)  # the compiler never forgets it, so it holds nothing of this object
        self._compiled = None if mode == "eager" else compile_step(step, self._backend)
        self._artifacts = Artifacts(artifacts if mode != "eager" else None)
        largest, machine = make_buffers(max(buckets), device), machine_key(device)
        self._buckets = {
            bucket: _Bucket(
                GraphKey(
                    bucket=bucket, inputs=step_inputs(largest.first(bucket)), kv_dtype=kv_dtype, mode=mode,
                    backend=backend, model=model, machine=machine,
                ),
                largest.first(bucket),
            )
            for bucket in sorted(buckets)
        }  # fmt: skip
        self._sizes = tuple(self._buckets)
        self._staging = Staging(max(buckets), device)
        self._fills = largest.words(), self._staging.placed.words()  # all buckets' buffers
        self._entries: dict[GraphKey, _Entry] = {}  # least recently used first
        self._hits = self._misses = self._evictions = self._pool_bytes = 0
        self._compiles_at_start: int | None = None
        self._trace_seconds = self._capture_seconds = 0.0
        # For which bucket the buffers, which all share, were last filled, and for how many rows.
        self._filled: _Bucket | None = None
        self._num_rows = 0
        self.slot = 0

    def warm_up(self) -> None:
        """Make every bucket's entry, largest first, so that the smaller graphs find room in its pool."""
        with self._artifacts.around([bucket.key for bucket in self._buckets.values()]):
            for bucket in reversed(self._buckets.values()):
                self._make_entry(bucket)
        self._compiles_at_start = self._backend.compiles

    def run(self, inputs: Sequence[RowInput], amend: Callable[[StepBuffers], None] | None = None) -> StepOutput:
        """One step for ``inputs``: tokens ``[n]`` int64 and logits ``[n, V]`` fp32, valid until the next run.

        amend: may change the entries of ``inputs`` in place, by what the host does not know yet.
        """
        bucket = self._buckets[self.bucket(len(inputs))]
        entry = self._entry(bucket)
        self._fill(bucket, inputs)
        if amend is not None:
            amend(bucket.inputs.first(len(inputs)))
        return self._run(bucket, entry)

    def run_on(self) -> StepOutput:
        """The rows of the last run again, with the tokens and positions that it left; the host has no part in it."""
        if self._filled is None:
            raise ValueError("no run has left anything to go on with")
        return self._run(self._filled, self._entry(self._filled))

    def bucket(self, num_rows: int) -> int:
        """Rows of the step that a run for so many takes, with those that pad it."""
        return choose_bucket(num_rows, self._sizes)

    def add_chunks(self, prefill: Prefill, most_tokens: int, recorder: Recorder | None = None) -> None:
        """Record prefills of up to ``most_tokens`` tokens, where steps are captured and there is memory for it.

        recorder: with a pool of its own, since its replays come between steps whose outputs are still in use.
        """
        if self._recorder is None:
            return
        sizes = chunk_sizes(most_tokens)
        self._chunks = ChunkGraphs(prefill, sizes, self._sizes[-1], self._device, recorder or GraphRecorder())
        self._chunk_addresses = self._addresses(self._chunks.buffers) if self._debug else {}

    def run_chunk(self, chunks: Sequence[RowChunk]) -> torch.Tensor | None:
        """Logits ``[len(chunks), V]`` after each row's last token; None, and nothing done, without a fitting graph."""
        if self._chunks is None:
            return None
        if self._debug:
            self._check_addresses("a prefill chunk", self._chunks.buffers, self._chunk_addresses)
        return self._chunks.run(chunks)

    def stats(self) -> dict[str, Any]:
        """Counts so far.

        compiles, captures: in all; recompiles: compiles after the warm-up. hits, misses: runs that found their entry,
        or had to make it. evictions: entries dropped for the memory limit. pool_bytes: of the pool that all steps'
        graphs share. artifacts: see ``Artifacts.state``. chunks: ``ChunkGraphs.stats``, None without any. By bucket:
        runs, padded_rows (without those whose end only the device knew), bucket_captures, seconds spent making entries,
        and the bytes that each held entry keeps.
        Of these seconds were trace_seconds spent by dynamo, compile_seconds by the compiler behind it (or loading what
        it once made) and capture_seconds by capturing; what is left, by first runs, in which Triton compiles.
        """
        buckets, held = self._buckets.items(), self._entries
        started = self._compiles_at_start
        return {
            "mode": self._mode,
            "buckets": self._sizes,
            "compiles": self._backend.compiles,
            "recompiles": 0 if started is None else self._backend.compiles - started,
            "captures": sum(bucket.captures for bucket in self._buckets.values()),
            "hits": self._hits,
            "misses": self._misses,
            "evictions": self._evictions,
            "pool_bytes": self._pool_bytes,
            "artifacts": self._artifacts.state,
            "trace_seconds": self._trace_seconds,
            "compile_seconds": self._backend.compile_seconds,
            "capture_seconds": self._capture_seconds,
            "chunks": None if self._chunks is None else self._chunks.stats(),
            "runs": {size: bucket.runs for size, bucket in buckets},
            "padded_rows": {size: bucket.padded_rows for size, bucket in buckets},
            "bucket_captures": {size: bucket.captures for size, bucket in buckets},
            "seconds": {size: bucket.seconds for size, bucket in buckets},
            "bytes": {size: held[bucket.key].kept_bytes for size, bucket in buckets if bucket.key in held},
        }

    def report(self) -> str:
        """``stats`` as a small table."""
        return format_report(self.stats())

    def close(self) -> None:
        """Drop all graphs, compiled code and the step itself."""
        self._entries.clear()
        for bucket in self._buckets.values():
            bucket.code = None
        self._step = self._compiled = self._recorder = self._chunks = None
        self._state = dict

    def _entry(self, bucket: _Bucket) -> _Entry:
        entry = self._entries.pop(bucket.key, None)
        if entry is None:
            self._misses += 1
            return self._make_entry(bucket)
        self._hits += 1
        self._entries[bucket.key] = entry
        return entry

    def _fill(self, bucket: _Bucket, inputs: Sequence[RowInput]) -> None:
        self._filled = None  # should filling break off
        self._staging.pack(inputs, self.slot)
        torch._foreach_copy_(*self._fills)
        self._filled, self._num_rows = bucket, len(inputs)

    def _run(self, bucket: _Bucket, entry: _Entry) -> StepOutput:
        if self._debug:
            self._check_addresses(f"bucket {bucket.key.bucket}", bucket.inputs, entry.addresses)
        assert self._filled is bucket
        self._filled = None  # should the step break off
        tokens, logits = entry.run()
        self._filled = bucket
        self.slot = (self.slot + 1) % RING_SLOTS
        bucket.runs += 1
        bucket.padded_rows += tokens.shape[0] - self._num_rows
        return tokens[: self._num_rows], logits[: self._num_rows]

    def _make_entry(self, bucket: _Bucket) -> _Entry:
        started = time.perf_counter()
        self._fill(bucket, [])  # what runs for warming up must not touch a live row
        if bucket.code is None:
            bucket.code = self._make_code(bucket.inputs)
        if self._mode == "graphs":
            self._make_room(bucket.kept_bytes)
            entry = self._record(bucket, bucket.code)
            self._make_room(entry.kept_bytes)
        else:
            entry = _Entry(bucket.code, 0, {})
        self._entries[bucket.key] = entry
        self._filled = None
        bucket.seconds += time.perf_counter() - started
        return entry

    def _make_code(self, inputs: StepBuffers) -> Callable[[], StepOutput]:
        step, compiled = self._step, self._compiled
        if step is None:
            raise ValueError("this graph cache is closed")
        if compiled is None:
            return lambda: step(inputs)
        mark_batch(inputs)
        began = time.perf_counter()
        with tracing(any_size=True):
            if self._recorder is None:
                compiled(inputs)
            else:
                self._recorder.warm_up(lambda: compiled(inputs))
        self._trace_seconds += max(0.0, self._backend.compile_began - began)  # it compiled before, in a try that failed
        return lambda: compiled(inputs)

    def _record(self, bucket: _Bucket, code: Callable[[], StepOutput]) -> _Entry:
        assert self._recorder is not None
        began = time.perf_counter()
        replay, (tokens, logits), bucket.kept_bytes, pool_bytes = self._recorder.record(code)
        self._capture_seconds += time.perf_counter() - began
        bucket.captures += 1
        self._pool_bytes += pool_bytes

        def run() -> StepOutput:
            replay()
            return tokens, logits

        return _Entry(run, bucket.kept_bytes, self._addresses(bucket.inputs) if self._debug else {})

    def _make_room(self, num_bytes: int) -> None:
        """Drop entries, the least recently used first, until ``num_bytes`` more stay within the limit."""
        if self._memory_limit is None:
            return
        while self._entries and num_bytes + sum(e.kept_bytes for e in self._entries.values()) > self._memory_limit:
            del self._entries[next(iter(self._entries))]
            self._evictions += 1

    def _addresses(self, inputs: StepBuffers | ChunkBuffers) -> dict[str, int]:
        tensors = {**inputs._asdict(), **self._state()}
        return {name: tensor.data_ptr() for name, tensor in tensors.items()}

    def _check_addresses(self, what: str, inputs: StepBuffers | ChunkBuffers, captured: Mapping[str, int]) -> None:
        now = self._addresses(inputs)
        moved = [name for name, address in captured.items() if now.get(name) != address]
        if moved:
            raise AssertionError(f"since {what} was captured, these moved: {', '.join(moved)}")
