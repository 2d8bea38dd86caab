"""The model on its device: prefill chunks and decode steps over the compact cache."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch

from fastdms.cache import CompactCache
from fastdms.decoder import Chunk, Decoder, DenseHistory
from fastdms.graphs import (
    ARTIFACTS,
    RING_SLOTS,
    GraphCache,
    RowChunk,
    RowInput,
    Sent,
    Staging,
    StepBuffers,
    StepOutput,
    TokenRing,
    decode_buckets,
    fingerprint,
    ragged_chunk,
)
from fastdms.ops import dense_kernel, sample

__all__ = ["STARVED", "FirstTokens", "Flight", "HistoryError", "ModelRunner", "PrefillPiece", "fill_chunk", "inference"]

STARVED = -1  # in place of a token, beside NOT_FINITE: the row found no page in this step or an earlier one


@contextmanager
def inference(device: torch.device) -> Iterator[None]:
    """What the model runs under whatever its caller has set: no autograd, no autocast, on the model's own device.

    Inference mode is off too: state made in it could not be written outside of it, and the compiler guards on it.
    """
    placed = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False), placed:
        yield


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillPiece:
    """The next tokens of one row. ``start``: position of the first. ``dense_tokens``: see ``ModelRunner``."""

    row: int
    token_ids: Sequence[int]
    start: int
    dense_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Flight:
    """A decode step under way; its logits ``[n, V]`` fp32 are valid until the next one."""

    _tokens: Sent
    logits: torch.Tensor

    def land(self) -> list[int]:
        """Wait for the sampled tokens; ``STARVED`` or ``NOT_FINITE`` where there is none."""
        return self._tokens.read()


@dataclass(frozen=True, slots=True)
class FirstTokens:
    """What prompts are followed by: tokens ``[n]`` int64, or ``NOT_FINITE``, and ``[n]`` bool, whether an end id."""

    tokens: torch.Tensor
    ends: torch.Tensor

    def enter(self, inputs: StepBuffers) -> None:
        """Into the last entries, which were filled with the tokens before them."""
        begin = len(inputs.tokens) - len(self.tokens)
        _go_on(StepBuffers(*(tensor[begin:] for tensor in inputs)), self.tokens, self.ends)


@contextmanager
def uncollected() -> Iterator[None]:
    """Inside, no garbage is looked for: compilers make and import much, and leave hardly any."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class HistoryError(ValueError):
    """There is no memory for the keys and values of a prompt that is to be prefilled densely."""


def fill_chunk(
    remainders: Iterable[PrefillPiece], num_tokens: int, dense_tokens: int | None = None
) -> list[PrefillPiece]:
    """The beginnings of ``remainders``, in order, that make one chunk of at most ``num_tokens`` tokens.

    A row is cut at multiples of ``num_tokens`` alone, whatever it shares its chunks with, since that shows where stored
    keys are rounded. A piece that is prefilled densely stands alone, and has at most ``dense_tokens`` tokens (None: as
    many). The pieces belong to the first of the remainders.
    """
    pieces: list[PrefillPiece] = []
    room = num_tokens
    for piece in remainders:
        if piece.dense_tokens:
            return pieces or [replace(piece, token_ids=piece.token_ids[: dense_tokens or num_tokens])]
        ids = piece.token_ids[: num_tokens - piece.start % num_tokens]
        if not ids or len(ids) > room:
            break
        pieces.append(replace(piece, token_ids=ids))
        room -= len(ids)
    return pieces


