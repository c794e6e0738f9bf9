"""Rehearsal: a worker plays each part that it may have in a gang, before serving, to compile it."""

from __future__ import annotations

import logging
import time
from itertools import product

import torch
from torch._dynamo.exc import TorchDynamoException

from distriray.errors import InvalidRequest, UnsupportedModel
from distriray.gang.admission import example, settle
from distriray.gang.config import HostConfig
from distriray.gang.messages import WorkerFacts
from distriray.gang.runner import SegmentRunner
from distriray.parallel import many_shapes

STEPS = 2
"""Of a rehearsal: text is new in the first step of an image alone."""

PROMPTS = "a lake", "a lake and its boats " * 20
"""Texts of different lengths, for networks that do not pad them."""

log = logging.getLogger("ray.serve.distriray.worker")


def rehearse(runner: SegmentRunner, config: HostConfig, facts: WorkerFacts) -> float:
    """Compile the network's blocks for pictures of the sizes that `config.compile` names, in every gang.

    The worker does so alone, as each rank of each gang in turn. From then on this process compiles no more:
    what it meets besides is launched as without.

    Returns:
        Seconds that it took.

    Raises:
        UnsupportedModel: torch cannot compile them here, or the model draws no picture of such a size.
    """
    began = time.perf_counter()
    runner.compile()
    parallel = config.parallel.model_copy(update={"cuda_graphs": False})
    prompts = PROMPTS[:1] if runner.pads_text else PROMPTS
    try:
        with many_shapes():
            for size in config.compile:
                width, height = map(int, size.split("x"))
                gangs = [gang for gang in config.sizes if gang <= facts.max_gang(height)]
                parts = [(rank, gang) for gang in gangs for rank in range(gang)]
                asked = {"width": width, "height": height, "num_inference_steps": STEPS, "seed": 0}
                for prompt, (rank, gang) in product(prompts, parts):
                    params = settle(example(facts, prompt=prompt, **asked), config, facts)
                    runner.rehearse(params, rank, gang, parallel)
    except InvalidRequest as error:
        raise UnsupportedModel(f"compile {size}: {error}") from error
    except TorchDynamoException as error:
        raise UnsupportedModel(f"torch cannot compile the blocks of {facts.model} here: {error}") from error
    torch.compiler.set_stance("eager_on_recompile")
    took_s = time.perf_counter() - began
    log.info("compiled for %s in %.0f s", ", ".join(config.compile), took_s)
    return took_s
