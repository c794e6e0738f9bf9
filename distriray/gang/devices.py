"""Kinds of device: what differs between them for whoever places, starts or measures workers."""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from distriray.gang.config import HostConfig


class DeviceKind(Protocol):
    """One kind of device that workers compute on.

    Attributes:
        gpus: whole GPUs that Ray reserves for each worker.
        guessed_step_s: seconds of a step of the default size, until one was seen.
        links_at_rest: no worker of a host may compute while gangs are formed.
    """

    gpus: int
    guessed_step_s: float
    links_at_rest: bool

    def environment(self, config: HostConfig) -> Mapping[str, str]:
        """Variables of a worker's process, which libraries read once."""

    def device(self) -> torch.device:
        """The device of a worker, in its own process."""

    def bind(self) -> None:
        """Make the calling thread compute on that device, as one of several workers of a machine."""

    def product(self) -> str:
        """The name that the device's maker gave it, for profiles."""

    def memory(self) -> int:
        """Bytes that this process has taken."""

    def trim(self) -> None:
        """Give back what torch keeps of the device's memory and does not use."""


class Cpu:
    """One thread of a CPU."""

    gpus = 0
    guessed_step_s = 1.0
    links_at_rest = False

    def environment(self, config: HostConfig) -> Mapping[str, str]:
        return {"OMP_NUM_THREADS": "1"}

    def device(self) -> torch.device:
        import torch

        return torch.device("cpu")

    def bind(self) -> None:
        import torch

        torch.set_num_threads(1)

    def product(self) -> str:
        return "cpu"

    def memory(self) -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def trim(self) -> None:
        """Torch keeps none of a CPU's."""


class Cuda:
    """One NVIDIA GPU: the one that Ray has reserved for the worker.

    Where Ray was told of more GPUs than there are, workers share them, which is how one GPU tests a gang.
    Each worker must see them all then: `RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES=1`.
    """

    gpus = 1
    guessed_step_s = 0.1
    links_at_rest = True

    def environment(self, config: HostConfig) -> Mapping[str, str]:
        most = config.nccl_max_ctas
        return {} if most is None else {"NCCL_MAX_CTAS": str(most)}

    def device(self) -> torch.device:
        import ray
        import torch

        return torch.device("cuda", place_of(ray.get_gpu_ids()[0], os.environ, torch.cuda.device_count()))

    def bind(self) -> None:
        import torch

        torch.cuda.set_device(self.device())

    def product(self) -> str:
        import torch

        return torch.cuda.get_device_name(self.device())

    def memory(self) -> int:
        import torch

        return int(torch.cuda.memory_reserved(self.device()))

    def trim(self) -> None:
        from distriray.parallel.graphs import give_back_unused

        give_back_unused()


DEVICES: Mapping[str, DeviceKind] = {"cpu": Cpu(), "cuda": Cuda()}
"""Every kind of device by its name in a configuration, which is torch's name for it."""


def place_of(gpu: int | str, environment: Mapping[str, str], gpus: int) -> int:
    """Torch's number of the GPU that Ray calls `gpu`, in a process that sees `gpus` of them.

    Torch counts those that `CUDA_VISIBLE_DEVICES` of `environment` lists, Ray names them as it does there.
    """
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    place = int(gpu) if listed is None else listed.replace(" ", "").split(",").index(str(gpu))
    return place % max(1, gpus)  # without any, torch says so


def worker_resources(device: str, cpus: float) -> dict[str, float]:
    """Resources that Ray reserves for one worker with that many logical CPUs."""
    gpus = DEVICES[device].gpus
    return {"CPU": cpus, **({"GPU": float(gpus)} if gpus else {})}
