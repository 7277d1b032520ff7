"""Expert load for Prometheus, read when it is scraped."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.parallel.experts import ExpertShare


class ExpertLoadCollector(Collector):
    """`baton_<role>_expert_tokens_total{layer, expert}` and `baton_<role>_expert_imbalance{layer}`, of tokens that this rank takes: the sum
    over a group's ranks is the load that `rebalanced` wants. And of placements `baton_<role>_expert_moves_total{layer}` and
    `baton_<role>_expert_moves_awaited`."""

    def __init__(self, role: str, share: ExpertShare) -> None:
        self._role, self._share = role, share

    def collect(self) -> Iterator[Metric]:
        layers = [prefix.removesuffix(".ffn") for prefix in self._share.layers]
        tokens = CounterMetricFamily(f"baton_{self._role}_expert_tokens", "Tokens that an expert has had", labels=["layer", "expert"])
        for layer, counts in zip(layers, self._share.load().tolist(), strict=True):
            for expert, count in enumerate(counts):
                tokens.add_metric([layer, str(expert)], count)
        yield tokens
        uneven = GaugeMetricFamily(f"baton_{self._role}_expert_imbalance", "Tokens of the busiest rank over the mean", labels=["layer"])
        for layer, value in zip(layers, self._share.imbalance(), strict=True):
            uneven.add_metric([layer], value)
        yield uneven
        moves = CounterMetricFamily(f"baton_{self._role}_expert_moves", "Placements of a layer's experts since the first", labels=["layer"])
        for layer, share in zip(layers, self._share.layers.values(), strict=True):
            moves.add_metric([layer], share.num_moves)
        yield moves
        awaited = f"baton_{self._role}_expert_moves_awaited"
        yield GaugeMetricFamily(awaited, "Layers whose next placement is decided and not in force", value=self._share.num_awaited)
