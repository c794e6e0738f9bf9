"""State of a request between two steps, as an object and as bytes."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch.utils import _pytree as pytree

from distriray.denoise.adapters import Adapter
from distriray.denoise.network_output import NetworkOutput
from distriray.denoise.schedulers import scheduler_class
from distriray.errors import InvalidRequest
from distriray.steps import guided_steps

_MAGIC = b"distriray state "
_VERSION = b"5\n"
_DIGEST_SIZE = 16


class Snapshot(NamedTuple):
    """All that a step changes of a state."""

    step: int
    values: dict[str, Any]
    network_output: NetworkOutput | None
    memory: dict[str, Any]
    drawn: list[torch.Tensor]


@dataclass(eq=False)
class DenoiseState:
    """A request after `step` of `num_steps` steps. Every rank of its gang holds all of it.

    Latents, embeddings and masks are on the pipeline's device. `timesteps` and the scheduler's tables stay on
    the host, which looks numbers up in them in every step: on a GPU each look would stop it.

    Attributes:
        family: of the pipelines that can go on with it, by its name in `pipelines.registry.PIPELINES`.
        values: what the family's steps hand on: `latents`, whose first dimension is the batch, `timesteps`,
            embeddings, for inpainting mask and image latents.
        scheduler: the request's own scheduler, whose memory is part of the state.
        generators: one CPU generator an image.
        guidance_end: share of the steps that have guidance, the first ones.
        adapters: those that it is drawn with.
        warnings: what of the request is not used, in words for whoever asked.
        network_output: the last step's; not part of the bytes.
        unsettled: how it was before the last step, as long as that step's latents may turn out to be garbage
            of a gang that broke (`Denoiser.settle`).
    """

    family: str
    task: str
    values: dict[str, Any]
    scheduler: Any
    generators: list[torch.Generator]
    guidance_scale: float
    guidance_rescale: float
    guidance_end: float
    height: int
    width: int
    step: int = 0
    adapters: tuple[Adapter, ...] = ()
    warnings: tuple[str, ...] = ()
    network_output: NetworkOutput | None = field(default=None, repr=False)
    unsettled: Snapshot | None = field(default=None, repr=False)

    @property
    def latents(self) -> torch.Tensor:
        latents: torch.Tensor = self.values["latents"]
        return latents

    @property
    def estimate(self) -> torch.Tensor | None:
        """The picture's latents so far, predicted in the last step; None before a step and after bytes."""
        return None if self.network_output is None else self.network_output.original(self.scheduler)

    @property
    def batch(self) -> int:
        """Number of images."""
        return len(self.generators)

    @property
    def num_steps(self) -> int:
        """Steps in all; a second-order scheduler's stages count one each."""
        return len(self.values["timesteps"])

    @property
    def guidance_over(self) -> bool:
        """Whether the next step is one of the last, without guidance."""
        return self.step >= guided_steps(self.guidance_end, self.num_steps)

    @property
    def done(self) -> bool:
        return self.step >= self.num_steps

    def to_bytes(self) -> bytes:
        """Version, checksum, and safetensors with a JSON header; no code, no pickle.

        Raises:
            TypeError: the scheduler remembers something that is neither a tensor nor a plain value.
            RuntimeError: the last step is not settled.
        """
        if self.unsettled is not None:
            raise RuntimeError("the last step may have left garbage; call `Denoiser.settle` first")
        tensors: dict[str, torch.Tensor] = {}
        memory = {k: v for k, v in vars(self.scheduler).items() if k != "_internal_dict"}
        header = {
            "family": self.family,
            "task": self.task,
            "values": _pack(self.values, "values", tensors),
            "scheduler": type(self.scheduler).__name__,
            "scheduler_config": _pack(_config_of(self.scheduler), "config", tensors),
            "scheduler_memory": _pack(memory, "scheduler", tensors),
            "guidance_scale": self.guidance_scale,
            "guidance_rescale": self.guidance_rescale,
            "guidance_end": self.guidance_end,
            "height": self.height,
            "width": self.width,
            "step": self.step,
            "images": self.batch,
            "adapters": self.adapters,
            "warnings": self.warnings,
        }
        for index, generator in enumerate(self.generators):
            tensors[f"generator/{index}"] = generator.get_state()
        content = save(tensors, {"state": json.dumps(header)})
        return _MAGIC + _VERSION + _digest(content) + content

    @classmethod
    def from_bytes(cls, blob: bytes) -> DenoiseState:
        """The state that `to_bytes` wrote, on the CPU.

        Raises:
            InvalidRequest: not such bytes, damaged, of another version, or with a scheduler that is not known
                here or remembers other things than this release's.
        """
        content = _checked(blob)
        try:
            # Copies: what is loaded are views of `content`, which nobody may write to, at any alignment.
            tensors = {name: tensor.clone() for name, tensor in load(content).items()}
            header = json.loads(_metadata(content)["state"])
            scheduler = scheduler_class(header["scheduler"]).from_config(
                _unpack(header["scheduler_config"], tensors)
            )
            _remember(scheduler, _unpack(header["scheduler_memory"], tensors))
            generators = []
            for index in range(header["images"]):
                generator = torch.Generator()
                generator.set_state(tensors[f"generator/{index}"])
                generators.append(generator)
            return cls(
                family=header["family"],
                task=header["task"],
                values=_unpack(header["values"], tensors),
                scheduler=scheduler,
                generators=generators,
                guidance_scale=header["guidance_scale"],
                guidance_rescale=header["guidance_rescale"],
                guidance_end=header["guidance_end"],
                height=header["height"],
                width=header["width"],
                step=header["step"],
                adapters=tuple(Adapter(*adapter) for adapter in header["adapters"]),
                warnings=tuple(header["warnings"]),
            )
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, InvalidRequest):
                raise
            raise InvalidRequest(
                f"these bytes are not a saved state: {type(error).__name__}: {error}"
            ) from error

    def snapshot(self) -> Snapshot:
        """A snapshot with which `restore` undoes the steps that follow.

        Families replace the tensors they remember. Schedulers write into lists, and PNDM's Runge-Kutta steps
        into a tensor of the latents' shape; so these are what is copied.
        """

        def kept(value: Any) -> Any:
            if isinstance(value, torch.Tensor) and value.shape == self.latents.shape:
                return value.clone()
            return value.copy() if isinstance(value, list | deque) else value

        memory = {name: kept(value) for name, value in vars(self.scheduler).items()}
        drawn = [generator.get_state() for generator in self.generators]
        return Snapshot(self.step, dict(self.values), self.network_output, memory, drawn)

    def restore(self, before: Snapshot) -> None:
        """Be as it was when `before` was taken; that can be restored once."""
        self.step, self.network_output, self.unsettled = before.step, before.network_output, None
        self.values = before.values
        vars(self.scheduler).clear()
        vars(self.scheduler).update(before.memory)
        for generator, drawn in zip(self.generators, before.drawn, strict=True):
            generator.set_state(drawn)

    def to(self, device: torch.device | str) -> DenoiseState:
        """This state with its tensors on `device`, and `timesteps` and the scheduler's tables on the host."""

        def on_device(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device)

        def remembered(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device if tensor.ndim == 4 else "cpu")

        moved, memory = partial(pytree.tree_map_only, torch.Tensor), vars(self.scheduler)
        self.values = {
            name: value.cpu() if name == "timesteps" else moved(on_device, value)
            for name, value in self.values.items()
        }
        memory.update(moved(remembered, dict(memory)))
        return self


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST_SIZE).digest()


