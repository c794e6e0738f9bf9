"""The patch-parallel U-Net: cuts the input, runs the network on the own rows, gathers the noise."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch.utils import _pytree as pytree

from distriray.collective.base import Communicator
from distriray.config import ParallelConfig
from distriray.errors import GenerationCancelled, InvalidRequest
from distriray.parallel.context import PatchContext
from distriray.parallel.convert import convert_layers
from distriray.parallel.decoder import PatchDecoder
from distriray.parallel.exchange.exchange import BUCKETS, Exchange
from distriray.parallel.exchange.steps import Step
from distriray.parallel.gather import Gather, check_same_image
from distriray.parallel.partition import Partition
from distriray.parallel.supported import check_inputs


@dataclass(frozen=True)
class StepStatistics:
    """What the last step did: its seconds, those spent waiting for peers, bytes sent, fresh or stale."""

    seconds: float = 0.0
    wait_s: float = 0.0
    bytes_sent: int = 0
    synchronous: bool = True


@dataclass(frozen=True)
class Share:
    """One rank's part of a call: a slice of the batch, and the ranks that share that slice's rows."""

    batch: slice
    communicator: Communicator
    partition: Partition


class Engine:
    """What makes one U-Net patch-parallel within the gang of a communicator.

    Args:
        unet: the network; its layers are replaced in place, its parameters stay.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.communicator: Communicator
        self.config: ParallelConfig
        self.context = PatchContext()
        self.decoder: PatchDecoder | None = None  # of the pipeline's VAE, if it can be cut into patches
        self.generation = 0
        self.drift = float("inf")
        self.yielding = False
        self.statistics = StepStatistics()
        self.buckets = BUCKETS
        self._unet = unet
        self._network: Callable[..., tuple[torch.Tensor]]
        self._exchanges: OrderedDict[tuple[Any, ...], Exchange] = OrderedDict()
        self._gather: Gather | None = None
        self._asked = [False, False]
        self._lock = threading.Lock()
        self._step = 0
        self._fresh_start = True
        self._warm = False
        self._timesteps: WeakKeyDictionary[Any, torch.Tensor | None] = WeakKeyDictionary()
        self._timestep = float("inf")
        self._text: torch.Tensor | None = None
        self._text_scale: Any = None

    # What a user or a worker calls

    def install(self) -> None:
        """Stand in for the U-Net's forward as it is now, hooks and all."""
        self._network, self._unet.forward = self._unet.forward, self.forward

    def serve(self, pipeline: Any) -> None:
        """Take a new `timesteps` tensor of this pipeline's scheduler for the start of an image."""
        if pipeline is not self._unet:
            self._timesteps.setdefault(pipeline, None)

    def bind(self, communicator: Communicator, config: ParallelConfig) -> None:
        """Join another gang: what was exchanged in the last one is dropped, and what was asked of it."""
        self._drop_exchanges()
        with self._lock:
            self._asked = [False, False]
        self.communicator = communicator
        self.config = config
        self.context.group_norm = config.group_norm
        if self.decoder is not None:
            together = config.parallel_vae and communicator.world_size > 1
            self.decoder.communicator = communicator if together else None
        self.generation += 1
        self._gather = None
        self.restart()

    def restart(self, steps_done: int = 0) -> None:
        """The next call is another image's, or a resumed one's, at step `steps_done`: it is synchronous."""
        self._step = steps_done
        self._fresh_start = True
        self._warm = False
        self.yielding = False

    def ask_yield(self) -> None:
        """Let the whole gang leave after the next step that all ranks share. Any rank, any thread."""
        with self._lock:
            self._asked[0] = True

    def ask_cancel(self) -> None:
        """Let the next step raise `GenerationCancelled` on every rank. Any rank, any thread."""
        with self._lock:
            self._asked[1] = True

    @property
    def buffer_bytes(self) -> int:
        """Memory of all exchange buffers, in bytes."""
        return sum(exchange.buffer_bytes for exchange in self._exchanges.values())

    @property
    def decodes_together(self) -> bool:
        """Whether all ranks take part in decoding, so that all must call it."""
        return self.decoder is not None and self.decoder.communicator is not None

    # The U-Net's forward pass

    @torch.no_grad()
    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        timestep_cond: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
        down_block_additional_residuals: tuple[torch.Tensor, ...] | None = None,
        mid_block_additional_residual: torch.Tensor | None = None,
        down_intrablock_additional_residuals: list[torch.Tensor] | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[torch.Tensor]:
        """`UNet2DConditionModel.forward`, the same on every rank of the gang: whole inputs, whole noise.

        Raises:
            UnsupportedModel: an input that patches cannot honour.
            InvalidRequest: too few rows for the gang, or `cfg_parallel=True` with an odd batch.
            GangMismatch: the ranks were called with different inputs.
            GangBroken: a peer died or hung.
            GenerationCancelled: a rank asked for it.
        """
        started, sent = time.perf_counter(), self.communicator.bytes_sent
        check_inputs(attention_mask, cross_attention_kwargs)
        self._notice_new_image(timestep, encoder_hidden_states, cross_attention_kwargs)
        share = self._share(sample)
        if self._fresh_start:
            self._begin_image(sample, timestep, encoder_hidden_states)
        batch = sample.shape[0]

        def cut(tree: Any) -> Any:
            return pytree.tree_map(lambda leaf: _cut_batch(leaf, share.batch, batch), tree)

        def cut_rows(tree: Any) -> Any:
            return pytree.tree_map(lambda leaf: _cut_rows(leaf, share), cut(tree))

        try:
            with self._exchange_step(share, sample) as step, self.context.during(step):
                (noise,) = self._network(
                    cut_rows(sample),
                    cut(timestep),
                    cut(encoder_hidden_states),
                    class_labels=cut(class_labels),
                    timestep_cond=cut(timestep_cond),
                    cross_attention_kwargs=cross_attention_kwargs,
                    added_cond_kwargs=cut(added_cond_kwargs),
                    down_block_additional_residuals=cut_rows(down_block_additional_residuals),
                    mid_block_additional_residual=cut_rows(mid_block_additional_residual),
                    down_intrablock_additional_residuals=cut_rows(down_intrablock_additional_residuals),
                    encoder_attention_mask=cut(encoder_attention_mask),
                    return_dict=False,
                )
            noise = self._collect(noise, share, batch, float("inf") if step is None else step.drift)
        except BaseException:
            self.restart(self._step)
            raise
        wait_s = self._gather.wait_s if self._gather else 0.0
        self.statistics = StepStatistics(
            time.perf_counter() - started,
            wait_s + (step.wait_s if step else 0.0),
            self.communicator.bytes_sent - sent,
            step is None or not step.displaced,
        )
        self._step += 1
        self._fresh_start = False
        return UNet2DConditionOutput(sample=noise) if return_dict else (noise,)

    def _notice_new_image(
        self, timestep: torch.Tensor | float | int, text: torch.Tensor, cross_attention_kwargs: Any
    ) -> None:
        now = float(timestep.flatten()[0]) if isinstance(timestep, torch.Tensor) else float(timestep)
        same_text = text is self._text or (
            self._text is not None and text.shape == self._text.shape and torch.equal(text, self._text)
        )
        # Schedulers of second order repeat a timestep; without a scheduler to ask, it may be the next image.
        another = not same_text or now > self._timestep or (now == self._timestep and not self._timesteps)
        for pipeline, before in list(self._timesteps.items()):
            scheduler = getattr(pipeline, "scheduler", None)
            self._timesteps[pipeline] = timesteps = getattr(scheduler, "timesteps", None)
            another |= timesteps is not before
        if another and not self._fresh_start:
            self.restart()
        if self._fresh_start or not same_text or cross_attention_kwargs != self._text_scale:
            self.context.text_epoch += 1
        self._timestep = now
        self._text, self._text_scale = text, cross_attention_kwargs

    def _begin_image(self, sample: torch.Tensor, timestep: Any, text: torch.Tensor) -> None:
        if self.communicator.world_size > 1:
            check_same_image(self.communicator, sample, self._timestep, text, self._step)
        if convert_layers(self._unet, self.context):
            self._drop_exchanges()

    def _share(self, sample: torch.Tensor) -> Share:
        """This rank's part of a call with `sample` (batch, channels, rows, columns)."""
        ranks, rank = self.communicator.world_size, self.communicator.rank
        batch = sample.shape[0]
        want = self.config.cfg_parallel
        if want is True and ranks > 1 and (batch % 2 or ranks % 2):
            raise InvalidRequest(
                f"cfg_parallel=True needs an even gang and an even batch, not {ranks} ranks and a batch of "
                f"{batch}; without guidance use 'auto'",
                param="guidance_scale",
            )
        halves = 2 if want and ranks % 2 == 0 and batch % 2 == 0 else 1
        size = ranks // halves
        half, part = divmod(rank, size)
        levels = len(self._unet.down_blocks) - 1
        return Share(
            slice(half * batch // halves, (half + 1) * batch // halves),
            self.communicator.subgroup(range(half * size, (half + 1) * size)),
            Partition(sample.shape[2], sample.shape[3], levels, size),
        )

    def _exchange_step(self, share: Share, sample: torch.Tensor) -> AbstractContextManager[Step | None]:
        if share.partition.world_size == 1 or self.config.exchange == "none":
            return nullcontext()
        # Buffers made in inference mode cannot be written outside it.
        inference = torch.is_inference_mode_enabled()
        key = (share.batch.start, share.batch.stop, share.partition, sample.dtype, inference)
        anew = self._fresh_start or key != next(reversed(self._exchanges), None)
        exchange = self._exchanges.get(key)
        if exchange is None:
            exchange = self._exchanges[key] = Exchange(
                share.communicator, share.partition, self.config, self.buckets
            )
        self._exchanges.move_to_end(key)
        if anew:
            for other in self._exchanges.values():
                other.restart()
            self._evict()
        warmup = self.config.warmup_steps
        auto = warmup == "auto" and self.config.exchange == "displaced"
        warm = self._warm if warmup == "auto" else self._step >= warmup
        displace = self.config.exchange == "displaced" and warm and not anew
        return exchange.step(displace, measure_drift=auto and not warm)

    def _collect(self, noise: torch.Tensor, share: Share, batch: int, drift: float) -> torch.Tensor:
        with self._lock:
            asked, self._asked = tuple(self._asked), [False, False]
        if self.communicator.world_size == 1:
            whole, (yielding, cancelled), self.drift = noise, asked, drift
        else:
            shape = (batch, noise.shape[1], share.partition.height, share.partition.width)
            if self._gather is None or self._gather.shape != shape or self._gather.dtype != noise.dtype:
                with torch.inference_mode(False):  # writable in either mode
                    self._gather = Gather(self.communicator, share.partition, shape, noise.dtype)
            whole, (yielding, cancelled), self.drift = self._gather(noise, asked, drift)
        if self.drift < self.config.auto_warmup_drift:
            self._warm = True
        self.yielding = self.yielding or yielding
        if cancelled:
            raise GenerationCancelled(f"cancelled after step {self._step + 1}")
        return whole

    # Buffers

    def _evict(self) -> None:
        """Drop the shapes used longest ago until what is not in use fits the bound."""
        while len(self._exchanges) > 1:
            idle = sum(exchange.buffer_bytes for exchange in list(self._exchanges.values())[:-1])
            if idle <= self.config.max_buffer_bytes:
                return
            self._exchanges.popitem(last=False)

    def _drop_exchanges(self) -> None:
        for exchange in self._exchanges.values():
            exchange.abandon()
        self._exchanges.clear()


def _cut_batch(leaf: Any, part: slice, batch: int) -> Any:
    if isinstance(leaf, torch.Tensor) and leaf.ndim and leaf.shape[0] == batch:
        return leaf[part]
    return leaf


def _cut_rows(leaf: Any, share: Share) -> Any:
    """The own rows of a feature map (batch, channels, rows, columns) at whatever level it is."""
    if not isinstance(leaf, torch.Tensor) or share.partition.world_size == 1:
        return leaf
    for level in range(share.partition.levels + 1):
        if tuple(leaf.shape[2:]) == share.partition.shape(level):
            start, stop = share.partition.rows(share.communicator.rank, level)
            return leaf[:, :, start:stop].contiguous()
    raise InvalidRequest(f"a feature map of {tuple(leaf.shape)} is no level of {share.partition}")
