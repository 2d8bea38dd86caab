"""The public face: what is refused, what survives a refusal, closing, streaming, and ``LLM``."""

from __future__ import annotations

import gc
import itertools
import weakref
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from transformers import PreTrainedModel

import fastdms
from fastdms.graphs import GraphCache
from fastdms.sampling_params import SamplingParams
from fastdms.tokenizer import encode_chat
from tests.models import VOCAB_SIZE, dms_config, save_checkpoint, tiny_tokens
from tests.running import Watch, check_idle, compiled, engine_of, many, one
from tests.tiny_tokenizers import byte_level
from tests.tolerance import assert_logits_close

MASKED = dms_config("nvidia", 7)
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
SEEDED = SamplingParams(temperature=1, seed=3, max_tokens=40, ignore_eos=True)
CHAT = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def model(weights: PreTrainedModel) -> fastdms.CompiledModel:
    """With a tokenizer of 260 tokens, so that the model can choose ids which the tokenizer has not."""
    return compiled(weights, dms=MASKED, tokenizer=byte_level())


BAD_PROMPTS: dict[str, tuple[Any, str]] = {
    "empty text": ("", "the prompt is empty"),
    "nothing": ([], "the prompt is empty"),
    "None": (None, "a prompt is text, a list of token ids or a list of messages, got NoneType"),
    "a number": (7, "a prompt is text, .* got int"),
    "bytes": (b"abc", "a prompt is text, .* got bytes"),
    "a tensor": (torch.tensor([5, 6]), "a prompt is text, .* got Tensor"),
    "an array": (numpy.array([5, 6]), "a prompt is text, .* got ndarray"),
    "one message": (CHAT[0], "a prompt is text, .* got dict"),
    "beyond the vocabulary": ([5, VOCAB_SIZE], "token id 300 is outside the vocabulary of 300"),
    "far beyond": ([2**70], f"token id {2**70} is outside the vocabulary"),
    "negative": ([5, -1], "token id -1 is outside the vocabulary"),
    "bool": ([True, False], "token ids must be integers, got True"),
    "float among ids": ([5, 6.0], "token ids must be integers, got 6.0"),
    "None among ids": ([5, None], "token ids must be integers, got None"),
    "text among ids": ([5, "a"], "token ids must be integers, got 'a'"),
    "too long": (tiny_tokens(256), "the prompt has 256 tokens; max_context 256 must leave room for one more"),
    "too long a text": ("a" * 400, "the prompt has 40[01] tokens; max_context 256"),
    "half a character": ("a\ud800", "Unicode|surrogate|UTF-8"),
    "unknown role": ([{"role": "nobody", "content": "x"}], "role"),
    "message without content": ([{"role": "user"}], "content"),
}
BAD_LISTS: dict[str, tuple[Any, str]] = {
    "an empty prompt": ([[]], "prompt 0 of 1: the prompt is empty"),
    "floats": ([1.5, 2.0], "prompt 0 of 2: a prompt is text, .* got float"),
    "None": ([None], "prompt 0 of 1: .* got NoneType"),
    "an empty text": (["a", ""], "prompt 1 of 2: the prompt is empty"),
    "an id": (["a", 5], "prompt 1 of 2: .* got int"),
    "lists too deep": ([[[5]]], "prompt 0 of 1: a prompt can't be a list of list"),
    "the last one": ([[5], [6], [7, VOCAB_SIZE]], "prompt 2 of 3: token id 300 is outside the vocabulary"),
}


BAD_SCORES: list[tuple[Any, Any, str]] = [
    ([], 1, "the prompt is empty"),
    (None, 1, "what to score must be a list of token ids, got NoneType"),
    ("ab", 1, "what to score must be a list of token ids, got str"),
    ([VOCAB_SIZE], 1, "token id 300 is outside the vocabulary"),
    ([5, [6]], 1, "token ids must be integers"),
    (tiny_tokens(257), 5, "257 tokens exceed max_context 256"),
    ([5, 6], 0, r"prompt_len must be an integer in \[1, 2\], got 0"),
    ([5, 6], 3, "prompt_len must be .* got 3"),
    ([5, 6], 1.0, "prompt_len must be .* got 1.0"),
    ([5, 6], True, "prompt_len must be .* got True"),
]


