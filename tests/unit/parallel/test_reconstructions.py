"""Reconstructions: sender and receivers hold the same, and come nearer to the values with every message."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distriray.parallel.exchange.reconstructions import Reconstruction, Reconstructions
from distriray.parallel.exchange.slots import LAYERS_CHANGED, Slot
from distriray.parallel.kernels.few_bits import GROUP

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def values(
    step: int, shape: tuple[int, ...] = (3, 2, 5, 7), dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_receivers_hold_what_the_sender_holds_bit_for_bit(bits: int, dtype: torch.dtype) -> None:
    start = values(0, dtype=dtype)
    sender, receiver = (Reconstruction(start.clone(), bits) for _ in range(2))
    for step in range(1, 6):
        message = sender.encode(values(step, dtype=dtype).transpose(0, 1).contiguous().transpose(0, 1))
        assert message.dtype == torch.uint8 and message.shape == (sender.message_bytes,)
        receiver.decode(message.clone())
        assert torch.equal(receiver.values, sender.values)


@pytest.mark.parametrize(("bits", "share"), [(2, 1 / 3), (4, 1 / 15), (8, 1 / 255)])
def test_no_number_is_further_off_than_half_a_level_of_its_group(bits: int, share: float) -> None:
    reconstruction = Reconstruction(torch.zeros(4 * GROUP), bits)
    wanted = values(1, (4, GROUP)) * torch.tensor([1e-3, 1.0, 10.0, 1e4]).view(-1, 1)
    reconstruction.encode(wanted.flatten())
    error = (reconstruction.values.view(4, GROUP) - wanted).abs().amax(1)
    # Scales are rounded to bfloat16, which may clip the largest of a group by 1/256.
    assert (error <= wanted.abs().amax(1) * (share + 1 / 256)).all() and (error > 0).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_errors_are_made_up_for_by_the_next_messages(bits: int) -> None:
    reconstruction, wanted = Reconstruction(torch.zeros(3 * GROUP + 5), bits), values(1, (3 * GROUP + 5,))
    errors = []
    for _ in range(6):
        reconstruction.encode(wanted)
        errors.append(float((reconstruction.values - wanted).abs().max()))
    assert errors[-1] < 0.02 * errors[0] or errors[-1] < 1e-6


def test_what_does_not_change_is_exact() -> None:
    wanted = values(3)
    reconstruction = Reconstruction(wanted.clone(), 4)
    reconstruction.encode(wanted)
    assert torch.equal(reconstruction.values, wanted)


@pytest.mark.parametrize(("bits", "numbers", "expected"), [(4, 64, 36), (8, 33, 68), (2, 1, 10)])
def test_a_message_is_as_small_as_its_bits_say(bits: int, numbers: int, expected: int) -> None:
    assert Reconstruction(torch.zeros(numbers), bits).message_bytes == expected


def slot(rows: int) -> Slot:
    shape = (1, 2, rows, 3)
    return Slot("halos", ((1, shape),), ((1, shape),), torch.float32)


def keep(reconstructions: Reconstructions, step: int, *rows: int) -> None:
    reconstructions.rewind()
    for count in rows:
        shape: Any = (1, 2, count, 3)
        reconstructions.keep(slot(count), {1: values(step, shape)}, {1: values(step + 1, shape)}, 4)
    reconstructions.end(displaced=False)


def test_a_whole_step_starts_every_slot_anew_in_the_same_memory() -> None:
    reconstructions = Reconstructions()
    keep(reconstructions, 1, 1, 2)
    reconstructions.rewind()
    sent, received = reconstructions.next(slot(1))
    sent[1].encode(values(9, (1, 2, 1, 3)))
    pointer, nbytes = received[1].values.data_ptr(), reconstructions.nbytes
    keep(reconstructions, 5, 1, 2)
    reconstructions.rewind()
    sent, received = reconstructions.next(slot(1))
    assert torch.equal(sent[1].values, values(5, (1, 2, 1, 3)))
    assert received[1].values.data_ptr() == pointer
    assert reconstructions.nbytes == nbytes == 4 * (2 * 6 + 2 * 12)


def test_another_layer_in_the_middle_of_an_image_is_an_error_and_none_between_images() -> None:
    reconstructions = Reconstructions()
    keep(reconstructions, 1, 1, 2)
    reconstructions.rewind()
    with pytest.raises(RuntimeError, match=LAYERS_CHANGED):
        reconstructions.next(slot(2))
    reconstructions.rewind()
    reconstructions.next(slot(1))
    with pytest.raises(RuntimeError, match=LAYERS_CHANGED):
        reconstructions.end(displaced=True)
    keep(reconstructions, 1, 1)  # a layer fewer
    keep(reconstructions, 1, 3, 1)  # and others
    reconstructions.rewind()
    for rows in (3, 1):
        reconstructions.next(slot(rows))
    reconstructions.end(displaced=True)
