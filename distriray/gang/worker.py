"""The Ray actor around a runner: it computes in one thread and answers control calls all the while."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from distriray.collective import open_store
from distriray.gang.config import HostConfig
from distriray.gang.devices import DEVICES
from distriray.gang.messages import (
    GangMembership,
    Progress,
    RankResult,
    SegmentOrder,
    StateLost,
    StopSignal,
    WorkerFacts,
)
from distriray.picture import Picture

if TYPE_CHECKING:
    from distriray.gang.runner import SegmentRunner

T = TypeVar("T")

log = logging.getLogger("ray.serve.distriray.worker")


class Worker:
    """One process with one device and one full copy of the model.

    Every method is a coroutine of the actor's event loop. `run` occupies a thread of its own and no other
    call does, so a worker answers while it computes. Forming gangs has a thread of its own too, so that the
    gangs of others can be repaired meanwhile; except on devices where that must wait until all are at rest.
    """

    def __init__(self, config: HostConfig, device: str, store: str) -> None:
        self._config, self._store = config, store
        self._kind = DEVICES[device]
        self._compute = ThreadPoolExecutor(1, "compute", initializer=self._kind.bind)
        self._linking = self._compute if self._kind.links_at_rest else ThreadPoolExecutor(1, "link")
        self._news = asyncio.Event()
        self._runner: SegmentRunner | None = None
        self._memory = 0  # when it was last looked up

    async def load(self) -> WorkerFacts:
        """Load the weights; raises ModelNotFound, UnsupportedModel, UnusableAdapter,
        UnusableControlNet, UnusableIPAdapter.
        """
        loop = asyncio.get_running_loop()

        def tell() -> None:
            loop.call_soon_threadsafe(self._news.set)

        def make() -> SegmentRunner:
            from distriray.gang.runner import SegmentRunner  # with diffusers, which hosts do without

            _quiet()
            device, store = self._kind.device(), open_store(self._store)
            config = self._config
            return SegmentRunner(
                config.model,
                device,
                store,
                config.timeout_s,
                tell,
                loras=config.loras,
                controls=config.controls,
                ip_adapters=config.ip_adapters,
                lora_cache_bytes=config.lora_cache_bytes,
            )

        runner = await loop.run_in_executor(self._compute, make)
        from distriray.gang.room import check_room  # which is loaded by now

        facts = runner.facts()
        await loop.run_in_executor(self._compute, check_room, runner, self._config, facts)
        if self._config.compile:
            from distriray.gang.rehearsal import rehearse

            took_s = await loop.run_in_executor(self._compute, rehearse, runner, self._config, facts)
            facts = replace(facts, load_s=facts.load_s + took_s, memory=self._kind.memory())
        self._runner, self._memory = runner, facts.memory
        return facts

    async def link(self, memberships: Sequence[GangMembership]) -> None:
        """Join these gangs, in this order; raises GangBroken."""
        await self._done_by(self._linking, self.runner.link, memberships)

    async def run(
        self, order: SegmentOrder, blob: bytes | None, pictures: Mapping[str, Picture] | None
    ) -> RankResult:
        """One segment, as in `SegmentRunner.run`."""
        return await self._done_by(self._compute, self.runner.run, order, blob, pictures or {})

    async def watch(self, serial: int, seen: int) -> Progress:
        """Wait until segment `serial` is beyond step `seen` or over."""
        while True:
            self._news.clear()
            progress = self.runner.mailbox.progress(serial)
            if progress.ended or progress.step > seen:
                return progress
            await self._news.wait()

    async def stop(self, serial: int, signal: StopSignal) -> None:
        """Let a segment leave after the step it is in."""
        self.runner.mailbox.stop(serial, signal)

    async def export(self, job: int) -> bytes:
        """A job's state, for a worker that lacks it.

        Raises:
            StateLost: whatever went wrong. Whoever is sent the state raises it too, and is not to blame.
        """
        try:
            return await asyncio.to_thread(self.runner.export, job)
        except Exception as error:
            log.exception("the state of job %d cannot be sent", job)
            raise StateLost(f"the state cannot be sent: {error!r}") from error

    async def retain(self, jobs: Collection[int], newest: int) -> None:
        """Drop the states of jobs that are over; later ones than `newest` are not meant."""
        self.runner.retain(jobs, newest)

    async def ping(self) -> tuple[int, int]:
        """Alive: bytes of memory after what was done last, and how many states are held.

        Nothing is asked of torch's allocator here. It is locked while a GPU gives memory back, which waits
        for transfers from peers. Whoever asks it meanwhile waits too, and keeps all Python threads from
        running, those that abort a transfer among them.
        """
        return self._memory, self.runner.held if self._runner else 0

    async def until_death(self) -> None:
        """Never returns: whoever waits for it hears at once when this process dies."""
        await asyncio.Event().wait()

    async def _done_by(self, thread: Executor, task: Callable[..., T], *arguments: Any) -> T:
        """What a task returns; then its thread looks the memory up."""

        def work() -> T:
            try:
                return task(*arguments)
            finally:
                self._memory = self._kind.memory()

        return await asyncio.get_running_loop().run_in_executor(thread, work)

    @property
    def runner(self) -> SegmentRunner:
        if self._runner is None:
            raise RuntimeError("the worker has no model yet; call load first")
        return self._runner


def _quiet() -> None:
    """Keep the libraries' progress bars and notices out of the driver's terminal."""
    import diffusers
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
