"""Decode buckets, static buffers, capture, and the cache of what was captured."""

from fastdms.graphs.bucket import choose_bucket, decode_buckets
from fastdms.graphs.buffers import MAX_BANNED, RowInput, StepBuffers, make_buffers
from fastdms.graphs.cache import MODES, GraphCache, Step, StepOutput, check_mode

__all__ = [
    "MAX_BANNED",
    "MODES",
    "GraphCache",
    "RowInput",
    "Step",
    "StepBuffers",
    "StepOutput",
    "check_mode",
    "choose_bucket",
    "decode_buckets",
    "make_buffers",
]
