"""Partitions of an emulated Gluon program's warps: which of them runs, and what each knows of shared memory.

A partition knows of a read or a write when all of its warps may rely on its having happened: when it has been waited
for, and the warps have met since. What one partition knows others learn by an mbarrier, and in no other way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Access", "Partition", "Partitions", "Product"]


class Access:
    """Of elements in shared memory: a "read", a "load" by TMA, or a "store" by the warps, which async reads don't see
    before a fence. is_used: whether anybody has read what a load brought.
    """

    def __init__(self, kind: str, place: range) -> None:
        self.kind, self.place = kind, place
        self.is_fenced, self.is_used = kind != "store", kind != "load"

    def meets(self, place: range) -> bool:
        return self.place.start < place.stop and place.start < self.place.stop


class Product:
    """What the matrix units work on; it is no tensor before ``warpgroup_mma_wait`` has waited for it."""

    def __init__(self, value: torch.Tensor, reads: list[Access], is_done: bool = False) -> None:
        self.value, self.reads, self.is_done = value, reads, is_done


class Partition:
    """Some of a program's warps."""

    def __init__(self, known: set[Access]) -> None:
        self.known = set(known)
        self.own: list[Access] = []  # each warp knows of its part alone
        self.products: list[Product] = []  # under way, the oldest first
        self.turn = threading.Semaphore(0)
        self.may_run: Callable[[], bool] = lambda: True
        self.describe_wait: Callable[[], str] = lambda: "its turn"
        self.has_ended = False

    def fence(self) -> None:
        """TMA and the matrix units see what was stored."""
        for access in self.own:
            access.is_fenced = True

    def meet(self) -> None:
        """All warps of the partition."""
        self.known.update(access for access in self.own if access.is_fenced)
        self.own = [access for access in self.own if not access.is_fenced]

    def finish_products(self, num_outstanding: int) -> None:
        """The oldest, so that no more than these are under way."""
        while len(self.products) > num_outstanding:
            product = self.products.pop(0)
            product.is_done = True
            self.own += product.reads

    def check_end(self) -> None:
        assert not self.products, "ends before all products are there"


class Partitions:
    """Of one program. One of them runs at a time, until it has to wait; then the next that needn't."""

    def __init__(self) -> None:
        self.running = Partition(set())
        self._all = [self.running]
        self._error: BaseException | None = None

    def wait_until(self, is_so: Callable[[], bool], describe: Callable[[], str]) -> None:
        """The running partition."""
        mine = self.running
        mine.may_run, mine.describe_wait = is_so, describe
        if not is_so():
            self._hand_over()
            mine.turn.acquire()
            if self._error is not None:
                raise self._error

    def _hand_over(self) -> None:
        """To the next that may run; once one has failed that is any, so that all end."""
        at = self._all.index(self.running) + 1
        left = [x for x in self._all[at:] + self._all[:at] if not x.has_ended]
        ready = [x for x in left if x.may_run()]
        if left and not ready:
            self._error = self._error or AssertionError("wait for ever: " + "; ".join(x.describe_wait() for x in left))
        if self._error is not None:
            ready = left
        if ready:
            self.running = ready[0]
            self.running.turn.release()

    def specialise(
        self,
        functions: list[tuple[Callable[..., Any], tuple[Any, ...]]],
        worker_num_warps: list[int],
        worker_num_regs: list[int],
    ) -> Any:
        """``warp_specialize``; workers know what the program did, and when all have ended it knows what they do."""
        assert len(functions) - 1 == len(worker_num_warps) == len(worker_num_regs)
        program = self.running
        workers = [Partition(program.known) for _ in worker_num_warps]
        self._all = [program, *workers]
        results: list[Any] = []
        threads = [
            threading.Thread(target=self._run, args=(partition, *function, results), daemon=True)
            for partition, function in zip(self._all, functions, strict=True)
        ]
        for thread in threads:
            thread.start()
        program.turn.release()
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error
        for worker in workers:
            worker.meet()
            program.known |= worker.known
        program.has_ended, self.running, self._all = False, program, [program]
        return results[0]

    def _run(self, mine: Partition, function: Callable[..., Any], args: tuple[Any, ...], results: list[Any]) -> None:
        mine.turn.acquire()
        try:
            if self._error is None:
                result = function(*args)
                mine.check_end()
                if mine is self._all[0]:
                    results.append(result)
        except BaseException as error:  # whoever waits for all raises it
            self._error = self._error or error
        mine.has_ended = True
        self._hand_over()
