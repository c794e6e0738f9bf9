"""The tensors of one exchange as bytes on their way to and from peers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

Message = tuple[int, torch.Tensor]
"""A peer, and the bytes sent to it or received from it."""


class Messages(dict[int, torch.Tensor]):
    """The tensors of an exchange by peer, flat and looked at: `Communicator.messages` makes them.

    Attributes:
        tensors: that they are the bytes of.
    """

    def __init__(self, messages: Iterable[Message], tensors: Mapping[int, torch.Tensor]) -> None:
        super().__init__(messages)
        self.tensors = dict(tensors)


def indexed(device: torch.device | str) -> torch.device:
    """`device` with its index: `cuda` is unequal to the `cuda:0` of the tensors that are made on it."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def peers_of(rank: int, world_size: int) -> tuple[int, ...]:
    """The other ranks of a gang, ascending."""
    return (*range(rank), *range(rank + 1, world_size))


def as_messages(
    tensors: Mapping[int, torch.Tensor], rank: int, world_size: int, device: torch.device
) -> list[Message]:
    """The tensors that have bytes to move, as flat `uint8` views beside their peer, in the mapping's order.

    `Messages` are that already.

    Raises:
        ValueError: a peer is no other rank of the gang, or a tensor is not contiguous or not on `device`.
    """
    if isinstance(tensors, Messages):
        return list(tensors.items())
    messages: list[Message] = []
    for peer, tensor in tensors.items():
        if not 0 <= peer < world_size or peer == rank:
            peers = list(peers_of(rank, world_size))
            raise ValueError(f"rank {rank} cannot exchange with rank {peer}; its peers are {peers}")
        if not tensor.is_contiguous():
            raise ValueError(
                f"the tensor for rank {peer} of shape {tuple(tensor.shape)} and strides {tensor.stride()} is "
                "not contiguous; pass tensor.contiguous(), or receive into a contiguous buffer"
            )
        if tensor.device != device:
            raise ValueError(
                f"the tensor for rank {peer} is on {tensor.device}, the communicator on {device}"
            )
        if tensor.numel():
            messages.append((peer, tensor.detach().reshape(-1).view(torch.uint8)))
    return messages
