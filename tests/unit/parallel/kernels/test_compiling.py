"""Every kernel compiles for GPUs, down to their machine code, where there is none."""

from __future__ import annotations

from typing import Any

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from distriray.parallel.kernels.fused import few_bits, fit, group_norm  # noqa: E402
from tests.parameters import pairwise  # noqa: E402

FLOATS = ["fp32", "fp16", "bf16"]
CAPABILITIES = [80, 90, 120]
"""Of an A100, an H100 and an RTX 5090."""


def machine_code(kernel: Any, capability: int, constants: dict[str, Any], **pointers: str) -> bytes:
    """What a kernel becomes; arguments are constants, pointers, integers, and these two floats."""
    warps = constants.pop("num_warps")
    types = {"eps": "fp32", "forgetting": "fp32", **dict.fromkeys(constants, "constexpr"), **pointers}
    source = ASTSource(
        kernel,
        signature={name: types.get(name, "i64") for name in kernel.arg_names},
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
    )
    target = GPUTarget("cuda", capability, 32)
    code: bytes = triton.compile(source, target=target, options={"num_warps": warps}).asm["cubin"]
    return code


@pytest.mark.parametrize(("capability", "dtype", "bits"), pairwise(CAPABILITIES, FLOATS, [2, 4, 8]), ids=str)
def test_changes_in_few_bits(capability: int, dtype: str, bits: int) -> None:
    constants, values, message = few_bits._constants(bits), f"*{dtype}", "*u8"
    encode = few_bits._encode, capability, dict(constants)
    assert machine_code(*encode, values=values, known=values, message=message)
    decode = few_bits._decode, capability, {**constants, "FILLS": bits == 4}
    assert machine_code(*decode, message=message, known=values, into=values)


@pytest.mark.parametrize(("capability", "dtype"), zip(CAPABILITIES, FLOATS, strict=True))
def test_group_norm(capability: int, dtype: str) -> None:
    values, numbers, warps = f"*{dtype}", "*fp32", {"num_warps": group_norm._WARPS}
    tiles = {"ROW_TILE": 8, "COLUMN_TILE": 1024, "TILES": 4, **warps}
    assert machine_code(group_norm._part_moments, capability, tiles, input=values, moments=numbers)
    parts = {"PARTS": group_norm._MAX_PARTS, **warps}
    assert machine_code(group_norm._merge_parts, capability, parts, moments=numbers, merged=numbers)
    whole = {"ABOVE": True, "BELOW": True, "WHOLE": False, "SCALES": True, "SHIFTS": True}
    tiles = {"RANK_TILE": 4, "CHANNEL_TILE": 64, "POSITION_TILE": 64, **whole, **warps}
    pointers = {"statistics": numbers, "shares": numbers}
    pointers |= dict.fromkeys(("input", "above", "below", "output", "weight", "bias"), values)
    assert machine_code(group_norm._normalize, capability, tiles, **pointers)


@pytest.mark.parametrize(("capability", "dtype"), zip(CAPABILITIES, FLOATS, strict=True))
def test_fitted_weights(capability: int, dtype: str) -> None:
    constants = {"UNIT": 8, "BLOCK": fit._BLOCK, "num_warps": fit._WARPS}
    pointers = {
        **dict.fromkeys(("received", "before", "change"), f"*{dtype}"),
        "blocks": "*i32",
        "sums": "*fp32",
    }
    assert machine_code(fit._add, capability, dict(constants), **pointers)
    assert machine_code(fit._extrapolate, capability, {"SUMS": fit._SUMS, **constants}, **pointers)
