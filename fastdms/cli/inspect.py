"""``fastdms inspect``: what a checkpoint is, without loading its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastdms.cli.options import Parser

if TYPE_CHECKING:
    from fastdms.checkpoint import Checkpoint
    from fastdms.config import DMSConfig, ModelConfig

__all__ = ["dense_kv_bytes", "expected_kv_bytes", "num_parameters", "run"]

FP8_SCALE_BYTES = 2


def run(argv: Sequence[str]) -> int:
    """Prints a small table."""
    parser = Parser(prog="fastdms inspect", description="Show a model's shape, DMS layout and KV memory per token.")
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a folder, a .gguf file or a hub id")
    args = parser.parse_args(argv)
    from fastdms.bundled_model import default_model
    from fastdms.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(default_model() if args.model is None else args.model)
    config, dms = checkpoint.config, checkpoint.dms
    weight_dtype = str(config.weight_dtype).removeprefix("torch.")
    if config.int4 is not None:
        weight_dtype += f", {len(config.int4.names)} linear layers int4 in groups of {config.int4.group}"
    scaling = ", ".join(f"{name} {value}" for name, value in config.rope.parameters)
    rows = [
        ("model", checkpoint.name),
        ("family", config.family),
        ("parameters", f"{num_parameters(config, dms) / 1e6:,.1f} million, {weight_dtype}"),
        ("layers", f"{config.num_layers} of width {config.hidden_size:,}, MLP {config.intermediate_size:,}"),
        ("heads", f"{config.num_heads} query, {config.num_kv_heads} KV, {config.head_dim} channels each"),
        ("vocabulary", f"{config.vocab_size:,} tokens"),
        ("context", f"{config.max_position_embeddings:,} tokens"),
        ("rope", f"{config.rope.type}, theta {config.rope.theta:,.0f}" + (f", {scaling}" if scaling else "")),
        ("dms", _layout(dms)),
        *([("adapter", _adapter(checkpoint))] if dms is not None and dms.source == "adapter" else []),
        ("kv per token", f"{dense_kv_bytes(config):,} bytes dense in bf16, {_expected(config, dms)}"),
    ]
    print("\n".join(f"{name:<14}{text}" for name, text in rows))
    return 0


def num_parameters(config: ModelConfig, dms: DMSConfig | None) -> int:
    """Weights of the model, a DMS adapter included, tied embeddings once."""
    hidden, q, kv = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = hidden * (q + 2 * kv) + q * hidden
    biases = config.qkv_bias * (q + 2 * kv) + config.o_bias * hidden
    biases += config.mlp_bias * (2 * config.intermediate_size + hidden)
    norms = 2 * hidden + config.qk_norm * 2 * config.head_dim
    adapter = (config.num_kv_heads + 1) * hidden if dms is not None and dms.source == "adapter" else 0
    layer = attention + 3 * hidden * config.intermediate_size + biases + norms + adapter
    embeddings = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    return embeddings + config.num_layers * layer + hidden


def dense_kv_bytes(config: ModelConfig) -> int:
    """Bytes that one token takes in a dense bf16 cache: K and V of all layers and KV heads."""
    return config.num_layers * config.num_kv_heads * 2 * config.head_dim * 2


def expected_kv_bytes(config: ModelConfig, dms: DMSConfig | None) -> float:
    """The same in fp8 with a bf16 scale for each K and each V vector, divided by the compression trained for."""
    compression = 1.0 if dms is None else dms.target_compression or 1.0
    return config.num_layers * config.num_kv_heads * 2 * (config.head_dim + FP8_SCALE_BYTES) / compression


def _layout(dms: DMSConfig | None) -> str:
    if dms is None:
        return "none: the cache keeps every token"
    borrowed = f"borrowed query channel, zeroed: {dms.zero_borrowed.replace('_', ' ')}"
    source = borrowed if dms.source == "borrowed_q" else "adapter of its own"
    decision = f"evicted if {dms.alpha_scale:g} s - {dms.alpha_offset:g} > 0"
    return f"{source}; shift {dms.shift}; window {dms.window_tokens:,} tokens; {decision}; {dms.prefill} prefill"


def _adapter(checkpoint: Checkpoint) -> str:
    config, dms = checkpoint.config, checkpoint.dms
    assert dms is not None
    # Mapped from their files, not read.
    num_bytes = sum(tensor.nbytes for name, tensor in checkpoint.tensors() if ".dms_proj_alpha" in name)
    target = dms.target_compression
    trained = "trained compression not known" if target is None else f"trained for {target:g}x"
    size = f"{config.num_layers} layers x {config.num_kv_heads} KV heads, {num_bytes:,} bytes"
    return f"{size}, {trained} with a window of {dms.window_tokens:,} tokens"


def _expected(config: ModelConfig, dms: DMSConfig | None) -> str:
    expected, dense = expected_kv_bytes(config, dms), dense_kv_bytes(config)
    if dms is None:
        why = "fp8, no eviction"
    elif dms.target_compression is None:
        why = "fp8; the compression trained for isn't known, so before eviction"
    else:
        why = f"fp8, trained for {dms.target_compression:g}x"
    return f"{expected:,.0f} expected compact ({why}): {dense / expected:.1f}x less"
