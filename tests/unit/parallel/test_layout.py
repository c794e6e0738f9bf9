"""Halves of the batch by patches of the image."""

from __future__ import annotations

import pytest

from distriray.errors import InvalidRequest
from distriray.parallel.layout import GangLayout


@pytest.mark.parametrize("layout", [GangLayout(1), GangLayout(3), GangLayout(2, 2), GangLayout(8, 2)])
def test_every_image_of_a_batch_is_computed_once_by_every_patch(layout: GangLayout) -> None:
    batch = list(range(6))
    for patch in range(layout.patches):
        ranks = [rank for rank in range(layout.world_size) if layout.patch(rank) == patch]
        assert [image for rank in ranks for image in batch[layout.batch_slice(rank, 6)]] == batch


def test_the_ranks_of_a_half_are_its_patches_in_order() -> None:
    layout = GangLayout(6, 2)
    assert [list(layout.ranks(half)) for half in range(2)] == [[0, 1, 2], [3, 4, 5]]
    assert [(layout.half(rank), layout.patch(rank)) for rank in range(6)] == [
        (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)
    ]  # fmt: skip


def test_halves_are_made_where_gang_and_batch_are_even() -> None:
    assert GangLayout.of(4, 2, "auto").halves == GangLayout.of(4, 6, True).halves == 2
    for world_size, batch, cfg_parallel in ((4, 3, "auto"), (3, 2, "auto"), (4, 2, False), (1, 1, True)):
        assert GangLayout.of(world_size, batch, cfg_parallel).halves == 1  # type: ignore[arg-type]


def test_halves_that_cannot_be_made_are_refused_with_the_value_and_the_mend() -> None:
    with pytest.raises(InvalidRequest, match="has 3 ranks; use 'auto'") as odd_gang:
        GangLayout.of(3, 2, True)
    with pytest.raises(InvalidRequest, match="a batch of 1; without guidance use 'auto'") as odd_batch:
        GangLayout.of(4, 1, True)
    assert (odd_gang.value.param, odd_batch.value.param) == ("gang_size", "guidance_scale")
