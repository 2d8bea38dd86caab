"""Continuous batching: requests take rows of the cache, prefill in chunks between decode steps, and leave."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from fastdms.admission import Admission, row_of
from fastdms.config import CHUNKS_AHEAD, dense_chunk, dense_tokens
from fastdms.graphs import send
from fastdms.ops import NOT_FINITE
from fastdms.request import Request
from fastdms.runner import STARVED, FirstTokens, Flight, HistoryError, ModelRunner, PrefillPiece, fill_chunk
from fastdms.under_way import UnderWay

__all__ = ["Engine"]


class Engine(Admission):
    """Admits, prefills, decodes, preempts and finishes requests; one ``step`` at a time, by whoever waits for one.

    A row that finds no page is released, and its request waits to be recomputed; its tokens come out the same, since
    they hang on seed, position and the text so far (with bf16 or fp8 KV up to rounding: a chunk sees its own keys
    unrounded). So does every row when a step is broken off by an exception, for its spans may be half written.

    Threads may share an engine: what touches rows or the cache happens inside ``alone``, and whoever steps carries all
    requests on.

    run_ahead: start a decode step before the tokens that it feeds are read, those of the step before or the first ones
    of prompts, and prefill chunks before that, too, and before it is known whether the last found pages. A row that an
    end id or its length ended does nothing in the step ahead; what one did that ended otherwise is dropped with its
    pages.
    """

    def __init__(self, runner: ModelRunner, *, prefill_chunk: int, run_ahead: bool) -> None:
        super().__init__(runner)
        self._lock = threading.RLock()
        self._depth = 0  # of ``alone`` in the thread that holds the lock
        self._closed = False
        self._cancelled: list[Request] = []
        self._prefill_chunk = prefill_chunk
        self._run_ahead = run_ahead
        self._under_way: UnderWay | None = None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other thread changes anything in here; ValueError once closed."""
        with self._lock:
            if self._closed:
                raise ValueError("this model is closed")
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                self._drop_cancelled()
        if self._cancelled:  # by another thread, which found the lock taken when no more was dropped
            self._try_to_drop()

    def close(self) -> None:
        """Any later use raises ValueError."""
        with self._lock:
            self._closed = True
            self.runner.graphs.close()

    def add(self, request: Request) -> None:
        """Queue a request, in order of arrival."""
        with self.alone():
            self._queue(request)

    def cancel(self, request: Request) -> None:
        """Forget an unfinished request and free its pages; a finished or unknown one is left alone.

        The garbage collector calls this for a stream that nobody holds any more, at any time and in any thread. So it
        waits for nothing: in the middle of a step it happens at the step's end.
        """
        self._cancelled.append(request)
        self._try_to_drop()

    def take_rows(self, count: int) -> list[int]:
        """Rows for direct use of the runner, until ``return_rows``; others are carried on until as many are free.

        ValueError if there are not so many, or those missing were taken like this before.
        """
        num_rows = self.cache.config.num_rows
        if count > num_rows:
            raise ValueError(
                f"{count} rows are needed, and there are {num_rows}; give compile a larger max_concurrency"
            )
        taken: list[int] = []
        with self.alone():
            try:
                while True:
                    self._forget_cancelled()
                    if self._waiting:
                        self.settle()  # else the next step ends requests and gives their rows to who waits
                    free = self._free_rows()[: count - len(taken)]
                    taken += free
                    self._taken_rows.update(free)
                    if len(taken) == count:
                        self.settle()
                        return taken
                    if not self._running:
                        raise ValueError(f"{count} rows are needed, and the others are taken and were not returned")
                    self.step()
            except BaseException:
                self._taken_rows.difference_update(taken)
                raise

    def return_rows(self, rows: list[int]) -> None:
        """Release rows that ``take_rows`` gave."""
        with self.alone():
            try:
                self.runner.release(rows)
            finally:
                self._taken_rows.difference_update(rows)
                self._refused = None

    def step(self) -> None:
        """Admit what fits, run a prefill chunk, or a few when running ahead, then a decode step of what is ready."""
        self._carefully(self._step)

    def prefill(self) -> None:
        """Admit and prefill what fits, and decode nothing until that is done."""
        self._carefully(self._prefill_all)

    def settle(self) -> None:
        """Read the tokens of the decode step under way, if there is one."""
        self._carefully(self._land)

    def _carefully(self, act: Callable[[], None]) -> None:
        with self.alone():
            try:
                act()
            except BaseException:
                self._under_way = None
                for request in list(self._running):
                    self._leave(request, broken_off=True)
                    if request.finished:
                        continue
                    request.usage = None  # half a step is in the spans
                    if request not in self._waiting:
                        self._queue(request)
                raise

    def _step(self) -> None:
        if self._goes_on():
            self._land(self.runner.decode(None))
            return
        if not self._prefilling() or self._could_admit():
            self._land()
            self._admit()
        if prefilling := self._prefilling():
            self._prefill(prefilling, then_decode=self._run_ahead)
        if self._under_way is None and (decoding := self._decoding()):
            self._decode(decoding)

    def _prefill_all(self) -> None:
        self._land()
        self._admit()
        while prefilling := self._prefilling():
            self._prefill(prefilling, then_decode=False)
            self._admit()  # by what the last have kept, more may fit than it seemed

    def _try_to_drop(self) -> None:
        if self._lock.acquire(blocking=False):
            try:
                self._drop_cancelled()
            finally:
                self._lock.release()

    def _drop_cancelled(self) -> None:
        if self._depth or self._closed:
            return
        self._depth += 1
        try:
            self._forget_cancelled()
        finally:
            self._depth -= 1

    def _forget_cancelled(self) -> None:
        while self._cancelled:
            request = self._cancelled[0]
            if request in self._waiting:
                self._waiting.remove(request)
            elif request in self._running:
                self._leave(request)
            self._cancelled.remove(request)  # not before: it may be broken off

    @property
    def _dense_chunk(self) -> int:
        return dense_chunk(self._prefill_chunk) if self._run_ahead else self._prefill_chunk

    def _remainder(self, request: Request) -> PrefillPiece:
        """What is still to prefill, or still to prefill densely, as far as one chunk can take it."""
        ids, begin = request.to_compute, request.computed
        dense = dense_tokens(self.runner.decoder.dms, len(request.prompt_ids), len(ids), self._prefill_chunk)
        if begin >= dense:
            dense = 0
        end = min(dense or len(ids), begin + (self._dense_chunk if dense else self._prefill_chunk))
        return PrefillPiece(row=row_of(request), token_ids=ids[begin:end], start=begin, dense_tokens=dense)

    def _start_chunks(self, requests: Sequence[Request]) -> torch.Tensor | None:
        """The last one's logits ``[n, V]``, of the first n; None, and nothing is run, without memory for the first."""
        # The host reads whether rows found their pages, which can wait for some chunks.
        for _ in range(CHUNKS_AHEAD if self._run_ahead else 1):
            pieces = fill_chunk(map(self._remainder, requests), self._prefill_chunk, self._dense_chunk)
            try:
                logits = self.runner.prefill(pieces)
            except HistoryError as error:
                requests[0].error = ValueError(str(error))  # kept with its frames it would keep half a history too
                return None
            prefilled = requests[: len(pieces)]  # the pieces are of the first
            for request, piece in zip(prefilled, pieces, strict=True):
                request.computed += len(piece.token_ids)
            if pieces[0].dense_tokens or any(request.prefilled for request in prefilled):
                break
        return logits

    def _prefill(self, requests: Sequence[Request], *, then_decode: bool) -> None:
        """``then_decode``: a step of all that are ready behind the chunks, before what these gave is read."""
        before, alone = [request.computed for request in requests], len(self._running) == 1
        logits = self._start_chunks(requests)
        if logits is None:
            self._leave(requests[0])
            return
        if any(request.prefilled for request in requests):
            self._refused = None  # it may have kept less than was expected, which was set aside for it until now
        results = [self.cache.starved]
        first = [(r, row) for r, row in zip(requests, logits, strict=False) if r.prefilled and not r.output_ids]
        sampled = None
        if first:
            rows = torch.stack([row for _, row in first])
            sampled = self.runner.sample(rows, [request.row_input() for request, _ in first])
            results.append(sampled.tokens)
        self._land()  # not before: the device would wait for all this
        sent = send(torch.cat(results))  # one wait for both
        if then_decode:
            self._decode_unread([request for request, _ in first], sampled)
        read = sent.read()
        for request, computed in zip(requests, before, strict=True):
            if request.computed > computed and read[row_of(request)]:
                lost, request.computed = request.computed - computed, computed
                self._starve(request, alone, lost_tokens=lost)
        for (request, row), token in zip(first, read[len(results[0]) :], strict=True):
            if request.row is not None:  # else it found no page
                self._accept(request, token, row)

    def _decoding(self) -> list[Request]:
        return [request for request in self._running if request.prefilled and request.output_ids]

    def _decode(self, requests: Sequence[Request]) -> None:
        self._under_way = UnderWay(self.runner.decode([request.row_input() for request in requests]), list(requests))
        if not self._run_ahead or any(request.logprobs is not None for request in requests):
            self._land()

    def _decode_unread(self, first: Sequence[Request], sampled: FirstTokens | None) -> None:
        """A step also of ``first``, whose first tokens have been sampled, unless their ends would leave nobody in it or
        logits are to be read."""
        decoding = self._decoding()
        requests = [*decoding, *first]
        if any(request.logprobs is not None for request in requests):
            return
        if decoding or any(request.max_tokens > 1 for request in first):
            inputs = [request.row_input() for request in requests]
            self._under_way = UnderWay(self.runner.decode(inputs, sampled), list(requests))

    def _goes_on(self) -> bool:
        """Whether the next step can start with what the one under way leaves, and nobody could join it."""
        return (
            self._under_way is not None
            and self._under_way.goes_on(self._running, self.runner.graphs)
            and not self._could_admit()
        )

    def _land(self, ahead: Flight | None = None) -> None:
        """Read the step under way; ``ahead``: the one after it for the same rows, which has been started."""
        if self._under_way is None:
            return
        requests, flight = self._under_way.requests, self._under_way.flight
        tokens = flight.land()
        self._under_way = None if ahead is None else UnderWay(ahead, requests)
        landed = [(i, request) for i, request in enumerate(requests) if request is not None]
        alone = len(requests) == len(self._running) == 1  # what has left since held its pages in this step
        for i, request in landed:
            if tokens[i] == STARVED:
                self._starve(request, alone, lost_tokens=1)
            else:
                request.computed += 1
        for i, request in landed:
            if tokens[i] != STARVED:
                self._accept(request, tokens[i], flight.logits[i])

    def _accept(self, request: Request, token: int, logits: torch.Tensor) -> None:
        if token == NOT_FINITE:
            request.error = ValueError(
                f"the model's logits are not finite after {request.computed} tokens: its weights, or its dtype "
                f"{self.runner.decoder.embed.dtype}, can't carry this prompt"
            )
        else:
            request.accept(token, logits)
        if request.finished:
            self._leave(request)

    def _starve(self, request: Request, alone: bool, lost_tokens: int) -> None:
        """No page was left for this row: wait for others to finish, or end if there are none."""
        # Growing each time, so that requests which starve each other are let in together only so often.
        held = self._pages_held()[row_of(request)]
        request.expected_pages = max(request.expected_pages, held) + self.cache.config.num_spans
        self._leave(request, lost_tokens)
        if not alone:
            self._queue(request)
        elif request.output_ids:
            request.finish("kv_full")
        else:
            request.error = ValueError(
                f"kv_memory is too small: a prompt of {len(request.prompt_ids)} tokens did not fit into "
                f"{self.cache.config.num_pages} pages ({self.cache.geometry.bytes_pool:,} bytes); give more kv_memory"
            )

    def _leave(self, request: Request, lost_tokens: int = 0, broken_off: bool = False) -> None:
        """``lost_tokens``: of a step that found no page; the spans that had room for them hold them all the same.
        ``broken_off``: in the middle of a step."""
        row = row_of(request)
        if self._under_way is not None and self._under_way.forget(request):
            lost_tokens = max(lost_tokens, 1)  # the step ahead stored one more, unless there was no page already
        request.usage = self.cache.usage(row, request.computed + lost_tokens)
        if not broken_off and lost_tokens <= self._prefill_chunk:  # of several chunks some may have been stored
            self._learn(request)
        self.runner.release([row])
        self._refused = None
        self._running.remove(request)
        request.row, request.computed = None, 0
