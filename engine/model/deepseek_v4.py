"""DeepSeek-V4, top to bottom (deepseek_v4.md, 2.0).

e = Embed[ids]; h = 4 streams of e
for each layer:   attention sublayer, then MoE sublayer, each between hc_pre (mix the streams, norm) and hc_post (spread); the post
                  of one sublayer and the pre of the next are one op
hc_head -> RMSNorm -> logits
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from core.errors import ConfigError
from engine.batch import Batch
from engine.cache.arena import LayerCache, ModelCaches
from engine.config import EngineConfig, ModelConfig
from engine.memory_plan import WideOutputs
from engine.model.attention import Attention
from engine.model.linear import Build, Linear
from engine.model.moe import MoE
from engine.model.quantized import QuantizedRows, Weight
from engine.model.side_stream import SideStream
from engine.model.step import Step, StepMaker
from engine.ops.registry import BoundOps
from engine.parallel.experts import ExpertShare
from engine.parallel.heads import HeadShare


@dataclass(frozen=True, slots=True)
class Unspread:
    """What a sublayer leaves: its output y [T, d], to be spread over the streams h [T, M, d] that fed it, with its gates."""

    y: torch.Tensor
    more: torch.Tensor | None
    """To be added to y, which is fp32 then."""
    h: torch.Tensor
    post: torch.Tensor
    comb: torch.Tensor


Sublayer = Callable[[torch.Tensor, QuantizedRows | None], tuple[torch.Tensor, torch.Tensor | None]]
"""Normed input [T, d], also in FP8 where that has a use -> output [T, d], and what is to be added to it."""


class HyperConnection:
    """The parameters of one sublayer's connection to the streams. The first sublayer of all starts from streams, the others from what
    the one before leaves: spreading that is fused with making the next input."""

    def __init__(self, build: Build, prefix: str, sublayer: str, is_first: bool, is_quantized: bool) -> None:
        """`is_quantized`: the sublayer's input is made in FP8, too."""
        model = build.model
        self._ops, self._eps, self._hc_eps, self._iters = build.ops, model.rms_norm_eps, model.hc_eps, model.hc_sinkhorn_iters
        self._fn = build.ops.pack["hc_pre" if is_first else "hc_post_pre"](build.tensor(f"{prefix}.hc_{sublayer}_fn"))
        self._base, self._scale = (build.tensor(f"{prefix}.hc_{sublayer}_{part}").float() for part in ("base", "scale"))
        self._norm = build.tensor(f"{prefix}.{sublayer}_norm.weight")
        self._is_quantized = is_quantized

    def run(self, last: torch.Tensor | Unspread, sublayer: Sublayer) -> Unspread:
        constants = (self._fn, self._base, self._scale, self._norm, self._eps, self._hc_eps, self._iters, self._is_quantized)
        if isinstance(last, Unspread):
            h, x, quantized, post, comb = self._ops.hc_post_pre(last.y, last.more, last.h, last.post, last.comb, *constants)
        else:
            h, (x, quantized, post, comb) = last, self._ops.hc_pre(last, *constants)
        return Unspread(*sublayer(x, quantized), h, post, comb)