def refuse_all(model: fastdms.CompiledModel) -> None:
    for name, (prompt, message) in BAD_PROMPTS.items():
        for call in (model, model.generate, model.stream):
            with pytest.raises(ValueError, match=message):
                call(prompt)
        if name != "nothing":
            with pytest.raises(ValueError, match=f"prompt 1 of 2: .*({message})"):
                model([[5, 6], prompt])
    for prompts, message in BAD_LISTS.values():
        with pytest.raises(ValueError, match=message):
            model(prompts)
    for ids, length, message in BAD_SCORES:
        with pytest.raises(ValueError, match=message):
            model.score(ids, length)
    with pytest.raises(ValueError, match="2 sequences and 1 prompt lengths"):
        model.score_batch([[5], [6]], [1])
    with pytest.raises(ValueError, match="5 rows are needed, and there are 4; give compile"):
        model.score_batch([[5]] * 5, [1] * 5)


def test_bad_input_is_refused_before_anything_runs(model: fastdms.CompiledModel) -> None:
    before = one(model([5, 6, 7], GREEDY)).token_ids
    report = str(model.kv_report())
    watch = Watch(model)
    refuse_all(model)
    assert not watch.counts, "something ran"
    assert str(model.kv_report()) == report
    check_idle(model)
    assert one(model([5, 6, 7], GREEDY)).token_ids == before


def test_open_streams_go_on_while_bad_requests_are_refused(weights) -> None:
    prompts = [tiny_tokens(length, seed=length) for length in (3, 50, 90, 120)]
    with compiled(weights, dms=MASKED, tokenizer=byte_level()) as model:
        expected = [one(model(prompt, SEEDED)) for prompt in prompts]
        watch = Watch(model)
        streams = [model.stream(prompt, SEEDED) for prompt in prompts]
        pieces = [[next(stream)] for stream in streams]
        before = dict(watch.counts)
        with pytest.raises(ValueError, match="5 rows are needed, and there are 4; give compile"):
            model.score_batch([[5]] * 5, [1] * 5)
        refuse_all(model)
        settings: dict[str, Any] = {
            "top_p": -1,
            "temperature": "hot",
            "max_tokens": 10**12,
            "stop": [""],
            "logprobs": 10**9,
        }
        for field in settings:
            with pytest.raises(ValueError, match=f"{field} must be"):
                model([5], **{field: settings[field]})
        assert dict(watch.counts) == before
        for some, stream in zip(pieces, streams, strict=True):
            some += list(stream)
        check_idle(model)
    for some, done in zip(pieces, expected, strict=True):
        assert "".join(piece.text for piece in some) == done.text
        assert [token for piece in some for token in piece.token_ids] == done.token_ids


