"""Block-scaled FP8 products with nothing but Triton: one launch that streams the weight for few rows, two for many.

One row, of a weight that is not large: triton_vector.py.
Few rows (decode is bound by the bytes of the weight): programs split N and K so that all multiprocessors read; each quantises the
activations of its channels itself, unless they come so, which is cheaper than a launch for it. Partial sums go through fp32 scratch,
and the last program to arrive at a tile adds them in order: the result does not depend on who was last.
Many rows: activations are quantised once, then tiles of 128 channels with both scales applied to the fp32 partial product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engine.model.quantized import FP8_BLOCK, SCALES_ALIGNED, QuantizedRows, QuantizedWeight, exp2_of_byte
from engine.ops import triton_vector
from engine.ops.triton_rounding import quantize, to_bf16
from engine.ops.triton_splits import is_last, sum_parts

BLOCK = tl.constexpr(FP8_BLOCK)
FEW_ROWS = 64
MOST_OF_ONE_ROW, MOST_OF_ONE_QUANTIZED_ROW = 1 << 24, 1 << 25
"""Codes of a weight that one row is multiplied with outside the matrix units: large ones stream as fast with them, the sooner if the row
is to be quantised by each program."""
SMALLEST_N = 64
"""Rows of the weight in a tile: the matrix unit's 64 at least."""


@dataclass(frozen=True, slots=True)
class FewConfig:
    """Of the kernel for few rows (tests/benchmarks/results)."""

    block_n: int
    programs: int = 264
    """K is split until there are about so many."""
    stages: int = 4
    warps: int = 4


def choose_few(n_size: int) -> FewConfig:
    return FewConfig(128 if n_size >= 2048 else 64)


@dataclass(frozen=True, slots=True)
class PackedWeight:
    codes: torch.Tensor
    """e4m3 [N', K']: padded with zeros to multiples of 128."""
    scale: torch.Tensor
    """fp32 [N' / 128, K' / 128]."""
    shape: tuple[int, int]
    """(N, K)."""
    arrived: torch.Tensor
    """int32 [N' / 64], zeros between calls: programs that have finished their part of a tile."""


@triton.jit
def load_rows(x_ptr, row, channel, num_rows, k_size):
    """fp32 of x at the broadcast of row and channel; zeros outside."""
    at = x_ptr + row.to(tl.int64) * k_size + channel
    return tl.load(at, mask=(row < num_rows) & (channel < k_size), other=0.0).to(tl.float32)


@triton.jit
def store_out(out_ptr, at, value, mask):
    if out_ptr.dtype.element_ty == tl.bfloat16:
        value = to_bf16(value)
    tl.store(out_ptr + at, value, mask=mask)


