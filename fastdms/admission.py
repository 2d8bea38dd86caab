"""Who waits for a row, who holds one, and who may have one."""

from __future__ import annotations

from bisect import insort

from fastdms.kv_report import RowUsage
from fastdms.request import Request
from fastdms.runner import ModelRunner

__all__ = ["Admission", "row_of"]


class Admission:
    """Gives rows to waiting requests in order, each when the pages that its prompt is expected to keep are free, with
    one page per span in reserve for every row that runs; whoever finds nothing running is always let in."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.cache = runner.cache
        self._taken_rows: set[int] = set()
        self._waiting: list[Request] = []
        self._running: list[Request] = []
        self._refused: Request | None = None  # who is next, as long as no pages have come back since it was looked at
        self._live_share = 1.0  # of tokens past the window, as last measured
        self._to_learn: tuple[RowUsage, int] | None = None  # what a row that left had kept, and of how many tokens

    @property
    def running(self) -> list[Request]:
        """Requests that hold a row."""
        return list(self._running)

    def _prefilling(self) -> list[Request]:
        return [request for request in self._running if not request.prefilled]

    def _queue(self, request: Request) -> None:
        insort(self._waiting, request, key=lambda waiting: waiting.arrival)

    def _free_rows(self) -> list[int]:
        used = self._taken_rows | {request.row for request in self._running}
        return [row for row in range(self.cache.config.num_rows) if row not in used]

    def _could_admit(self) -> bool:
        return bool(self._waiting and self._free_rows()) and self._waiting[0] is not self._refused

    def _admit(self) -> None:
        while self._waiting and (free := self._free_rows()):
            self._read_live_share()
            request = self._waiting[0]
            request.expected_pages = max(request.expected_pages, self._pages_for(len(request.to_compute)))
            if self._running and self._with_reserve(request.expected_pages) > self._pages_to_spare():
                self._refused = request
                return
            if request.penalties is not None:
                self.runner.count(free[0], request.prompt_ids, request.output_ids)
            request.row, request.computed = free[0], 0
            self._running.append(request)
            self._waiting.pop(0)

    def _pages_for(self, num_tokens: int) -> int:
        config = self.cache.config
        recent = min(num_tokens, config.window_tokens + 1)
        kept = recent + self._live_share * (num_tokens - recent)
        return config.num_spans * -(-int(kept + 1) // config.page_size)

    def _with_reserve(self, pages: int) -> int:
        """One page more for each span, up to what a row can hold at most."""
        config = self.cache.config
        return min(pages + config.num_spans, config.num_spans * config.max_pages)

    def _pages_to_spare(self) -> int:
        """Free pages, less what prompts under way will still take and the reserve of each row."""
        held = self._pages_held()
        spare = int(self.cache.num_free)
        for request in self._running:
            now = held[row_of(request)]
            spare -= self._with_reserve(now if request.prefilled else max(now, request.expected_pages)) - now
        return spare

    def _pages_held(self) -> list[int]:
        """Pages of each row."""
        pages = -(-self.cache.live_len // self.cache.config.page_size)
        counts: list[int] = pages.sum((0, 2)).tolist()
        return counts

    def _learn(self, request: Request) -> None:
        """From a request that leaves, when its share is next read: that waits for what is under way."""
        # Without tokens that found no page: some spans lack them, and too small a share would let too many rows in.
        if request.usage is not None and request.computed > 2 * (self.cache.config.window_tokens + 1):
            self._to_learn = request.usage, request.computed

    def _read_live_share(self) -> None:
        if self._to_learn is not None:
            (usage, computed), self._to_learn = self._to_learn, None
            window = self.cache.config.window_tokens + 1
            kept = float(usage.live_tokens.mean()) - window
            self._live_share = min(1.0, max(0.0, kept / (computed - window)))


def row_of(request: Request) -> int:
    """Of a request that holds one."""
    assert request.row is not None, "the request holds no row"
    return request.row
