"""The images that a gang denoises at a time, and whose step a call of the network is."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from weakref import WeakSet

from distriray.parallel.image import Branch, Image
from distriray.parallel.networks.base import Call
from distriray.parallel.schedules import Moment


class Images:
    """Images of one network: those that live, and those whose `with` blocks a call is in.

    Calls outside of any such block are steps of one that nobody has announced.

    Args:
        entering: called with an image whose block begins, before it does.
    """

    def __init__(self, entering: Callable[[Image], None]) -> None:
        self._entering = entering
        self._live: WeakSet[Image] = WeakSet()
        self._entered: list[Image] = []
        self._unannounced = self.new()

    def new(self, at_step: int = 0, num_steps: int | None = None) -> Image:
        """An image that lives as long as somebody keeps it (`Engine.image`)."""
        image = Image(self._enter, self._entered.remove, at_step, num_steps)
        self._live.add(image)
        return image

    @property
    def current(self) -> Image:
        """The image that the next call is a step of."""
        return self._entered[-1] if self._entered else self._unannounced

    @property
    def begun(self) -> list[Branch]:
        """The branches of all images that live."""
        return [branch for image in self._live for branch in image.branches.values()]

    def branch(self, call: Call, moment: Moment) -> tuple[Branch, bool]:
        """The branch of the current image that a call goes on with or begins, and whether another ends so."""
        image = self.current
        if not image.branches:
            others = {other.stream for other in self._live if other.branches}
            image.stream = next(stream for stream in count() if stream not in others)
        before = image.branches.get(call.branch)
        branch = image.branch(call, moment, said=bool(self._entered))
        return branch, before not in (None, branch)

    def interrupt(self) -> None:
        """Let each image go on from the state that its caller has, and nothing that was exchanged."""
        for image in self._live:
            image.interrupt()

    def forget_unannounced(self) -> None:
        """Let the next call outside of any block begin an image."""
        self._unannounced.begin(0)

    def _enter(self, image: Image) -> None:
        if image in self._entered:
            raise RuntimeError("the image was entered before, and not left")
        self.forget_unannounced()
        self._entering(image)
        self._entered.append(image)