@triton.jit(do_not_specialize=["num_rows", "x_scale_stride"])
def fp8_linear_few_kernel(
    x_ptr,
    x_scale_ptr,
    codes_ptr,
    scale_ptr,
    out_ptr,
    scratch_ptr,
    arrived_ptr,
    num_rows,
    n_size,
    k_size,
    k_tiles,
    x_scale_stride,
    tiles_per_split,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Tile [BLOCK_N weight rows, BLOCK_M rows of x]: the weight is the first operand, whose tiles need 64 rows. x: codes, with scales at
    row + tile of 128 channels * x_scale_stride; or to be quantised here."""
    tile, split = tl.program_id(0), tl.program_id(1)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    channel = tl.arange(0, BLOCK)
    first = split * tiles_per_split
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    scale_row = scale_ptr + tile * BLOCK_N // BLOCK * k_tiles
    weight_row = codes_ptr + n.to(tl.int64)[:, None] * (k_tiles * BLOCK) + channel[None, :]
    for k in tl.range(first, tl.minimum(first + tiles_per_split, k_tiles), num_stages=NUM_STAGES):
        weight = tl.load(weight_row + k * BLOCK)
        weight_scale = tl.load(scale_row + k)
        if x_ptr.dtype.element_ty == tl.float8e4nv:
            row = tl.minimum(m, num_rows - 1)
            x_codes = tl.load(x_ptr + row[None, :] * (k_tiles * BLOCK) + k * BLOCK + channel[:, None])
            x_scale = tl.load(x_scale_ptr + row + k * x_scale_stride)[None, :]
        else:
            x = load_rows(x_ptr, m[None, :], k * BLOCK + channel[:, None], num_rows, k_size)
            x_codes, x_scale = quantize(x, 0)
        total += tl.dot(weight, x_codes) * (x_scale * weight_scale)
    at = m.to(tl.int64)[None, :] * n_size + n[:, None]
    inside = (m[None, :] < num_rows) & (n[:, None] < n_size)
    if SPLITS > 1:
        own = scratch_ptr + tile * (SPLITS * BLOCK_N * BLOCK_M) + tl.arange(0, BLOCK_N)[:, None] + m[None, :] * BLOCK_N
        tl.store(own + split * (BLOCK_N * BLOCK_M), total, mask=inside)
        if not is_last(arrived_ptr + tile, SPLITS):
            return
        total = sum_parts(own, inside, BLOCK_M, BLOCK_N, SPLITS)
    store_out(out_ptr, at, total, inside)


@triton.jit(do_not_specialize=["num_rows", "row_stride", "tile_stride"])
def act_quant_kernel(x_ptr, codes_ptr, scale_ptr, num_rows, k_size, k_tiles, row_stride, tile_stride, BLOCK_M: tl.constexpr):
    """Rows of 128 channels: codes [num_rows, k_tiles * 128], scale at row * row_stride + tile * tile_stride."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    tile = tl.program_id(1)
    channel = tile * BLOCK + tl.arange(0, BLOCK)
    codes, scale = quantize(load_rows(x_ptr, row[:, None], channel[None, :], num_rows, k_size), 1)
    tl.store(codes_ptr + row.to(tl.int64)[:, None] * (k_tiles * BLOCK) + channel[None, :], codes, mask=row[:, None] < num_rows)
    tl.store(scale_ptr + row[:, None] * row_stride + tile * tile_stride, scale, mask=row[:, None] < num_rows)


@triton.jit(do_not_specialize=["num_rows", "x_scale_stride"])
def fp8_linear_many_kernel(
    x_ptr,
    x_scale_ptr,
    codes_ptr,
    scale_ptr,
    out_ptr,
    num_rows,
    n_size,
    n_tiles,
    k_tiles,
    x_scale_stride,
    BLOCK_M: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Tile [BLOCK_M, 128]; GROUP row tiles after each other share a tile of the weight in L2."""
    program, m_tiles = tl.program_id(0), tl.cdiv(num_rows, BLOCK_M)
    group = program // (GROUP * n_tiles) * GROUP
    height = tl.minimum(m_tiles - group, GROUP)
    m = (group + program % (GROUP * n_tiles) % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n_tile = program % (GROUP * n_tiles) // height
    n = n_tile * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, BLOCK)
    row = tl.minimum(m, num_rows - 1).to(tl.int64)
    x_row = x_ptr + row[:, None] * (k_tiles * BLOCK) + channel[None, :]
    weight_row = codes_ptr + n.to(tl.int64)[None, :] * (k_tiles * BLOCK) + channel[:, None]
    x_scale = tl.load(x_scale_ptr + row)
    weight_scale = tl.load(scale_ptr + n_tile * k_tiles)
    total = tl.zeros([BLOCK_M, BLOCK], tl.float32)
    for k in tl.range(0, k_tiles, num_stages=NUM_STAGES):
        after = tl.minimum(k + 1, k_tiles - 1)
        next_x_scale = tl.load(x_scale_ptr + row + after.to(tl.int64) * x_scale_stride)
        next_weight_scale = tl.load(scale_ptr + n_tile * k_tiles + after)
        part = tl.dot(tl.load(x_row + k * BLOCK), tl.load(weight_row + k * BLOCK))
        total += part * (x_scale * weight_scale)[:, None]
        x_scale, weight_scale = next_x_scale, next_weight_scale
    store_out(out_ptr, m.to(tl.int64)[:, None] * n_size + n[None, :], total, (m[:, None] < num_rows) & (n[None, :] < n_size))


def flat_rows(x: torch.Tensor | QuantizedRows) -> torch.Tensor | QuantizedRows:
    """[..., K] as contiguous rows; quantised ones as `QuantizedRows.empty` lays them out."""
    if isinstance(x, torch.Tensor):
        return x.flatten(0, -2).contiguous()
    rows_apart, groups_apart = x.scale.stride()
    if x.codes.is_contiguous() and (rows_apart == 1 or len(x) <= 1) and groups_apart % SCALES_ALIGNED == 0:
        return x
    laid_out = QuantizedRows.empty(*x.codes.shape, x.dtype, x.device)
    laid_out.codes.copy_(x.codes)
    laid_out.scale.copy_(x.scale)
    return laid_out


def run(x: torch.Tensor | QuantizedRows, weight: PackedWeight) -> torch.Tensor:
    """As the reference, x in bf16 (or fp32), or quantised from it."""
    flat = flat_rows(x)
    out = torch.empty(len(flat), weight.shape[0], dtype=flat.dtype, device=flat.device)
    if 0 < len(flat) <= FEW_ROWS:
        run_few(flat, weight, out)
    elif len(flat):
        run_many(flat, weight, out)
    return out.unflatten(0, x.shape[:-1]) if isinstance(x, torch.Tensor) else out


def run_few(x: torch.Tensor | QuantizedRows, weight: PackedWeight, out: torch.Tensor, config: FewConfig | None = None) -> None:
    """x: [M <= 64, K], as `flat_rows` has it; out: [M, N]."""
    codes, scale, scale_stride = (x, x, 0) if isinstance(x, torch.Tensor) else (x.codes, x.scale, x.scale.stride(1))
    most = MOST_OF_ONE_ROW if isinstance(x, torch.Tensor) else MOST_OF_ONE_QUANTIZED_ROW
    if config is None and len(x) == 1 and weight.codes.numel() <= most:
        x_scale = None if isinstance(x, torch.Tensor) else scale
        triton_vector.multiply(codes, weight.codes, weight.scale, out, x_scale=x_scale, is_quantised=True)
        return
    rows, k_tiles = len(x), weight.codes.shape[1] // FP8_BLOCK
    block_m = max(16, triton.next_power_of_2(rows))
    config = config or choose_few(len(weight.codes))
    tiles = len(weight.codes) // config.block_n
    per_split = triton.cdiv(k_tiles, max(1, min(k_tiles // 4, config.programs // tiles, 16)))
    splits = triton.cdiv(k_tiles, per_split)
    scratch = torch.empty(splits * len(weight.codes) * block_m if splits > 1 else 1, dtype=torch.float32, device=x.device)
    fp8_linear_few_kernel[(tiles, splits)](
        codes,
        scale,
        weight.codes,
        weight.scale,
        out,
        scratch,
        weight.arrived,
        rows,
        *weight.shape,
        k_tiles,
        scale_stride,
        per_split,
        BLOCK_M=block_m,
        BLOCK_N=config.block_n,
        SPLITS=splits,
        NUM_STAGES=config.stages,
        num_warps=config.warps,
    )


def quantized(x: torch.Tensor | QuantizedRows) -> QuantizedRows:
    """x: as `flat_rows` has it."""
    if isinstance(x, QuantizedRows):
        return x
    rows = QuantizedRows.empty(*x.shape, x.dtype, x.device)
    k_tiles = rows.scale.shape[1]
    grid = (triton.cdiv(len(x), 16), k_tiles)
    act_quant_kernel[grid](x, rows.codes, rows.scale, *x.shape, k_tiles, 1, rows.scale.stride(1), BLOCK_M=16, num_warps=4)
    return rows


def run_many(x: torch.Tensor | QuantizedRows, weight: PackedWeight, out: torch.Tensor) -> None:
    """x: [M, K], as `flat_rows` has it; out: [M, N]."""
    n_tiles, k_tiles = weight.scale.shape
    rows = quantized(x)
    block_rows = 64
    grid = (triton.cdiv(len(x), block_rows) * n_tiles,)
    fp8_linear_many_kernel[grid](
        rows.codes,
        rows.scale,
        weight.codes,
        weight.scale,
        out,
        len(x),
        weight.shape[0],
        n_tiles,
        k_tiles,
        rows.scale.stride(1),
        BLOCK_M=block_rows,
        GROUP=8,
        NUM_STAGES=4,
        num_warps=4,
    )


def pack(weight: QuantizedWeight) -> PackedWeight:
    """On the weight's device; no copy where N and K are multiples of 128."""
    rows, columns = weight.shape
    padding = (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK)
    codes = weight.data.contiguous()
    if any(padding):
        codes = torch.nn.functional.pad(codes.view(torch.uint8), padding).view(torch.float8_e4m3fn)
    arrived = torch.zeros(len(codes) // SMALLEST_N, dtype=torch.int32, device=codes.device)
    return PackedWeight(codes, exp2_of_byte(weight.scale).contiguous(), weight.shape, arrived)


_SIZES = {"num_rows": "i32", "n_size": "i32:16", "k_tiles": "i32:16"}
_WEIGHT = {"codes_ptr": "*fp8e4nv", "scale_ptr": "*fp32", "out_ptr": "*bf16"}
_FEW = {**_SIZES, **_WEIGHT, "scratch_ptr": "*fp32", "arrived_ptr": "*i32", "k_size": "i32:16"}
_FEW |= {"x_scale_stride": "i32", "tiles_per_split": "i32"}
_QUANT = {
    "x_ptr": "*bf16",
    "codes_ptr": "*fp8e4nv",
    "scale_ptr": "*fp32",
    "num_rows": "i32",
    "k_size": "i32:16",
    "k_tiles": "i32:16",
    "row_stride": "i32",
    "tile_stride": "i32",
}
_MANY = {**_SIZES, **_WEIGHT, "x_ptr": "*fp8e4nv", "x_scale_ptr": "*fp32", "n_tiles": "i32:16", "x_scale_stride": "i32"}
AOT = [
    *(
        (
            fp8_linear_few_kernel,
            _FEW | {"x_ptr": x, "x_scale_ptr": x_scale},
            {"BLOCK_M": rows, "BLOCK_N": n, "SPLITS": splits, "NUM_STAGES": 4},
            {"num_warps": 4},
        )
        for x, x_scale in (("*bf16", "*bf16"), ("*fp8e4nv", "*fp32"))
        for rows, n, splits in ((16, 64, 8), (16, 128, 1), (16, 128, 4), (64, 128, 1), (64, 128, 4))
    ),
    (act_quant_kernel, _QUANT, {"BLOCK_M": 16}, {"num_warps": 4}),
    (fp8_linear_many_kernel, _MANY, {"BLOCK_M": 64, "GROUP": 8, "NUM_STAGES": 4}, {"num_warps": 4}),
]
