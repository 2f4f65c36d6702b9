"""When requests must end by time: deadlines, after which nobody waits, and soft limits, after which what is there is
the answer."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

from lorry.server.engine.sequence import Request

_Alarm = tuple[float, int, bool, str]  # when, order of the request, whether it is the soft limit, request id


class Alarms:
    """A heap over the live `requests`, whom the owner adds and removes."""

    def __init__(self, requests: Mapping[str, Request]) -> None:
        self._requests = requests
        self._heap: list[_Alarm] = []

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def next(self) -> float | None:
        """time.time() of the next alarm; it may be of a request that has ended."""
        return self._heap[0][0] if self._heap else None

    def set(self, request: Request) -> None:
        """Note the limits of a new request."""
        message = request.message
        if message.deadline is not None:
            heapq.heappush(self._heap, (message.deadline, request.order, False, request.id))
        if message.stopping.time_limit is not None:
            alarm = message.arrival + message.stopping.time_limit
            heapq.heappush(self._heap, (alarm, request.order, True, request.id))

    def due(self, now: float) -> list[tuple[Request, bool]]:
        """Live requests whose time has come, and whether it was the soft limit (else the deadline); once each."""
        due = []
        while self._heap and self._heap[0][0] <= now:
            alarm = heapq.heappop(self._heap)
            if self._concerns(alarm):
                due.append((self._requests[alarm[3]], alarm[2]))
        return due

    def tidy(self) -> None:
        """Forget ended requests once most alarms are theirs."""
        if len(self._heap) > 64 + 4 * len(self._requests):
            self._heap = [alarm for alarm in self._heap if self._concerns(alarm)]
            heapq.heapify(self._heap)

    def _concerns(self, alarm: _Alarm) -> bool:
        request = self._requests.get(alarm[3])
        return request is not None and request.order == alarm[1]
