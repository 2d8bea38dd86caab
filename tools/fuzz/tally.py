"""What has been tried so far."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

__all__ = ["Tally"]


@dataclass(slots=True, kw_only=True)
class Tally:
    """cases: spans (or rows, or (batch entry, KV head) pairs) compared, per op. rejected: invalid calls, per op."""

    cases: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)

    def count(self, op: str, cases: int) -> None:
        """``cases`` more of ``op`` were compared."""
        self.cases[op] += cases

    def reject(self, op: str) -> None:
        """One more invalid call of ``op`` was refused."""
        self.rejected[op] += 1

    @property
    def total(self) -> int:
        """All cases, invalid calls among them."""
        return self.cases.total() + self.rejected.total()
