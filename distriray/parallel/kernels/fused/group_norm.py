"""Group norm by Triton: every element is read once for its statistics, and once more to be normalized.

Feature maps are read as (batch, channels, positions) where they lie, contiguous or channels last, in tiles of
channels x positions. Offsets that grow with a feature map are 64 bits wide.
"""
# mypy: allow-untyped-defs
# Triton evaluates the annotations of a kernel's arguments, so all but constants have none.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from distriray.parallel.kernels.rows_around import RowsAround

_STATISTICS_TILE = 8192
_NORMALIZED_TILE = 4096
_WARPS = 8
# A program of the statistics reads that many elements at least, so that small groups need no second launch;
# and a group has that many programs at most.
_SPAN = 32768
_MAX_PARTS = 128


def group_statistics(input: torch.Tensor, groups: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """Mean and biased variance of each group of (batch, channels, ...): float32 (batch, groups, 2).

    A group of many elements is cut into parts of equal shares, but for the last, whose moments are merged.

    Raises:
        ValueError: no elements, or channels that are no multiple of the groups.
    """
    maps = _maps(input)
    batch, channels, positions = maps.shape
    if channels % groups:
        raise ValueError(f"{channels} channels are no multiple of {groups} groups")
    batch_stride, channel_stride, column_stride = maps.stride()
    rows, columns = channels // groups, positions
    if channel_stride == positions * column_stride:  # a group is one run of elements
        rows, columns = 1, rows * positions
    row_tile = triton.next_power_of_2(rows)
    column_tile = max(_STATISTICS_TILE // row_tile, 1)
    tiles = max(_SPAN // _STATISTICS_TILE, triton.cdiv(columns, column_tile * _MAX_PARTS))
    tiles = triton.next_power_of_2(min(tiles, triton.cdiv(columns, column_tile)))
    span = tiles * column_tile
    parts = triton.cdiv(columns, span)
    shape = (batch, groups, 2)
    if out is None:
        out = torch.empty(shape, dtype=torch.float32, device=input.device)
    moments = out if parts == 1 else torch.empty((parts, *shape), dtype=torch.float32, device=input.device)
    with torch.cuda.device_of(input):
        _part_moments[(batch * groups, parts)](
            maps,
            moments,
            groups,
            rows,
            columns,
            batch_stride,
            channels // groups * channel_stride,
            channel_stride,
            column_stride,
            ROW_TILE=row_tile,
            COLUMN_TILE=column_tile,
            TILES=tiles,
            num_warps=_WARPS,
        )
        if parts > 1:
            _merge_parts[(batch * groups,)](moments, out, columns, span, PARTS=_MAX_PARTS, num_warps=4)
    return out


def normalize(
    input: torch.Tensor,
    statistics: torch.Tensor,
    shares: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    around: RowsAround | None = None,
) -> torch.Tensor:
    """`Kernels.normalize`.

    Raises:
        ValueError: no elements.
    """
    maps = _maps(input)
    target = torch.empty_like(maps).view(input.shape) if around is None else around.room(input)
    above, below = (None, None) if around is None else (around.above, around.below)
    output = _maps(target)
    batch, channels, positions = output.shape
    first = 0 if around is None else sum(around.heights[:2]) * input.shape[3]
    ranks, _, groups, _ = statistics.shape
    if maps.stride(1) == 1:  # channels last
        channel_tile = min(triton.next_power_of_2(channels), 64)
        position_tile = _NORMALIZED_TILE // channel_tile
    else:
        position_tile = min(triton.next_power_of_2(positions), 1024)
        channel_tile = _NORMALIZED_TILE // position_tile
    grid = (triton.cdiv(positions, position_tile), triton.cdiv(channels, channel_tile), batch)
    with torch.cuda.device_of(input):
        _normalize[grid](
            maps,
            *(maps if rows is None else _maps(rows) for rows in (above, below)),
            output,
            statistics,
            statistics if shares is None else shares,
            statistics if weight is None else weight,
            statistics if bias is None else bias,
            channels,
            positions,
            first,
            maps.shape[2],
            *(0 if rows is None else rows.shape[2] * rows.shape[3] for rows in (above, below)),
            groups,
            channels // groups,
            ranks,
            statistics.stride(0),
            *maps.stride(),
            *output.stride(),
            eps,
            ABOVE=above is not None,
            BELOW=below is not None,
            WHOLE=shares is None,
            SCALES=weight is not None,
            SHIFTS=bias is not None,
            RANK_TILE=triton.next_power_of_2(ranks),
            CHANNEL_TILE=channel_tile,
            POSITION_TILE=position_tile,
            num_warps=_WARPS,
        )
    return target


def _maps(input: torch.Tensor) -> torch.Tensor:
    """(batch, channels, positions), a view unless rows and columns lie apart."""
    if not input.numel():
        raise ValueError(f"a feature map of shape {tuple(input.shape)} has no elements to normalize")
    return input.reshape(*input.shape[:2], -1)


@triton.jit
def _part_moments(
    input,
    moments,
    groups,
    rows,
    columns,
    batch_stride,
    group_stride,
    row_stride,
    column_stride,
    ROW_TILE: tl.constexpr,
    COLUMN_TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """Mean and variance of `TILES` tiles of one group, (parts, batch x groups, 2).

    Squares are summed of differences to the mean of the first tile: those of the values themselves would lose
    the variance of a large mean.
    """
    group = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    first = part * (TILES * COLUMN_TILE)
    width = tl.minimum(columns - first, TILES * COLUMN_TILE).to(tl.int32)
    row = tl.arange(0, ROW_TILE)[:, None]
    column = tl.arange(0, COLUMN_TILE)[None, :]
    start = (group // groups) * batch_stride + (group % groups) * group_stride + first * column_stride
    places = input + start + row.to(tl.int64) * row_stride + column.to(tl.int64) * column_stride

    inside = (row < rows) & (column < width)
    values = tl.load(places, mask=inside, other=0.0).to(tl.float32)
    near = tl.sum(tl.sum(values, 1), 0) / (rows * tl.minimum(width, COLUMN_TILE)).to(tl.float32)
    total = tl.zeros([ROW_TILE, COLUMN_TILE], dtype=tl.float32)
    squares = tl.zeros([ROW_TILE, COLUMN_TILE], dtype=tl.float32)
    stride = tl.full([], COLUMN_TILE, tl.int64) * column_stride
    for tile in range(TILES):
        inside = (row < rows) & (column + tile * COLUMN_TILE < width)
        values = tl.load(places, mask=inside, other=0.0).to(tl.float32)
        difference = tl.where(inside, values - near, 0.0)
        total += difference
        squares += difference * difference
        places += stride
    count = rows * width.to(tl.float32)
    mean = tl.sum(tl.sum(total, 1), 0) / count
    variance = tl.sum(tl.sum(squares, 1), 0) / count - mean * mean
    place = moments + (part * tl.num_programs(0) + group) * 2
    tl.store(place, near + mean)
    tl.store(place + 1, tl.maximum(variance, 0.0))


@triton.jit
def _merge_parts(moments, merged, columns, span, PARTS: tl.constexpr):
    """Mean and variance of one group from those of its parts (Chan et al. 1979)."""
    group = tl.program_id(0)
    part = tl.arange(0, PARTS)
    width = tl.minimum(columns - part.to(tl.int64) * span, span)
    known = width > 0
    share = tl.where(known, width, 0).to(tl.float32) / columns
    place = moments + (part * tl.num_programs(0) + group) * 2
    near = tl.load(moments + group * 2)
    difference = tl.load(place, mask=known, other=0.0) - near
    variances = tl.load(place + 1, mask=known, other=0.0)
    mean = tl.sum(share * difference, 0)
    spread = difference - mean
    variance = tl.sum(share * (variances + spread * spread), 0)
    tl.store(merged + group * 2, near + mean)
    tl.store(merged + group * 2 + 1, variance)


@triton.jit
def _normalize(
    input,
    above,
    below,
    output,
    statistics,
    shares,
    weight,
    bias,
    channels,
    positions,
    first,
    input_positions,
    above_positions,
    below_positions,
    groups,
    group_channels,
    ranks,
    rank_stride,
    input_batch_stride,
    input_channel_stride,
    input_position_stride,
    output_batch_stride,
    output_channel_stride,
    output_position_stride,
    eps,
    ABOVE: tl.constexpr,
    BELOW: tl.constexpr,
    WHOLE: tl.constexpr,
    SCALES: tl.constexpr,
    SHIFTS: tl.constexpr,
    RANK_TILE: tl.constexpr,
    CHANNEL_TILE: tl.constexpr,
    POSITION_TILE: tl.constexpr,
):
    """One tile of the output, from its channels' statistics of all ranks.

    Positions of the input are in the output from `first` on, those above and below, which are contiguous,
    next to them, and zeros beyond.
    """
    batch = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * CHANNEL_TILE + tl.arange(0, CHANNEL_TILE)
    known = channel < channels
    rank = tl.arange(0, RANK_TILE)[:, None]
    group = batch * groups + channel // group_channels
    place = statistics + rank.to(tl.int64) * rank_stride + group[None, :] * 2
    measured = (rank < ranks) & known[None, :]
    means = tl.load(place, mask=measured, other=0.0)
    variances = tl.load(place + 1, mask=measured, other=0.0)
    if WHOLE:
        mean = tl.sum(means, 0)
        variance = tl.sum(variances, 0)
    else:
        share = tl.load(shares + rank, mask=rank < ranks, other=0.0)
        mean = tl.sum(share * means, 0)
        spread = means - mean[None, :]
        variance = tl.sum(share * (tl.maximum(variances, 0.0) + spread * spread), 0)
    scale = 1.0 / tl.sqrt(variance + eps)
    if SCALES:
        scale *= tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)

    position = tl.program_id(0).to(tl.int64) * POSITION_TILE + tl.arange(0, POSITION_TILE)
    row = channel.to(tl.int64)[:, None]
    column = position[None, :]
    place = column - first
    source = input + batch * input_batch_stride + row * input_channel_stride + place * input_position_stride
    inside = (place >= 0) & (place < input_positions)
    values = tl.load(source, mask=known[:, None] & inside, other=0.0).to(tl.float32)
    map = batch * channels + row
    if ABOVE:
        place += above_positions
        there = (place >= 0) & (place < above_positions)
        source = above + map * above_positions + place
        values += tl.load(source, mask=known[:, None] & there, other=0.0).to(tl.float32)
        inside |= there
    if BELOW:
        place = column - first - input_positions
        there = (place >= 0) & (place < below_positions)
        source = below + map * below_positions + place
        values += tl.load(source, mask=known[:, None] & there, other=0.0).to(tl.float32)
        inside |= there
    values = (values - mean[:, None]) * scale[:, None]
    if SHIFTS:
        values += tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)[:, None]
    values = tl.where(inside, values, 0.0)
    target = (
        output + batch * output_batch_stride + row * output_channel_stride + column * output_position_stride
    )
    tl.store(target, values.to(output.dtype.element_ty), mask=known[:, None] & (column < positions))
