"""Entry point of the library: makes a diffusers pipeline patch-parallel."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, TypeVar

import diffusers
import torch

from distriray.collective.base import Communicator
from distriray.config import ParallelConfig
from distriray.parallel.decoder import PatchDecoder
from distriray.parallel.engine import Engine
from distriray.parallel.layers.bare import has_class_forward
from distriray.parallel.layout import GangLayout
from distriray.parallel.networks.local import LocalCode
from distriray.parallel.networks.registry import denoising_module, network_of
from distriray.parallel.networks.vae import decoder_of

log = logging.getLogger(__name__)

Pipeline = TypeVar("Pipeline")
Patches = TypeVar("Patches", Engine, PatchDecoder)
DIFFUSERS = 0, 42
"""The newest minor version that the layers and processors here, which restate its own, were compared with."""
PATCHES = "distriray_patches"  # the attribute of a network that holds its engine or decoder


def parallelize(
    pipeline: Pipeline,
    communicator: Communicator,
    config: ParallelConfig | None = None,
    *,
    local: Iterable[Any] = (),
) -> Pipeline:
    """Let the gang of `communicator` denoise and decode `pipeline`'s images together, in patches.

    Denoising is as fresh as waits allow unless `config` says otherwise: exact in the first image of a
    shape, and always of transformers. Decoding is exact: each rank decodes its own rows.
    A VAE that several pipelines share decodes in the gang of the last of them that was parallelized.

    Afterwards every rank makes the same calls with the same arguments and gets the whole image. The pipeline
    stays the class it was: any size, batch, step count, scheduler and guidance, LoRA, callbacks. On an
    already parallelized pipeline this joins another gang.

    All ranks call this together. It gives them rank 0's state of torch's default random generators (5 KB), so
    that calls without a `generator` draw the same latents everywhere.

    Args:
        pipeline: a diffusers pipeline around a network of a family in `networks.registry.NETWORKS`, or such a
            network.
        communicator: the gang.
        config: how its ranks share a step; by default the exchange is `auto`.
        local: code in the network and the VAE's decoder that is not diffusers', and that works on some rows
            of the picture without the others: classes (of modules, attention processors, hooks) and functions
            (hooks, or what stands in the place of a layer's forward). What is not known to be local is
            refused when an image begins. It is remembered when another gang is joined.

    Returns:
        The same pipeline.

    Raises:
        UnsupportedModel: the network is of no such family, or its family refuses it.
        TypeError: something in `local` is neither a class nor a function, or `config` is of another class, as
            diffusers' ParallelConfig is.
        InvalidRequest: `cfg_parallel=True` in a gang of odd size.
        GangBroken: a peer did not call it.

    Source: Li et al., DistriFusion, CVPR 2024 (arXiv 2402.19481).
    """
    config = ParallelConfig() if config is None else config
    if not isinstance(config, ParallelConfig):
        kind = type(config)
        raise TypeError(
            f"config is a {kind.__module__}.{kind.__qualname__}, not a distriray.ParallelConfig: write "
            'ParallelConfig(exchange="sync"), for one'
        )
    GangLayout.of(communicator.world_size, batch=2, cfg_parallel=config.cfg_parallel)  # refuses an odd gang
    _warn_of_newer(diffusers.__version__)
    before = engine_of(pipeline)
    said = LocalCode(local) | (LocalCode() if before is None else before.network.local)
    network = network_of(pipeline, said)
    engine = _installed(network.module, lambda _: Engine(network))
    engine.network.local = said
    engine.watch(pipeline)
    if engine.decoder is not None:  # perhaps that of another pipeline around this network
        engine.decoder.communicator = None
    decoder = decoder_of(pipeline, said)
    engine.decoder = None if decoder is None else _installed(decoder, PatchDecoder)
    if engine.decoder is not None:
        engine.decoder.local = said
    _share_random_state(communicator)
    engine.join(communicator, config)
    return pipeline


def engine_of(pipeline: Any) -> Engine | None:
    """The engine of a parallelized pipeline or network; None if it is not parallelized."""
    return getattr(denoising_module(pipeline), PATCHES, None)


@cache
def _warn_of_newer(version: str) -> None:
    """Warn, once, of a diffusers whose layers may compute otherwise under the names that are known here."""
    if tuple(map(int, version.split(".")[:2])) > DIFFUSERS:
        log.warning(
            "diffusers %s is newer than %d.%d, which gangs were compared with: before you trust one, see "
            "that with exchange 'sync' it draws the picture of one device",
            version,
            *DIFFUSERS,
        )


def _installed(module: Any, make: Callable[[Any], Patches]) -> Patches:
    """The module's engine (or decoder), created and installed on the first call."""
    patches: Patches | None = vars(module).get(PATCHES)
    if patches is None:
        patches = vars(module)[PATCHES] = make(module)
        patches.install()
    elif has_class_forward(module):  # a hook that was there before was removed
        patches.install()
    return patches


def _share_random_state(communicator: Communicator) -> None:
    if communicator.world_size == 1:
        return
    device = communicator.device
    states = [torch.get_rng_state()]
    if device.type == "cuda":  # where diffusers draws unless it is given a generator
        states.append(torch.cuda.get_rng_state(device))
    wire = torch.cat(states).to(device)
    if communicator.rank == 0:
        communicator.exchange(dict.fromkeys(range(1, communicator.world_size), wire), {}).wait()
        return
    communicator.exchange({}, {0: wire}).wait()
    host, *on_device = wire.cpu().split([len(state) for state in states])
    communicator.check()  # on a GPU a transfer that was aborted ends like any other, and leaves garbage
    torch.set_rng_state(host)
    for state in on_device:
        torch.cuda.set_rng_state(state, device)
