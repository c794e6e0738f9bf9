"""One image that a gang denoises, and which of its steps a call of the network is."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from copy import copy
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch

from distriray.config import WHOLE_AT_FIRST, Mix
from distriray.parallel.exchange.cache import ExchangeKey
from distriray.parallel.networks.base import Call, Reuse
from distriray.parallel.schedules import Element, Moment, Turn


class Text:
    """Prompt embeddings of a call, and what else their keys and values depend on.

    Args:
        texts: (batch, tokens, channels) each, of the calls that ranks make, one by each half or one by all:
            ranks must alike see that a text has changed.
        scale: such as a LoRA's.
    """

    def __init__(self, texts: Iterable[torch.Tensor], scale: Any) -> None:
        self.scale = copy(scale)  # callers may change what they gave
        self._read = [(text, None if text.is_inference() else text._version) for text in texts]

    def reads_as(self, other: Text) -> bool:
        """Whether the embeddings are the same. Numbers of other tensors are compared, which stops a GPU."""
        return len(self._read) == len(other._read) and all(map(_reads_as, self._read, other._read))


def _reads_as(one: tuple[torch.Tensor, int | None], other: tuple[torch.Tensor, int | None]) -> bool:
    """`Text.reads_as` of one text each, (batch, tokens, channels), with torch's count of its changes."""
    (mine, version), (its, its_version) = one, other
    if mine is its:
        return version == its_version
    return mine.shape == its.shape and torch.equal(mine, its)


@dataclass(eq=False)
class Branch:
    """One guidance branch of an image, or both where one call has both.

    Attributes:
        step: number of the next one.
        fresh_start: whether that has no step to go on from.
        warm: whether drift has fallen so far that steps may be displaced.
        exchange: key of the last step's; None if it had none.
        mix: which values of the step before a displaced one takes; None where nothing is exchanged.
        needed: bytes that its buffers may take, where it is known for how many there is room.
        element: the timestep of the last call, where it is one of a schedule.
        alone: whether the last call was the only one with that timestep.
        batch: `Call.predictions` of the last call: with others, as where guidance ends, a gang may be laid
            out otherwise.
        text: of the last call.
        text_changed: whether the next step has another one than the last.
        reuse: what its short steps take from whole ones.
    """

    step: int
    fresh_start: bool = True
    warm: bool = False
    exchange: ExchangeKey | None = None
    mix: Mix | None = None
    needed: int = 0
    element: Element | Turn | None = None
    alone: bool = True
    batch: int | None = None
    text: Text | None = None
    text_changed: bool = True
    reuse: Reuse = field(default_factory=Reuse)

    def takes_again(self, moment: Moment) -> bool:
        """Whether a call has the very timestep of the last one: it is of another region or image."""
        return self.element is not None and moment.element == self.element

    def is_followed_by(self, moment: Moment, text: Text) -> bool:
        """Whether a call is known to be the step after the last one, though nobody has said so.

        It is where its timestep is the next of the same schedule, the text is the same, and nothing else was
        called with the timestep before: steps of several images or regions in turn look like that otherwise.
        """
        if self.text is None or self.element is None or moment.element is None or not self.alone:
            return False
        return moment.element.follows(self.element) and text.reads_as(self.text)

    def reuses(self, interval: int, call: Call) -> Reuse:
        """What the next step, of `interval`, takes from a whole one, if it is short; on all ranks alike."""
        reuse, like = self.reuse, (call.sample.shape, call.sample.dtype, call.branches)
        if reuse.like != like:
            reuse = self.reuse = Reuse(like=like)
        reuse.in_turn = self.step >= WHOLE_AT_FIRST and not (self.fresh_start or self.text_changed)
        reuse.short = reuse.in_turn and reuse.added is not None and reuse.age + 1 < interval
        reuse.age = reuse.age + 1 if reuse.short else 0
        return reuse

    def look_at(self, moment: Moment, text: Text, again: bool) -> None:
        """Remember a call as the last one."""
        same = self.text is not None and not self.fresh_start and text.scale == self.text.scale
        self.text_changed = not same or self.text is None or not text.reads_as(self.text)
        self.element, self.text, self.alone = moment.element, text, not again


@dataclass(eq=False)
class Image:
    """One image that a gang denoises: calls of its network within `with image:` are its steps, in order.

    It may be left and entered again, so several images, or several regions of one, are denoised in turn: each
    goes on from its own last step. A call with the very element of a schedule that the last call had is taken
    for another region even so, and begins anew, and so does an image that an error has left. `Engine.image`
    makes one; it keeps buffers as long as it lives.

    Attributes:
        enter, leave: what the engine does.
        first_step: number of the step that it begins with.
        num_steps: of the whole image; None if it is not known.
        branches: those that have begun.
        stream: which buffers are its own, among those of images that live at the same time.
    """

    enter: Callable[[Image], None]
    leave: Callable[[Image], None]
    first_step: int = 0
    num_steps: int | None = None
    branches: dict[Hashable, Branch] = field(default_factory=dict)
    stream: int = 0

    def __enter__(self) -> Image:
        self.enter(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:  # whoever keeps the error may keep this too, on one rank and not on another
            self.interrupt()
        self.leave(self)

    def begin(self, at_step: int) -> None:
        """Forget all steps: the next one is synchronous, and has this number."""
        self.branches.clear()
        self.first_step = at_step

    def interrupt(self) -> None:
        """Forget what was exchanged, and go on with the number of the next step."""
        self.begin(max((branch.step for branch in self.branches.values()), default=self.first_step))

    def branch(self, call: Call, moment: Moment, said: bool) -> Branch:
        """The branch that a call belongs to: a new one of a new image, unless it is known to go on.

        Args:
            said: whether a user says that the call is of this image.
        """
        text, branch = (
            Text((each.text for each in call.dealt or [call]), call.text_scale),
            self.branches.get(call.branch),
        )
        again = branch is not None and branch.takes_again(moment)
        if branch is not None and not said and not branch.is_followed_by(moment, text):
            self.begin(0)
            branch = None
        if branch is None:
            branch = self.branches[call.branch] = Branch(self.first_step)
        elif again or not branch.alone or branch.batch != call.predictions:
            branch.fresh_start, branch.warm = True, False
        branch.batch = call.predictions
        branch.look_at(moment, text, again)
        return branch
