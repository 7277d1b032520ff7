"""DeepSeek-V4, top to bottom (deepseek-v4 spec, section 2.0).

e = Embed[ids]; h = 4 streams of e
for each layer:   attention sublayer, then MoE sublayer, each between hc_pre (mix the streams, norm) and hc_post (spread)
hc_head -> RMSNorm -> logits
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from engine.batch import Batch
from engine.cache.arena import LayerCache, ModelCaches
from engine.config import EngineConfig, ModelConfig
from engine.model.attention import Attention
from engine.model.linear import Build, Linear
from engine.model.moe import MoE
from engine.model.quantized import Weight
from engine.model.step import Step, StepMaker
from engine.ops.registry import BoundOps
from engine.parallel.experts import ExpertShare


class HyperConnection:
    """The parameters of one sublayer's connection to the streams."""

    def __init__(self, build: Build, prefix: str, sublayer: str) -> None:
        model = build.model
        self._ops, self._eps, self._hc_eps, self._iters = build.ops, model.rms_norm_eps, model.hc_eps, model.hc_sinkhorn_iters
        self._fn, self._base, self._scale = (build.tensor(f"{prefix}.hc_{sublayer}_{part}").float() for part in ("fn", "base", "scale"))
        self._norm = build.tensor(f"{prefix}.{sublayer}_norm.weight")

    def pre(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[T, M, d] -> normed input of the sublayer [T, d], and what `post` needs."""
        mixed: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = self._ops.hc_pre(
            h, self._fn, self._base, self._scale, self._norm, self._eps, self._hc_eps, self._iters
        )
        return mixed

    def post(self, y: torch.Tensor, h: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
        streams: torch.Tensor = self._ops.hc_post(y, h, post, comb)
        return streams


class Block:
    def __init__(self, build: Build, prefix: str, ratio: int, is_hash: bool) -> None:
        self._attn_hc, self._ffn_hc = HyperConnection(build, prefix, "attn"), HyperConnection(build, prefix, "ffn")
        self._attention = Attention(build, f"{prefix}.attn", ratio)
        self._moe = MoE(build, f"{prefix}.ffn", is_hash)

    def forward(self, h: torch.Tensor, step: Step, cache: LayerCache) -> torch.Tensor:
        """Streams [T, M, d] -> streams."""
        x, post, comb = self._attn_hc.pre(h)
        h = self._attn_hc.post(self._attention.forward(x, step, cache), h, post, comb)
        x, post, comb = self._ffn_hc.pre(h)
        return self._ffn_hc.post(self._moe.forward(x, step.batch.token_ids_T), h, post, comb)

    def join(self, x: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Serve the peers' tokens with the experts held here; x: [0, d]."""
        self._moe.forward(x, token_ids)


class DeepseekV4:
    """The main model. Weights are packed for the bound backends at construction; `mtp_weights` are kept as read, for the drafter."""

    def __init__(
        self,
        model: ModelConfig,
        engine: EngineConfig,
        weights: Mapping[str, Weight],
        ops: BoundOps,
        share: ExpertShare | None = None,
    ) -> None:
        """`share`: this rank's part of the experts, in a group."""
        dtype = torch.bfloat16 if engine.dtype == "bfloat16" else torch.float32
        build = Build(model, ops, weights, dtype, share)
        self._model, self._ops, self._dtype = model, ops, dtype
        self._embed = build.tensor("embed.weight").to(dtype)
        self._new_step = StepMaker(model, self._embed.device)
        self._layers = [
            Block(build, f"layers.{layer}", ratio, layer < model.num_hash_layers) for layer, ratio in enumerate(model.compress_ratios)
        ]
        self._head_hc = tuple(build.tensor(f"hc_head_{part}").float() for part in ("fn", "base", "scale"))
        self._norm = build.tensor("norm.weight")
        self._head = Linear(build, "head.weight", torch.float32)
        self.mtp_weights = {name: weight for name, weight in weights.items() if name.startswith("mtp.")}

    @torch.inference_mode()
    def forward(self, batch: Batch, caches: ModelCaches) -> torch.Tensor:
        """Run the batch's tokens; returns fp32 logits [R, vocab] of the rows it asks for. The caches then hold their state."""
        h = self._embed[batch.token_ids_T].unsqueeze(1).repeat(1, self._model.hc_mult, 1)
        step = self._new_step(batch)
        for layer, cache in zip(self._layers, caches.layers, strict=True):
            h = layer.forward(h, step, cache)
        if batch.logits_rows_R is not None:
            h = h[batch.logits_rows_R]
        x = self._ops.hc_head(h, *self._head_hc, self._model.rms_norm_eps, self._model.hc_eps)
        logits: torch.Tensor = self._head(self._ops.rms_norm(x, self._norm, self._model.rms_norm_eps))
        return logits

    @torch.inference_mode()
    def join(self) -> None:
        """A step without tokens of one's own: what a rank of a group does while its peers have work."""
        token_ids = torch.zeros(0, dtype=torch.int64, device=self._embed.device)
        x = self._embed[token_ids]
        for layer in self._layers:
            layer.join(x, token_ids)
