"""Compact-DMS operations: schema, fake, plain reference on CPU, Triton kernel on CUDA. Nothing here knows a model."""

from fastdms.ops.decode_append import decode_append
from fastdms.ops.decode_attention import decode_attention
from fastdms.ops.decode_linear import MOST_ROWS, decode_linear
from fastdms.ops.dense_attention import dense_attention, dense_kernel
from fastdms.ops.dequantise import dequantise
from fastdms.ops.prefill_append import prefill_append
from fastdms.ops.prefill_attention import prefill_attention
from fastdms.ops.prefill_rope import prefill_rope
from fastdms.ops.release import release
from fastdms.ops.rope_decide import decision_constants
from fastdms.ops.sample import NOT_FINITE, count_tokens, sample
from fastdms.ops.soft_attention import soft_attention
from fastdms.ops.span_cache import KV_DTYPES, SpanCache

__all__ = [
    "KV_DTYPES",
    "MOST_ROWS",
    "NOT_FINITE",
    "SpanCache",
    "count_tokens",
    "decision_constants",
    "decode_append",
    "decode_attention",
    "decode_linear",
    "dense_attention",
    "dense_kernel",
    "dequantise",
    "prefill_append",
    "prefill_attention",
    "prefill_rope",
    "release",
    "sample",
    "soft_attention",
]
