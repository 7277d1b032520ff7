"""DeepSeek-V4 for training: whole sequences, gradients. The same mathematics as engine/model, in plain torch (a parity test compares).

Parameters carry the published names and shapes (the experts of a layer are stacked), so that `published()` is a checkpoint.
`quantize` simulates the published formats (FP8 and MXFP4 weights, FP8 activations and KV rows) with straight-through gradients.

Shape suffixes: B batch, T tokens, M streams, H heads, D head_dim, S compressed entries, W window, N blocks of W tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deploy.demo_model import training_ops
from engine.config import ModelConfig
from engine.model.quantized import quantize_fp8, quantize_mxfp4
from engine.model.rope import compress_frequencies, main_frequencies, rotation
from engine.model.weights import expected_tensors, published_format

_COMPILED = ("hc_pre", "hc_post", "joint_softmax", "swiglu", "norm_rotate", "index_scores", "pool")
"""Where most of the memory traffic of a step is. Compiling takes seconds for each new shape, so those that can see tokens as one flat
dimension, whatever the batch, do."""

_EXPERT = re.compile(r"\.experts\.(\d+)\.")


class TrainingModel(nn.Module):
    def __init__(self, config: ModelConfig, seed: int = 0, *, compiled: bool = False) -> None:
        """`compiled`: fuse the element-wise parts (GPU)."""
        super().__init__()
        self.config = config
        self.quantize = False
        self.select = False
        """Hard top-k selection of entries (off: all visible ones), as in serving."""
        self.expert_load: dict[str, Tensor] = {}
        self._compiled = compiled
        if compiled:  # one function serves several shapes, each compiled for itself
            torch._dynamo.config.recompile_limit = 64
        self._fused: dict[str, Callable[..., Any]] = {}
        self.tables = nn.ParameterDict()
        self.main_frequencies: Tensor
        self.compress_frequencies: Tensor
        self.register_buffer("main_frequencies", main_frequencies(config), persistent=False)
        self.register_buffer("compress_frequencies", compress_frequencies(config), persistent=False)
        generator = torch.Generator().manual_seed(seed)
        values: dict[str, Tensor] = {}
        for name, spec in expected_tensors(config).items():
            if spec.kind == "ids":
                draws = torch.rand((spec.shape[0], config.n_routed_experts), generator=generator)
                values[name] = draws.argsort(1)[:, : spec.shape[1]].contiguous()
            else:
                values[name] = _initial(name, spec.shape, config, generator)
        self.tensors = nn.ParameterDict()
        for name, value in self._stack(values).items():
            if value.dtype == torch.int64:
                self.tables[_key(name)] = nn.Parameter(value, requires_grad=False)
            else:
                self.tensors[_key(name)] = nn.Parameter(value)

    def _stack(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Published tensors -> the same, with the experts of a layer in one tensor [E, out, in] named `experts.w1.weight`."""
        stacked = {name: value for name, value in values.items() if not _EXPERT.search(name)}
        for name in values:
            if ".experts.0." in name:
                parts = [values[name.replace(".experts.0.", f".experts.{e}.")] for e in range(self.config.n_routed_experts)]
                stacked[name.replace(".experts.0.", ".experts.")] = torch.stack(parts)
        return stacked

    def published(self) -> dict[str, Tensor]:
        """All tensors by published name, float32 or int64, on the CPU."""
        found: dict[str, Tensor] = {}
        for key, value in (*self.tensors.items(), *self.tables.items()):
            name, value = key.replace("/", "."), value.detach().cpu()
            if ".experts." in name:
                found |= {name.replace(".experts.", f".experts.{e}."): part.float() for e, part in enumerate(value)}
            else:
                found[name] = value if value.dtype == torch.int64 else value.float()
        return found

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Take over published tensors, float or int64."""
        with torch.no_grad():
            for name, value in self._stack(values).items():
                (self.tables if value.dtype == torch.int64 else self.tensors)[_key(name)].copy_(value)

    def fused(self, name: str) -> Callable[..., Any]:
        """A function of training_ops, compiled if this model is and that pays."""
        if name not in self._fused:
            plain = getattr(training_ops, name)
            self._fused[name] = torch.compile(plain, dynamic=False) if self._compiled and name in _COMPILED else plain
        return self._fused[name]

    def prepare(self, dtype: torch.dtype) -> None:
        """Cast (and quantise) the weights once for the coming forward passes."""
        self.weights: dict[str, Tensor] = {}
        self.dtype = dtype
        for key, value in self.tensors.items():
            name = key.replace("/", ".")
            form, used = published_format(name), value
            if self.quantize and form in ("fp8", "mxfp4"):
                with torch.no_grad():
                    flat = value.flatten(0, -2)  # blocks of 128 rows do not straddle experts, whose rows are multiples of 128
                    exact = (quantize_fp8 if form == "fp8" else quantize_mxfp4)(flat).dequantize().view_as(value)
                used = value + (exact - value).detach()
            self.weights[name] = used.to(dtype) if value.dim() >= 2 and name.endswith(".weight") else used

    def linear(self, x: Tensor, name: str) -> Tensor:
        if self.quantize and published_format(name) in ("fp8", "mxfp4"):
            x = training_ops.fake_fp8(x, 128)
        return F.linear(x, self.weights[name])

    def norm(self, x: Tensor, name: str) -> Tensor:
        return training_ops.norm(x, self.weights[name], self.config.rms_norm_eps, self.dtype)

    # -- attention -------------------------------------------------------------------------------------------------------------

    def entries(self, x: Tensor, prefix: str, ratio: int, frequencies: Tensor) -> Tensor:
        """Compressed entries of all whole blocks, normed and rotated: [B, S, D]."""
        x = x[:, : x.shape[1] // ratio * ratio]
        kv, score = F.linear(x, self.weights[f"{prefix}.wkv.weight"]), F.linear(x, self.weights[f"{prefix}.wgate.weight"])
        pooled = self.fused("pool")(kv, score, self.weights[f"{prefix}.ape"], ratio)
        cos, sin = rotation(torch.arange(pooled.shape[1], device=x.device) * ratio, frequencies)
        return training_ops.norm_rotate(pooled, self.weights[f"{prefix}.norm.weight"], cos, sin, self.config.rms_norm_eps, self.dtype)

    def cached(self, kv: Tensor) -> Tensor:
        return training_ops.quantize_kv(kv, self.config.qk_rope_head_dim) if self.quantize else kv

    def attention(self, x: Tensor, prefix: str, ratio: int) -> tuple[Tensor, Tensor | None]:
        """x: [B, T, d], T a multiple of the window. Returns (y, the indexer's loss or None)."""
        config, window = self.config, self.config.sliding_window
        batch, length = x.shape[:2]
        heads, dim, groups, eps = config.num_attention_heads, config.head_dim, config.o_groups, config.rms_norm_eps
        scale = dim**-0.5
        assert length % window == 0, f"{length=} is no multiple of {window=}"
        blocks = (batch, length // window, window)
        frequencies = self.compress_frequencies if ratio else self.main_frequencies
        positions = torch.arange(length, device=x.device)
        cos, sin = rotation(positions, frequencies)

        def norm_rotate(x: Tensor, weight: Tensor | None) -> Tensor:
            turned = self.fused("norm_rotate")(_flat(x), weight, cos.repeat(batch, 1), sin.repeat(batch, 1), eps, self.dtype)
            return turned.view(x.shape)

        qr = self.norm(self.linear(x, f"{prefix}.wq_a.weight"), f"{prefix}.q_norm.weight")
        q = norm_rotate(self.linear(qr, f"{prefix}.wq_b.weight").unflatten(-1, (heads, dim)), None)
        kv = norm_rotate(self.linear(x, f"{prefix}.wkv.weight"), self.weights[f"{prefix}.kv_norm.weight"])
        #   a block of W queries sees the block before and its own:  keys [B, N, 2 W, D]
        own = self.cached(kv).view(*blocks, dim)
        near_kv = torch.cat((F.pad(own[:, :-1], (0, 0, 0, 0, 1, 0)), own), 2)
        age = window + torch.arange(window, device=x.device)[:, None] - torch.arange(2 * window, device=x.device)
        exists = (torch.arange(2 * window, device=x.device) >= window) | (torch.arange(blocks[1], device=x.device) > 0)[:, None]
        near_mask = (((age >= 0) & (age < window)) & exists[:, None])[:, :, None]
        rows = q.view(batch, blocks[1], window * heads, dim)
        near = (rows @ near_kv.transpose(-1, -2)).unflatten(2, (window, heads))
        sink, loss, softmax = self.weights[f"{prefix}.attn_sink"], None, self.fused("joint_softmax")
        if not ratio:
            (weight,) = softmax(near, None, near_mask, None, sink, scale)
            o = weight.flatten(2, 3) @ near_kv
        else:
            far_kv = self.cached(self.entries(x, f"{prefix}.compressor", ratio, frequencies))
            closed = torch.arange(far_kv.shape[1], device=x.device) < ((positions + 1) // ratio)[:, None]
            far = (rows.flatten(1, 2) @ far_kv.transpose(-1, -2)).view(*blocks, heads, -1)
            seen = closed.view(1, *blocks[1:], 1, -1)
            if ratio == 4:
                logits = self.index_logits(x, qr, f"{prefix}.indexer", cos, sin, frequencies)
                with torch.no_grad():  # the indexer learns what attention would take if it saw every entry
                    _, every = softmax(near, far, near_mask, seen, sink, scale)
                    mass = every.float().sum(3).flatten(1, 2)
                loss = training_ops.index_loss(logits, closed, mass)
                if self.select and far_kv.shape[1] > config.index_topk:
                    chosen = logits.detach().masked_fill(~closed, training_ops.MASKED).topk(config.index_topk, -1).indices
                    picked = torch.zeros(logits.shape, dtype=torch.bool, device=x.device).scatter_(-1, chosen, True) & closed
                    seen = picked.view(*blocks, 1, -1)
            weight, far_weight = softmax(near, far, near_mask, seen, sink, scale)
            o = weight.flatten(2, 3) @ near_kv + (far_weight.flatten(1, 3) @ far_kv).view(batch, blocks[1], -1, dim)
        o = training_ops.rotate(o.reshape(batch, length, heads, dim).float(), cos, -sin).to(self.dtype)
        wo_a = self.weights[f"{prefix}.wo_a.weight"].unflatten(0, (groups, -1))
        z = torch.einsum("btgi,goi->btgo", o.flatten(2).unflatten(2, (groups, -1)), wo_a).flatten(2)
        return self.linear(z, f"{prefix}.wo_b.weight"), loss

    def index_logits(self, x: Tensor, qr: Tensor, prefix: str, cos: Tensor, sin: Tensor, frequencies: Tensor) -> Tensor:
        """fp32 [B, T, S]. Gradients stay inside the indexer: its inputs are detached."""
        heads, dim = self.config.index_n_heads, self.config.index_head_dim
        x, qr = x.detach(), qr.detach()
        keys = self.entries(x, f"{prefix}.compressor", 4, frequencies)
        q = self.linear(qr, f"{prefix}.wq_b.weight").unflatten(-1, (heads, dim)).float()
        q = training_ops.rotate(q, cos, sin).to(self.dtype)
        weights = F.linear(x, self.weights[f"{prefix}.weights_proj.weight"]).float() * (dim * heads) ** -0.5
        dots = (q.flatten(1, 2) @ keys.transpose(-1, -2)).unflatten(1, (-1, heads))
        return self.fused("index_scores")(dots, weights)

    # -- experts ---------------------------------------------------------------------------------------------------------------

    def moe(self, x: Tensor, ids: Tensor, prefix: str) -> Tensor:
        """Every expert runs on every token, with weight 0 where it was not chosen: with 8 small experts that is quickest."""
        config = self.config
        scores = F.softplus(F.linear(x.float(), self.weights[f"{prefix}.gate.weight"].float())).sqrt()
        key = _key(f"{prefix}.gate.tid2eid")
        if key in self.tables:
            chosen = self.tables[key][ids]
        else:
            bias = self.weights[f"{prefix}.gate.bias"].detach().float()
            chosen = (scores + bias).detach().topk(config.num_experts_per_tok, -1).indices
        picked = scores.gather(-1, chosen)
        picked = picked / (picked.sum(-1, keepdim=True) + 1e-20) * config.routed_scaling_factor
        weight = torch.zeros_like(scores).scatter(-1, chosen, picked)
        if key not in self.tables:
            self.expert_load[f"{prefix}.gate.bias"] = (weight > 0).float().mean((0, 1)).detach()
        w1, w2, w3 = (self.weights[f"{prefix}.experts.{w}.weight"] for w in ("w1", "w2", "w3"))
        inputs, swiglu = training_ops.fake_fp8(x, 128) if self.quantize else x, self.fused("swiglu")
        sizes = (config.n_routed_experts, config.moe_intermediate_size)
        gate = F.linear(inputs, w1.flatten(0, 1)).unflatten(-1, sizes)
        up = F.linear(inputs, w3.flatten(0, 1)).unflatten(-1, sizes)
        hidden = swiglu(gate, up, config.swiglu_limit, self.dtype, weight, self.quantize)
        routed = hidden.flatten(2) @ w2.transpose(1, 2).flatten(0, 1)
        s1, s2, s3 = (self.weights[f"{prefix}.shared_experts.{w}.weight"] for w in ("w1", "w2", "w3"))
        hidden = swiglu(F.linear(inputs, s1), F.linear(inputs, s3), config.swiglu_limit, self.dtype, None, self.quantize)
        return routed + F.linear(hidden, s2)

    def balance(self, rate: float) -> None:
        """Auxiliary-loss-free balancing: nudge each expert's selection bias towards equal load."""
        with torch.no_grad():
            for name, load in self.expert_load.items():
                self.tensors[_key(name)] += rate * torch.sign(load.mean() - load)

    # -- whole -----------------------------------------------------------------------------------------------------------------

    def block(self, h: Tensor, ids: Tensor, prefix: str, ratio: int) -> tuple[Tensor, Tensor | None]:
        """h: [1, B T, M, d], all tokens of all rows."""

        def pre(h: Tensor, sublayer: str) -> tuple[Tensor, Tensor, Tensor]:
            parts = [self.weights[f"{prefix}.hc_{sublayer}_{part}"] for part in ("fn", "base", "scale")]
            weight = self.weights[f"{prefix}.{sublayer}_norm.weight"]
            return self.fused("hc_pre")(h, *parts, weight, self.config.hc_sinkhorn_iters, self.config.rms_norm_eps, self.config.hc_eps)

        x, post, comb = pre(h, "attn")
        y, loss = self.attention(x.view(*ids.shape, -1), f"{prefix}.attn", ratio)
        h = self.fused("hc_post")(_flat(y), h, post, comb)
        x, post, comb = pre(h, "ffn")
        return self.fused("hc_post")(self.moe(x, _flat(ids), f"{prefix}.ffn"), h, post, comb), loss

    def head(self, h: Tensor, prefix: str) -> Tensor:
        """Streams -> logits fp32."""
        fn, base, scale = (self.weights[f"{prefix}hc_head_{part}"] for part in ("fn", "base", "scale"))
        x = training_ops.hc_head(h, fn, base, scale, self.config.rms_norm_eps, self.config.hc_eps)
        return F.linear(self.norm(x, f"{prefix}norm.weight"), self.weights["head.weight"]).float()

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """ids: int64 [B, T], T a multiple of the window. Returns (logits fp32 [B, T, V]; MTP's logits [B, T, V] for the token after
        the next, the last row without meaning, or None without an MTP block; sum of the indexers' losses). `prepare` comes first."""
        embed = self.weights["embed.weight"]
        h = _flat(embed[ids]).unsqueeze(2).repeat(1, 1, self.config.hc_mult, 1)
        index_loss = torch.zeros((), device=ids.device)
        for layer, ratio in enumerate(self.config.compress_ratios):
            h, loss = self.block(h, ids, f"layers.{layer}", ratio)
            index_loss = index_loss if loss is None else index_loss + loss
        drafted = None
        if self.config.num_nextn_predict_layers:
            following = self.norm(_flat(embed[ids.roll(-1, 1)]), "mtp.0.enorm.weight")
            streams = self.linear(self.norm(h, "mtp.0.hnorm.weight"), "mtp.0.h_proj.weight")
            m, _ = self.block(self.linear(following, "mtp.0.e_proj.weight").unsqueeze(2) + streams, ids, "mtp.0", 0)
            drafted = self.head(m, "mtp.0.").view(*ids.shape, -1)
        return self.head(h, "").view(*ids.shape, -1), drafted, index_loss


def _flat(x: Tensor) -> Tensor:
    """[B, T, ...] -> [1, B T, ...]."""
    return x.flatten(0, 1).unsqueeze(0)


def _key(name: str) -> str:
    """A parameter's name: torch allows no dots."""
    return name.replace(".", "/")


def _initial(name: str, shape: tuple[int, ...], config: ModelConfig, generator: torch.Generator) -> Tensor:
    """Start values. Streams mostly keep to themselves; the rest of a row of `ape` prefers no token of a block at first."""
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith(".ape"):
        return torch.randn(shape, generator=generator)
    if name.endswith("_fn"):
        return torch.randn(shape, generator=generator) * 0.01
    if len(shape) == 2:
        value = torch.randn(shape, generator=generator) * (0.02 if name.startswith("embed") else shape[-1] ** -0.5)
        return value * 0.3 if name.endswith(("wo_b.weight", "w2.weight")) else value
    value = torch.zeros(shape)
    if name.endswith("_scale"):
        value.fill_(0.1)
    elif name.endswith(("hc_attn_base", "hc_ffn_base")):
        mult = config.hc_mult
        value[2 * mult :] = 2.5 * torch.eye(mult).flatten()
    return value
