"""Adapters (LoRA) of a pipeline: held within a bound, and switched between requests."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from diffusers.loaders.lora_base import _load_lora_into_text_encoder
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from distriray.adapters import AdapterSpec, Lora
from distriray.denoise.adapter_file import AdapterFile, mark_of, parts_of
from distriray.denoise.weight_files import first_lines
from distriray.errors import InvalidRequest, UnusableAdapter
from distriray.names import check_names
from distriray.parallel.room import is_out_of_memory

MOST_HELD = 64
"""Adapters that are held at once, however small they are: every layer has its part of each."""

_LOADING = threading.Lock()
"""Held while weights are loaded without memory of their own first: PEFT replaces a method of `nn.Module` for
that, which two threads at once would leave replaced."""


class Adapter(NamedTuple):
    """An adapter that a request is drawn with; `digest` tells its weights from those of others."""

    name: str
    scale: float
    digest: str


@dataclass(frozen=True)
class AdapterCounts:
    """Counts of the adapters that were asked for: held already, loaded, dropped for want of room."""

    hits: int = 0
    loads: int = 0
    evictions: int = 0


class Adapters:
    """The adapters of one pipeline. One thread uses it.

    Those that were used last stay in the network, beside its own weights, which never change: layers with
    no adapter in use compute what they compute without any, bit by bit.

    Args:
        pipeline: of diffusers; adapters that it has by itself are not known here.
        family: its name in `pipelines.registry.PIPELINES`.
        most_bytes: of the weights of all adapters that are held, in memory.

    Attributes:
        known: the adapters that requests may name.
        counts: what became of those that were asked for.
        seconds: spent on reading, loading and switching.
    """

    def __init__(self, pipeline: Any, family: str, most_bytes: int) -> None:
        self.known: dict[str, AdapterSpec] = {}
        self.counts = AdapterCounts()
        self.seconds = 0.0
        self._pipeline, self._family, self._most_bytes = pipeline, family, most_bytes
        self._held: dict[str, int] = {}  # bytes by digest, the last one used at the end
        self._names: dict[str, str] = {}  # by digest
        self._digests: dict[tuple[str, int, int], str] = {}  # of files, by path, size and time
        self._downloaded: dict[AdapterSpec, Path] = {}
        self._layers: list[LoraLayer] = []
        self._used: tuple[Adapter, ...] = ()

    def learn(self, specs: Iterable[AdapterSpec]) -> None:
        """Know these adapters too, in place of others with their names."""
        self.known.update((spec.name, spec) for spec in specs)

    @property
    def held(self) -> tuple[str, ...]:
        """The names of the adapters in memory, the last one used at the end."""
        return tuple(self._names[digest] for digest in self._held)

    @property
    def nbytes(self) -> int:
        """Memory of the adapters that are held, in bytes."""
        return sum(self._held.values())

    def check(self, spec: AdapterSpec) -> None:
        """Read an adapter that nobody asked for yet; raises UnusableAdapter unless it fits the pipeline."""
        self._read(spec)

    def choose(self, loras: Sequence[Lora]) -> tuple[Adapter, ...]:
        """Use the adapters that a request names, and none else. Those with scale 0 are none.

        Raises:
            AdapterNotFound: a name is not known.
            UnusableAdapter: a file is missing, damaged or not for this pipeline.
            InvalidRequest: together they need more than `most_bytes`.
        """
        check_names("loras", loras, self.known)
        wanted = [lora for lora in loras if lora.scale]
        with self._timed():
            files: dict[str, AdapterFile] = {}
            chosen = [
                Adapter(lora.name, lora.scale, self._digest(self.known[lora.name], files)) for lora in wanted
            ]
            self._use(tuple(chosen), files)
        return self._used

    def use(self, adapters: tuple[Adapter, ...]) -> None:
        """Use these adapters and none else: those that a state was begun with.

        Raises:
            UnusableAdapter: one is not held any more, and its file is another now; else as `choose`.
        """
        if adapters == self._used:
            return
        with self._timed():
            files: dict[str, AdapterFile] = {}
            for name, _, digest in adapters:
                if digest in self._held:
                    continue
                if name not in self.known or self._digest(self.known[name], files) != digest:
                    raise UnusableAdapter(f"adapter {name!r} was replaced while a request was drawn with it")
            self._use(adapters, files)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - began

    def _digest(self, spec: AdapterSpec, files: dict[str, AdapterFile]) -> str:
        """The digest of an adapter's weights; if they are not held they are read, into `files`."""
        digest = self._digests.get(mark_of(self._locate(spec)))
        if digest not in self._held:
            file = self._read(spec)
            files[file.digest] = file
            digest = file.digest
        return digest

    def _locate(self, spec: AdapterSpec) -> Path:
        """The file of an adapter; the Hub is asked once, as it may take long."""
        path = self._downloaded.get(spec)
        if path is None or not path.is_file():
            path = spec.locate()
            if not spec.is_local:
                self._downloaded[spec] = path
        return path

    def _read(self, spec: AdapterSpec) -> AdapterFile:
        """The file of an adapter; raises UnusableAdapter unless all its weights fit the pipeline."""
        if spec.families and self._family not in spec.families:
            families = ", ".join(spec.families)
            raise UnusableAdapter(f"adapter {spec.name!r} is for {families}; the model is {self._family}")
        file = AdapterFile.read(spec.name, self._locate(spec), self._pipeline, self._most_bytes)
        self._digests[file.mark] = file.digest
        return file

    # Using

    def _use(self, adapters: tuple[Adapter, ...], files: Mapping[str, AdapterFile]) -> None:
        """Switch to adapters that are held or read; what fails leaves none in use."""
        new = {digest: name for name, _, digest in adapters if digest not in self._held}
        if new:
            self._switch(())
            self._make_room({digest for _, _, digest in adapters}, [files[digest] for digest in new])
            for digest, name in new.items():
                self._load(name, files[digest])
        for _, _, digest in adapters:
            self._held[digest] = self._held.pop(digest)
        hits, loads = self.counts.hits + len(adapters) - len(new), self.counts.loads + len(new)
        self.counts = replace(self.counts, hits=hits, loads=loads)
        if adapters != self._used:
            self._switch(adapters)

    def _switch(self, adapters: tuple[Adapter, ...]) -> None:
        scales: dict[str, float] = {}
        for _, scale, digest in adapters:  # two names may be of the same weights
            scales[_key(digest)] = scales.get(_key(digest), 0.0) + scale
        for layer in self._layers:
            here = [key for key in scales if key in layer.lora_A]
            if here:
                layer.set_adapter(here)
            if layer.disable_adapters is bool(here):
                layer.enable_adapters(bool(here))
            for key in here:
                layer.set_scale(key, scales[key])
        self._used = adapters

    def _make_room(self, kept: set[str], files: Sequence[AdapterFile]) -> None:
        """Drop what was not used for longest until there is room for these files."""
        more, count = sum(file.nbytes for file in files), len(files)
        least = more + sum(nbytes for digest, nbytes in self._held.items() if digest in kept)
        if least > self._most_bytes:
            raise InvalidRequest(
                f"the adapters take {least} bytes together, and {self._most_bytes} are there for them "
                "(lora_cache_bytes); use fewer at once",
                "loras",
            )
        for digest in list(self._held):
            if self.nbytes + more <= self._most_bytes and len(self._held) + count <= MOST_HELD:
                return
            if digest not in kept:
                self._drop(digest)
                self.counts = replace(self.counts, evictions=self.counts.evictions + 1)

    def _drop(self, digest: str) -> None:
        key = _key(digest)
        for component in parts_of(self._pipeline).values():
            for layer in _lora_layers(component):
                if key in layer.lora_A:
                    layer.set_adapter([other for other in layer.active_adapters if other != key])
                    layer.delete_adapter(key)
            getattr(component, "peft_config", {}).pop(key, None)
        self._held.pop(digest, None)
        self._names.pop(digest, None)

    def _load(self, name: str, file: AdapterFile) -> None:
        """Put the weights of a file into the pipeline, all of them or none."""
        key = _key(file.digest)
        common = {"network_alphas": None, "metadata": file.scales, "adapter_name": key}
        self._names[file.digest] = name
        try:
            for part in file.factors:
                component = parts_of(self._pipeline)[part]
                place = component.device, component.dtype
                weights = {k: w.to(*place) for k, w in file.weights.items() if k.startswith(f"{part}.")}
                with _LOADING, warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # that it has adapters already
                    if part.startswith("text_encoder"):
                        _load_lora_into_text_encoder(weights, text_encoder=component, prefix=part, **common)
                    else:
                        component.load_lora_adapter(weights, prefix=part, low_cpu_mem_usage=True, **common)
            found = {
                part: factors
                for part, component in parts_of(self._pipeline).items()
                if (factors := _factors_of(component, key))
            }
            if {part: frozenset(factors) for part, factors in found.items()} != file.factors:
                raise UnusableAdapter(f"adapter {name!r} has weights that diffusers did not take")
        except Exception as error:
            self._drop(file.digest)
            self._look_for_layers()
            self._switch(())
            if isinstance(error, UnusableAdapter) or is_out_of_memory(error):
                raise
            raise UnusableAdapter(f"adapter {name!r} cannot be loaded: {first_lines(error, 1)}") from error
        self._held[file.digest] = sum(w.nbytes for weights in found.values() for w in weights.values())
        self._look_for_layers()

    def _look_for_layers(self) -> None:
        self._layers = [layer for part in parts_of(self._pipeline).values() for layer in _lora_layers(part)]


def _key(digest: str) -> str:
    """PEFT's name for an adapter: the same on all ranks, and another for other weights."""
    return f"lora_{digest}"


def _lora_layers(component: nn.Module) -> list[LoraLayer]:
    return [layer for layer in component.modules() if isinstance(layer, LoraLayer)]


def _factors_of(component: nn.Module, key: str) -> dict[str, Tensor]:
    """The weights of an adapter in a component, by the names that files give them."""
    found: dict[str, Tensor] = {}
    for name, layer in component.named_modules():
        if isinstance(layer, LoraLayer) and key in layer.lora_A:
            for kind in layer.adapter_layer_names:
                held = getattr(layer, kind)
                if key in held:
                    for rest, weight in held[key].named_parameters():
                        found[f"{name}.{kind}.{rest}"] = weight
    return found
