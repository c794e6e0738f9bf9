"""What is asked for, and what a single worker draws of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from PIL import Image

from bench.likeness import largest_difference, psnr
from distriray import AsyncClient, GenerationRequest

MODEL = "builtin:landscapes"
ADAPTERS = ("ink", "neon", "rain")
ALIKE_DB = 25.0
"""PSNR below which the picture of a gang that reads old values is another one."""
ALIKE_COLOURS = 2
"""Of 255, how far that of a gang that reads fresh ones may be off: its sums are rounded in another order."""


@dataclass(frozen=True)
class Scene:
    """A request but for its id; `exact` where gangs draw what a single worker draws, but for rounding."""

    name: str
    fields: dict[str, Any]
    exact: bool = True

    def request(self, **others: Any) -> GenerationRequest:
        return GenerationRequest(**{**self.fields, **others})

    @property
    def images(self) -> int:
        return int(self.fields.get("num_images", 1))

    def faults(self, pictures: list[Image.Image], references: list[Image.Image]) -> list[str]:
        """What is wrong with what came, held against the references."""
        if len(pictures) != len(references):
            return [f"{len(pictures)} pictures in place of {len(references)}"]
        return [fault for pair in zip(pictures, references, strict=True) if (fault := self._fault(*pair))]

    def _fault(self, picture: Image.Image, reference: Image.Image) -> str | None:
        if picture.size != reference.size:
            return f"{picture.size} in place of {reference.size}"
        if not self.exact:
            near = psnr(picture, reference)
            return f"{near:.1f} dB" if near < ALIKE_DB else None
        off = largest_difference(picture, reference)
        return f"colours are off by {off}" if off > ALIKE_COLOURS else None


def scenes(workers: int) -> list[Scene]:
    """The requests of which clients choose, for gangs of at most so many workers."""
    largest = max(size for size in (1, 2, 4) if size <= workers)
    slope = Image.linear_gradient("L").resize((128, 128))
    drawn = Image.merge("RGB", (slope, slope.rotate(90), slope))

    def of(name: str, side: tuple[int, int], steps: int, exact: bool = True, **fields: Any) -> Scene:
        whole = {
            "prompt": f"a lake at dusk, {name}",
            "width": side[0],
            "height": side[1],
            "num_inference_steps": steps,
            "seed": len(name),
            **fields,
        }
        return Scene(name, whole, exact)

    return [
        of("small", (128, 128), 8),
        of("wide", (256, 128), 12),
        of("tall", (128, 320), 10, guidance_scale=1.0),
        of("large", (256, 256), 20),
        of("two", (128, 128), 6, num_images=2),
        of("by a large gang", (256, 256), 16, gang_size=largest),
        of("by two, euler", (192, 256), 12, gang_size=min(2, largest), scheduler="euler"),
        of("ancestral", (128, 128), 12, scheduler="euler-ancestral"),
        of("edit", (128, 128), 12, image=drawn, strength=0.6),
        of("ink", (128, 128), 8, loras=[{"name": "ink"}]),
        of("neon and rain", (128, 256), 10, loras=[{"name": "neon", "scale": 0.5}, {"name": "rain"}]),
        of("without guidance at the end", (192, 192), 12, guidance_end=0.5),
        of("compressed", (256, 256), 12, exact=False, exchange="compressed"),
        of("old keys", (256, 256), 14, exact=False, exchange="displaced_attention", gang_size=largest),
        of("displaced", (256, 256), 14, exact=False, exchange="displaced"),
    ]


async def draw_references(client: AsyncClient, asked: list[Scene]) -> dict[str, list[Image.Image]]:
    """The pictures of each scene by a single worker."""
    return {
        scene.name: (await client.generate(scene.request(gang_size=1, exchange="sync"))).images
        for scene in asked
    }
