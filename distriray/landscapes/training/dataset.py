"""Renders the training pictures once, so that training reads them from memory-mapped files.

    python -m distriray.landscapes.training.dataset --out runs/landscapes/pictures [--sizes 256x256 512x512]

A bucket is one picture size: `HEIGHTxWIDTH.npy`, (count, height, width, 3) uint8; picture i shows scene
`first_seed + i`. Finished buckets are kept, so the command can be repeated.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distriray.landscapes.draw import draw
from distriray.landscapes.scene import HELD_OUT_SEED, Scene, sample_scene


@dataclass(frozen=True)
class Bucket:
    """Pictures of one size: how many there are and the seed of the first."""

    height: int
    width: int
    count: int
    first_seed: int

    @property
    def name(self) -> str:
        return f"{self.height}x{self.width}"

    def scene(self, index: int) -> Scene:
        return sample_scene(self.first_seed + index)

    def picture(self, index: int) -> NDArray[np.uint8]:
        return draw(self.scene(index), self.height, self.width)

    def held_out(self, index: int) -> NDArray[np.uint8]:
        """A picture of this size that no training sees."""
        return draw(sample_scene(HELD_OUT_SEED + index), self.height, self.width)


BUCKETS: tuple[Bucket, ...] = (
    Bucket(256, 256, 10_000, 0),
    Bucket(512, 512, 4_000, 1_000_000),
    Bucket(256, 384, 700, 2_000_000),
    Bucket(384, 256, 700, 3_000_000),
    Bucket(384, 512, 250, 4_000_000),
    Bucket(512, 384, 250, 5_000_000),
    Bucket(768, 768, 240, 6_000_000),
    Bucket(1024, 1024, 240, 7_000_000),
    Bucket(512, 768, 240, 8_000_000),
    Bucket(768, 512, 240, 9_000_000),
)
SMALLEST = Bucket(128, 128, 20_000, 10_000_000)
"""Where a transformer begins to learn: a picture is a quarter of the tokens."""


def by_name() -> dict[str, Bucket]:
    """All buckets there are."""
    return {bucket.name: bucket for bucket in (*BUCKETS, SMALLEST)}


def render(bucket: Bucket, folder: Path, processes: int) -> None:
    """Writes the bucket's file, unless it is there already."""
    path = folder / f"{bucket.name}.npy"
    if path.exists():
        return
    partial = path.with_suffix(".partial")
    shape = (bucket.count, bucket.height, bucket.width, 3)
    pictures = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
    with Pool(processes) as pool:
        for index, picture in enumerate(pool.imap(bucket.picture, range(bucket.count), chunksize=16)):
            pictures[index] = picture
    pictures.flush()
    partial.rename(path)
    print(f"{bucket.name}: {bucket.count} pictures", flush=True)


def load(folder: Path) -> Iterator[tuple[Bucket, NDArray[np.uint8]]]:
    """All of `BUCKETS`, rendered."""
    for bucket in BUCKETS:
        yield bucket, pictures_of(bucket, folder)


def pictures_of(bucket: Bucket, folder: Path) -> NDArray[np.uint8]:
    """A rendered bucket's pictures, memory-mapped."""
    return np.load(folder / f"{bucket.name}.npy", mmap_mode="r")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/landscapes/pictures"))
    parser.add_argument("--processes", type=int, default=2)
    known = by_name()
    usual = [bucket.name for bucket in BUCKETS]
    parser.add_argument(
        "--sizes", nargs="+", choices=known, default=usual, help="in place of all but the smallest"
    )
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.sizes:
        render(known[name], arguments.out, arguments.processes)


if __name__ == "__main__":
    main()