class ModelRunner:
    """Owns the decoder, its cache and the graph cache of its decode step.

    A row's first tokens may be prefilled densely, by attention that forgets nothing: as many as ``config.dense_tokens``
    says. Until they are all there, or the row is released, their keys and values are held whole beside the cache.

    prefill_chunk: the most tokens of a chunk that is not dense; such are captured beside the decode steps, up to some
        thousand tokens of a few rows. 0: none are.
    debug: check before each replay that weights and state lie where they did at capture.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: CompactCache,
        *,
        mode: str,
        max_concurrency: int,
        prefill_chunk: int = 0,
        debug: bool = False,
    ) -> None:
        self.decoder, self.cache = decoder, cache
        self.device = decoder.embed.device
        self._histories: dict[int, DenseHistory] = {}  # by row
        with inference(self.device):
            self._ring = TokenRing(max_concurrency, self.device)
            self._staging = Staging(max_concurrency, self.device)  # of first tokens
        ring = self._ring.tokens

        def step(inputs: StepBuffers) -> StepOutput:
            logits = decoder.decode(inputs.tokens, inputs.positions, inputs.rows, cache)
            starved = cache.starved.index_select(0, inputs.rows) != 0
            sampled, ends = _sample(logits, inputs, cache.counts)
            tokens = torch.where(starved, STARVED, sampled)
            ring.index_put_((inputs.slots, torch.arange(len(tokens), device=tokens.device)), tokens)
            _go_on(inputs, tokens, ends)
            inputs.slots.copy_((inputs.slots + 1) % RING_SLOTS)
            return tokens, logits

        with inference(self.device), uncollected():
            self.graphs = GraphCache(
                step, mode=mode, buckets=decode_buckets(max_concurrency), device=self.device,
                model=_fingerprint(decoder, cache), kv_dtype=str(cache.config.kv_dtype),
                state=lambda: {**_state(decoder, cache), "token_ring": ring}, artifacts=ARTIFACTS, debug=debug,
            )  # fmt: skip
            self.graphs.warm_up()
            if prefill_chunk and not (decoder.dms is not None and decoder.dms.prefill == "dense"):
                self.graphs.add_chunks(
                    lambda buffers: decoder.prefill(Chunk(**buffers._asdict()), cache),
                    min(prefill_chunk, cache.config.max_context),
                )

    def prefill(self, pieces: Sequence[PrefillPiece]) -> torch.Tensor:
        """Run one ragged chunk; logits ``[len(pieces), V]`` fp32 after each piece's last token.

        A piece that is prefilled densely must be the only one, and its row's first must begin at 0.
        """
        first = pieces[0]
        rows = [RowChunk(piece.row, piece.token_ids, piece.start) for piece in pieces]
        with inference(self.device):
            logits = None if first.dense_tokens else self.graphs.run_chunk(rows)
            if logits is not None:
                return logits
            columns = ragged_chunk(rows)._asdict()
            placed = {name: tensor.to(self.device, non_blocking=True) for name, tensor in columns.items()}
        chunk = Chunk(**placed, history=self._history(first), start=first.start)
        with inference(self.device):
            logits = self.decoder.prefill(chunk, self.cache)
        if first.start + len(first.token_ids) >= first.dense_tokens:
            self._histories.pop(first.row, None)
        return logits

    @property
    def dense_kernel(self) -> str | None:
        """The kernel that dense prefills run by, None where there are none."""
        decoder = self.decoder
        if decoder.dms is not None and decoder.dms.prefill == "masked":
            return None
        config = decoder.config
        group = config.num_heads // config.num_kv_heads
        return dense_kernel(decoder.embed.dtype, config.head_dim, group, self.device)

    def decode(self, inputs: Sequence[RowInput] | None, first: FirstTokens | None = None) -> Flight:
        """Start a step that feeds one token for each of ``inputs`` and samples the next.

        None: for the rows of the last step, each fed what it sampled, which the host need not know yet; those that an
        end id or their length ended, or that gave no token, store nothing more.
        first: what is fed for the last of ``inputs`` in place of their tokens, which stand before it; the same holds.
        """
        with inference(self.device):
            slot = self.graphs.slot
            self._ring.free(slot)
            if inputs is None:
                _, logits = self.graphs.run_on()
            else:
                _, logits = self.graphs.run(inputs, None if first is None else first.enter)
            return Flight(self._ring.send(slot, len(logits)), logits)

    def sample(self, logits: torch.Tensor, inputs: Sequence[RowInput]) -> FirstTokens:
        """Next tokens from logits ``[n, V]`` that a prefill gave; counts them too."""
        with inference(self.device):
            return FirstTokens(*_sample(logits, self._staging.pack(inputs).first(len(inputs)), self.cache.counts))

    def count(self, row: int, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        """Say what the request of ``row`` has seen before it decodes, for its penalties; steps count on from there."""
        with inference(self.device):
            self.cache.count(row, prompt_ids, output_ids)

    def release(self, rows: list[int]) -> None:
        """Give the pages of ``rows`` back."""
        for row in rows:
            self._histories.pop(row, None)
        with inference(self.device):
            self.cache.release(rows)

    def new_history(self, num_tokens: int) -> DenseHistory:
        """Room for the keys and values of ``num_tokens`` tokens; HistoryError if there is none."""
        with inference(self.device):
            try:
                return DenseHistory(self.decoder.config, num_tokens, self.decoder.embed.dtype, self.device)
            except RuntimeError as error:
                if self.device.type == "cuda" and not isinstance(error, torch.OutOfMemoryError):
                    raise
                raise HistoryError(
                    f"no memory on {self.device} to prefill {num_tokens} tokens densely; give compile less kv_memory"
                ) from error

    def _history(self, piece: PrefillPiece) -> DenseHistory | None:
        if not piece.dense_tokens:
            return None
        if piece.start == 0:
            self._histories[piece.row] = self.new_history(piece.dense_tokens)
        return self._histories[piece.row]


def _fingerprint(decoder: Decoder, cache: CompactCache) -> str:
    """Of all that a decode step is made of but the values of the weights."""
    zeroing = [layer.zero_borrowed for layer in decoder.layers]
    weights = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in decoder.state_dict().items()]
    return fingerprint(decoder.config, decoder.dms, zeroing, decoder.cos.shape, weights, cache.config, repr(decoder))


def _state(decoder: Decoder, cache: CompactCache) -> dict[str, torch.Tensor]:
    """Every tensor that a decode step reads or writes beside its buffers."""
    own = {name: tensor for name, tensor in vars(cache).items() if isinstance(tensor, torch.Tensor)}
    return {**dict(decoder.named_parameters()), **dict(decoder.named_buffers()), **own}


def _go_on(inputs: StepBuffers, tokens: torch.Tensor, ends: torch.Tensor) -> None:
    """Have ``inputs`` feed the ``tokens`` that were sampled by them, if the host has nothing to say about it; rows that
    have come to an end become padding."""
    ended = ends | (tokens < 0) | (inputs.positions < 0) | (inputs.positions + 1 >= inputs.last_positions)
    inputs.tokens.copy_(tokens.clamp_min(0))
    inputs.positions.copy_(torch.where(ended, -1, inputs.positions + 1))


def _sample(logits: torch.Tensor, inputs: StepBuffers, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return sample(
        logits,
        temperature=inputs.temperature,
        top_k=inputs.top_k,
        top_p=inputs.top_p,
        min_p=inputs.min_p,
        seeds=inputs.seeds,
        positions=inputs.positions + 1,
        end_ids=inputs.end_ids,
        banned_until=inputs.banned_until,
        penalties=inputs.penalties,
        count_rows=inputs.count_rows,
        counts=counts,
    )
