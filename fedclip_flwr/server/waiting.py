"""Waiting for answers."""

from __future__ import annotations

import time


class Wait:
    """Waiting for answers: prompt while they come, gentler the longer none does. Now and then the user is told."""

    SHORTEST, LONGEST = 0.01, 2.0
    EACH = 0.00025
    """For every message under way: a SuperLink that is asked looks at all of them, in a database for 0.1 ms each."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._told = time.monotonic()
        self.begin()

    def begin(self) -> None:
        """From now on time counts."""
        self._start = self._last = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    @property
    def over(self) -> bool:
        return self.seconds > self._timeout

    def worth_telling(self) -> bool:
        """Whether some seconds have gone by since the last word."""
        if time.monotonic() - self._told < 5:
            return False
        self._told = time.monotonic()
        return True

    def something_came(self) -> None:
        """The next answer may be near."""
        self._last = time.monotonic()

    def a_moment(self, under_way: int) -> None:
        """A twentieth of the time for which nothing has come: little of it is lost, and few questions are asked.

        Longer where so many messages are under way that the answer takes its time, too.
        """
        pause = min((time.monotonic() - self._last) / 20, self.LONGEST)
        time.sleep(max(pause, self.SHORTEST, self.EACH * under_way))
