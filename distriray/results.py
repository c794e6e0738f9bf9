"""Results: the images of a request, and how they were made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Annotated, Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from distriray.config import ExchangeMode, Mix
from distriray.quantities import Seconds


class Segment(BaseModel):
    """Steps `first_step` to `last_step` (the latter not included) by one gang, rank 0 first.

    The order was sent at `sent_at`; all ranks were ready at `formed_at` (not counting prompt encoding); the
    last step ended at `left_at`, all in seconds since the epoch. `fresh_step_s` and `stale_step_s` are the
    mean seconds of a synchronous and of a displaced step, among the latter all that are short and whole in
    turn. `exchange` is how the steps were shared, where `auto` has chosen too: a request for it with the same
    seed and gang makes the same picture again.
    """

    model_config = ConfigDict(frozen=True)

    workers: tuple[int, ...]
    first_step: int
    last_step: int
    seconds: float
    sent_at: float
    formed_at: float
    left_at: float
    fresh_step_s: float | None = None
    stale_step_s: float | None = None
    exchange: ExchangeMode | Mix = "sync"

    @property
    def steps(self) -> int:
        return self.last_step - self.first_step


class Timings(BaseModel):
    """Seconds of each phase; `total_s` is from submission to result, `adapters_s` of switching adapters."""

    model_config = ConfigDict(frozen=True)

    queued_s: Seconds
    adapters_s: Seconds = 0.0
    prepare_s: Seconds
    denoise_s: Seconds
    decode_s: Seconds
    total_s: Seconds

    @property
    def waiting_s(self) -> float:
        """Seconds that no phase explains: forming gangs, waiting between them, sending results."""
        phases = self.queued_s + self.adapters_s + self.prepare_s + self.denoise_s + self.decode_s
        return max(0.0, self.total_s - phases)


class GenerationResult(BaseModel):
    """The images of one request and how they were made. `images` stays out of `model_dump`."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    id: str
    model: str
    height: int
    width: int
    seeds: list[int]
    timings: Timings
    segments: list[Segment]
    repairs: int = 0
    warnings: list[str] = []
    """What of the request is not used, such as the end of a prompt that is too long for the model."""
    images: Annotated[list[Image.Image], Field(exclude=True, repr=False)]

    @property
    def gang_size(self) -> int:
        """Size of the gang that made most of the steps."""
        return _of_most_steps(self.segments, lambda segment: len(segment.workers))

    @property
    def exchange(self) -> ExchangeMode | Mix:
        """The way in which most of the steps were shared."""
        return _of_most_steps(self.segments, lambda segment: segment.exchange)

    def summary(self) -> dict[str, Any]:
        """Everything but the images, ready for JSON."""
        exchange = self.exchange.model_dump() if isinstance(self.exchange, Mix) else self.exchange
        return {**self.model_dump(mode="json"), "gang_size": self.gang_size, "exchange": exchange}


def _of_most_steps(segments: Iterable[Segment], what: Callable[[Segment], Any]) -> Any:
    steps: Counter[Any] = Counter()
    for segment in segments:
        steps[what(segment)] += segment.steps
    return steps.most_common(1)[0][0]
