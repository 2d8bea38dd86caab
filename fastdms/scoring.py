"""Teacher-forced logits: the prompt through prefill, the rest token by token through the decode path."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastdms.config import dense_tokens
from fastdms.graphs import RowInput
from fastdms.runner import ModelRunner, PrefillPiece, fill_chunk

__all__ = ["score"]


def score(
    runner: ModelRunner, rows: Sequence[int], sequences: Sequence[Sequence[int]], prompt_lens: Sequence[int], chunk: int
) -> list[torch.Tensor]:
    """fp32 logits ``[len - prompt_len + 1, V]`` of each sequence, on the CPU; ``rows`` must be empty and are left full.

    Prompts share ragged chunks of at most ``chunk`` tokens, all remainders share decode steps.
    Raises ValueError when the cache has no page left.
    """
    out: list[list[torch.Tensor]] = [[] for _ in sequences]
    dense = [dense_tokens(runner.decoder.dms, length, length, chunk) for length in prompt_lens]
    done = [0] * len(sequences)
    while pending := [i for i, length in enumerate(prompt_lens) if done[i] < length]:
        remainders = (
            PrefillPiece(
                row=rows[i], token_ids=sequences[i][done[i] : prompt_lens[i]], start=done[i], dense_tokens=dense[i]
            )
            for i in pending
        )
        pieces = fill_chunk(remainders, chunk)
        logits = runner.prefill(pieces).cpu()
        _check_pages(runner)
        for i, piece, row in zip(pending, pieces, logits, strict=False):  # the first of them
            done[i] += len(piece.token_ids)
            if done[i] == prompt_lens[i]:
                out[i].append(row)
    while live := [i for i, ids in enumerate(sequences) if done[i] < len(ids)]:
        inputs = [RowInput(row=rows[i], token=sequences[i][done[i]], position=done[i]) for i in live]
        logits = runner.decode(inputs).logits.cpu()
        _check_pages(runner)
        for i, row in zip(live, logits, strict=True):
            out[i].append(row)
            done[i] += 1
    scored = [torch.stack(steps) for steps in out]
    if not all(logits.isfinite().all() for logits in scored):
        raise ValueError("the model's logits are not finite: its weights, or its dtype, can't carry these sequences")
    return scored


def _check_pages(runner: ModelRunner) -> None:
    if runner.cache.starved_rows():
        raise ValueError(
            f"kv_memory is too small for the sequences to score: all {runner.cache.config.num_pages} pages are taken"
        )
