"""A host's own time, which runs slower the more of its workers are busy, where they share a node's cores."""

from __future__ import annotations


def busy_workers(gang: int, decoding: bool, decodes_together: bool) -> int:
    """Number of workers of a gang that are at work, for the pace of its host.

    All are, while steps are made and while a picture is decoded together. Where it is not, one of them
    decodes and the others, which the gang still holds, are idle.

    Args:
        gang: number of workers that the gang holds.
        decoding: its steps are done, and it makes the picture out of its latents.
        decodes_together: the ranks of a gang decode together, each its own rows, as they do if
            `ParallelConfig.parallel_vae` is set and the VAE can be cut into patches.
    """
    return 1 if decoding and not decodes_together else gang


class HostClock:
    """Converts between a clock and a host's own time, in which every step takes as long as on a full host.

    While few workers are busy a step takes only a fraction `pace` of what it takes on a full host, so 1 s of
    the clock is 1 / `pace` s of the host's time. On devices that share nothing the two are the same.
    """

    def __init__(self, now_s: float = 0.0) -> None:
        self.pace = 1.0
        self._clock_s = self._host_s = now_s

    def at(self, clock_s: float) -> float:
        """The host's time at a time of the clock, which is not before the last `change`."""
        return self._host_s + (clock_s - self._clock_s) / self.pace

    def when(self, host_s: float) -> float:
        """The time of the clock at which the host's time is `host_s`, if the pace stays as it is."""
        return self._clock_s + (host_s - self._host_s) * self.pace

    def change(self, pace: float, now_s: float) -> bool:
        """Run at `pace` from `now_s` on; return whether that is a change."""
        if pace == self.pace:
            return False
        self._host_s, self._clock_s, self.pace = self.at(now_s), now_s, pace
        return True
