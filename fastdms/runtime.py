"""``compile`` and what it gives back."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

import torch

from fastdms.cache import CompactCache
from fastdms.checkpoint import open_checkpoint
from fastdms.completion import Completion, StreamPiece
from fastdms.config import DMSConfig, ModelConfig
from fastdms.decoder import Decoder
from fastdms.engine import Engine
from fastdms.graphs import MAX_END_IDS, GraphCache
from fastdms.kv_report import KVReport, RowUsage
from fastdms.options import Options, resolve_cache, resolve_dms, resolve_options, resolve_zeroing
from fastdms.progress import progress
from fastdms.prompts import Prompt, PromptReader, is_chat, is_single
from fastdms.request import Request
from fastdms.runner import ModelRunner, inference
from fastdms.sampling_params import MAX_STOPS, SamplingParams
from fastdms.scoring import score
from fastdms.text_stream import TextStream
from fastdms.weights import load_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["CompiledModel", "IncompleteError", "compile"]


def compile(
    model: str | os.PathLike[str] | PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dms: str | DMSConfig = "auto",
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    kv_dtype: str = "auto",
    weights: str = "auto",
    max_concurrency: int = 8,
    max_context: int | None = None,
    kv_memory: int | float | None = None,
    prefill_chunk: int = 2048,
    mode: str | None = None,
) -> CompiledModel:
    """Load ``model`` and make it ready to generate.

    model: a folder of safetensors, a hub id, a GGUF file, or a transformers model object.
    tokenizer: a transformers tokenizer; None takes the checkpoint's. Without one, prompts are token ids.
    dms: ``"auto"`` as the checkpoint declares; ``"off"`` never evicts, and is otherwise the model that was trained: a
        borrowed query channel stays zeroed; or a ``DMSConfig``, which replaces what the checkpoint declares unread.
    device: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``; None takes CUDA where there is one.
    dtype: of computation, and of weights unless ``weights`` says otherwise: ``"fp32"``, ``"bf16"`` or ``"fp16"``; None:
        as stored on CUDA, fp32 on CPU.
    kv_dtype: ``"fp32"``, ``"bf16"`` or ``"fp8"`` (e4m3 with a scale per token and head); ``"auto"``: fp8 on CUDA, on
        CPU bf16 where that is the dtype and else fp32.
    weights: ``"auto"`` is ``dtype``, and what a checkpoint stores as int4 stays so; ``"bf16"`` makes that the dtype;
        ``"fp8"`` stores the linear layers and the output head as e4m3 with an fp32 scale per output channel; ``"int4"``
        the linear layers as 4 bits with a scale for each 128, 64 or 32 weights of a row, and the head as e4m3, also one
        that an int4 checkpoint left as it was. All else is in ``dtype``: embedding table, norms, biases, a DMS adapter.
        Small decode batches read weights so; prefill and larger ones take each back to ``dtype`` for its use.
    max_concurrency: rows of the cache: requests that run at once, in [1, 256].
    max_context: tokens of one request, prompt and answer; None: the model's ``max_position_embeddings``.
    kv_memory: for the whole cache with its metadata: bytes (int), or a share of the free memory (float); None: what
        all rows could need, up to 85 % of the free memory (CPU: half). A dense prefill (without eviction, or by its
        rule) holds a prompt's keys and values besides (``score`` another one's): None and a share leave room for it.
    prefill_chunk: prompt tokens per prefill step, four of which may go before a decode step (if dense as one, of 8,192
        tokens at most); it changes rounding and what memory a step takes.
    mode: ``"graphs"`` (one CUDA graph per decode bucket, and some for prefill chunks), ``"compile"`` (torch.compile
        alone) or ``"eager"``; None: graphs on CUDA, eager on CPU.

    Raises ValueError for whatever can't be: it names the argument, file or tensor, and what is allowed.
    """
    checkpoint = open_checkpoint(model, read_metadata=not isinstance(dms, DMSConfig))
    config = checkpoint.config
    options = resolve_options(
        config, device=device, dtype=dtype, kv_dtype=kv_dtype, weights=weights, max_concurrency=max_concurrency,
        max_context=max_context, kv_memory=kv_memory, prefill_chunk=prefill_chunk, mode=mode,
    )  # fmt: skip
    rule = resolve_dms(dms, checkpoint.dms)
    if tokenizer is not None:
        _check_tokenizer(tokenizer)
    elif checkpoint.tokenizer_path is not None:
        from fastdms.tokenizer import has_tokenizer, load_tokenizer

        if has_tokenizer(checkpoint.tokenizer_path):
            tokenizer = load_tokenizer(checkpoint.tokenizer_path)
    _end_ids(config, tokenizer)  # refused before the weights are read, not after
    with inference(options.device):
        try:
            decoder = Decoder(
                config, rule, num_positions=options.max_context, dtype=options.dtype, device=options.device,
                weight_dtype=options.weights, head_dtype=options.head, zero_borrowed=resolve_zeroing(checkpoint.dms),
            )  # fmt: skip
        except (RuntimeError, MemoryError) as error:
            raise ValueError(f"no memory on {options.device} for the weights of {checkpoint.name}: {error}") from error
        load_weights(decoder, progress(checkpoint.tensors(), desc=f"loading {checkpoint.name}", unit=" tensors"))
        sizes = resolve_cache(config, rule, options)
        try:
            cache = CompactCache(sizes, options.device)
        except (RuntimeError, MemoryError) as error:
            raise ValueError(
                f"no memory on {options.device} for a cache of {sizes.num_pages:,} pages: {error}"
            ) from error
    runner = ModelRunner(
        decoder, cache, mode=options.mode, max_concurrency=options.max_concurrency, prefill_chunk=options.prefill_chunk
    )
    return CompiledModel(config, rule, options, runner, tokenizer)


class IncompleteError(ValueError):
    """Some prompts of a call could not be completed; the message names the first of them, and why.

    completions: in the order of the prompts, None where there is none.
    """

    def __init__(self, message: str, completions: Sequence[Completion | None] = ()) -> None:
        super().__init__(message)
        self.completions = list(completions)


class CompiledModel:
    """A model ready to generate: call it, ``stream`` it, ``score`` with it; ``close`` it or use it in a ``with``.

    Threads may share one model: their requests run side by side.
    """

    def __init__(
        self,
        config: ModelConfig,
        dms: DMSConfig | None,
        options: Options,
        runner: ModelRunner,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        self.config, self.dms, self.options, self.tokenizer = config, dms, options, tokenizer
        self._engine: Engine | None = Engine(
            runner, prefill_chunk=options.prefill_chunk, run_ahead=options.device.type == "cuda"
        )
        self._prompts = PromptReader(config, tokenizer, options.max_context)
        self._arrivals = 0
        self._last_call: list[RowUsage] = []
        self._end_ids = _end_ids(config, tokenizer)

    def __call__(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None, **sampling: Any
    ) -> Completion | list[Completion]:
        """Complete one prompt, or a list of them.

        prompts: text, a list of token ids, or a chat as a list of message dicts; or a list of any of these.
        params: one ``SamplingParams`` for all; or give its fields as keywords.

        Returns a ``Completion``, or a list in the order of the prompts. Raises ValueError, before anything runs, for a
        prompt that is empty, too long or out of the vocabulary, and afterwards ``IncompleteError``, a ValueError, for
        one that found no KV memory or whose logits are not finite: its ``completions`` are those of the other prompts.
        """
        params = _sampling(params, sampling)
        if is_single(prompts):
            prompt_ids = self._prompts.read(cast(Prompt, prompts))
            return self._complete([self._request(prompt_ids, params, answers=is_chat(prompts))])[0]
        listed = cast(Sequence[Prompt], prompts)
        read = zip(listed, self._prompts.read_all(listed), strict=True)
        return self._complete([self._request(ids, params, answers=is_chat(prompt)) for prompt, ids in read])

    generate = __call__

    def _complete(self, requests: Sequence[Request]) -> list[Completion]:
        engine = self._open_engine()
        try:
            for request in requests:
                engine.add(request)
            most = sum(request.max_tokens for request in requests)
            with progress(total=most, desc="generating", unit=" tokens") as bar:
                while not all(request.finished for request in requests):
                    self._open_engine().step()
                    if not bar.disable:
                        _count_tokens(bar, requests)
        finally:
            for request in requests:
                engine.cancel(request)
            self._last_call = [request.usage for request in requests if request.usage is not None] or self._last_call
        errors = {index: request.error for index, request in enumerate(requests) if request.error is not None}
        completions = [self._completion(request) if request.error is None else None for request in requests]
        if errors:
            raise _incomplete(errors, completions)
        return cast(list[Completion], completions)

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        params: SamplingParams | None = None,
        *,
        allow_control_tokens: bool = False,
        **sampling: Any,
    ) -> Completion:
        """Complete one chat, given as message dicts (``role``, ``content``), by the tokenizer's template.

        allow_control_tokens: whether text that spells a control token becomes that token.
        """
        self._open_engine()
        ids = self._prompts.read_chat(messages, allow_control_tokens=allow_control_tokens)
        return self._complete([self._request(ids, _sampling(params, sampling), answers=True)])[0]

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        allow_control_tokens: bool = False,
        **sampling: Any,
    ) -> Iterator[StreamPiece]:
        """Yield the completion of one prompt piece by piece; dropping the iterator cancels the request.

        A piece never splits a character, and text that may begin a stop string is held back until that is known.
        The prompt is checked here, the request is queued by the first ``next``; other calls may run while the stream is
        open, and carry it on.
        """
        self._open_engine()
        ids = self._prompts.read(prompt, allow_control_tokens=allow_control_tokens)
        return self._pieces(self._request(ids, _sampling(params, sampling), answers=is_chat(prompt)))

    def _pieces(self, request: Request) -> Iterator[StreamPiece]:
        try:
            self._open_engine().add(request)  # not before: a generator that was never started is dropped silently
            while True:
                while request.pieces:
                    yield request.pieces.popleft()
                if request.error is not None:
                    raise request.error
                if request.finished:
                    return
                self._open_engine().step()
        finally:
            engine = self._engine
            if engine is not None:
                engine.cancel(request)
            if request.usage is not None:
                self._last_call = [request.usage]

    def score(self, token_ids: Sequence[int], prompt_len: int) -> torch.Tensor:
        """fp32 logits ``[len(token_ids) - prompt_len + 1, V]`` on the CPU: row i after ``prompt_len + i`` tokens.

        The first ``prompt_len`` tokens go through prefill, the others one by one through the decode path.
        """
        return self.score_batch([token_ids], [prompt_len])[0]

    def score_batch(self, token_ids: Sequence[Sequence[int]], prompt_lens: Sequence[int]) -> list[torch.Tensor]:
        """``score`` of several sequences, run together; at most ``max_concurrency`` of them.

        Requests that hold the rows for it are carried on to their ends first.
        """
        engine = self._open_engine()
        if not isinstance(token_ids, (list, tuple)) or not isinstance(prompt_lens, (list, tuple)):
            raise ValueError("score_batch takes a list of sequences and a list of prompt lengths")
        if len(token_ids) != len(prompt_lens):
            raise ValueError(f"{len(token_ids)} sequences and {len(prompt_lens)} prompt lengths")
        sequences = [self._prompts.read_scored(ids, length) for ids, length in zip(token_ids, prompt_lens, strict=True)]
        with engine.alone():
            rows = engine.take_rows(len(sequences))
            try:
                logits = score(engine.runner, rows, sequences, prompt_lens, self.options.prefill_chunk)
                self._last_call = [engine.cache.usage(row, len(ids)) for row, ids in zip(rows, sequences, strict=True)]
                return logits
            finally:
                engine.return_rows(rows)

    def kv_report(self) -> KVReport:
        """KV memory of the rows in flight, or, when there are none, of those of the last finished call."""
        engine = self._open_engine()
        with engine.alone():
            engine.settle()
            in_flight = [engine.cache.usage(r.row, r.computed) for r in engine.running if r.row is not None]
        return self._report(in_flight or self._last_call)

    @property
    def dense_kernel(self) -> str | None:
        """What prefills a prompt densely: ``"flash_attn_3"``, ``"gluon"``, ``"cudnn"``, ``"flash_attn_2"``,
        ``"torch_flash"``, ``"triton"`` or, on the CPU, ``"reference"``; None where prompts are prefilled under the DMS
        mask. Beside cuDNN, chunks that begin at no multiple of 128 go by torch's flash.
        """
        return self._open_engine().runner.dense_kernel

    @property
    def graphs(self) -> GraphCache:
        """The graph cache of the decode step and of prefill chunks."""
        return self._open_engine().runner.graphs

    def close(self) -> None:
        """Free the weights, the cache and the graphs; any later use raises ValueError. Closing twice is fine."""
        if self._engine is not None:
            engine, self._engine = self._engine, None
            engine.close()
            del engine
            if self.options.device.type == "cuda":
                torch.cuda.empty_cache()

    def __enter__(self) -> CompiledModel:
        self._open_engine()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_engine(self) -> Engine:
        if self._engine is None:
            raise ValueError("this model is closed")
        return self._engine

    def _request(self, prompt_ids: list[int], params: SamplingParams, *, answers: bool) -> Request:
        """``answers``: the text answers a chat, rather than going on where the prompt ends."""
        for token in params.stop_ids:
            if token >= self.config.vocab_size:
                raise ValueError(f"stop_token_ids has {token}; the vocabulary has {self.config.vocab_size} tokens")
        if params.stop_strings and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer; pass tokenizer= to compile, or use stop_token_ids")
        text = None
        if self.tokenizer is not None:
            text = TextStream(
                self.tokenizer, params.stop_strings, () if answers else prompt_ids, min_tokens=params.min_tokens
            )
        self._arrivals += 1
        return Request(
            arrival=self._arrivals, prompt_ids=prompt_ids, params=params, end_ids=self._end_ids,
            max_context=self.options.max_context, text=text,
        )  # fmt: skip

    def _completion(self, request: Request) -> Completion:
        assert request.finish_reason is not None
        assert request.usage is not None
        return Completion(
            text="".join(piece.text for piece in request.pieces),
            token_ids=request.output_ids,
            finish_reason=request.finish_reason,
            prompt_tokens=len(request.prompt_ids),
            logprobs=request.logprobs,
            kv=self._report([request.usage]),
        )

    def _report(self, rows: Sequence[RowUsage]) -> KVReport:
        cache = self._open_engine().cache
        return KVReport.of(rows, cache.geometry, (cache.config.num_layers, cache.config.num_kv_heads))


def _count_tokens(bar: Any, requests: Sequence[Request]) -> None:
    """Set ``bar`` to the tokens that came, of those that can: a request that ended early leaves the rest out."""
    bar.total = sum(len(request.output_ids) if request.finished else request.max_tokens for request in requests)
    bar.update(sum(len(request.output_ids) for request in requests) - bar.n)


def _incomplete(errors: Mapping[int, ValueError], completions: Sequence[Completion | None]) -> IncompleteError:
    """``errors``: of the prompts without a completion, by their index."""
    index, first = next(iter(errors.items()))
    message, count = str(first), len(completions)
    if count > 1:
        message = (
            f"prompt {index} of {count}: {message}; {len(errors)} of {count} prompts failed, "
            f"the completions of the others are in `completions` of this error"
        )
    error = IncompleteError(message, completions)
    error.__cause__ = first
    return error


def _end_ids(config: ModelConfig, tokenizer: PreTrainedTokenizerBase | None) -> frozenset[int]:
    """The tokens that end a text: those of the config and of the tokenizer, as far as the model can choose them."""
    ids = set(config.eos_token_ids)
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ids.add(int(tokenizer.eos_token_id))
    ids = {token for token in ids if 0 <= token < config.vocab_size}
    limit = MAX_END_IDS - MAX_STOPS
    if len(ids) > limit:
        raise ValueError(f"the model has {len(ids)} end-of-text ids; at most {limit} are supported")
    return frozenset(ids)


def _check_tokenizer(tokenizer: object) -> None:
    from transformers import PreTrainedTokenizerBase

    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"tokenizer must be a transformers tokenizer or None, got {type(tokenizer).__name__}")


def _sampling(params: SamplingParams | None, fields: Mapping[str, Any]) -> SamplingParams:
    known = SamplingParams.__dataclass_fields__
    if unknown := [name for name in fields if name not in known]:
        raise ValueError(f"unknown sampling fields {', '.join(unknown)}; there are {', '.join(known)}")
    if params is None:
        return SamplingParams(**fields)
    if not isinstance(params, SamplingParams):
        raise ValueError(f"params must be a SamplingParams, got {type(params).__name__}")
    if fields:
        raise ValueError(f"give either params or fields, not both: {', '.join(fields)}")
    return params
