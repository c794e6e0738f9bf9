"""Time that a link between devices would add to a rank's steps, measured with peers that answer at once."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from bench.projection.peers import Step

LINKS = ("nvlink4:10:360", "pcie5:20:50", "pcie4:20:25")


@dataclass(frozen=True)
class Link:
    """A device's own link to its peers, of which it uses both directions at once.

    Attributes:
        latency_s: of one group of messages, from its call until the first byte arrives.
        bytes_per_s: in one direction, for all peers together.
        hides: transfers go on while the device computes; where the processor itself moves the bytes, they
            cost their whole time.
    """

    name: str
    latency_s: float
    bytes_per_s: float
    hides: bool = True

    def seconds(self, sent: dict[int, int]) -> float:
        """Of one group of messages."""
        return self.latency_s + sum(sent.values()) / self.bytes_per_s


def add_links(parser: argparse.ArgumentParser, also: str = "") -> None:
    """Add `--links`, whose help ends with `also`."""
    parser.add_argument(
        "--links",
        type=parse_link,
        nargs="+",
        metavar="NAME:US:GB/S",
        default=[parse_link(link) for link in LINKS],
        help=f"latency of a group of messages and bandwidth of a device in one direction; {' '.join(LINKS)} "
        f"(80 %% of what NVLink 4 and PCIe 5 and 4 with 16 lanes carry by name){also}",
    )


def parse_link(text: str) -> Link:
    """`NAME:MICROSECONDS:GB/S` as a link.

    Raises:
        ValueError: it is not of that form, or its bandwidth is not positive or its latency negative.
    """
    try:
        name, latency, bandwidth = text.split(":")
        link = Link(name, float(latency) / 1e6, float(bandwidth) * 1e9)
    except ValueError as error:
        raise ValueError(f"{text!r} is no NAME:MICROSECONDS:GB/S, such as nvlink4:10:360") from error
    if link.bytes_per_s <= 0 or link.latency_s < 0:
        raise ValueError(f"{text!r} needs a positive bandwidth and a latency that is not negative")
    return link


def exposed_s(steps: Sequence[Step], link: Link) -> list[float]:
    """Seconds that the link adds to each of consecutive steps.

    The steps' own timeline is replayed. Transfers leave one after another, none before it was launched; where
    a wait comes before its transfer is over, everything after it moves by the difference. Transfers that were
    launched before the first step are over; so its number is too small where it waits for such.
    """
    now, free, shift = 0.0, 0.0, 0.0
    over: dict[int, float] = {}
    added = []
    for step in steps:
        before = shift
        for moment in step.moments:
            at = now + moment.at_s + shift
            if moment.kind == "wait":
                shift += max(0.0, over.get(moment.transfer, at) - at)
            elif link.hides:
                over[moment.transfer] = free = max(at, free) + link.seconds(moment.sent)
            else:
                shift += link.seconds(moment.sent)
        now += step.seconds
        added.append(shift - before)
    return added
