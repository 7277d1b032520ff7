"""Mixture of experts: routed experts chosen by score or by a table of token ids, and the shared expert (deepseek_v4.md, 2.5)."""

from __future__ import annotations

import torch

from engine.model.linear import Build, Linear, Linears
from engine.model.quantized import QuantizedRows
from engine.ops.expert_exchange import Beside, Tokens


class MoE:
    def __init__(self, build: Build, prefix: str, is_hash: bool) -> None:
        model = build.model
        self._ops, self._side, self._topk = build.ops, build.sides[0], model.num_experts_per_tok
        self._scaling, self._limit = model.routed_scaling_factor, model.swiglu_limit
        self._gate = Linear(build, f"{prefix}.gate.weight", torch.float32)
        self._bias = None if is_hash else build.tensor(f"{prefix}.gate.bias").float()
        self._table = build.tensor(f"{prefix}.gate.tid2eid").long().contiguous() if is_hash else None
        self._share, self._heads = None if build.share is None else build.share.layers[prefix], build.heads
        held = range(model.n_routed_experts) if self._share is None else self._share.held
        experts = [f"{prefix}.experts.{index}" for index in held]
        w1, w2, w3 = ([build.weights[f"{expert}.{name}.weight"] for expert in experts] for name in ("w1", "w2", "w3"))
        self._experts = build.ops.pack["moe_experts"](w1, w2, w3, build.quantize)
        if self._share is not None:
            self._share.experts = self._experts
        shared = f"{prefix}.shared_experts"
        self._w1_w3 = Linears(build, ((f"{shared}.w1.weight",), (f"{shared}.w3.weight",)))
        self._w2 = Linear(build, f"{shared}.w2.weight")

    @property
    def widening_bytes(self) -> int | None:
        """How many more the routed experts take once `widen`ed; None if they cannot be, or are."""
        found: int | None = self._experts.widening_bytes if "moe_experts" in self._ops.widen else None
        return found

    @property
    def experts_bytes(self) -> int:
        """Of the routed experts held here, where they can be widened."""
        return int(self._experts.num_bytes)

    def widen(self) -> None:
        """Hold the routed experts, unchanged in value, in the backend's larger form, which is quicker for many tokens. For a moment both
        forms are there. Raises ConfigError if they cannot be."""
        self._experts = self._ops.widen["moe_experts"](self._experts)
        if self._share is not None:
            self._share.experts, self._share.form = self._experts, self._ops.widen["moe_experts"]

    @property
    def takes_quantized(self) -> bool:
        """Whether `forward` has a use for quantised rows."""
        return self._w1_w3.takes_quantized

    def forward(
        self, x: torch.Tensor, quantized: QuantizedRows | None, token_ids: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x: [T, d] after ffn_norm, and in FP8; token_ids, positions: int64 [T] (-1: a row that only fills up; in a group it has no
        experts, so that idle ranks cost their peers little). Returns what is to be added up and rounded to x's dtype: the routed experts'
        sum, [T, d] in fp32 or x's dtype, and the shared expert's output, [T, d] in x's dtype. In a group T may be 0, and all ranks call
        it."""
        shared = self._side.start(lambda: self._shared(x if quantized is None else quantized), late=True)
        if self._heads is None:
            return self._routed(x, quantized, token_ids, positions, shared), shared()
        mine = self._heads.mine
        routed = self._routed(mine(x), None, mine(token_ids), mine(positions, filler=-1), shared)
        return self._heads.whole(routed, len(x)), shared()

    def _routed(
        self, x: torch.Tensor, quantized: QuantizedRows | None, token_ids: torch.Tensor, positions: torch.Tensor, beside: Beside
    ) -> torch.Tensor:
        """The sum of the experts that each token is sent to. beside: see `ExpertExchange.combine`."""
        ids, weights = self._ops.moe_gate(self._gate(x), self._bias, self._table, token_ids, self._topk, self._scaling)
        if self._share is None:
            routed: torch.Tensor = self._ops.moe_experts(x, ids, weights, self._experts, self._limit)
            return routed
        arrived = self._share.dispatch(Tokens(x, ids, weights, positions, quantized))
        of_rows = arrived.ids, arrived.weights, self._experts, self._limit, arrived.sum_dtype, arrived.among
        rows = self._ops.moe_experts(arrived.x, *of_rows)
        return self._share.exchange.combine(rows, arrived, beside)

    def _shared(self, x: torch.Tensor | QuantizedRows) -> torch.Tensor:
        return self._w2(self._ops.swiglu(*self._w1_w3(x), self._limit, x.dtype, self._w2.takes_quantized))
