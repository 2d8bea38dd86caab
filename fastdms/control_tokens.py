"""Encoding a rendered chat so that what a message says can't become a control token.

A message that spells a token such as ``<|im_end|>`` would otherwise end its own turn and could forge another's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise

__all__ = ["Message", "encode_shielded"]

Message = Mapping[str, str]

PRIVATE_USE = range(0xE000, 0xF900)


def encode_shielded(
    messages: Sequence[Message],
    control: Mapping[str, int],
    render: Callable[[Sequence[Message]], str],
    encode: Callable[[str], list[int]],
    unknown: int | None = None,
) -> list[int]:
    """``encode(render(messages))``, but control tokens that a message's content spells become ordinary text.

    control: the control tokens, text to id; each of two characters or more. Where no message spells one, the rendered
    text is encoded as it is; else it is cut behind the first character of each that a message spelled. Where a template
    rewrites the content, so that it can't be found again in the text, a space is put there instead.
    unknown: the id of what the vocabulary lacks, if it has one.
    Raises ValueError if control tokens remain which the template didn't write.
    """
    plain = render(messages)
    firsts = {token[0] for token in control}
    if not any(first in message["content"] for first in firsts for message in messages):
        return encode(plain)
    tokens = "|".join(re.escape(token) for token in sorted(control, key=len, reverse=True))
    first_of_token = re.compile(f"(?={tokens}).", re.DOTALL)
    unused = _unused_characters(plain + "".join(message["content"] for message in messages))
    mask = {ord(first): next(unused) for first in firsts}
    unmask = {ord(stand_in): first for first, stand_in in mask.items()}

    masked = render(_mapped(messages, lambda content: content.translate(mask)))
    num_written = len(re.findall(tokens, masked))
    if masked.translate(unmask) != plain:
        # The template looks for some of the masked characters: mask no more than needed.
        masked = render(_mapped(messages, lambda content: first_of_token.sub(lambda m: mask[ord(m[0])], content)))
    if masked.translate(unmask) == plain:
        starts = [match.start() for match in first_of_token.finditer(plain)]
        ids = _encode_cut(plain, [i + 1 for i in starts if masked[i] != plain[i]], encode, next(unused))
    elif len(re.findall(tokens, plain)) <= num_written:
        ids = encode(plain)
    else:
        ids = encode(render(_mapped(messages, lambda content: first_of_token.sub(r"\g<0> ", content))))
    control_ids = set(control.values()) - {unknown}
    if sum(i in control_ids for i in ids) > num_written:
        raise ValueError(
            "a message spells control tokens so that they can't be told apart from the chat template's own"
        )
    return ids


def _mapped(messages: Sequence[Message], change: Callable[[str], str]) -> list[Message]:
    return [{**message, "content": change(message["content"])} for message in messages]


def _unused_characters(text: str) -> Iterator[str]:
    used = set(text)
    yield from (chr(code) for code in PRIVATE_USE if chr(code) not in used)
    raise ValueError("the messages use every private-use character of Unicode's basic plane")


def _encode_cut(text: str, cuts: list[int], encode: Callable[[str], list[int]], mark: str) -> list[int]:
    """Encode the parts of the text between the cuts one by one, each as a continuation."""
    # A sentencepiece tokenizer takes each part for a new text and puts a space before it, unless something comes first.
    head = encode(mark)
    ids: list[int] = []
    for start, end in pairwise([0, *cuts, len(text)]):
        part = text[start:end]
        marked = encode(mark + part) if start else []
        ids += marked[len(head) :] if start and marked[: len(head)] == head else encode(part)
    return ids
