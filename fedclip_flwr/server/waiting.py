"""Waiting for answers."""

from __future__ import annotations

import time


class Wait:
    """Waits for answers, with longer pauses the longer none arrives. Also paces the reports to the user."""

    SHORTEST, LONGEST = 0.01, 2.0
    PER_MESSAGE = 0.00025
    """Seconds of pause for each message under way: for each, a poll costs the SuperLink 0.1 ms in its database."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._reported = time.monotonic()
        self.begin()

    def begin(self) -> None:
        """Restarts the time limit."""
        self._start = self._last = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    @property
    def over(self) -> bool:
        return self.seconds > self._timeout

    def report_due(self) -> bool:
        """True if 5 seconds have passed since the last report; the caller then reports."""
        if time.monotonic() - self._reported < 5:
            return False
        self._reported = time.monotonic()
        return True

    def answered(self) -> None:
        """Resets the pause: more answers may follow soon."""
        self._last = time.monotonic()

    def pause(self, under_way: int) -> None:
        """Sleeps for a twentieth of the time since the last answer: little time is lost, and polls are few.

        With many messages under way, longer: a poll then costs the SuperLink more.
        """
        seconds = min((time.monotonic() - self._last) / 20, self.LONGEST)
        time.sleep(max(seconds, self.SHORTEST, self.PER_MESSAGE * under_way))
