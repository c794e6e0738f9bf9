"""How long requests take beside what their host predicts: `python -m bench.predictions`.

A host without a profile begins with a guess and learns from what it draws. Requests for sizes, steps and
gangs drawn at random come one after another, so that none waits.
"""

from __future__ import annotations

import argparse
import random
from itertools import pairwise
from statistics import quantiles

from bench.arguments import add_json, side
from bench.report import Report
from distriray.arguments import at_least, positive
from distriray.gang import HostConfig, open_host
from distriray.requests import GenerationRequest

PARTS = 3
"""Parts of the run that are told of apart: in the first one the host still learns."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="builtin:landscapes")
    parser.add_argument("--requests", type=at_least(2 * PARTS), default=90)
    parser.add_argument("--sizes", type=side, nargs="+", default=[256, 384, 512], help="pixels of a side")
    parser.add_argument("--steps", type=positive, nargs="+", default=[2, 4, 8])
    parser.add_argument("--workers", type=positive, default=2)
    parser.add_argument("--seed", type=int, default=1)
    add_json(parser)
    arguments = parser.parse_args()
    config = HostConfig.model_validate({"model": arguments.model, "workers": arguments.workers})
    report = Report(
        f"bench.predictions: {arguments.model}, seconds over predicted ones",
        columns=("requests", "10 % below", "median", "10 % above"),
        seed=arguments.seed,
        settings=vars(arguments),
    )
    draw, ratios = random.Random(arguments.seed), list[float]()
    with open_host(config, cpus=arguments.workers) as host:
        for number in range(arguments.requests):
            size, steps = draw.choice(arguments.sizes), draw.choice(arguments.steps)
            gang = draw.choice(config.sizes)
            predicted_s = host.host.latency.times(gang, size, size, batch=1).run_s(0, steps)
            request = GenerationRequest(
                prompt="a lake at dusk, snowy mountains",
                seed=number,
                height=size,
                width=size,
                num_inference_steps=steps,
                gang_size=gang,
            )
            timings = host.generate(request).timings
            ratios.append((timings.total_s - timings.queued_s) / predicted_s)
    for first, end in pairwise(len(ratios) * part // PARTS for part in range(PARTS + 1)):
        tenths = quantiles(ratios[first:end], n=10)
        report.add(f"{first + 1} to {end}", *(f"{tenths[tenth]:.2f}" for tenth in (0, 4, 8)))
    report.publish(arguments.json)


if __name__ == "__main__":
    main()
