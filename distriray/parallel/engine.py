"""Engine of one network in a gang: which step a call is, what it exchanges in, what becomes of its output."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import replace
from functools import partial
from threading import Lock
from typing import Any

import torch

from distriray.collective.base import Communicator
from distriray.config import ExchangeMode, Mix, ParallelConfig
from distriray.errors import DistrirayError, GangMismatch, UnsupportedModel
from distriray.parallel.agreement import check_same_image, tensors_in
from distriray.parallel.choice import Chooser, TimedStep
from distriray.parallel.collector import Collector
from distriray.parallel.context import PatchContext
from distriray.parallel.decoder import PatchDecoder
from distriray.parallel.exchange.step import Step
from distriray.parallel.exchanges import Exchanges
from distriray.parallel.gather import Place
from distriray.parallel.graphs import CaptureFailed, CudaGraphs, GraphMaker
from distriray.parallel.guiders import Guiders
from distriray.parallel.image import Branch, Image
from distriray.parallel.images import Images
from distriray.parallel.network_graphs import NetworkGraphs
from distriray.parallel.networks.base import Call, Network, Reuse
from distriray.parallel.outline import Outline
from distriray.parallel.room import most_buffer_bytes
from distriray.parallel.schedules import Moment, Schedules
from distriray.parallel.share import Share
from distriray.parallel.statistics import StepStatistics
from distriray.parallel.stopwatch import Stopwatch
from distriray.parallel.sums import Sums
from distriray.parallel.uncopied import Uncopied


class Engine(Uncopied):
    """One network, made patch-parallel within a gang.

    Args:
        network: its layers are converted in place, its parameters stay.

    Attributes:
        network: what is particular to its family.
        communicator, config: the gang, and how it shares a step; set by `join`.
        context: what the network's layers look up during a call.
        graphs: its steps as CUDA graphs, and what keeps them from being that.
        decoder: that of the pipeline's VAE; None if it cannot be cut into patches.
        exchanges: those that its calls are in, and room for their buffers: an image for which that is too
            small is refused before its first step, or that in which a ControlNet begins or guidance ends.
        generation: counts the gangs that were joined.
        lags: whether what the ranks ask for is read a step later, unless the step may end a warm-up; set by
            `join` for GPUs, where it has arrived by then, and reading it at once would stop the device.
        statistics: of the last step.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self.communicator: Communicator
        self.config: ParallelConfig
        self.context = PatchContext()
        self.graphs = NetworkGraphs(network, self.context)
        self.decoder: PatchDecoder | None = None
        self.generation = 0
        self.statistics = StepStatistics()
        self.lags = False
        self._schedules = Schedules()
        self._guiders = Guiders()
        self._collector = Collector()
        self._more_follow = False
        self._images = Images(self._entering)
        self.exchanges = Exchanges(network, self._images, self.graphs)
        self._cached_text: Hashable = None
        self._chooser = Chooser(network.displacement_measured)
        self._outline: Outline | None = None
        self._sums: Sums | None = None
        self._calling = Lock()

    # What a user or a worker calls

    def install(self) -> None:
        """Replace the network's current forward, hooks included."""
        self.network.replace_forward(self.forward)
        self.network.forward = partial(self.graphs.compute, self.network.forward)

    def watch(self, pipeline: Any) -> None:
        """Know what a pipeline knows of its calls.

        That is the timesteps of its scheduler, without reading them on a device in every step, and of which
        branch a call is, if it has a guider.
        """
        if pipeline is not self.network.module:
            self._schedules.watch(pipeline)
            self._guiders.watch(pipeline)

    def join(self, communicator: Communicator, config: ParallelConfig) -> None:
        """Join a gang, dropping pending signals.

        What was laid out and captured for other gangs is kept, within `max_buffer_bytes`, until they are
        joined again: gangs that change go back and forth between a few.
        """
        if config.cache_interval > 1 and not self.network.has_short_steps:
            kind = self.network.kind.__name__
            raise UnsupportedModel(
                f"cache_interval of a {kind}: it is for transformers; take fewer steps, by `unipc`"
            )
        if not self._is_in(communicator, config):
            how = communicator.device, config.cuda_graphs
            if self.generation == 0 or how != (self.communicator.device, self.config.cuda_graphs):
                captures = config.cuda_graphs and communicator.device.type == "cuda"
                self.capture_with(CudaGraphs(communicator.device) if captures else None)
            self.exchanges.join(communicator, config)
            self.communicator = communicator
            self.config = config
            self.lags = communicator.device.type == "cuda"
        self._chooser.join(communicator, config)
        if self.decoder is not None:
            together = config.parallel_vae and communicator.world_size > 1
            self.decoder.communicator = communicator if together else None
        self.generation += 1
        self._collector.join(communicator)
        self._more_follow = False
        self._images.interrupt()
        self._images.forget_unannounced()

    def _is_in(self, communicator: Communicator, config: ParallelConfig) -> bool:
        """Whether this gang, so configured, is the one that was joined last."""
        return self.generation > 0 and self.communicator is communicator and self.config == config

    def capture_with(self, maker: GraphMaker | None) -> None:
        """Let later steps be graphs that `maker` makes, none if it is None; exchanges begin anew."""
        self.exchanges.clear()
        self._images.interrupt()
        self.graphs.make_with(maker)

    def image(self, at_step: int = 0, num_steps: int | None = None) -> Image:
        """An image: calls of the network within `with image:` are its steps, one after the other.

        Without it, a call is known to be the next step of an image where its timestep is the next element of
        the tensor that the last call's was an element of, as pipelines have it, and the text is the same. Any
        other call is synchronous, as the first step of an image is.

        Args:
            at_step: number of the step that it begins with, where it was begun elsewhere.
            num_steps: of the whole image; ranks compare it.
        """
        return self._images.new(at_step, num_steps)

    def start_image(self, at_step: int = 0) -> None:
        """Let the next call start an image, or resume one at `at_step`: that step is synchronous."""
        self._images.current.begin(at_step)
        self._collector.forget()
        self._more_follow = False

    def announce_more(self) -> None:
        """Promise that a further call of the same image follows the next one, or else `settle`.

        Without the promise, and unless the timestep is known as one of a watched pipeline's schedule and not
        as its last, a call returns when its output is known to be whole: a GPU has nothing to do then.
        """
        self._more_follow = True

    @property
    def exchange(self) -> ExchangeMode | Mix:
        """How the image that the gang began last is shared: what `auto` has chosen, for one.

        `sync` before it has begun any since it was joined, and where there is nothing to exchange.
        """
        return self._chooser.exchange

    @property
    def settled(self) -> bool:
        """Whether the last call's output is known to be whole."""
        return self._collector.settled

    def settle(self) -> None:
        """Wait until the last call's output is known to be whole. All ranks alike.

        Raises:
            GangBroken: a peer died or hung, and the output is garbage.
            GangMismatch: the ranks were in different steps, and the output is garbage.
            GenerationCancelled: a rank asked for it.
        """
        self._collector.settle()

    def ask_yield(self) -> None:
        """Let the whole gang leave after the next step that all ranks share. Any rank, any thread.

        Where steps lag, after the one that follows it; asked in an image's last step, it has no effect there.
        """
        self._collector.ask(yield_=True)

    def ask_cancel(self) -> None:
        """Let the next step raise `GenerationCancelled` on every rank. Any rank, any thread.

        Where steps lag, the one that follows it; asked in an image's last step, it has no effect there.
        """
        self._collector.ask(cancel=True)

    @property
    def yielding(self) -> bool:
        """Whether a rank has asked the gang to yield since the image began."""
        return self._collector.yielding

    @property
    def drift(self) -> float:
        """Relative change of what the ranks sent in the last step, the largest of theirs.

        Infinite where it was not measured.
        """
        return self._collector.drift

    @property
    def buffer_bytes(self) -> int:
        """Memory of all exchange buffers, in bytes."""
        return self.exchanges.buffer_bytes

    def buffer_bytes_of(self, calls: Iterable[Call], world_size: int, config: ParallelConfig) -> int:
        """Memory of the exchange buffers, in bytes, of the rank of another gang that needs most.

        Nothing is computed, and nobody is asked.

        Args:
            calls: of one step, one for each branch of guidance that has calls of its own.

        Raises:
            InvalidRequest: such a gang cannot share such a call.
        """
        self._convert()
        return most_buffer_bytes(self.network, calls, world_size, config)

    def give_back(self) -> None:
        """Let go of memory that is kept for later: graphs', and that of gangs that were left."""
        self.graphs.give_back()
        self.exchanges.drop_left()

    @property
    def decodes_together(self) -> bool:
        """Whether all ranks take part in decoding, so that all must call it."""
        return self.decoder is not None and self.decoder.communicator is not None

    def _entering(self, image: Image) -> None:
        if not image.branches:
            self._collector.yielding = self._more_follow = False
        if not self._images.begun:
            self._collector.forget_output()

    # The network's forward pass

    def forward(
        self, *args: Any, branches: Mapping[str, Mapping[str, Any]] | None = None, **kwargs: Any
    ) -> Any:
        """The network's forward, to be called alike on every rank: whole inputs, whole output.

        Args:
            args, kwargs: those of the network (`Network.read`).
            branches: the further arguments of each branch's call, by the branch's name, where guidance has a
                call for each; those of one step together. An even gang makes two calls at once, one by each
                half, unless `cfg_parallel` is False; else all ranks make each in turn.

        Returns:
            The network's output, in the form that it has without the engine; with `branches` a list of what
            is predicted for each of them.

        Raises:
            UnsupportedModel: a layer or an input that patches cannot honour, or one that wants a gradient.
            InvalidRequest: too few rows for the gang, more ranks than heads that they are to deal, or
                `cfg_parallel=True` with an odd batch or gang.
            OutOfMemory: there is no room for its buffers (`Exchanges.room`).
            GangMismatch: the ranks were called with different inputs; where steps lag, in this call or in
                the one before, whose output is garbage then.
            GangBroken: a peer died or hung.
            GenerationCancelled: a rank asked for it.
            RuntimeError: another thread is calling the network.
        """
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors_in((args, branches, kwargs))):
            raise UnsupportedModel(
                f"a gradient of what a {type(self.network.module).__name__} in a gang computes; without one, "
                "call it under torch.no_grad()"
            )
        if not self._calling.acquire(blocking=False):
            raise RuntimeError(
                f"two threads call one {type(self.network.module).__name__} at a time, whose layers know one "
                "step; take turns, or give each thread a network of its own"
            )
        follows, self._more_follow = self._more_follow, False
        try:
            with torch.no_grad():
                if branches is None:
                    return self._output(self.network.read(*args, **kwargs), follows)
                return self._predictions(branches, follows, *args, **kwargs)
        finally:
            self._calling.release()

    def _predictions(
        self, branches: Mapping[str, Mapping[str, Any]], follows: bool, /, *args: Any, **kwargs: Any
    ) -> list[torch.Tensor]:
        """`forward` of a step whose guidance branches have calls of their own.

        Args:
            follows: whether a call of the image is promised to follow the step.
        """

        def read(name: str) -> Call:
            given = {**kwargs, **branches[name], "return_dict": False}
            return replace(self.network.read(*args, **given), branch=name, branches=len(branches))

        calls = {name: read(name) for name in branches}
        dealt = self.network.deal([*calls.values()], self.communicator, self.config)
        if dealt is not None:
            (whole,) = self._output(dealt, follows)
            return [whole[first : first + dealt.batch] for first in range(0, dealt.predictions, dealt.batch)]
        predictions, figures = list[torch.Tensor](), StepStatistics()
        for number, (name, call) in enumerate(calls.items(), 1):
            if call.besides is not None:
                call = read(name)  # anew with ControlNets, which may have run in the last one
            (prediction,) = self._output(call, follows or number < len(calls))
            predictions.append(prediction)
            figures += self.statistics
        self.statistics = figures
        return predictions

    def _output(self, call: Call, follows: bool) -> Any:
        """`forward` of the one call that is under way.

        Args:
            follows: whether another call of the image is promised to follow.
        """
        sent = self.communicator.bytes_sent
        if call.branch is None:
            call = replace(call, branch=self._guiders.branch)
        with Stopwatch(call.sample.device) as whole:
            output, step, share, reuse = self._run(call, follows)
        if step is not None and not reuse.short:
            timed = TimedStep(whole, step.waiting.rows, step.waiting.keys_values)
            self._chooser.note(call, share, timed, step.mix if step.displaced else None)
        sent = self.communicator.bytes_sent - sent
        self.statistics = StepStatistics.of(whole, step, self._collector.waiting, sent, reuse.in_turn)
        return output

    def _run(self, call: Call, follows: bool) -> tuple[Any, Step | None, Share, Reuse]:
        """The network's output, the step of the exchange that it was computed in, this rank's share, and what
        it took from a step before."""
        moment = self._schedules.read(call.timestep, call.branch)
        follows = follows or moment.more_follow
        branch = self._branch(call, moment)
        try:
            share = self._prepare(call, moment, branch)
            if self.config.cache_interval > 1 and self.network.may_be_short(call):
                call = replace(call, reuse=branch.reuses(self.config.cache_interval, call))
            else:
                branch.reuse = Reuse()
            self._look_at_text(call, branch)
            place = self._place(call, moment, branch)
            exchange = branch.exchange
            passed: tuple[Any, Step | None] | None = None
            try:
                passed = self._pass(call, branch, share, place, follows)
            except CaptureFailed:
                branch.exchange = exchange
            if passed is None:  # nothing was computed, and no peer was told anything; now it is launched
                passed = self._pass(call, branch, share, place, follows)
        except BaseException:
            self.start_image(branch.step)  # a step that failed is nothing to go on from
            raise
        branch.step += 1
        branch.fresh_start = False
        return *passed, share, branch.reuse

    def _pass(
        self, call: Call, branch: Branch, share: Share, place: Place | None, follows: bool
    ) -> tuple[Any, Step | None]:
        """The network's output, and the step of the exchange that it was computed in.

        Args:
            place: where this rank is.
            follows: whether another call of the image follows.
        """
        with ExitStack() as exchanging:
            exchange_step, graphs = self.exchanges.step(call, branch, share)
            step = exchanging.enter_context(exchange_step)
            exchanging.enter_context(self.context.during(step))
            collected = 0

            def collect(part: torch.Tensor) -> torch.Tensor:
                nonlocal collected
                collected += 1
                if step is None or not step.displaced:
                    exchanging.close()  # only now is the drift of the whole step known
                drift = float("inf") if step is None else step.drift
                may_end_warmup = isinstance(drift, torch.Tensor)
                lags = self.lags and follows and not may_end_warmup
                whole, largest = self._collector.collect(part, share, drift, place, lags)
                exchanging.close()  # what the next step reads leaves behind what this one waits for
                branch.warm |= largest < self.config.auto_warmup_drift
                return whole

            with self.graphs.during(call, share, graphs, collect) as collect_or_record:
                output = self.network.compute(call, share, collect_or_record)
            if collected != 1:
                family = type(self.network).__name__
                raise RuntimeError(f"{family} collected its output {collected} times, not once")
        return output, step

    def _branch(self, call: Call, moment: Moment) -> Branch:
        """The branch that a call goes on with, or begins."""
        branch, replaces = self._images.branch(call, moment)
        if replaces:  # it may be of the step under way
            self._collector.yielding = False
            self.settle()
        return branch

    def _look_at_text(self, call: Call, branch: Branch) -> None:
        """Whether text keys and values that layers have cached are those of this call."""
        weights, inference = self.network.text_weights(), torch.is_inference_mode_enabled()
        made_by = branch, call.besides, weights, inference
        changed = branch.text_changed or call.text.is_inference()  # torch counts no changes of such tensors
        self.context.new_text = branch.fresh_start or changed or made_by != self._cached_text
        # Blocks that a short step leaves out still have those of the call before.
        self._cached_text = None if call.short and self.context.new_text else made_by

    def _prepare(self, call: Call, moment: Moment, branch: Branch) -> Share:
        """This rank's share of a call that all ranks make alike, on a network that can be cut."""
        before = branch.exchange
        takes_other_room = branch.fresh_start or before is not None and before.besides != call.besides
        refusal: DistrirayError | None = None
        try:
            share = self._cut(call, branch, takes_other_room)
        except DistrirayError as error:
            refusal = error
        if takes_other_room:
            self._compare(call, moment, branch, refusal is not None)
        if branch.fresh_start:
            self.graphs.begin_image()
        if refusal is not None:
            raise refusal
        if branch.fresh_start:
            has_room = partial(self.exchanges.has_room, call, branch)
            branch.mix = self._chooser.mix(call, share, has_room, branch.mix)
            self.exchanges.make_room(call, branch, branch.mix)
        return share

    def _cut(self, call: Call, branch: Branch, takes_other_room: bool) -> Share:
        """This rank's share of a call, on a network that is converted and has room for it here."""
        share = self.network.share(call, self.communicator, self.config)
        if branch.fresh_start or self._outline is None or not self._outline.holds():
            self._convert()
        if branch.fresh_start:
            self._guiders.check()
        if takes_other_room:
            mix = self.config.first_mix if branch.fresh_start else branch.mix
            self.exchanges.make_room(call, branch, mix)
        return share

    def _compare(self, call: Call, moment: Moment, branch: Branch, refused: bool) -> None:
        """Compare a call with those of the other ranks: what one refuses, all leave."""
        if self.communicator.world_size == 1:
            return
        compared = [*map(self.network.compared, call.of_halves)]
        num_steps = self._images.current.num_steps or moment.num_steps
        with suppress(GangMismatch) if refused else nullcontext():
            check_same_image(
                self.communicator, compared, self.config, branch.step, moment.timestep, num_steps, refused
            )

    def _place(self, call: Call, moment: Moment, branch: Branch) -> Place | None:
        """Position of this rank, for the others to compare; None without others."""
        if self.communicator.world_size == 1:
            return None
        sample = call.sample
        if self._sums is None or self._sums.of != (sample.numel(), sample.device):
            self._sums = Sums(sample.numel(), sample.device)
        return Place(branch.step, moment.timestep, self._sums(sample)[:3])

    def _convert(self) -> None:
        """Convert what has joined the network's layers since the last time; what cannot be cut is refused."""
        self._outline = None
        if self.network.convert(self.context):
            self.exchanges.clear()
            self._cached_text = None
        self._outline = Outline(self.network.module)
