"""Everything that distriray raises on purpose, in one hierarchy."""

from typing import ClassVar


class DistrirayError(Exception):
    """Base of every error below.

    Attributes:
        code: the stable name by which an error is answered over HTTP and known again by its client. An error
            without one of its own is of its base there.
    """

    code: ClassVar[str] = "internal_error"


class UnsupportedModel(DistrirayError, TypeError):
    """The pipeline or one of its layers cannot be parallelized or served; the message names what can."""


class InvalidRequest(DistrirayError, ValueError):
    """A request that cannot be served as it stands; `param` names the field at fault.

    `unquoted` is the message without any text of the request, for what is written down.
    """

    code = "invalid_value"

    def __init__(self, message: str, param: str | None = None, unquoted: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.unquoted = message if unquoted is None else unquoted

    def __reduce__(self) -> tuple[type["InvalidRequest"], tuple[str, str | None, str]]:
        return type(self), (str(self), self.param, self.unquoted)


class ModelNotFound(DistrirayError, FileNotFoundError):
    """No model of that name; the message says what was looked for and where."""

    code = "model_not_found"


class AdapterNotFound(DistrirayError, LookupError):
    """No adapter of that name; the message lists those that there are."""

    code = "adapter_not_found"


class UnusableAdapter(DistrirayError, ValueError):
    """An adapter's file is missing, damaged or not for this model; the message names it and says what is."""

    code = "adapter_unusable"


class ControlNetNotFound(DistrirayError, LookupError):
    """No ControlNet of that name; the message lists those that there are."""

    code = "controlnet_not_found"


class UnusableControlNet(DistrirayError, ValueError):
    """A ControlNet is missing, damaged or not for this model; the message names it and says what is."""

    code = "controlnet_unusable"


class IPAdapterNotFound(DistrirayError, LookupError):
    """No IP-Adapter of that name; the message lists those that there are."""

    code = "ip_adapter_not_found"


class UnusableIPAdapter(DistrirayError, ValueError):
    """An IP-Adapter is missing, damaged or not for this model; the message names it and says what is."""

    code = "ip_adapter_unusable"


class NotEnoughDevices(DistrirayError, RuntimeError):
    """The machine or cluster has fewer devices than were asked for."""

    code = "unavailable"


class NotAllowed(DistrirayError, PermissionError):
    """The API key is missing or wrong."""


class QueueFull(DistrirayError, RuntimeError):
    """The queue is at its bound; `retry_after_s` is the predicted wait in seconds."""

    code = "queue_full"

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[type["QueueFull"], tuple[str, float]]:
        return type(self), (str(self), self.retry_after_s)


class DeadlineUnmet(DistrirayError, RuntimeError):
    """The deadline cannot be met; `possible_s` is the time that could be, in seconds from now."""

    code = "deadline_unmet"

    def __init__(self, message: str, possible_s: float | None = None) -> None:
        super().__init__(message)
        self.possible_s = possible_s

    def __reduce__(self) -> tuple[type["DeadlineUnmet"], tuple[str, float | None]]:
        return type(self), (str(self), self.possible_s)


class TooLong(DeadlineUnmet):
    """The request would be given up before it is done; `possible_s` is the time that it would take."""


class OutOfMemory(DistrirayError, MemoryError):
    """The image does not fit into a device's memory; a smaller one or fewer at once may."""

    code = "out_of_memory"


class NotFinite(DistrirayError, ArithmeticError):
    """The numbers of a picture ran away, to infinities or to none at all: it would be black."""

    code = "not_finite"


class GangBroken(DistrirayError, RuntimeError):
    """A peer died, hung or left; the communicator is unusable and a new one must be made."""

    code = "gang_broken"


class BackendUnavailable(DistrirayError, RuntimeError):
    """The ranks of a gang, all alike, cannot exchange in the way that was asked for; the message says why."""


class RankFailed(DistrirayError, RuntimeError):
    """A process that `launch` started failed; the message holds the traceback of every rank that did."""


class GangMismatch(DistrirayError, ValueError):
    """The ranks of a gang were called with different inputs."""


class GenerationCancelled(DistrirayError, RuntimeError):
    """The request was cancelled; every rank of the gang left after the same step."""

    code = "cancelled"
