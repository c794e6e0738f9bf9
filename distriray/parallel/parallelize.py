"""The library's entry point."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from distriray.collective.base import Communicator
from distriray.config import ParallelConfig
from distriray.errors import InvalidRequest
from distriray.parallel.engine import Engine
from distriray.parallel.supported import unet_of

Pipeline = TypeVar("Pipeline")


def parallelize(
    pipeline: Pipeline, communicator: Communicator, config: ParallelConfig | None = None
) -> Pipeline:
    """Let the gang of `communicator` denoise `pipeline`'s images together, by displaced patch parallelism.

    Every rank makes the same calls with the same arguments afterwards, and gets the whole image. The pipeline
    stays the class it was: any size, batch, step count, scheduler and guidance, LoRA, callbacks. On an
    already parallelized pipeline this joins another gang, without any transfer.

    The first call on a pipeline also gives all ranks rank 0's state of torch's default random generator, so
    that calls without a `generator` draw the same latents everywhere.

    Args:
        pipeline: a diffusers pipeline around a `UNet2DConditionModel`, or such a U-Net.
        communicator: the gang.
        config: how its ranks share a step; the default is displaced.

    Returns:
        The same pipeline.

    Raises:
        UnsupportedModel: the network is not one that can be cut into patches.
        InvalidRequest: `cfg_parallel=True` in a gang of odd size.
        GangBroken: a peer did not make its first call.

    Source: Li et al., DistriFusion, CVPR 2024 (arXiv 2402.19481).
    """
    config = config or ParallelConfig()
    if config.cfg_parallel is True and communicator.world_size > 1 and communicator.world_size % 2:
        raise InvalidRequest(
            f"cfg_parallel=True splits the gang into halves, but it has {communicator.world_size} ranks; "
            "use 'auto'",
            param="gang_size",
        )
    unet = unet_of(pipeline)
    engine = engine_of(pipeline)
    if engine is None:
        engine = Engine(unet, lambda: getattr(pipeline, "scheduler", None))
        _share_random_state(communicator)
        unet.forward = engine.forward
    engine.bind(communicator, config)
    return pipeline


def engine_of(pipeline: Any) -> Engine | None:
    """The engine of a parallelized pipeline or U-Net; None if it is not parallelized."""
    unet = getattr(pipeline, "unet", pipeline)
    return getattr(vars(unet).get("forward"), "__self__", None)


def _share_random_state(communicator: Communicator) -> None:
    if communicator.world_size == 1:
        return
    state = torch.get_rng_state()
    wire = state.to(communicator.device)
    others = range(1, communicator.world_size)
    if communicator.rank == 0:
        communicator.exchange(dict.fromkeys(others, wire), {}).wait()
    else:
        communicator.exchange({}, {0: wire}).wait()
        torch.set_rng_state(wire.cpu())
