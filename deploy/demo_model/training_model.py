"""DeepSeek-V4 for training: whole sequences, dense masks, gradients. The same mathematics as engine/model, in plain torch.

Parameters carry the published names and shapes, so that a state dict is a checkpoint. `quantize` simulates the published formats
(FP8 and MXFP4 weights, FP8 activations and KV rows) with straight-through gradients.

Shape suffixes: B batch, T tokens, M streams, H heads, D head_dim, S compressed entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import ModelConfig
from engine.model.quantized import FP8_MAX, ceil_exponent_byte, exp2_of_byte, quantize_fp8, quantize_mxfp4
from engine.model.rope import compress_frequencies, main_frequencies, rotation
from engine.model.weights import expected_tensors, published_format


class _Straight(torch.autograd.Function):
    """Value of `quantized`, gradient of `x`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantized: Tensor) -> Tensor:
        return quantized

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def fake_fp8(x: Tensor, group: int) -> Tensor:
    """x [..., K] in FP8 with a power-of-two scale per `group` channels."""
    groups = x.detach().float().unflatten(-1, (-1, group))
    scale = exp2_of_byte(ceil_exponent_byte(groups.abs().amax(-1, keepdim=True).clamp(min=1e-4) / FP8_MAX))
    values = (groups / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float() * scale
    return _Straight.apply(x, values.flatten(-2).to(x.dtype))


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    """x: [B, T, ..., D]; cos, sin: [T, rope / 2]."""
    rope = 2 * cos.shape[-1]
    shape = (1, len(cos)) + (1,) * (x.dim() - 3) + (rope // 2,)
    c, s = cos.view(shape), sin.view(shape) * (-1 if inverse else 1)
    even, odd = x[..., -rope::2].float(), x[..., x.shape[-1] - rope + 1 :: 2].float()
    turned = torch.stack((even * c - odd * s, even * s + odd * c), -1).flatten(-2)
    return torch.cat((x[..., :-rope], turned.to(x.dtype)), -1)


class TrainingModel(nn.Module):
    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.quantize = False
        self.select = False
        """Hard top-k selection of entries (off: all visible ones), as in serving."""
        generator = torch.Generator().manual_seed(seed)
        self.tensors = nn.ParameterDict()
        self.main_frequencies: Tensor
        self.compress_frequencies: Tensor
        self.register_buffer("main_frequencies", main_frequencies(config), persistent=False)
        self.register_buffer("compress_frequencies", compress_frequencies(config), persistent=False)
        self.tables: dict[str, Tensor] = {}
        self.expert_load: dict[str, Tensor] = {}
        for name, spec in expected_tensors(config).items():
            if spec.kind == "ids":
                draws = torch.rand((spec.shape[0], config.n_routed_experts), generator=generator)
                self.tables[name] = draws.argsort(1)[:, : spec.shape[1]].contiguous()
                continue
            value = torch.zeros(spec.shape)
            if name.endswith("norm.weight"):
                value.fill_(1.0)
            elif len(spec.shape) == 2 and not name.endswith((".ape", "_fn")):
                value = torch.randn(spec.shape, generator=generator) * (0.02 if name.startswith("embed") else spec.shape[-1] ** -0.5)
                if name.endswith(("wo_b.weight", "w2.weight")):
                    value *= 0.3
            elif name.endswith("_fn"):
                value = torch.randn(spec.shape, generator=generator) * 0.01
            elif name.endswith("_scale"):
                value.fill_(0.1)
            elif name.endswith(("hc_attn_base", "hc_ffn_base")):
                mult = config.hc_mult
                value[: 2 * mult] = 0.0
                value[2 * mult :] = 2.5 * torch.eye(mult).flatten()  # streams mostly keep to themselves
            self.tensors[self._key(name)] = nn.Parameter(value)

    @staticmethod
    def _key(name: str) -> str:
        return name.replace(".", "/")

    def published(self) -> dict[str, Tensor]:
        """All tensors by published name, float32 or int64, on the CPU."""
        found = {name.replace("/", "."): value.detach().float().cpu() for name, value in self.tensors.items()}
        return found | {name: table.cpu() for name, table in self.tables.items()}

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Take over published tensors, float or int64."""
        for name, value in values.items():
            if name in self.tables:
                self.tables[name] = value.to(self.tables[name].device)
            else:
                with torch.no_grad():
                    self.tensors[self._key(name)].copy_(value)

    def prepare(self, dtype: torch.dtype) -> None:
        """Cast (and quantise) the weights once for the coming forward passes."""
        self.weights: dict[str, Tensor] = {}
        for key, value in self.tensors.items():
            name = key.replace("/", ".")
            form = published_format(name)
            used: Tensor = value
            if self.quantize and form in ("fp8", "mxfp4"):
                exact = (quantize_fp8 if form == "fp8" else quantize_mxfp4)(value.detach()).dequantize()
                used = _Straight.apply(value, exact)
            self.weights[name] = used.to(dtype) if len(value.shape) == 2 and name.endswith(".weight") else used
        self.dtype = dtype

    def linear(self, x: Tensor, name: str, *, quantized: bool = True) -> Tensor:
        if self.quantize and quantized and published_format(name) in ("fp8", "mxfp4"):
            x = fake_fp8(x, 128)
        return F.linear(x, self.weights[name])

    def norm(self, x: Tensor, name: str | None) -> Tensor:
        y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return (y if name is None else y * self.weights[name].float()).to(self.dtype)

    # -- hyper-connections -----------------------------------------------------------------------------------------------------

    def hc_pre(self, h: Tensor, prefix: str, sublayer: str) -> tuple[Tensor, Tensor, Tensor]:
        config, mult = self.config, self.config.hc_mult
        fn, base, scale = (self.weights[f"{prefix}.hc_{sublayer}_{part}"].float() for part in ("fn", "base", "scale"))
        flat = h.float().flatten(2)
        mixed = F.linear(flat, fn) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + config.rms_norm_eps)
        pre = torch.sigmoid(mixed[..., :mult] * scale[0] + base[:mult]) + config.hc_eps
        post = 2 * torch.sigmoid(mixed[..., mult : 2 * mult] * scale[1] + base[mult : 2 * mult])
        comb = torch.softmax((mixed[..., 2 * mult :] * scale[2] + base[2 * mult :]).unflatten(-1, (mult, mult)), -1) + config.hc_eps
        comb = comb / (comb.sum(-2, keepdim=True) + config.hc_eps)
        for _ in range(config.hc_sinkhorn_iters - 1):
            comb = comb / (comb.sum(-1, keepdim=True) + config.hc_eps)
            comb = comb / (comb.sum(-2, keepdim=True) + config.hc_eps)
        x = (pre.unsqueeze(-1) * h.float()).sum(2).to(self.dtype)
        return self.norm(x, f"{prefix}.{sublayer}_norm.weight"), post, comb

    def hc_post(self, y: Tensor, h: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        mixed = comb.transpose(-1, -2) @ h.float()
        return (mixed + post.unsqueeze(-1) * y.float().unsqueeze(2)).to(h.dtype)

    def hc_head(self, h: Tensor, prefix: str) -> Tensor:
        fn, base, scale = (self.weights[f"{prefix}hc_head_{part}"].float() for part in ("fn", "base", "scale"))
        flat = h.float().flatten(2)
        mixed = F.linear(flat, fn) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + self.config.rms_norm_eps)
        pre = torch.sigmoid(mixed * scale + base) + self.config.hc_eps
        return (pre.unsqueeze(-1) * h.float()).sum(2).to(self.dtype)

    # -- attention -------------------------------------------------------------------------------------------------------------

    def compress(self, x: Tensor, prefix: str, ratio: int) -> Tensor:
        """Closed entries fp32 [B, S, D] before norm and rotation."""
        blocks = x.shape[1] // ratio
        x = x[:, : blocks * ratio]
        kv = F.linear(x, self.weights[f"{prefix}.wkv.weight"]).float().unflatten(1, (blocks, ratio))
        score = F.linear(x, self.weights[f"{prefix}.wgate.weight"]).float().unflatten(1, (blocks, ratio))
        score = score + self.weights[f"{prefix}.ape"].float()
        if ratio == 4:
            width = kv.shape[-1] // 2
            before = F.pad(kv[:, :-1, :, :width], (0, 0, 0, 0, 1, 0))
            before_score = F.pad(score[:, :-1, :, :width], (0, 0, 0, 0, 1, 0), value=-1e30)
            kv = torch.cat((before, kv[..., width:]), 2)
            score = torch.cat((before_score, score[..., width:]), 2)
        return (torch.softmax(score, 2) * kv).sum(2)

    def finish_entries(self, entries: Tensor, prefix: str, ratio: int, frequencies: Tensor) -> Tensor:
        cos, sin = rotation(torch.arange(entries.shape[1], device=entries.device) * ratio, frequencies)
        return rotate(self.norm(entries, f"{prefix}.norm.weight"), cos, sin)

    def quantize_kv(self, kv: Tensor) -> Tensor:
        nope = self.config.nope_head_dim
        return torch.cat((fake_fp8(kv[..., :nope], 64), kv[..., nope:]), -1) if self.quantize else kv

    def attention(self, x: Tensor, prefix: str, ratio: int) -> tuple[Tensor, Tensor | None]:
        """Returns (y, the indexer's loss or None)."""
        config = self.config
        batch, length = x.shape[:2]
        heads, dim, groups = config.num_attention_heads, config.head_dim, config.o_groups
        frequencies = self.compress_frequencies if ratio else self.main_frequencies
        positions = torch.arange(length, device=x.device)
        cos, sin = rotation(positions, frequencies)
        qr = self.norm(self.linear(x, f"{prefix}.wq_a.weight"), f"{prefix}.q_norm.weight")
        q = self.linear(qr, f"{prefix}.wq_b.weight").unflatten(-1, (heads, dim))
        q = rotate(self.norm(q, None), cos, sin)
        kv = rotate(self.norm(self.linear(x, f"{prefix}.wkv.weight"), f"{prefix}.kv_norm.weight"), cos, sin)
        kv = self.quantize_kv(kv)
        age = positions[:, None] - positions[None, :]
        visible = ((age >= 0) & (age < config.sliding_window))[None].expand(batch, -1, -1)
        index_logits = every = None
        if ratio:
            entries = self.finish_entries(self.compress(x, f"{prefix}.compressor", ratio), f"{prefix}.compressor", ratio, frequencies)
            kv = torch.cat((kv, self.quantize_kv(entries)), 1)
            closed = torch.arange(entries.shape[1], device=x.device)[None, :] < ((positions + 1) // ratio)[:, None]
            seen = closed[None].expand(batch, -1, -1)
            every = torch.cat((visible, seen), -1)
            if ratio == 4:
                index_logits = self.index_logits(x, qr, f"{prefix}.indexer", cos, sin, frequencies)
                index_logits = index_logits.masked_fill(~closed, -1e30)
                if self.select and entries.shape[1] > config.index_topk:
                    chosen = index_logits.topk(config.index_topk, -1).indices
                    seen = seen & torch.zeros_like(seen).scatter_(-1, chosen, True)
            visible = torch.cat((visible, seen), -1)
        scores = torch.einsum("bthd,bsd->bhts", q, kv).float() * dim**-0.5
        sink = self.weights[f"{prefix}.attn_sink"].float().view(1, heads, 1, 1).expand(batch, -1, length, 1)
        index_loss = None
        if index_logits is not None and every is not None:
            # The indexer learns what attention would take if it saw every entry, selected or not.
            with torch.no_grad():
                mass = torch.softmax(torch.cat((scores.masked_fill(~every[:, None], -1e30), sink), -1), -1)[..., length:-1].sum(1)
                mass = mass / mass.sum(-1, keepdim=True).clamp(min=1e-9)
            cross = -(mass * torch.log_softmax(index_logits.float(), -1)).sum(-1)
            index_loss = cross[:, 4:].mean()
        scores = scores.masked_fill(~visible[:, None], -1e30)
        weight = torch.softmax(torch.cat((scores, sink), -1), -1)[..., :-1]
        o = torch.einsum("bhts,bsd->bthd", weight.to(self.dtype), kv)
        o = rotate(o, cos, sin, inverse=True).flatten(2).unflatten(-1, (groups, -1))
        wo_a = self.weights[f"{prefix}.wo_a.weight"].unflatten(0, (groups, -1))
        z = torch.einsum("btgi,goi->btgo", o, wo_a).flatten(2)
        return self.linear(z, f"{prefix}.wo_b.weight"), index_loss

    def index_logits(self, x: Tensor, qr: Tensor, prefix: str, cos: Tensor, sin: Tensor, frequencies: Tensor) -> Tensor:
        """fp32 [B, T, S]. Gradients stay inside the indexer: its inputs are detached."""
        config = self.config
        heads, dim = config.index_n_heads, config.index_head_dim
        x, qr = x.detach(), qr.detach()
        keys = self.finish_entries(self.compress(x, f"{prefix}.compressor", 4), f"{prefix}.compressor", 4, frequencies)
        q = rotate(self.linear(qr, f"{prefix}.wq_b.weight").unflatten(-1, (heads, dim)), cos, sin)
        weights = self.linear(x, f"{prefix}.weights_proj.weight").float() * (dim * heads) ** -0.5
        dots = torch.einsum("bthd,bsd->bths", q, keys).relu()
        return torch.einsum("bths,bth->bts", dots.float(), weights)

    # -- experts ---------------------------------------------------------------------------------------------------------------

    def moe(self, x: Tensor, ids: Tensor, prefix: str) -> Tensor:
        config = self.config
        logits = F.linear(x.float(), self.weights[f"{prefix}.gate.weight"].float())
        scores = F.softplus(logits).sqrt()
        table = self.tables.get(f"{prefix}.gate.tid2eid")
        if table is not None:
            chosen = table.to(ids.device)[ids]
        else:
            chosen = (scores + self.weights[f"{prefix}.gate.bias"].detach().float()).topk(config.num_experts_per_tok, -1).indices
        picked = scores.gather(-1, chosen)
        picked = picked / (picked.sum(-1, keepdim=True) + 1e-20) * config.routed_scaling_factor
        weight = torch.zeros_like(scores).scatter(-1, chosen, picked)
        if table is None:
            self.expert_load[f"{prefix}.gate.bias"] = (weight > 0).float().mean((0, 1))
        names = [f"{prefix}.experts.{e}" for e in range(config.n_routed_experts)]
        w1, w2, w3 = (torch.stack([self.weights[f"{n}.{w}.weight"] for n in names]) for w in ("w1", "w2", "w3"))
        inputs = fake_fp8(x, 128) if self.quantize else x
        gate = torch.einsum("btd,efd->btef", inputs, w1).float().clamp(max=config.swiglu_limit)
        up = torch.einsum("btd,efd->btef", inputs, w3).float().clamp(-config.swiglu_limit, config.swiglu_limit)
        hidden = (F.silu(gate) * up * weight.unsqueeze(-1)).to(self.dtype)
        if self.quantize:
            hidden = fake_fp8(hidden, 128)
        routed = torch.einsum("btef,edf->btd", hidden, w2)
        shared = f"{prefix}.shared_experts"
        gate = self.linear(x, f"{shared}.w1.weight").float().clamp(max=config.swiglu_limit)
        up = self.linear(x, f"{shared}.w3.weight").float().clamp(-config.swiglu_limit, config.swiglu_limit)
        return routed + self.linear((F.silu(gate) * up).to(self.dtype), f"{shared}.w2.weight")

    def balance(self, rate: float) -> None:
        """Auxiliary-loss-free balancing: nudge each expert's selection bias towards equal load."""
        with torch.no_grad():
            for name, load in self.expert_load.items():
                self.tensors[self._key(name)] += rate * torch.sign(load.mean() - load)

    # -- whole -----------------------------------------------------------------------------------------------------------------

    def block(self, h: Tensor, ids: Tensor, prefix: str, ratio: int) -> tuple[Tensor, Tensor | None]:
        x, post, comb = self.hc_pre(h, prefix, "attn")
        y, index_loss = self.attention(x, f"{prefix}.attn", ratio)
        h = self.hc_post(y, h, post, comb)
        x, post, comb = self.hc_pre(h, prefix, "ffn")
        return self.hc_post(self.moe(x, ids, f"{prefix}.ffn"), h, post, comb), index_loss

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """ids: int64 [B, T]. Returns (logits fp32 [B, T, V]; MTP's logits for the token after the next, [B, T - 1, V], or None
        without an MTP block; sum of the indexers' losses). `prepare` must have been called."""
        embed = self.weights["embed.weight"]
        h = embed[ids].unsqueeze(2).repeat(1, 1, self.config.hc_mult, 1)
        index_losses = [torch.zeros((), device=ids.device)]
        for layer, ratio in enumerate(self.config.compress_ratios):
            h, loss = self.block(h, ids, f"layers.{layer}", ratio)
            if loss is not None:
                index_losses.append(loss)
        logits = F.linear(self.norm(self.hc_head(h, ""), "norm.weight"), self.weights["head.weight"]).float()
        drafted = None
        if self.config.num_nextn_predict_layers:
            token = self.linear(self.norm(embed[ids[:, 1:]], "mtp.0.enorm.weight"), "mtp.0.e_proj.weight")
            streams = self.linear(self.norm(h[:, :-1], "mtp.0.hnorm.weight"), "mtp.0.h_proj.weight")
            m, _ = self.block(token.unsqueeze(2) + streams, ids[:, :-1], "mtp.0", 0)
            drafted = F.linear(self.norm(self.hc_head(m, "mtp.0."), "mtp.0.norm.weight"), self.weights["head.weight"]).float()
        return logits, drafted, torch.stack(index_losses).sum()
