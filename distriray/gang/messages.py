"""Messages between a host and its workers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from PIL import Image

from distriray.adapters import AdapterSpec
from distriray.config import ExchangeMode, Mix, ParallelConfig
from distriray.denoise.pipelines.terms import Terms
from distriray.errors import DistrirayError
from distriray.requests import GenerationRequest
from distriray.status import AdapterStatus
from distriray.steps import StepCount


@dataclass(frozen=True, order=True, slots=True)
class WorkerId:
    """One worker process: its place in the host, and which of the processes that filled it."""

    index: int
    incarnation: int


ALONE = "alone"
"""The name of the communicator that every worker has from the start, of itself."""


@dataclass(frozen=True, slots=True)
class GangMembership:
    """A communicator to make: this worker is `rank` among `world_size`. A `name` can be used only once."""

    group: tuple[int, ...]
    name: str
    rank: int
    world_size: int


@dataclass(frozen=True, slots=True)
class SegmentOrder:
    """Resume `request` at `step` as one rank of the gang of `communicator`, until done or told to stop.

    The request's pictures are not here: whoever prepares it gets them besides.

    `serial` numbers a host's segments, so that a stop signal never reaches another one. `job` numbers the
    requests that it accepted, so that no state is taken for that of another request that had the same id.
    `adapters` are those that the request names, as the host knew them when it accepted it.
    """

    serial: int
    job: int
    request: GenerationRequest
    step: int
    communicator: str
    rank: int
    parallel: ParallelConfig
    preview_steps: frozenset[int] = frozenset()
    adapters: tuple[AdapterSpec, ...] = ()


class StateLost(Exception):
    """What a gang was to be sent, a state or pictures, has not come: its sender died, or cannot send it."""


class StopSignal(StrEnum):
    """Why a running segment is to leave after the step it is in."""

    YIELD = "yield"
    CANCEL = "cancel"


class SegmentEnd(StrEnum):
    """End of a segment on one rank."""

    DONE = "done"
    YIELDED = "yielded"
    CANCELLED = "cancelled"
    REFUSED = "refused"  # the request cannot be served, here or elsewhere
    NOT_BEGUN = "not begun"  # another rank was not ready
    BROKEN = "broken"  # a peer died, hung or left
    FAILED = "failed"  # this worker cannot be trusted any more


@dataclass(frozen=True, slots=True)
class RankResult:
    """One rank's report of a segment.

    Attributes:
        step: where it holds the request's state, unless it refused or failed.
        fresh_s, stale_s: seconds of each synchronous and of each displaced step, among the latter all that
            are short and whole in turn.
        images: from rank 0 of a gang that is done.
        error: why the request was refused.
        cause: why the gang broke or this worker failed.
        broken: the gang's communicator is unusable.
        adapters_s: seconds of loading and switching adapters.
        formed_at: when this rank was ready to step, not counting prompt encoding and adapters; seconds since
            the epoch.
        left_at: when it had done its last step.
        exchange: how the ranks shared the steps.
        waited: the share of its last step in which this rank waited for its peers; None of a lone worker.
        warnings: what of the request is not used.
        adapters: what this worker holds now.
    """

    end: SegmentEnd
    step: int
    adapters_s: float = 0.0
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
    exchange: ExchangeMode | Mix = "sync"
    waited: float | None = None
    warnings: tuple[str, ...] = ()
    adapters: AdapterStatus = AdapterStatus()


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of rank 0 in a segment, with all previews that it made: (step, picture)."""

    step: int
    num_steps: int
    ended: bool
    previews: tuple[tuple[int, Image.Image], ...] = ()


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """A worker's report once its weights are loaded.

    Attributes:
        default_size: (height, width) in pixels of a request that names none.
        size_unit: pixels; heights and widths are multiples of it.
        row_unit: pixel rows of the smallest patch.
        cuts_vae: the VAE's decoder can be cut into patches.
        has_short_steps: it takes a `cache_interval`.
        key_heads: the most ranks that `attention: ulysses` deals heads to; None where it deals none.
        load_s: seconds that loading took, and compiling.
        memory: in bytes.
        terms: what the model says of a request's fields besides its size.
        own_steps: how often the model's own scheduler calls the network.
        guides: whether guidance takes a second branch.
    """

    pid: int
    device: str
    device_name: str
    model: str
    default_size: tuple[int, int]
    size_unit: int
    row_unit: int
    cuts_vae: bool
    load_s: float
    memory: int
    own_steps: StepCount
    guides: bool
    terms: Terms = Terms()
    has_short_steps: bool = False
    key_heads: int | None = None

    @property
    def device_type(self) -> str:
        """The kind of its device, by which `DEVICES` has it."""
        return self.device.partition(":")[0]

    def max_gang(self, height: int) -> int:
        """The largest gang among which an image of `height` pixels can be cut: one unit of rows each."""
        return max(1, -(-height // self.row_unit))
