"""What a host and its workers say to each other."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from PIL import Image

from ..config import ParallelConfig
from ..errors import DistrirayError
from ..requests import MULTIPLE_OF, GenerationRequest


@dataclass(frozen=True, slots=True)
class Link:
    """A communicator to make: this worker is `rank` among `world_size`. A `name` serves once."""

    group: tuple[int, ...]
    name: str
    rank: int
    world_size: int


@dataclass(frozen=True, slots=True)
class Order:
    """Go on with `request` at `step`, as a rank of the gang of communicator `link`, until done or asked.

    `serial` numbers a host's segments, so that a wish never reaches another one. `job` numbers the requests
    that it accepted, so that no state is taken for that of another request that had the same id.
    """

    serial: int
    job: int
    request: GenerationRequest
    step: int
    link: str
    rank: int
    parallel: ParallelConfig
    preview_steps: frozenset[int] = frozenset()


class Wish(StrEnum):
    """What a running segment may be asked for."""

    YIELD = "yield"
    CANCEL = "cancel"


class Ending(StrEnum):
    """How a segment ended on one rank."""

    DONE = "done"
    YIELDED = "yielded"
    CANCELLED = "cancelled"
    REFUSED = "refused"  # the request cannot be served, here or elsewhere
    NOT_BEGUN = "not begun"  # another rank was not ready
    BROKEN = "broken"  # a peer died, hung or left
    FAILED = "failed"  # this worker is not to be trusted any more


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one rank has to say of a segment.

    It holds the request's state at `step`, unless it refused or failed. `error` is why the request was
    refused, `cause` why the gang broke or the worker failed; `broken` says that the gang's communicator is
    unusable. `fresh_s` and `stale_s` are the seconds of each synchronous and each displaced step. `formed_at`
    and `left_at` are when this rank was ready to step, were its prompt encoded already, and when it had
    stepped.
    """

    ending: Ending
    step: int
    num_steps: int
    prepare_s: float = 0.0
    fresh_s: tuple[float, ...] = ()
    stale_s: tuple[float, ...] = ()
    decode_s: float = 0.0
    bytes_sent: int = 0
    previews: tuple[tuple[int, Image.Image], ...] = ()
    images: list[Image.Image] | None = None
    error: DistrirayError | None = None
    cause: str = ""
    broken: bool = False
    formed_at: float = 0.0
    left_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Progress:
    """How far rank 0 of a segment is, with all previews that it made: (step, picture)."""

    step: int
    num_steps: int
    ended: bool
    previews: tuple[tuple[int, Image.Image], ...] = ()


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """What a worker reports once its weights are loaded; memory in bytes."""

    pid: int
    node: str
    device: str
    device_name: str
    model: str
    default_size: tuple[int, int]
    levels: int
    load_s: float
    memory: int

    def max_gang(self, height: int) -> int:
        """The largest gang among which an image of `height` pixels can be cut: one unit of rows each."""
        return max(1, -(-height // (MULTIPLE_OF * 2**self.levels)))
