"""The last part of hc_pre: post gates, and comb by Sinkhorn's normalisations, from the partial sums that `project` leaves (triton.py)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def balance(
    partial_ptr, base_ptr, scale_ptr, post_ptr, comb_ptr, block, tokens, dim, num_splits, norm_eps, hc_eps, iterations,
    N: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    token = (block * BT + tl.arange(0, BT)).to(tl.int64)
    alive = token < tokens
    split = tl.arange(0, SPLITS)
    at = partial_ptr + (token[:, None] * num_splits + split[None, :]) * WIDTH
    real = alive[:, None] & (split < num_splits)[None, :]
    k = tl.arange(0, 4)
    jk = tl.arange(0, 16)
    rho = tl.rsqrt(tl.sum(tl.load(at + N, mask=real, other=0.0), 1) / (4 * dim) + norm_eps)[:, None]
    post = tl.sum(tl.load(at[:, :, None] + 4 + k[None, None, :], mask=real[:, :, None], other=0.0), 1) * rho
    comb = tl.sum(tl.load(at[:, :, None] + 8 + jk[None, None, :], mask=real[:, :, None], other=0.0), 1) * rho
    post = 2 * tl.sigmoid(post * tl.load(scale_ptr + 1) + tl.load(base_ptr + 4 + k)[None, :])
    comb = tl.reshape(comb * tl.load(scale_ptr + 2) + tl.load(base_ptr + 8 + jk)[None, :], [BT, 4, 4])
    comb = tl.exp(comb - tl.max(comb, 2)[:, :, None])
    comb = comb * (1.0 / tl.sum(comb, 2))[:, :, None] + hc_eps
    comb = comb * (1.0 / (tl.sum(comb, 1) + hc_eps))[:, None, :]
    for _ in range(iterations - 1):
        comb = comb * (1.0 / (tl.sum(comb, 2) + hc_eps))[:, :, None]
        comb = comb * (1.0 / (tl.sum(comb, 1) + hc_eps))[:, None, :]
    tl.store(post_ptr + token[:, None] * 4 + k[None, :], post, mask=alive[:, None])
    tl.store(comb_ptr + token[:, None] * 16 + jk[None, :], tl.reshape(comb, [BT, 16]), mask=alive[:, None])


@triton.jit
def _pick(values, index, I: tl.constexpr):
    return tl.sum(tl.where(index == I, values, 0.0), 0)


@triton.jit
def _shares(a, b, c, d, eps, FAST: tl.constexpr):
    """Each over their sum + eps; FAST: by the GPU's own reciprocal, to the last bit but one."""
    total = ((a + b) + (c + d)) + eps
    if FAST:
        inverse = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [total], dtype=tl.float32, is_pure=True, pack=1)
    else:
        inverse = 1.0 / total
    return a * inverse, b * inverse, c * inverse, d * inverse


@triton.jit
def balance_token(
    partial_ptr, base_ptr, scale_ptr, post_ptr, comb_ptr, token, dim, num_splits, norm_eps, hc_eps, iterations,
    N: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """`balance` of one token with comb in 16 scalars: each normalisation waits for three sums and a division, no other thread."""
    split = tl.arange(0, SPLITS)
    real = split < num_splits
    at = partial_ptr + (token.to(tl.int64) * num_splits + split) * WIDTH
    k = tl.arange(0, 4)
    jk = tl.arange(0, 16)
    # As in `_mix` of triton.py: all loads come first.
    square = tl.load(at + N, mask=real, other=0.0)
    post = tl.load(at[:, None] + 4 + k[None, :], mask=real[:, None], other=0.0)
    comb = tl.load(at[:, None] + 8 + jk[None, :], mask=real[:, None], other=0.0)
    post_scale, post_base = tl.load(scale_ptr + 1), tl.load(base_ptr + 4 + k)
    comb_scale, comb_base = tl.load(scale_ptr + 2), tl.load(base_ptr + 8 + jk)
    rho = tl.rsqrt(tl.sum(square, 0) / (4 * dim) + norm_eps)
    tl.store(post_ptr + token * 4 + k, 2 * tl.sigmoid(tl.sum(post, 0) * rho * post_scale + post_base))
    comb = tl.sum(comb, 0) * rho * comb_scale + comb_base
    rows = tl.reshape(comb, [4, 4])
    rows = tl.exp(rows - tl.max(rows, 1)[:, None])
    comb = tl.reshape(rows * (1.0 / tl.sum(rows, 1))[:, None] + hc_eps, [16])
    c00, c01, c02, c03 = _pick(comb, jk, 0), _pick(comb, jk, 1), _pick(comb, jk, 2), _pick(comb, jk, 3)
    c10, c11, c12, c13 = _pick(comb, jk, 4), _pick(comb, jk, 5), _pick(comb, jk, 6), _pick(comb, jk, 7)
    c20, c21, c22, c23 = _pick(comb, jk, 8), _pick(comb, jk, 9), _pick(comb, jk, 10), _pick(comb, jk, 11)
    c30, c31, c32, c33 = _pick(comb, jk, 12), _pick(comb, jk, 13), _pick(comb, jk, 14), _pick(comb, jk, 15)
    c00, c10, c20, c30 = _shares(c00, c10, c20, c30, hc_eps, FAST)
    c01, c11, c21, c31 = _shares(c01, c11, c21, c31, hc_eps, FAST)
    c02, c12, c22, c32 = _shares(c02, c12, c22, c32, hc_eps, FAST)
    c03, c13, c23, c33 = _shares(c03, c13, c23, c33, hc_eps, FAST)
    for _ in range(iterations - 1):
        c00, c01, c02, c03 = _shares(c00, c01, c02, c03, hc_eps, FAST)
        c10, c11, c12, c13 = _shares(c10, c11, c12, c13, hc_eps, FAST)
        c20, c21, c22, c23 = _shares(c20, c21, c22, c23, hc_eps, FAST)
        c30, c31, c32, c33 = _shares(c30, c31, c32, c33, hc_eps, FAST)
        c00, c10, c20, c30 = _shares(c00, c10, c20, c30, hc_eps, FAST)
        c01, c11, c21, c31 = _shares(c01, c11, c21, c31, hc_eps, FAST)
        c02, c12, c22, c32 = _shares(c02, c12, c22, c32, hc_eps, FAST)
        c03, c13, c23, c33 = _shares(c03, c13, c23, c33, hc_eps, FAST)
    out = comb_ptr + token * 16
    tl.store(out + 0, c00)
    tl.store(out + 1, c01)
    tl.store(out + 2, c02)
    tl.store(out + 3, c03)
    tl.store(out + 4, c10)
    tl.store(out + 5, c11)
    tl.store(out + 6, c12)
    tl.store(out + 7, c13)
    tl.store(out + 8, c20)
    tl.store(out + 9, c21)
    tl.store(out + 10, c22)
    tl.store(out + 11, c23)
    tl.store(out + 12, c30)
    tl.store(out + 13, c31)
    tl.store(out + 14, c32)
    tl.store(out + 15, c33)
