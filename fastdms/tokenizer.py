"""Text and chats to token ids: one BOS where the model wants it, control tokens only where the template writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastdms.control_tokens import Message, encode_shielded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "encode_chat",
    "encode_prompt",
    "has_chat_template",
    "has_tokenizer",
    "load_tokenizer",
    "render_conversation",
]

ROLES = ("system", "developer", "user", "assistant", "tool")
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")


def has_tokenizer(path: Path) -> bool:
    """Whether the .gguf file or folder brings a vocabulary at all; some checkpoints leave it to the base model's."""
    return path.suffix == ".gguf" or any((path / name).is_file() for name in VOCABULARY_FILES)


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The transformers tokenizer in a folder or in a .gguf file. ValueError where there is none or it is corrupt."""
    path = Path(path)
    if path.suffix == ".gguf":
        from fastdms.gguf_tokenizer import load_gguf_tokenizer

        return load_gguf_tokenizer(path)
    if not path.is_dir():
        raise ValueError(f"no tokenizer at {path}: it must be a folder or a .gguf file")
    # Without this, transformers makes up a vocabulary of three tokens for some classes.
    if not has_tokenizer(path):
        raise ValueError(f"no tokenizer in {path}: it has none of {', '.join(VOCABULARY_FILES)}")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    # The tokenizers library raises bare Exceptions for what it can't parse.
    except Exception as error:
        raise ValueError(f"can't read the tokenizer in {path}: {error}") from error


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether ``encode_chat`` can be used."""
    return bool(getattr(tokenizer, "chat_template", None))


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a plain prompt. It may spell control tokens, so that a rendered template can be given as a prompt.

    Where the tokenizer adds a BOS there is exactly one, whether or not the text begins with it; nothing is added at the
    end. Raises ValueError for anything but a string of valid Unicode.
    """
    if not isinstance(text, str):
        raise ValueError(f"a text prompt must be a string, got {type(text).__name__}")
    return _with_bos(tokenizer, _encode(tokenizer, text))


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, allow_control_tokens: bool = False
) -> list[int]:
    """The ids of a conversation in the tokenizer's chat template, up to where the assistant begins to speak.

    messages: dicts with ``role`` (system, developer, user, assistant, tool) and ``content`` (a string), no other keys.
    allow_control_tokens: by default a control token that is spelled inside a message is encoded as ordinary text, so
        that nobody can end their turn and forge another; True encodes it as the control token. Control tokens are
        the tokenizer's special tokens, and those of its added tokens that the template writes around a message.

    Raises ValueError for malformed messages, without a chat template, and when the template refuses the messages.
    """
    _check_messages(messages)
    if not has_chat_template(tokenizer):
        raise ValueError("this model's tokenizer has no chat template: give a text prompt instead of messages")

    def render(rewritten: Sequence[Message]) -> str:
        return _render(tokenizer, rewritten)

    def encode(text: str) -> list[int]:
        return _encode(tokenizer, text)

    if allow_control_tokens:
        ids = encode(render(messages))
    else:
        ids = encode_shielded(messages, _control_tokens(tokenizer), render, encode, tokenizer.unk_token_id)
    return _with_bos(tokenizer, ids)


def render_conversation(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """A finished conversation in the tokenizer's chat template, as text. Raises ValueError as ``encode_chat`` does."""
    _check_messages(messages)
    if not has_chat_template(tokenizer):
        raise ValueError("this model's tokenizer has no chat template")
    return _render(tokenizer, messages, answering=False)


def _check_messages(messages: object) -> None:
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"messages must be a list of at least one dict with role and content, got {messages!r:.80}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or message.keys() != {"role", "content"}:
            raise ValueError(f"message {i} must be a dict with exactly role and content, got {message!r:.80}")
        if message["role"] not in ROLES:
            raise ValueError(f"the role of message {i} must be one of {', '.join(ROLES)}, got {message['role']!r:.80}")
        if not isinstance(message["content"], str):
            raise ValueError(f"the content of message {i} must be a string, got {message['content']!r:.80}")


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, answering: bool = True) -> str:
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=answering
        )
    # A template is somebody's program: what it raises itself is a TemplateError, the rest are its faults.
    except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"the chat template refuses these messages: {error}") from error
    return str(text)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"a prompt must be valid Unicode: {error}") from error
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _with_bos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    bos = tokenizer.bos_token_id
    wanted = bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos]
    return [bos, *ids] if wanted and ids[:1] != [bos] else ids


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    try:
        around = _render(tokenizer, [{"role": "user", "content": "a"}])
    except ValueError:
        around = ""
    return {
        token.content: token_id
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if len(token.content) > 1 and (token.special or token.content in around)
    }
