"""The decode step under way, as the engine sees it: for which requests it is, and whether the next is for the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastdms.graphs import GraphCache
from fastdms.request import Request
from fastdms.runner import Flight

__all__ = ["UnderWay"]


@dataclass(slots=True)
class UnderWay:
    """A decode step whose tokens are not read yet.

    requests: of its entries; None for one that has left since.
    stale: one left that no step knows to have ended, so that its entry might go on.
    """

    flight: Flight
    requests: list[Request | None]
    stale: bool = False

    def forget(self, request: Request) -> bool:
        """Take out a request that leaves; whether the step has it store a token all the same, if there is a page."""
        if request not in self.requests:
            return False
        self.requests[self.requests.index(request)] = None
        unknown = not request.ended_in_step and request.error is None
        self.stale = self.stale or unknown
        return unknown

    def goes_on(self, running: Sequence[Request], graphs: GraphCache) -> bool:
        """Whether the next step is for the same entries: of those that it knows to have ended, which are padding, no
        more than the bucket would have anyway, and not for those alone."""
        return (
            not self.stale
            and running == [request for request in self.requests if request is not None]
            and any(len(request.output_ids) + 1 < request.max_tokens for request in running)
            and graphs.bucket(len(running)) == graphs.bucket(len(self.requests))
        )
