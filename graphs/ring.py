"""How the tokens of decode steps get to the host without holding the next step up."""

from __future__ import annotations

import functools

import torch

__all__ = ["RING_SLOTS", "Sent", "TokenRing", "send"]

RING_SLOTS = 4  # an engine has two steps under way at most


class Sent:
    """Numbers, such as a step's tokens, on their way to the host."""

    def __init__(self, tokens: torch.Tensor, copied: torch.cuda.Event | None) -> None:
        self._tokens, self._copied = tokens, copied
        self._ids: list[int] | None = None

    def read(self) -> list[int]:
        """Wait for them."""
        if self._ids is None:
            if self._copied is not None:
                self._copied.synchronize()
            self._ids = self._tokens.tolist()
        return self._ids


def send(x: torch.Tensor) -> Sent:
    """Start ``x``, of one dim, on its way to the host: what is launched after this may change it."""
    if x.device.type != "cuda":
        return Sent(x.clone(), None)
    on_host, copied = torch.empty_like(x, device="cpu", pin_memory=True), torch.cuda.Event()
    on_host.copy_(x, non_blocking=True)
    copied.record(torch.cuda.current_stream(x.device))  # the caller may be on another device
    return Sent(on_host, copied)


class TokenRing:
    """What the last steps sampled, in a slot each: on the device, where steps write, and in pinned memory on the host.

    A slot is copied on a stream of its own, since the step after need not wait for that: it writes to another slot.

    tokens: ``[RING_SLOTS, B]`` int64, on the device.
    """

    def __init__(self, most_rows: int, device: torch.device) -> None:
        self.tokens = self._on_host = torch.zeros((RING_SLOTS, most_rows), dtype=torch.int64, device=device)
        self._sent: list[Sent | None] = [None] * RING_SLOTS
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._on_host = torch.zeros_like(self.tokens, device="cpu", pin_memory=True)
            self._stream = _copy_stream(device)
            self.tokens.record_stream(self._stream)  # a copy under way outlives the ring
            self._copied = [torch.cuda.Event() for _ in range(RING_SLOTS)]

    def free(self, slot: int) -> None:
        """Before a step that writes to ``slot``: have on the host what it holds."""
        sent = self._sent[slot]
        if sent is not None:
            sent.read()

    def send(self, slot: int, num_rows: int) -> Sent:
        """Behind the step that writes to ``slot``: start its first ``num_rows`` tokens on their way."""
        on_host, copied = self._on_host[slot, :num_rows], None
        if self._stream is not None:
            copied = self._copied[slot]
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                on_host.copy_(self.tokens[slot, :num_rows], non_blocking=True)
                copied.record()
        sent = self._sent[slot] = Sent(on_host, copied)
        return sent


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all models of a device: torch hands out 32, and another model may capture on any that is taken anew."""
    return torch.cuda.Stream(device)
