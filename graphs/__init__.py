"""Decode buckets, prefill chunks, static buffers, capture, and the cache of what was captured."""

from fastdms.graphs.artifacts import ARTIFACTS
from fastdms.graphs.bucket import choose_bucket, decode_buckets
from fastdms.graphs.buffers import MAX_END_IDS, RowInput, Staging, StepBuffers, make_buffers
from fastdms.graphs.cache import MODES, GraphCache, check_mode
from fastdms.graphs.chunk_graphs import RowChunk, ragged_chunk
from fastdms.graphs.compiler import Step, StepOutput
from fastdms.graphs.key import GraphKey, fingerprint
from fastdms.graphs.ring import RING_SLOTS, Sent, TokenRing, send

__all__ = [
    "ARTIFACTS",
    "MAX_END_IDS",
    "MODES",
    "RING_SLOTS",
    "GraphCache",
    "GraphKey",
    "RowChunk",
    "RowInput",
    "Sent",
    "Staging",
    "Step",
    "StepBuffers",
    "StepOutput",
    "TokenRing",
    "check_mode",
    "choose_bucket",
    "decode_buckets",
    "fingerprint",
    "make_buffers",
    "ragged_chunk",
    "send",
]
