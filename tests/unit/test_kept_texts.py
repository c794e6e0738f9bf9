"""Texts that are read once, whatever else of their requests differs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from distriray.denoise import Denoiser
from distriray.denoise.pipelines.kept_texts import KeptTexts
from distriray.requests import SamplingParams
from tests.edits import shown, shrink
from tests.models import tiny_sd15, tiny_sdxl
from tests.parameters import sweep
from tests.unit.flow_matching.families import MODELS

ALL: dict[str, Callable[[], Any]] = {"sdxl": tiny_sdxl, "sd15": tiny_sd15, **MODELS}
READ_WITH_PICTURES = {"longcat-image-edit", "qwen-image-edit", "qwen-image-edit-plus"}
SMALL: dict[str, Any] = {"prompt": "a lake", "num_inference_steps": 3, "height": 64, "width": 96, "seed": 1}


class Counted:
    """A pipeline's denoiser, and how often its text encoders were called."""

    def __init__(self, pipeline: Any) -> None:
        self.denoiser, self.calls = Denoiser(pipeline), 0
        for name, component in pipeline.components.items():
            if name.startswith("text_encoder") and component is not None:
                component.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.calls += 1

    def values(self, **fields: Any) -> dict[str, Any]:
        """What is prepared of a request."""
        return self.denoiser.prepare(SamplingParams(**shown(self.denoiser, **{**SMALL, **fields}))).values


def alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    (leaves, structure), (others, other_structure) = pytree.tree_flatten(one), pytree.tree_flatten(other)
    return structure == other_structure and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(leaves, others, strict=True)
    )


@pytest.mark.parametrize("model", sweep(ALL, first=4))
def test_a_text_is_read_once_and_as_if_it_was_read_again(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    pipeline = ALL[model]()
    counted = Counted(pipeline)
    counted.values()
    assert (first := counted.calls)
    again = {"seed": 7, "num_inference_steps": 2, "num_images": 1}
    values = counted.values(**again)
    assert counted.calls == (2 * first if model in READ_WITH_PICTURES else first)
    fresh = Denoiser(pipeline).prepare(SamplingParams(**shown(counted.denoiser, **{**SMALL, **again})))
    assert alike(values, fresh.values)
    before = counted.calls
    assert not alike(values, counted.values(**again, prompt="a desert")) and counted.calls > before


def test_who_changes_what_was_read_changes_nothing_that_is_kept() -> None:
    counted = Counted(tiny_sdxl())
    for _ in range(2):
        read = counted.values()["prompt_embeds"]
        assert float(read.abs().max()) > 0
        read.zero_()
    assert counted.calls == 2, "of the two encoders"


def test_what_was_used_last_is_kept_within_the_bound() -> None:
    each = 1000 + sys.getsizeof("a")
    calls, texts = list[str](), KeptTexts(most_bytes=3 * each)

    def encode(text: str, rows: int = 1) -> dict[str, Any]:
        calls.append(text)
        return {"embeds": [torch.full((rows, 250), float(len(calls)))], "rows": rows, "mask": None}

    first = texts.of(encode, "a")  # of a thousand bytes each
    for text in ("b", "c", "a", "d"):
        texts.of(encode, text)
    assert calls == ["a", "b", "c", "d"] and texts.nbytes == 3 * each
    again = texts.of(encode, "a")
    assert torch.equal(again["embeds"][0], first["embeds"][0]) and (again["rows"], again["mask"]) == (1, None)
    texts.of(encode, "b")
    assert calls == ["a", "b", "c", "d", "b"], "the one that was not used for longest went"
    texts.of(encode, "e", rows=4)
    texts.of(encode, "e", rows=4)
    assert calls[-2:] == ["e", "e"] and texts.nbytes == 3 * each, "nothing goes for what is larger than all"


def test_texts_are_read_anew_with_other_adapters_other_arguments_and_pictures() -> None:
    calls, texts = list[tuple[Any, ...]](), KeptTexts()

    def encode(*given: Any, **named: Any) -> torch.Tensor:
        calls.append((*given, *named.items()))
        return torch.ones(2)

    for given in (("a", 1), ("a", True), ("a", None), ("a", 1.0)):
        texts.of(encode, *given)
        texts.of(encode, *given)
    assert len(calls) == 4, "what is equal and of another type is something else"
    texts.of(encode, "a", images=1)
    texts.adapters = (("ink", 0.5),)
    texts.of(encode, "a", images=1)
    texts.adapters = ()
    texts.of(encode, "a", images=1)
    assert len(calls) == 6
    for _ in range(2):
        texts.of(encode, "a", image=torch.ones(1))
        texts.of(encode, "a", image=["b"])
    assert len(calls) == 10


def test_of_no_device_nothing_is_kept() -> None:
    texts = KeptTexts()
    for _ in range(2):
        assert texts.of(lambda text: torch.ones(2, device="meta"), "a").is_meta
    assert texts.nbytes == 0
