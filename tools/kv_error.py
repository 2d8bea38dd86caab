"""``fastdms kv-error``: what a KV dtype costs, as the KL divergence of the next-token distribution from fp32 pages.

``fp8 weights`` and ``int4 weights`` have fp32 pages too: they show what ``weights="fp8"`` and ``"int4"`` cost.
``int4, exact head`` and ``int4, int4 head`` are the same but for the output head, which is fp8 with ``weights="int4"``.
A model that is stored as int4, or whose layers make no whole groups of int4 weights, has fewer lines.
``fp8, no scale`` stores plain e4m3, to show what the scale per token and head is worth. The runtime has no such pages:
for that line alone the quantiser of the CPU references, ``fastdms.ops.quantise.quantise``, is replaced.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdms.cli.options import Parser

if TYPE_CHECKING:
    import torch

    from fastdms.config import ModelConfig

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Print a line for each KV dtype and for fp8 and int4 weights, as far as the model can have them.

    Each gives the mean and the largest KL divergence (nats/token), and the share of equal greedy tokens.
    """
    parser = Parser(prog="fastdms kv-error", description=__doc__)
    parser.add_argument("model", nargs="?", help="folder, hub id or GGUF file; none: the default model")
    parser.add_argument("--text", required=True, help="a text file; its beginning is scored")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--decode-tokens", type=int, default=128)
    args = parser.parse_args(argv)
    _report(args)
    return 0


def _report(args: argparse.Namespace) -> None:
    import torch

    import fastdms
    from fastdms.checkpoint import open_checkpoint
    from fastdms.tokenizer import encode_prompt

    text = Path(args.text).read_text(encoding="utf-8")
    source = args.model or fastdms.default_model()
    total = args.prompt_tokens + args.decode_tokens
    logprobs: dict[str, Any] = {}
    cases, left_out = _cases(open_checkpoint(source).config)
    for name, kv_dtype, weights, patch in cases:
        options: dict[str, Any] = {"device": "cpu", "kv_dtype": kv_dtype, "weights": weights}
        with patch, fastdms.compile(source, **options, max_concurrency=1, max_context=total) as model:
            if model.tokenizer is None:
                raise ValueError(f"{source} has no tokenizer, which reading the text needs")
            ids = encode_prompt(model.tokenizer, text[: 16 * total])[:total]
            if len(ids) < total:
                raise ValueError(f"{args.text} has {len(ids)} tokens; {total} are needed")
            logprobs[name] = model.score(ids, args.prompt_tokens).log_softmax(-1)
    exact = logprobs["fp32"]
    if not torch.isfinite(exact).all():
        raise ValueError(f"the logits of {source} are not finite, even with fp32 pages")
    print(f"{total} tokens, of which {args.prompt_tokens} prefilled; KL(fp32 pages || dtype) in nats/token")
    for name, other in logprobs.items():
        divergence = (exact.exp() * (exact - other)).sum(-1)
        match = (exact.argmax(-1) == other.argmax(-1)).float().mean()
        print(f"{name:<16} mean {divergence.mean():.6f}  max {divergence.max():.6f}  greedy match {match:.1%}")
    if left_out:
        print(f"left out: {left_out}")


def _cases(config: ModelConfig) -> tuple[list[tuple[str, str, str, AbstractContextManager[None]]], str]:
    """Name, KV dtype, weights and what is patched of each line; then which are left out, and why."""
    import torch

    from fastdms.linear import int4_group
    from fastdms.ops.int4 import INT4

    cases: list[tuple[str, str, str, AbstractContextManager[None]]] = [
        ("fp32", "fp32", "auto", nullcontext()),
        ("bf16", "bf16", "auto", nullcontext()),
        ("fp8", "fp8", "auto", nullcontext()),
        ("fp8, no scale", "fp8", "auto", _no_scale()),
    ]
    if config.int4 is not None:
        return cases, "other weights; the checkpoint's are int4"
    cases.append(("fp8 weights", "fp32", "fp8", nullcontext()))
    try:
        int4_group(config)
    except ValueError as error:
        return cases, f"int4 weights; {error}"
    cases += [
        ("int4 weights", "fp32", "int4", nullcontext()),
        ("int4, exact head", "fp32", "int4", _head(torch.float32)),
        ("int4, int4 head", "fp32", "int4", _head(INT4)),
    ]
    return cases, ""


@contextmanager
def _head(dtype: torch.dtype) -> Iterator[None]:
    """The output head of int4 models in ``dtype``, the embedding's or INT4."""
    from fastdms import options

    before = dict(options.QUANTISED)
    options.QUANTISED["int4"] = (before["int4"][0], dtype)
    try:
        yield
    finally:
        options.QUANTISED.update(before)


@contextmanager
def _no_scale() -> Iterator[None]:
    import torch

    from fastdms.ops import quantise

    def plain(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        clamped = x.clamp(-quantise.FP8_MAX, quantise.FP8_MAX).to(dtype)
        return clamped, torch.ones(x.shape[:-1], dtype=torch.bfloat16)

    scaled = quantise.quantise
    quantise.quantise = plain
    try:
        yield
    finally:
        quantise.quantise = scaled


if __name__ == "__main__":
    from fastdms.cli import main as command_line

    sys.exit(command_line(["kv-error", *sys.argv[1:]]))
