"""The parts of the training model that are worth fusing: pure functions of tensors, each compiled on its own on a GPU.

Shape suffixes: B batch, T tokens, M streams, H heads, D channels of a head, S compressed entries, W window, N blocks of W tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.model.quantized import FP8_MAX

MASKED = -1e30


def fake_fp8(x: Tensor, group: int) -> Tensor:
    """x [..., K] as FP8 with the smallest power-of-two scale per `group` channels that does not saturate; the gradient passes."""
    groups = x.float().unflatten(-1, (-1, group))
    values = groups.detach()
    bits = (values.abs().amax(-1, keepdim=True).clamp(min=1e-4) / FP8_MAX).view(torch.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(torch.int32)
    scale = (exponent << 23).view(torch.float32)
    rounded = (values / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float() * scale
    return (groups + (rounded - values)).flatten(-2).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the last 2 * cos.shape[-1] channels of float32 x [B, T, ..., D], interleaved pairs; cos, sin: [T, rope / 2]."""
    rope = 2 * cos.shape[-1]
    shape = (1, len(cos)) + (1,) * (x.dim() - 3) + (rope // 2,)
    c, s = cos.view(shape), sin.view(shape)
    pairs = x[..., -rope:].unflatten(-1, (-1, 2))
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = torch.stack((even * c - odd * s, even * s + odd * c), -1).flatten(-2)
    return torch.cat((x[..., :-rope], turned), -1)


def norm(x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """RMS norm over the last dim, without a weight if that is None; in float32, rounded once."""
    y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight.float()).to(dtype)


def norm_rotate(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """RMS norm over the last dim, then rotation; rounded once."""
    return rotate(norm(x, weight, eps, torch.float32), cos, sin).to(dtype)


def quantize_kv(kv: Tensor, rope: int) -> Tensor:
    """Key-value rows as the FP8 cache holds them: all but the rotated channels in groups of 64."""
    return torch.cat((fake_fp8(kv[..., :-rope], 64), kv[..., -rope:]), -1)


def hc_pre(h: Tensor, fn: Tensor, base: Tensor, scale: Tensor, weight: Tensor, iters: int, eps: float, hc_eps: float) -> tuple[Tensor, ...]:
    """Streams [B, T, M, d] -> normed input of the sublayer [B, T, d], post [B, T, M], comb [B, T, M, M] (spec 2.1)."""
    mult = h.shape[2]
    flat = h.float().flatten(2)
    mixed = F.linear(flat, fn) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + eps)
    pre = torch.sigmoid(mixed[..., :mult] * scale[0] + base[:mult]) + hc_eps
    post = 2 * torch.sigmoid(mixed[..., mult : 2 * mult] * scale[1] + base[mult : 2 * mult])
    comb = torch.softmax((mixed[..., 2 * mult :] * scale[2] + base[2 * mult :]).unflatten(-1, (mult, mult)), -1) + hc_eps
    comb = comb / (comb.sum(-2, keepdim=True) + hc_eps)
    for _ in range(iters - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + hc_eps)
        comb = comb / (comb.sum(-2, keepdim=True) + hc_eps)
    x = (pre.unsqueeze(-1) * h.float()).sum(2).to(h.dtype)
    return norm(x, weight, eps, h.dtype), post, comb


def hc_post(y: Tensor, h: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """Spread y [B, T, d] over the streams: h'_k = post_k y + sum_j comb[j, k] h_j."""
    streams = h.float()
    mixed = sum(comb[..., j, :].unsqueeze(-1) * streams[..., j : j + 1, :] for j in range(h.shape[2]))
    return (mixed + post.unsqueeze(-1) * y.float().unsqueeze(2)).to(h.dtype)


def hc_head(h: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, hc_eps: float) -> Tensor:
    """h: [B, T, M, d] -> [B, T, d] (spec 2.1)."""
    flat = h.float().flatten(2)
    mixed = F.linear(flat, fn) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + eps)
    pre = torch.sigmoid(mixed * scale + base) + hc_eps
    return (pre.unsqueeze(-1) * h.float()).sum(2).to(h.dtype)


def pool(kv: Tensor, score: Tensor, ape: Tensor, ratio: int) -> Tensor:
    """Projections [B, T, width] of whole blocks -> closed entries fp32 [B, S, D] (spec 2.3)."""
    kv, score = kv.float().unflatten(1, (-1, ratio)), score.float().unflatten(1, (-1, ratio)) + ape.float()
    if ratio == 4:
        width = kv.shape[-1] // 2
        before = F.pad(kv[:, :-1, :, :width], (0, 0, 0, 0, 1, 0))
        before_score = F.pad(score[:, :-1, :, :width], (0, 0, 0, 0, 1, 0), value=MASKED)
        kv = torch.cat((before, kv[..., width:]), 2)
        score = torch.cat((before_score, score[..., width:]), 2)
    return (torch.softmax(score, 2) * kv).sum(2)


def joint_softmax(
    near: Tensor, far: Tensor | None, near_mask: Tensor, far_mask: Tensor | None, sink: Tensor, scale: float
) -> tuple[Tensor, ...]:
    """Softmax over scaled products with the window [B, N, W, H, 2 W] and the entries [B, N, W, H, S], and the sink [H].

    Masks [N, W, 1, 2 W] and [B or 1, N, W, 1, S]. Returns the weights of both, in the scores' dtype.
    """
    sink = sink.float().view(-1, 1)
    window = (near.float() * scale).masked_fill(~near_mask, MASKED)
    if far is None:
        top = torch.maximum(window.amax(-1, keepdim=True), sink).detach()
        window = torch.exp(window - top)
        return ((window / (window.sum(-1, keepdim=True) + torch.exp(sink - top))).to(near.dtype),)
    assert far_mask is not None
    entries = (far.float() * scale).masked_fill(~far_mask, MASKED)
    top = torch.maximum(torch.maximum(window.amax(-1, keepdim=True), entries.amax(-1, keepdim=True)), sink).detach()
    window, entries = torch.exp(window - top), torch.exp(entries - top)
    total = window.sum(-1, keepdim=True) + entries.sum(-1, keepdim=True) + torch.exp(sink - top)
    return (window / total).to(near.dtype), (entries / total).to(near.dtype)


def index_scores(dots: Tensor, weights: Tensor) -> Tensor:
    """sum over heads of weight * relu(dot): [B, T, H, S] and [B, T, H] -> fp32 [B, T, S] (spec 2.4)."""
    return (dots.float().relu() * weights.float().unsqueeze(-1)).sum(2)


def index_loss(logits: Tensor, closed: Tensor, mass: Tensor) -> Tensor:
    """Cross entropy of the indexer against the attention mass [B, T, S] that entries receive, weighted by that mass: a token that
    looks at no entry teaches nothing. closed: [T, S]."""
    logs = torch.log_softmax(logits.masked_fill(~closed, MASKED), -1).masked_fill(~closed, 0.0)
    return -(mass * logs).sum() / mass.sum().clamp(min=1.0)


def swiglu(gate: Tensor, up: Tensor, limit: float, dtype: torch.dtype, weight: Tensor | None, quantize: bool) -> Tensor:
    """Clamped SwiGLU [..., I], times the expert's weight if given."""
    hidden = F.silu(gate.float().clamp(max=limit)) * up.float().clamp(-limit, limit)
    hidden = (hidden if weight is None else hidden * weight.unsqueeze(-1)).to(dtype)
    return fake_fp8(hidden, 128) if quantize else hidden