class Block:
    def __init__(self, build: Build, layer: int, ratio: int, is_hash: bool) -> None:
        prefix = f"layers.{layer}"
        self.attention = Attention(build, f"{prefix}.attn", ratio)
        self.moe = MoE(build, f"{prefix}.ffn", is_hash)
        self._attn_hc = HyperConnection(build, prefix, "attn", layer == 0, self.attention.takes_quantized)
        self._ffn_hc = HyperConnection(build, prefix, "ffn", False, self.moe.takes_quantized)

    def forward(self, last: torch.Tensor | Unspread, step: Step, cache: LayerCache) -> Unspread:
        """`last`: of the block before; the streams in the first."""
        last = self._attn_hc.run(last, lambda x, quantized: (self.attention.forward(x, quantized, step, cache), None))
        tokens = step.batch.token_ids_T, step.batch.places.positions_T
        return self._ffn_hc.run(last, lambda x, quantized: self.moe.forward(x, quantized, *tokens))

    def join(self, x: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Serve the peers' tokens with the experts held here; x: [0, d]."""
        self.moe.forward(x, None, token_ids, token_ids)


class DeepseekV4:
    """The main model. Weights are packed for the bound backends at construction; `mtp_weights` are kept as read, and not used yet."""

    def __init__(
        self,
        model: ModelConfig,
        engine: EngineConfig,
        weights: Mapping[str, Weight],
        ops: BoundOps,
        share: ExpertShare | None = None,
        heads: HeadShare | None = None,
    ) -> None:
        """`share`: this rank's part of the experts, in a group; `heads`: of the heads, where ranks attend together."""
        dtype = torch.bfloat16 if engine.dtype == "bfloat16" else torch.float32
        embed = weights["embed.weight"]
        assert isinstance(embed, torch.Tensor)
        self._embed = embed.to(dtype)
        build = Build(model, ops, weights, dtype, share, heads, (SideStream(embed.device), SideStream(embed.device)))
        self._model, self._ops, self._dtype = model, ops, dtype
        self.vocab_size = model.vocab_size
        self._new_step = StepMaker(model, ops, self._embed.device)
        self._layers = [Block(build, layer, ratio, layer < model.num_hash_layers) for layer, ratio in enumerate(model.compress_ratios)]
        self._head_fn = ops.pack["hc_head"](build.tensor("hc_head_fn"))
        self._head_base, self._head_scale = (build.tensor(f"hc_head_{part}").float() for part in ("base", "scale"))
        self._norm = build.tensor("norm.weight")
        self._head = Linear(build, "head.weight", torch.float32)
        self.mtp_weights = {name: weights[name] for name in weights if name.startswith("mtp.")}
        self.num_widened = 0
        """Layers whose routed experts are in the form for many tokens."""
        self.wide_outputs = WideOutputs()

    def widenable(self) -> list[MoE]:
        """Those of the layers, first to last, that `widen` would take."""
        return [layer.moe for layer in self._layers if layer.moe.widening_bytes is not None]

    def widen(self, num_layers: int) -> None:
        """`MoE.widen` in so many more layers, one after the other. Raises ConfigError, before it begins, if there are fewer."""
        found = self.widenable()
        if num_layers > len(found):
            raise ConfigError(
                f"{num_layers} layers' experts are to be widened to FP8; {len(found)} can be: those in MXFP4, with a backend for GPUs"
            )
        for moe in found[:num_layers]:
            moe.widen()
            self.num_widened += 1
            if self._embed.is_cuda:
                torch.cuda.empty_cache()  # the smaller form's memory has no use in pieces of its size

    def outputs_widening_bytes(self) -> int:
        """How many more the output projections' first halves take once `widen_outputs` has them."""
        return sum(layer.attention.widening_bytes for layer in self._layers)

    def widen_outputs(self, has_room: bool) -> None:
        """`Attention.widen` in all layers, or, without room, only a note of it in `wide_outputs`."""
        self.wide_outputs = WideOutputs(self.outputs_widening_bytes(), has_room)
        for layer in self._layers if has_room else ():
            layer.attention.widen()

    @torch.inference_mode()
    def forward(self, batch: Batch, caches: ModelCaches) -> torch.Tensor:
        """Run the batch's tokens; returns fp32 logits [R, vocab] of the rows it asks for. The caches then hold their state."""
        last: torch.Tensor | Unspread = self._embed[batch.token_ids_T].unsqueeze(1).repeat(1, self._model.hc_mult, 1)
        step = self._new_step(batch)
        for layer, cache in zip(self._layers, caches.layers, strict=True):
            last = layer.forward(last, step, cache)
        assert isinstance(last, Unspread)
        y = last.y if last.more is None else torch.add(last.y, last.more, out=torch.empty_like(last.more))
        parts: tuple[torch.Tensor, ...] = (y, last.h, last.post, last.comb)
        if batch.logits_rows_R is not None:
            parts = tuple(part[batch.logits_rows_R] for part in parts)
        h = self._ops.hc_post(*parts)
        x = self._ops.hc_head(h, self._head_fn, self._head_base, self._head_scale, self._model.rms_norm_eps, self._model.hc_eps)
        logits: torch.Tensor = self._head(self._ops.rms_norm(x, self._norm, self._model.rms_norm_eps))
        return logits

    @torch.inference_mode()
    def join(self) -> None:
        """A step without tokens of one's own: what a rank of a group does while its peers have work."""
        token_ids = torch.zeros(0, dtype=torch.int64, device=self._embed.device)
        x = self._embed[token_ids]
        for layer in self._layers:
            layer.join(x, token_ids)
