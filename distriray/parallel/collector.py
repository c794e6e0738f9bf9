"""Collector of a network's output from all ranks, and of what they ask for in the same message."""

from __future__ import annotations

import threading

import torch

from distriray.collective.base import Communicator
from distriray.errors import GenerationCancelled
from distriray.parallel.gather import Flags, Gather, Header, HeaderOnItsWay, Place
from distriray.parallel.share import Share
from distriray.parallel.stopwatch import Stopwatch


class Collector:
    """Collector of the outputs of one network, step after step; what is asked is decided alike on all ranks.

    Attributes:
        drift: relative change of what the ranks sent in the last step, the largest of theirs; infinite where
            it was not measured.
        yielding: whether a rank has asked the gang to yield since the image began.
    """

    def __init__(self) -> None:
        self.drift = float("inf")
        self.yielding = False
        self._communicator: Communicator
        self._gather: Gather | None = None
        self._unread: HeaderOnItsWay | None = None
        self._lock = threading.Lock()
        self._asked = Flags()

    def join(self, communicator: Communicator) -> None:
        """Join a gang, dropping what was asked of the one before."""
        with self._lock:
            self._asked = Flags()
        self._communicator = communicator
        self._gather = None
        self.forget()

    def forget(self) -> None:
        """Forget the last output, and that anybody has asked to yield."""
        self.forget_output()
        self.yielding = False

    def forget_output(self) -> None:
        """Forget the last output: nobody will ask whether it is whole."""
        self._unread = None

    def ask(self, yield_: bool = False, cancel: bool = False) -> None:
        """Ask for it with this rank's next part. Any thread."""
        with self._lock:
            self._asked = Flags(self._asked.yield_ or yield_, self._asked.cancel or cancel)

    @property
    def waiting(self) -> tuple[Stopwatch, ...]:
        """The time in which the last gather waited for peers; none without one."""
        return () if self._gather is None else (self._gather.waiting,)

    @property
    def settled(self) -> bool:
        """Whether the last output is known to be whole."""
        return self._unread is None

    def settle(self) -> None:
        """Wait until the last output is known to be whole; raises what `Engine.settle` does."""
        unread, self._unread = self._unread, None
        if unread is not None:
            self._heed(unread.read())

    def collect(
        self,
        part: torch.Tensor,
        share: Share,
        drift: torch.Tensor | float,
        place: Place | None,
        lags: bool,
    ) -> tuple[torch.Tensor, float]:
        """The whole output, and the largest drift, infinite where it is not read yet.

        Args:
            part: (this rank's part of the batch, channels, this rank's rows, columns).
            drift: of this rank in this step.
            place: where this rank is.
            lags: whether what the ranks ask for is read with the next output.
        """
        with self._lock:
            asked, self._asked = self._asked, Flags()
        if self._communicator.world_size == 1:
            return part, self._heed(Header(asked, float("inf")))
        whole, header = self._gather_of(part, share)(part, asked, drift, place)
        self.settle()  # the output before, whose header has come while this one was launched
        if lags:
            self._unread = header
            return whole, float("inf")
        return whole, self._heed(header.read())

    def _gather_of(self, part: torch.Tensor, share: Share) -> Gather:
        shape = share.whole(part)
        if self._gather is None or self._gather.shape != shape or self._gather.dtype != part.dtype:
            with torch.inference_mode(False):  # writable in either mode
                self._gather = Gather(self._communicator, share.layout, share.partition, shape, part.dtype)
        return self._gather

    def _heed(self, header: Header) -> float:
        """Do what the ranks ask for; return the drift."""
        self.drift = header.drift
        self.yielding = self.yielding or header.flags.yield_
        if header.flags.cancel:
            raise GenerationCancelled("a rank of the gang asked for it")
        return self.drift
