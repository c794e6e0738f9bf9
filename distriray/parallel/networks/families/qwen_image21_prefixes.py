"""Prefixes of Qwen-Image 2.1 that callers keep, as keys and values, from the first step of an image on."""

from __future__ import annotations

import math
from operator import is_
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

from distriray.errors import InvalidRequest
from distriray.parallel.networks.base import Call
from distriray.parallel.share import Share

TOKENS_PER_SLOT = 4
"""Tokens of an image that stand in one place of the text."""
_MASKS = "img_mask", "encoder_hidden_states_mask"


class Standing(NamedTuple):
    """Where the image stands behind a prefix that is kept: what is the same in every step.

    Attributes:
        shapes, masks: what the network was told of it: of all images, and of images and text.
        rotary: what turns the image's queries and keys, (tokens, channels).
        key_mask: which tokens of prefix and image are not padding, bool (batch, 1, 1, tokens); None if all.
    """

    shapes: Any
    masks: tuple[Any, ...]
    rotary: torch.Tensor
    key_mask: torch.Tensor | None


class Prefixes:
    """What a network knows of callers' `kv_cache`s, for as long as these live."""

    def __init__(self) -> None:
        self._parts: WeakKeyDictionary[QwenImage21KVCache, slice] = WeakKeyDictionary()
        self._standings: WeakKeyDictionary[QwenImage21KVCache, Standing] = WeakKeyDictionary()

    def keep(self, cache: QwenImage21KVCache, share: Share) -> None:
        """Note that a `kv_cache` has been filled, with the images that this rank computes."""
        self._parts[cache] = share.part

    def own_part(self, cache: QwenImage21KVCache, share: Share) -> QwenImage21KVCache:
        """What a `kv_cache` has of the images that this rank computes; raises InvalidRequest."""
        whole = slice(0, share.batch)
        part, images = self._parts.get(cache, whole), len(cache.get_layer(0).get()[0])
        if images != part.stop - part.start or part not in (whole, share.part):
            raise InvalidRequest(
                f"a kv_cache of {images} images, where this rank computes those from {share.part.start} to "
                f"{share.part.stop} of {share.batch}; make it anew, with kv_cache_mode 'extract'"
            )
        if part == share.part:
            return cache
        own = QwenImage21KVCache(len(cache.layer_caches))
        for layer, kept in zip(own.layer_caches, cache.layer_caches, strict=True):
            layer.store(*(each[share.part] for each in kept.get()))
        return own

    def standing(self, call: Call, positions: Any) -> Standing:
        """Where a call's image stands: looked up on the host where that was not done for its `kv_cache`.

        Args:
            positions: the network's layer of them.
        """
        arguments, cache = call.arguments, call.arguments["kv_cache"]
        shapes, masks = arguments["img_shapes"][0], tuple(arguments[name] for name in _MASKS)
        known = self._standings.get(cache)
        if known is None or known.shapes != shapes or not all(map(is_, known.masks, masks)):
            among_text, text_mask, key_mask = masks[0][0], masks[1], None
            images = among_text.repeat_interleave(torch.where(among_text, TOKENS_PER_SLOT, 1))
            rotary = positions(shapes, images, device=call.sample.device)
            if text_mask is not None:
                valid = images.new_ones(call.batch, len(images))
                valid[:, ~images] = text_mask.bool()[:, ~among_text[: text_mask.shape[1]]]
                key_mask = valid[:, None, None]
            known = self._standings[cache] = Standing(
                shapes, masks, rotary[-math.prod(shapes[-1]) :], key_mask
            )
        return known


def keys_and_values(cache: QwenImage21KVCache) -> list[torch.Tensor]:
    """Keys and values of each block in turn."""
    return [each for layer in cache.layer_caches for each in layer.get()]
