"""Patch-parallel U-Net: cuts the input, runs the network on this rank's rows, gathers the noise."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from distriray.collective.base import Communicator
from distriray.config import ParallelConfig
from distriray.errors import GenerationCancelled
from distriray.parallel.agreement import check_same_image
from distriray.parallel.context import PatchContext
from distriray.parallel.convert import convert_layers
from distriray.parallel.decoder import PatchDecoder
from distriray.parallel.exchange.cache import ExchangeCache
from distriray.parallel.exchange.exchange import BUCKETS, Exchange
from distriray.parallel.exchange.steps import Step
from distriray.parallel.gather import Flags, Gather, Gathered
from distriray.parallel.layout import GangLayout
from distriray.parallel.new_image import NewImageDetector
from distriray.parallel.partition import Partition
from distriray.parallel.share import Share
from distriray.parallel.supported import check_inputs


@dataclass(frozen=True)
class StepStatistics:
    """Figures of one step.

    Attributes:
        seconds: of the whole step on this rank.
        wait_s: those of them that were spent waiting for peers.
        bytes_sent: by this rank, to all peers.
        synchronous: whether all values were fresh.
    """

    seconds: float = 0.0
    wait_s: float = 0.0
    bytes_sent: int = 0
    synchronous: bool = True


class Engine:
    """One U-Net, made patch-parallel within a gang.

    Args:
        unet: the network; its layers are converted in place, its parameters stay.

    Attributes:
        communicator, config: the gang, and how it shares a step; set by `join`.
        context: what the network's layers look up during a call.
        decoder: that of the pipeline's VAE; None if it cannot be cut into patches.
        bucket_count: buckets of a displaced step; counts for exchanges made afterwards.
        generation: counts the gangs that were joined.
        drift: relative change of what the ranks sent in the last step, the largest of theirs; infinite where
            it was not measured.
        yielding: whether a rank has asked the gang to yield since the image began.
        statistics: of the last step.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.communicator: Communicator
        self.config: ParallelConfig
        self.context = PatchContext()
        self.decoder: PatchDecoder | None = None
        self.bucket_count = BUCKETS
        self.generation = 0
        self.drift = float("inf")
        self.yielding = False
        self.statistics = StepStatistics()
        self._unet = unet
        self._network: Callable[..., tuple[torch.Tensor]]
        self._detector = NewImageDetector()
        self._exchanges = ExchangeCache()
        self._gather: Gather | None = None
        self._lock = threading.Lock()
        self._asked = Flags()
        self._step = 0
        self._fresh_start = True
        self._warm = False

    # What a user or a worker calls

    def install(self) -> None:
        """Replace the U-Net's current forward, hooks included."""
        self._network, self._unet.forward = self._unet.forward, self.forward

    def watch_scheduler(self, pipeline: Any) -> None:
        """Treat a new `timesteps` tensor on this pipeline's scheduler as the start of an image."""
        if pipeline is not self._unet:
            self._detector.watch(pipeline)

    def join(self, communicator: Communicator, config: ParallelConfig) -> None:
        """Join another gang, dropping the previous gang's buffers and pending signals."""
        self._exchanges.clear()
        with self._lock:
            self._asked = Flags()
        self.communicator = communicator
        self.config = config
        self.context.group_norm = config.group_norm
        if self.decoder is not None:
            together = config.parallel_vae and communicator.world_size > 1
            self.decoder.communicator = communicator if together else None
        self.generation += 1
        self._gather = None
        self.start_image()

    def start_image(self, at_step: int = 0) -> None:
        """Let the next call start an image, or resume one at `at_step`: that step is synchronous."""
        self._step = at_step
        self._fresh_start = True
        self._warm = False
        self.yielding = False

    def ask_yield(self) -> None:
        """Let the whole gang leave after the next step that all ranks share. Any rank, any thread."""
        with self._lock:
            self._asked = self._asked._replace(yield_=True)

    def ask_cancel(self) -> None:
        """Let the next step raise `GenerationCancelled` on every rank. Any rank, any thread."""
        with self._lock:
            self._asked = self._asked._replace(cancel=True)

    @property
    def buffer_bytes(self) -> int:
        """Memory of all exchange buffers, in bytes."""
        return self._exchanges.nbytes

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
        """`UNet2DConditionModel.forward`, to be called alike on every rank: whole inputs, whole noise.

        Args:
            sample: latents, (batch, channels, rows, columns).
            encoder_hidden_states: prompt embeddings, (batch, tokens, channels).

        Returns:
            The predicted noise, shaped as `sample`.

        Raises:
            UnsupportedModel: an input that patches cannot honour.
            InvalidRequest: too few rows for the gang, or `cfg_parallel=True` with an odd batch.
            GangMismatch: the ranks were called with different inputs.
            GangBroken: a peer died or hung.
            GenerationCancelled: a rank asked for it.
        """
        started, sent = time.perf_counter(), self.communicator.bytes_sent
        check_inputs(attention_mask, cross_attention_kwargs)
        now = float(timestep.flatten()[0]) if isinstance(timestep, torch.Tensor) else float(timestep)
        self._notice_new_image(now, encoder_hidden_states, cross_attention_kwargs)
        share = self._share(sample)
        if self._fresh_start:
            self._prepare_image(sample, now, encoder_hidden_states)
        cut, cut_rows = share.cut, share.cut_rows
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
            noise = self._collect(noise, share, float("inf") if step is None else step.drift)
        except BaseException:
            self.start_image(self._step)  # a step that failed is nothing to go on from
            raise
        self.statistics = StepStatistics(
            time.perf_counter() - started,
            (step.wait_s if step else 0.0) + (self._gather.wait_s if self._gather else 0.0),
            self.communicator.bytes_sent - sent,
            step is None or not step.displaced,
        )
        self._step += 1
        self._fresh_start = False
        return UNet2DConditionOutput(sample=noise) if return_dict else (noise,)

    def _notice_new_image(self, timestep: float, text: torch.Tensor, scale: Any) -> None:
        signs = self._detector.look(timestep, text, scale)
        if signs.new_image and not self._fresh_start:
            self.start_image()
        if self._fresh_start or signs.new_text:
            self.context.text_epoch += 1

    def _prepare_image(self, sample: torch.Tensor, timestep: float, text: torch.Tensor) -> None:
        if self.communicator.world_size > 1:
            check_same_image(self.communicator, sample, timestep, text, self._step)
        if convert_layers(self._unet, self.context):
            self._exchanges.clear()

    def _share(self, sample: torch.Tensor) -> Share:
        batch, _, height, width = sample.shape
        rank = self.communicator.rank
        layout = GangLayout.of(self.communicator.world_size, batch, self.config.cfg_parallel)
        communicator = self.communicator.subgroup(layout.ranks(layout.half(rank)))
        partition = Partition(height, width, len(self._unet.down_blocks) - 1, layout.patches)
        return Share(layout, communicator, partition, batch, layout.batch_slice(rank, batch))

    def _exchange_step(self, share: Share, sample: torch.Tensor) -> AbstractContextManager[Step | None]:
        """The step of the exchange for this call; None without patches or without an exchange."""
        config = self.config
        if share.partition.world_size == 1 or config.exchange == "none":
            return nullcontext()
        # Buffers made in inference mode cannot be written outside it.
        inference = torch.is_inference_mode_enabled()
        key = (share.part.start, share.part.stop, share.partition, sample.dtype, inference)
        follows = not self._fresh_start and key == self._exchanges.latest
        exchange = self._exchanges.use(
            key, lambda: Exchange(share.communicator, share.partition, config, self.bucket_count)
        )
        if not follows:
            self._exchanges.restart()
            self._exchanges.evict(config.max_buffer_bytes)
        if config.exchange != "displaced":
            return exchange.step()
        if config.warmup_steps == "auto":
            return exchange.step(self._warm and follows, measure_drift=not self._warm)
        return exchange.step(self._step >= config.warmup_steps and follows)

    def _collect(self, noise: torch.Tensor, share: Share, drift: float) -> torch.Tensor:
        """The whole noise; what the ranks asked for is decided alike on all of them."""
        with self._lock:
            asked, self._asked = self._asked, Flags()
        if self.communicator.world_size == 1:
            gathered = Gathered(noise, asked, drift)
        else:
            shape = (share.batch, noise.shape[1], share.partition.height, share.partition.width)
            if self._gather is None or self._gather.shape != shape or self._gather.dtype != noise.dtype:
                with torch.inference_mode(False):  # writable in either mode
                    self._gather = Gather(
                        self.communicator, share.layout, share.partition, shape, noise.dtype
                    )
            gathered = self._gather(noise, asked, drift)
        self.drift = gathered.drift
        if self.drift < self.config.auto_warmup_drift:
            self._warm = True
        self.yielding = self.yielding or gathered.flags.yield_
        if gathered.flags.cancel:
            raise GenerationCancelled(f"cancelled after step {self._step + 1}")
        return gathered.whole