def _checked(blob: bytes) -> bytes:
    """The content of saved bytes; raises InvalidRequest."""
    if not blob.startswith(_MAGIC):
        raise InvalidRequest("these bytes are not a saved state")
    version, _, rest = blob[len(_MAGIC) :].partition(b"\n")
    if version + b"\n" != _VERSION:
        raise InvalidRequest(
            f"a state of version {version[:20]!r}; this release reads version {_VERSION.strip()!r}"
        )
    digest, content = rest[:_DIGEST_SIZE], rest[_DIGEST_SIZE:]
    if _digest(content) != digest:
        raise InvalidRequest("the saved state is damaged: its checksum does not match")
    return content


def _remember(scheduler: Any, memory: dict[str, Any]) -> None:
    """Give a fresh scheduler the attributes of the saved one, which must be of the same release."""
    lost = vars(scheduler).keys() - memory.keys() - {"_internal_dict"}
    foreign = {name for name in memory if name.startswith("__") or hasattr(type(scheduler), name)}
    if lost or foreign:
        raise InvalidRequest(
            f"the saved {type(scheduler).__name__} differs from this diffusers' in {sorted(lost | foreign)}"
        )
    vars(scheduler).update(memory)


def _config_of(scheduler: Any) -> dict[str, Any]:
    return {k: v for k, v in scheduler.config.items() if not k.startswith("_")}


def _metadata(blob: bytes) -> dict[str, str]:
    """The metadata of safetensors bytes: a JSON header behind its own length."""
    length = int.from_bytes(blob[:8], "little")
    metadata: dict[str, str] = json.loads(blob[8 : 8 + length])["__metadata__"]
    return metadata


def _pack(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """`value` as JSON, with its tensors put into `tensors` under names that begin with `name`."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, np.ndarray):
        tensors[name] = torch.from_numpy(value.copy())
        return {"array": name}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {"dict": {key: _pack(item, f"{name}/{key}", tensors) for key, item in value.items()}}
    for kind in (list, tuple, deque):
        if isinstance(value, kind):
            items = [_pack(item, f"{name}/{index}", tensors) for index, item in enumerate(value)]
            return {kind.__name__: items}
    raise TypeError(f"{name} is a {type(value).__name__}, which cannot be saved")


def _unpack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "array":
        return tensors[content].numpy()
    if kind == "dict":
        return {key: _unpack(item, tensors) for key, item in content.items()}
    return {"list": list, "tuple": tuple, "deque": deque}[kind](_unpack(item, tensors) for item in content)
