"""The work of a job: prompts in, a bounded number of them under way at once, pictures out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from ..errors import DistrirayError, GenerationCancelled, QueueFull
from ..requests import GenerationRequest, GenerationResult
from .folder import Folder
from .prompts import Prompt


class Maker(Protocol):
    """Makes images, from any thread: a host in this process, or a running service."""

    def generate(self, request: GenerationRequest) -> GenerationResult: ...

    def cancel(self, request_id: str) -> object: ...


class Run:
    """One run over the prompts that a folder does not have yet.

    Args:
        makers: share the prompts; whoever is free takes the next one.
        in_flight: prompts under way at each maker.
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
        tell: Callable[[Prompt, GenerationResult | DistrirayError], None] = lambda *_: None,
    ) -> None:
        self._prompts = iter([prompt for prompt in prompts if prompt.id not in folder.made])
        self._folder = folder
        self._tell = tell
        self._turn = threading.Lock()
        self._stopping = threading.Event()
        self._under_way: dict[str, Maker] = {}
        self._fault: BaseException | None = None
        self.completed = self.failed = 0
        self._threads = [
            threading.Thread(target=self._work, args=(maker,), name=f"prompt {i}", daemon=True)
            for maker in makers
            for i in range(in_flight)
        ]

    def finish(self) -> None:
        """Work until no prompt is left, or until `stop`, and then until none is under way.

        Raises:
            Exception: what made it impossible to go on; what was under way then has been finished.
        """
        for thread in self._threads:
            thread.start()
        for thread in self._threads:
            thread.join()
        if self._fault is not None:
            raise self._fault

    def stop(self) -> None:
        """Begin no further prompt. Called again, cancel those under way. For signal handlers, too."""
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
                prompt = next(self._prompts, None)
            if prompt is None:
                return
            self._under_way[prompt.id] = maker
            try:
                end = self._make(maker, prompt)
            except BaseException as fault:  # not the prompt's own: nobody could go on
                self._fault = fault
                self._stopping.set()
                return
            finally:
                del self._under_way[prompt.id]
            if end is not None:
                self._tell(prompt, end)

    def _make(self, maker: Maker, prompt: Prompt) -> GenerationResult | DistrirayError | None:
        """Make and keep one prompt; None if it was given up because the run stops."""
        while True:
            try:
                result = maker.generate(prompt.request)
            except QueueFull as full:
                if self._stopping.wait(full.retry_after_s):
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

    def _failed(self, prompt: Prompt, error: DistrirayError) -> DistrirayError:
        self._folder.fail(prompt, error)
        with self._turn:
            self.failed += 1
        return error