def test_text_prompts_need_a_tokenizer(weights) -> None:
    with compiled(weights) as model:
        assert model.tokenizer is None
        for call in (lambda: model("a"), lambda: model(CHAT), lambda: model.chat(CHAT), lambda: model.stream("a")):
            with pytest.raises(ValueError, match="there is no tokenizer: pass tokenizer= to compile"):
                call()
        assert one(model([5, 6], GREEDY)).text == ""


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"dms": "on"}, "dms must be 'auto', 'off' or a DMSConfig, got 'on'"),
    ({"dms": None}, "dms must be .* got None"),
    ({"device": "tpu"}, "device must be 'cpu', 'cuda' or 'cuda:N', got 'tpu'"),
    ({"device": "mps"}, "device must be .* got 'mps'"),
    ({"device": 1.5}, "device must be .* got 1.5"),
    ({"dtype": "fp8"}, "dtype must be one of 'fp32', .* got 'fp8'"),
    ({"dtype": torch.int32}, "dtype must be one of .* got torch.int32"),
    ({"dtype": torch.float64}, "dtype must be one of .* got torch.float64"),
    ({"dtype": ["fp32"]}, "dtype must be one of"),
    ({"kv_dtype": "int4"}, "kv_dtype must be 'auto' or one of 'fp32', 'bf16', 'fp8', got 'int4'"),
    ({"kv_dtype": torch.bfloat16}, "kv_dtype must be .* got torch.bfloat16"),
    ({"kv_dtype": ["fp8"]}, "kv_dtype must be"),
    ({"weights": "fp4"}, "weights must be one of 'auto', 'bf16', 'fp8', 'int4', got 'fp4'"),
    ({"weights": "int4"}, "groups of 128, 64, 32 of a row, and model.layers.0.mlp.down_proj has 112 inputs"),
    ({"weights": "bf16", "dtype": "fp32"}, "weights 'bf16' and dtype 'fp32' contradict"),
    ({"mode": "fast"}, "mode must be one of 'graphs', 'compile', 'eager', got 'fast'"),
    ({"mode": "graphs"}, "mode 'graphs' needs a CUDA device"),
    ({"max_concurrency": 0}, r"max_concurrency must be an integer in \[1, 256\], got 0"),
    ({"max_concurrency": 2.0}, "max_concurrency must be .* got 2.0"),
    ({"max_context": 1}, r"max_context must be an integer in \[2, 1024\], got 1"),
    ({"max_context": 1025}, "max_context must be .* got 1025"),
    ({"prefill_chunk": 0}, "prefill_chunk must be .* got 0"),
    ({"prefill_chunk": True}, "prefill_chunk must be .* got True"),
    ({"kv_memory": 0}, "kv_memory must be a number of bytes .* got 0"),
    ({"kv_memory": -1.0}, "kv_memory must be .* got -1.0"),
    ({"kv_memory": 1.5}, "kv_memory must be .* got 1.5"),
    ({"kv_memory": float("nan")}, "kv_memory must be .* got nan"),
    ({"kv_memory": "1GB"}, "kv_memory must be .* got '1GB'"),
    ({"kv_memory": 5000}, "kv_memory of 5,000 bytes is too small: 4 rows of 256 tokens need [0-9,]+ bytes"),
    ({"tokenizer": "gpt2"}, "tokenizer must be a transformers tokenizer or None, got str"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=[str(options) for options, _ in BAD_OPTIONS])
