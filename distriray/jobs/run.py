"""The work of a job: prompts in, a bounded number of them under way at once, pictures out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from secrets import token_hex
from typing import Protocol

from distriray.errors import DistrirayError, GenerationCancelled, NotEnoughDevices, QueueFull
from distriray.jobs.folder import Folder
from distriray.jobs.prompts import Prompt
from distriray.requests import GenerationRequest
from distriray.results import GenerationResult

MAX_TRIES = 5
"""How often a prompt is tried where what is in the way passes, such as workers or routers being replaced."""

LONGEST_WAIT_S = 10.0
"""How long a job waits for a full queue before it asks again, whatever was predicted."""


class MakerLost(Exception):
    """A maker that will make nothing any more; what it was asked for is another's to make."""


class Maker(Protocol):
    """Makes images, from any thread: a host in this process, or a running service."""

    def generate(self, request: GenerationRequest) -> GenerationResult: ...

    def cancel(self, request_id: str) -> object: ...


class Run:
    """One run over the prompts that a folder does not have yet.

    Args:
        makers: share the prompts; whoever is free takes the next one.
        in_flight: prompts under way at each maker.
        pause_s: before a prompt is tried for the second time; twice as long before each further time.
        tell: called with each prompt and the result or the error it came to, from any thread.

    Attributes:
        completed, failed: prompts that this run made, and those it could not make.
    """

    def __init__(
        self,
        prompts: Iterable[Prompt],
        folder: Folder,
        makers: Sequence[Maker],
        *,
        in_flight: int,
        pause_s: float = 1.0,
        tell: Callable[[Prompt, GenerationResult | DistrirayError], None] = lambda *_: None,
    ) -> None:
        self._prompts = iter([prompt for prompt in prompts if prompt.id not in folder.made])
        self._folder = folder
        self._tell = tell
        self._pause_s = pause_s
        self._turn = threading.Lock()
        self._stopping = threading.Event()
        self._under_way: dict[str, Maker] = {}
        self._fault: BaseException | None = None
        self.completed = self.failed = 0
        self._in_flight = in_flight
        self._makers = list(makers)
        self._returned: list[Prompt] = []  # by makers that were lost
        self._lost: MakerLost | None = None  # the last one

    def finish(self) -> None:
        """Work until no prompt is left, or until `stop`, and then until none is under way.

        Raises:
            NotEnoughDevices: every maker was lost before all was made.
            Exception: what made it impossible to go on; what was under way then has been finished.
        """
        while self._makers:
            threads = [
                threading.Thread(target=self._work, args=(maker,), name=f"prompt {i}", daemon=True)
                for maker in self._makers
                for i in range(self._in_flight)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if self._fault is not None:
                raise self._fault
            if self.stopped or not self._returned:
                return
        left = len(self._returned) + sum(1 for _ in self._prompts)
        raise NotEnoughDevices(
            f"{self._lost}; with no host left, prompts not made: {left}; run the same command again for them"
        )

    def stop(self) -> None:
        """Begin no further prompt. Called again, cancel those under way.

        It takes locks, and so is not for signal handlers.
        """
        if self._stopping.is_set():
            for name, maker in list(self._under_way.items()):
                threading.Thread(target=maker.cancel, args=(name,), daemon=True).start()
        self._stopping.set()

    @property
    def stopped(self) -> bool:
        """Whether somebody asked for an early end."""
        return self._stopping.is_set()

    def _work(self, maker: Maker) -> None:
        while not self._stopping.is_set():
            with self._turn:
                prompt = self._returned.pop() if self._returned else next(self._prompts, None)
            if prompt is None:
                return
            try:
                end = self._make(maker, prompt)
                if end is not None:
                    self._tell(prompt, end)
            except MakerLost as lost:
                with self._turn:
                    self._lost = lost
                    self._returned.append(prompt)
                    if maker in self._makers:
                        self._makers.remove(maker)
                return
            except BaseException as fault:  # not the prompt's own: nobody could go on
                self._fault = fault
                self._stopping.set()
                return

    def _make(self, maker: Maker, prompt: Prompt) -> GenerationResult | DistrirayError | None:
        """Make and keep one prompt; None if it was given up because the run stops."""
        tries = 0
        while True:
            try:
                result = self._attempt(maker, prompt)
            except QueueFull as full:
                if self._stopping.wait(min(full.retry_after_s, LONGEST_WAIT_S)):
                    return None
                continue
            except (NotEnoughDevices, ConnectionError) as error:
                tries += 1
                if tries >= MAX_TRIES:
                    if isinstance(error, ConnectionError):
                        raise  # no prompt is to blame
                    return self._failed(prompt, error)
                if self._stopping.wait(self._pause_s * 2 ** (tries - 1)):
                    return None
                continue
            except GenerationCancelled as error:
                return None if self._stopping.is_set() else self._failed(prompt, error)
            except DistrirayError as error:
                return self._failed(prompt, error)
            self._folder.keep(prompt, result)
            with self._turn:
                self.completed += 1
            return result

    def _attempt(self, maker: Maker, prompt: Prompt) -> GenerationResult:
        """Ask once, by an id of its own: what a run before this one asked for may still be under way."""
        name = f"{prompt.id}.{token_hex(4)}"
        self._under_way[name] = maker
        try:
            return maker.generate(prompt.whole().model_copy(update={"id": name}))
        finally:
            del self._under_way[name]

    def _failed(self, prompt: Prompt, error: DistrirayError) -> DistrirayError:
        self._folder.fail(prompt, error)
        with self._turn:
            self.failed += 1
        return error
