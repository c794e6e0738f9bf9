"""The timesteps of pipelines' schedulers, as numbers on the host."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch


class Element:
    """One element of a tensor of timesteps, known by where it lies in memory.

    Args:
        timestep: the element, without dimensions; it keeps the memory from being another tensor's.
    """

    def __init__(self, timestep: torch.Tensor) -> None:
        self._timestep = timestep
        self._address = timestep.data_ptr()
        self._of = timestep.untyped_storage().data_ptr(), timestep.device, timestep.dtype

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Element) and (self._of, self._address) == (other._of, other._address)

    def __hash__(self) -> int:
        return hash((self._of, self._address))

    def follows(self, other: Element | Turn) -> bool:
        """Whether it is the next one of the same tensor."""
        if not isinstance(other, Element) or self._of != other._of:
            return False
        return self._address - other._address == self._timestep.element_size()


class Turn:
    """The step that a scheduler is at, for timesteps that a pipeline has computed from its schedule's.

    Args:
        timesteps: the scheduler's; it keeps the memory from being another tensor's.
        index: of the one that comes next.

    Attributes:
        index: as given.
    """

    def __init__(self, timesteps: torch.Tensor, index: int) -> None:
        self._timesteps, self.index = timesteps, index

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Turn) and self._timesteps is other._timesteps and self.index == other.index

    def __hash__(self) -> int:
        return hash((id(self._timesteps), self.index))

    def follows(self, other: Element | Turn) -> bool:
        """Whether the scheduler has taken one step of the same schedule since."""
        if not isinstance(other, Turn) or self._timesteps is not other._timesteps:
            return False
        return self.index == other.index + 1


class Moment(NamedTuple):
    """Position of a network call in its image.

    Attributes:
        timestep: as a number.
        more_follow: whether it is known that its schedule has further ones.
        num_steps: of its schedule; None where that is not known.
        element: what the timestep is known by: where it lies, if it is one tensor element for all of the
            batch, or whose turn it is.
    """

    timestep: float
    more_follow: bool = False
    num_steps: int | None = None
    element: Element | Turn | None = None


class Schedules:
    """The schedules of the pipelines that are watched.

    A pipeline calls its network with an element of its scheduler's `timesteps`, which are on the device; to
    read it there would stop a GPU in every step. So they are read once, when the tensor is a new one, and an
    element is recognized by where it lies in memory. Pipelines of transformers divide it first, by the number
    of timesteps in training: then the scheduler says which one it is at.
    """

    def __init__(self) -> None:
        self._watched: WeakKeyDictionary[Any, _Schedule] = WeakKeyDictionary()

    def watch(self, pipeline: Any) -> None:
        """Look at this pipeline's scheduler from now on."""
        self._watched.setdefault(pipeline, _Schedule(None))

    def read(self, timestep: torch.Tensor | float, branch: Hashable = None) -> Moment:
        """The moment of a call with `timestep`.

        A tensor on a GPU that is no part of a watched schedule is read there, which stops it.

        Args:
            timestep: a number, or a tensor of which the first element counts.
            branch: of guidance, where each has calls of its own.
        """
        self._look()
        if not isinstance(timestep, torch.Tensor):
            return Moment(float(timestep))
        first = timestep[(0,) * timestep.ndim]
        one = all(
            size == 1 or not stride for size, stride in zip(timestep.shape, timestep.stride(), strict=True)
        )
        element = Element(first) if one and first.data_ptr() else None
        for schedule in self._watched.values():
            index = schedule.index(first)
            if index is not None:
                return schedule.moment(index, element)
        turns = {
            Turn(schedule.timesteps, index): schedule
            for pipeline, schedule in self._watched.items()
            if schedule.timesteps is not None
            and (index := schedule.turn(getattr(pipeline, "scheduler", None), timestep, branch)) is not None
        }
        if len(turns) == 1:  # else it might be any of theirs
            ((turn, schedule),) = turns.items()
            return schedule.moment(turn.index, turn)
        return Moment(float(first), element=element)

    def _look(self) -> None:
        """Read what watched schedulers have been given since this was last called."""
        for pipeline, before in list(self._watched.items()):
            timesteps = getattr(getattr(pipeline, "scheduler", None), "timesteps", None)
            if timesteps is not before.timesteps:
                self._watched[pipeline] = _Schedule(timesteps)


class _Schedule:
    """The timesteps of a scheduler; None before it has any."""

    def __init__(self, timesteps: torch.Tensor | None) -> None:
        self.timesteps = timesteps
        self._seen: int | None = None
        self._branches: set[Hashable] = set()
        listed = isinstance(timesteps, torch.Tensor) and timesteps.ndim == 1 and timesteps.is_contiguous()
        self.numbers: list[float] = [float(t) for t in timesteps.tolist()] if listed else []  # type: ignore[union-attr]

    def moment(self, index: int, element: Element | Turn | None) -> Moment:
        """That of one of the timesteps, and what it is known by."""
        steps = len(self.numbers)
        return Moment(self.numbers[index], index + 1 < steps, steps, element)

    def index(self, element: torch.Tensor) -> int | None:
        """Which of the timesteps `element` is a view of, if it is one of theirs."""
        table = self.timesteps
        if (
            not self.numbers
            or table is None
            or (table.device, table.dtype) != (element.device, element.dtype)
        ):
            return None
        index, rest = divmod(element.data_ptr() - table.data_ptr(), table.element_size())
        return index if not rest and 0 <= index < len(self.numbers) else None

    def turn(self, scheduler: Any, timestep: torch.Tensor, branch: Hashable) -> int | None:
        """Which of the timesteps `timestep` was computed from, if it is the one that the scheduler is at.

        On a device other than the host's it is read unless the scheduler has moved since the last time, as
        one in use does, or the call is of a branch that has been read once.

        Args:
            timestep: one for each of the batch, or for all.
            branch: of guidance, where each has calls of its own.
        """
        if getattr(scheduler, "num_inference_steps", None) is None or not timestep.is_floating_point():
            return None  # nobody has asked for a schedule, or it is one of another
        at = getattr(scheduler, "step_index", None)
        index = (getattr(scheduler, "begin_index", None) or 0) if at is None else at
        if not 0 <= index < len(self.numbers):
            return None
        moved, self._seen = index != self._seen, index
        if timestep.device.type != "cpu" and (moved or branch in self._branches):
            return index
        number = self.numbers[index]
        scale = getattr(getattr(scheduler, "config", None), "num_train_timesteps", 1)
        rounding = 2 * torch.finfo(timestep.dtype).eps
        computed = timestep.float().cpu()
        numbers = number, number / scale, 1 - number / scale  # Z-Image's time runs upward
        near = (torch.isclose(computed, torch.tensor(n), rtol=rounding) for n in numbers)
        if not any(map(torch.all, near)):
            return None
        if branch is not None:
            self._branches.add(branch)
        return index