def test_compile_refuses(weights, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compiled(weights, **options)
    with pytest.raises(ValueError, match=message):
        fastdms.LLM(weights, **{"device": "cpu", "max_context": 256, "max_concurrency": 4} | options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without CUDA")
def test_cuda_without_cuda(weights) -> None:
    for device in ("cuda", "cuda:0", torch.device("cuda")):
        with pytest.raises(ValueError, match="asks for CUDA, and this machine has no CUDA device"):
            compiled(weights, device=device)
    assert compiled(weights, device=None).options.device.type == "cpu"


def test_the_least_kv_memory_that_is_named_is_enough(weights) -> None:
    with pytest.raises(ValueError, match="is too small") as refusal:
        compiled(weights, kv_memory=1)
    least = int(str(refusal.value).split(" need ")[1].split(" ")[0].replace(",", ""))
    with pytest.raises(ValueError, match="is too small"):
        compiled(weights, kv_memory=least - 1)
    with compiled(weights, kv_memory=least) as model:
        assert one(model([5], GREEDY)).finish_reason == "length"


def test_unknown_keywords_are_named(weights) -> None:
    with pytest.raises(TypeError, match="max_concurency"):
        compiled(weights, max_concurency=3)
    with compiled(weights) as model, pytest.raises(ValueError, match="unknown sampling fields max_token; there are"):
        model([5], max_token=3)


def test_closing(weights) -> None:
    model = compiled(weights, dms=MASKED, tokenizer=byte_level())
    stream, unread = model.stream([5, 6], SEEDED), model.stream([5, 6], SEEDED)
    first = next(stream)
    decoder, cache = (weakref.ref(part) for part in (engine_of(model).runner.decoder, engine_of(model).cache))
    graphs = model.graphs
    for _ in range(2):
        model.close()
    gc.collect()
    assert decoder() is None, "an open stream or the graph cache keeps the weights"
    assert cache() is None
    assert first.token_ids
    assert graphs.stats()["mode"] == "eager"
    for use in (
        lambda: model([5], GREEDY), lambda: model.generate("a"), lambda: model.chat(CHAT), lambda: model.stream([5]),
        lambda: model.score([5, 6], 1), lambda: model.score_batch([[5]], [1]), model.kv_report, lambda: model.graphs,
        lambda: list(stream), lambda: list(unread), model.__enter__,
    ):  # fmt: skip
        with pytest.raises(ValueError, match="this model is closed"):
            use()
    assert list(stream) == []


def test_a_with_block_closes_whatever_happens(weights) -> None:
    model = compiled(weights)
    with pytest.raises(KeyError, match="x"):
        _fail_inside(model)
    with pytest.raises(ValueError, match="this model is closed"):
        model([5])


def _fail_inside(model: fastdms.CompiledModel) -> None:
    with model as entered:
        assert entered is model
        raise KeyError("x")


def ends(whole: fastdms.Completion) -> dict[str, tuple[SamplingParams, str | None, str]]:
    """Every way in which a text can end: parameters, the text where it is known beforehand, and the reason."""
    text, tokens = whole.text, whole.token_ids
    stop = text[10:14]
    before = text[: text.index(stop)]
    return {
        "max_tokens=1": (replace(SEEDED, max_tokens=1), None, "length"),
        "a stop over tokens": (replace(SEEDED, stop=stop), before, "stop"),
        "a stop only begun": (replace(SEEDED, stop=text[-1] + "zzz"), text, "length"),
        "max_tokens in half a stop": (replace(SEEDED, stop=text[5:9] + "zzz", max_tokens=9), None, "length"),
        "a stop that begins another": (replace(SEEDED, stop=[stop[:2], stop]), text[: text.index(stop[:2])], "stop"),
        "an end token": (replace(SEEDED, stop_token_ids=[tokens[8]]), None, "stop"),
        "the end token first": (replace(SEEDED, stop_token_ids=tokens[:1]), None, "stop"),
        "all of it": (SEEDED, text, "length"),
    }


def test_streamed_pieces_join_to_the_text_of_a_call(model: fastdms.CompiledModel) -> None:
    whole = one(model([5, 6, 7], SEEDED))
    assert len(whole.text) > 25
    counts = {}
    for name, (params, text, reason) in ends(whole).items():
        done, pieces = one(model([5, 6, 7], params)), list(model.stream([5, 6, 7], params))
        counts[name] = len(done.token_ids)
        if text is None:  # as far as the same tokens go without any stop
            text = one(model([5, 6, 7], replace(SEEDED, max_tokens=counts[name]))).text
        assert "".join(piece.text for piece in pieces) == done.text == done["text"] == text, name
        assert [token for piece in pieces for token in piece.token_ids] == done.token_ids, name
        assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + [reason], name
        assert (done.finish_reason, done.prompt_tokens) == (reason, 3), name
        assert all(len(piece.token_ids) == 1 for piece in pieces), name
        assert done.token_ids == whole.token_ids[: counts[name]], name
    assert counts["max_tokens=1"] == counts["the end token first"] == 1
    assert counts["an end token"] == whole.token_ids.index(whole.token_ids[8]) + 1
    assert counts["a stop only begun"] == counts["all of it"] == 40
    assert 1 < counts["a stop that begins another"] <= counts["a stop over tokens"] < 40


def test_chats(model: fastdms.CompiledModel) -> None:
    assert model.tokenizer is not None
    ids = encode_chat(model.tokenizer, CHAT)
    expected = one(model(ids, SEEDED))
    assert expected.prompt_tokens == len(ids)
    for done in (model.chat(CHAT, SEEDED), one(model(CHAT, SEEDED)), *many(model([CHAT, CHAT], SEEDED))):
        assert (done.text, done.prompt_tokens) == (expected.text, len(ids))
    forged = [{"role": "user", "content": "<|im_end|>"}]
    plain, control = (model.chat(forged, GREEDY, allow_control_tokens=allowed) for allowed in (False, True))
    assert plain.prompt_tokens > control.prompt_tokens
    for allowed, done in ((False, plain), (True, control)):
        pieces = model.stream(forged, GREEDY, allow_control_tokens=allowed)
        assert [token for piece in pieces for token in piece.token_ids] == done.token_ids


def test_llm(weights, tmp_path) -> None:
    llm = fastdms.LLM(
        save_checkpoint(weights, tmp_path, "nvidia"), tokenizer=byte_level(), device="cpu", max_context=256
    )
    single = one(llm.model("hello", SEEDED))
    prompts: list[Any] = ["hello", [5, 6], CHAT]
    outputs = llm.generate(prompts, SEEDED)
    assert outputs[0]["text"] == outputs[0].text == single.text
    for prompt, output in zip(prompts, outputs, strict=True):
        (alone,) = llm.generate(prompt, SEEDED)
        assert alone.token_ids == output.token_ids
    assert llm.chat(CHAT, SEEDED)[0].token_ids == outputs[2].token_ids
    assert llm.generate("hello", temperature=1, seed=3, max_tokens=40, ignore_eos=True)[0].text == single.text
    nothings: list[Any] = ["", [], None]
    for nothing in nothings:
        with pytest.raises(ValueError, match="prompt"):
            llm.generate(nothing)
    with pytest.raises(KeyError):
        outputs[0]["txt"]


@pytest.mark.parametrize(
    ("making", "using"), list(itertools.product(["inference", "autocast", "grad"], ["inference", "autocast", "grad"]))
)
def test_the_callers_torch_settings_do_not_matter(weights, making: str, using: str) -> None:
    def setting(name: str) -> Any:
        modes = {"inference": torch.inference_mode, "grad": torch.enable_grad}
        return torch.autocast("cpu", dtype=torch.bfloat16) if name == "autocast" else modes[name]()

    ids, params = tiny_tokens(30), replace(SEEDED, max_tokens=10)
    with compiled(weights, dms=MASKED) as plain:
        expected, logits = one(plain(ids, params)), plain.score(ids, 25)
    assert MASKED is not None
    for rule in (MASKED, replace(MASKED, prefill="dense")):
        with setting(making):
            model = compiled(weights, dms=rule)
        with setting(using):
            done, scored = one(model(ids, params)), model.score(ids, 25)
        assert not scored.requires_grad
        if rule is MASKED:
            assert done.token_ids == expected.token_ids
            assert_logits_close(scored, logits)
        assert one(model(ids, params)).token_ids == done.token_ids


@pytest.mark.parametrize("is_enabled", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_garbage_is_looked_for_after_a_start_as_before_it(
    fails: bool, is_enabled: bool, weights: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def warm_up(self: GraphCache) -> None:
        seen.append(gc.isenabled())
        if fails:
            raise RuntimeError("no room")

    monkeypatch.setattr(GraphCache, "warm_up", warm_up)
    was_enabled = gc.isenabled()
    (gc.enable if is_enabled else gc.disable)()
    try:
        with pytest.raises(RuntimeError, match="no room") if fails else nullcontext():
            compiled(weights).close()
        assert gc.isenabled() == is_enabled
    finally:
        (gc.enable if was_enabled else gc.disable)()
    assert seen == [False]
