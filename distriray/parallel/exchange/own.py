"""Keys and values of this rank's tokens, on their way to where those of all ranks are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F


class OwnKeysValues(ABC):
    """This rank's part of the keys and values of a layer."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """(batch, this rank's tokens, channels), of the keys as of the values."""

    @property
    @abstractmethod
    def like(self) -> torch.Tensor:
        """A tensor of their dtype and device."""

    @abstractmethod
    def computed(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Both, wherever they come to be."""

    @abstractmethod
    def put(self, place: torch.Tensor) -> None:
        """Write both into `place`, (this rank's tokens, 2, batch, channels), whose channels lie in a row."""


@dataclass(frozen=True)
class Computed(OwnKeysValues):
    """Keys and values, (batch, this rank's tokens, channels) each."""

    key: torch.Tensor
    value: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.key.shape)

    @property
    def like(self) -> torch.Tensor:
        return self.key

    def computed(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.key, self.value

    def put(self, place: torch.Tensor) -> None:
        torch.stack((self.key.transpose(0, 1), self.value.transpose(0, 1)), 1, out=place)


@dataclass(frozen=True)
class Projected(OwnKeysValues):
    """Products with a weight each, which are computed where they are to be.

    Attributes:
        input: (batch, this rank's tokens, channels of the input).
        to_key, to_value: weights, (channels, channels of the input).
    """

    input: torch.Tensor
    to_key: torch.Tensor
    to_value: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return *self.input.shape[:2], len(self.to_key)

    @property
    def like(self) -> torch.Tensor:
        return self.input

    def computed(self) -> tuple[torch.Tensor, torch.Tensor]:
        return F.linear(self.input, self.to_key), F.linear(self.input, self.to_value)

    def put(self, place: torch.Tensor) -> None:
        batch = len(self.input)
        for index, weight in enumerate((self.to_key, self.to_value)):
            output = place[:, index].transpose(0, 1)
            if batch > 1 and not place.is_cpu:
                torch.bmm(self.input, weight.t().expand(batch, -1, -1), out=output)
                continue
            for own, into in zip(self.input, output, strict=True):
                torch.mm(own, weight.t(), out=into)
