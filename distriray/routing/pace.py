"""Time as a host lives it: slower the more of its workers are busy, where they share a node's cores."""

from __future__ import annotations


class HostTime:
    """Converts between a clock and a host's own time, in which every step takes as long as on a full host.

    While few workers are busy a step takes a share `pace` of what it takes when all are, so 1 s of the clock
    is 1 / `pace` s of the host's time. On devices that share nothing the two are the same.
    """

    def __init__(self, now_s: float = 0.0) -> None:
        self.pace = 1.0
        self._clock_s = self._host_s = now_s

    def at(self, clock_s: float) -> float:
        """The host's time at a time of the clock, not before the last `change`."""
        return self._host_s + (clock_s - self._clock_s) / self.pace

    def when(self, host_s: float) -> float:
        """The time of the clock at which it is `host_s` for the host, if its pace stays."""
        return self._clock_s + (host_s - self._host_s) * self.pace

    def change(self, pace: float, now_s: float) -> bool:
        """From now on at this pace; whether that is another one."""
        if pace == self.pace:
            return False
        self._host_s, self._clock_s, self.pace = self.at(now_s), now_s, pace
        return True
