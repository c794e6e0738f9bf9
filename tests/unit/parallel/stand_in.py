"""A device that is none: its tensors live on the CPU, and whatever would stop a GPU for the host is noted."""

from __future__ import annotations

import traceback
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("meta")
"""What tensors of the stand-in say that they are on; nothing else is there."""

READS = {
    "aten::_local_scalar_dense",
    "aten::_linalg_check_errors",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::nonzero",
    "aten::repeat_interleave",
    "aten::_unique2",
}
MASKED = {"aten::index", "aten::index_put_", "aten::_index_put_impl_"}


class OnDevice(torch.Tensor):
    """A tensor of the stand-in, which is `inner` on the CPU."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnDevice:
        tensor: OnDevice = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        tensor.inner = inner
        return tensor

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def tolist(self) -> Any:
        return self.cpu().tolist()  # torch's own refuses subclasses

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return StandIn().perform(operation, args, kwargs or {})


class _Autocast(torch.autocast):
    """torch's own, which knows the CPU where the stand-in is meant."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == DEVICE.type else device_type, *args, **kwargs)


class StandIn(TorchDispatchMode):
    """While it is active, tensors that are made on `DEVICE` are its own.

    Attributes:
        stops: what would have stopped a GPU, and where it was asked for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stops: list[str] = []
        self._made_on_host = _MadeOnHost()
        self._autocast = mock.patch.object(torch, "autocast", _Autocast)

    def __enter__(self) -> StandIn:
        super().__enter__()
        self._made_on_host.__enter__()
        self._autocast.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._autocast.stop()
        self._made_on_host.__exit__(*error)
        super().__exit__(*error)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.perform(operation, args, kwargs or {})

    def take(self, module: nn.Module) -> None:
        """Move a module to the device."""
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[name] = nn.Parameter(OnDevice(parameter.data), requires_grad=False)
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = OnDevice(buffer)

    def perform(self, operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        name = operation.name().partition(".")[0]
        leaves = pytree.tree_leaves((args, kwargs))
        ours = [leaf for leaf in leaves if isinstance(leaf, OnDevice)]
        hosts = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, OnDevice)]
        target = kwargs.get("device")
        goes = target is not None and torch.device(target) == DEVICE
        if name == "aten::_fused_sdp_choice":
            return 0  # attention by matrix products, which knows no devices
        sized = kwargs.get("output_size") is not None  # what is repeated need not be counted
        if not sized and self._stops(name, ours, hosts, goes, leaves=target is not None and not goes):
            self.stops.append(f"{name} of {[tuple(t.shape) for t in (*ours, *hosts)]}: {_caller()}")
        inner = {id(leaf): leaf.inner for leaf in ours}
        outer = {id(leaf.inner): leaf for leaf in ours}
        args, kwargs = pytree.tree_map(lambda leaf: inner.get(id(leaf), leaf), (args, kwargs))
        if goes:
            kwargs["device"] = torch.device("cpu")
        result = operation(*args, **kwargs)
        if not goes and (not ours or target is not None):
            return result

        def place(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            return outer.get(id(leaf)) if id(leaf) in outer else OnDevice(leaf)

        return pytree.tree_map(place, result)

    def _stops(
        self, name: str, ours: list[OnDevice], hosts: list[torch.Tensor], goes: bool, *, leaves: bool
    ) -> bool:
        """Whether an operation reads on the device, or takes a tensor from or to it."""
        if name == "aten::copy_":
            return bool(ours and hosts)
        if goes:
            return bool(hosts)
        if not ours:
            return False
        masks = name in MASKED and any(tensor.dtype == torch.bool for tensor in ours[1:])
        # Kernels take scalars of the host as arguments.
        return leaves or masks or name in READS or any(tensor.ndim for tensor in hosts)


class _MadeOnHost(TorchFunctionMode):
    """Makes tensors of numbers copies from the host, as for a GPU; made on `DEVICE` they would be lost."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") == DEVICE:
            kwargs.pop("device")
            return function(*args, **kwargs).to(DEVICE)
        return function(*args, **kwargs)


def _caller() -> str:
    """Where this project or diffusers asked for it."""
    ours = [
        f for f in traceback.extract_stack() if "/distriray/" in f.filename or "/diffusers/" in f.filename
    ]
    lines = [f"{f.filename.rpartition('site-packages/')[2]}:{f.lineno} {f.line}" for f in ours]
    return " < ".join(lines[:-3:-1])
