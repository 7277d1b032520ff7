"""Dashboards and alerts name metrics that exist."""

from __future__ import annotations

import json
import pathlib
import re

import pytest
import yaml
from prometheus_client import generate_latest

from core.metrics import new_registry
from decode_worker.metrics import DecodeMetrics
from kv_transfer.metrics import ReceiverMetrics, SenderMetrics
from prefill_worker.metrics import PrefillMetrics
from router.members import Members
from router.metrics import RankCollector, RouterMetrics

GRAFANA = pathlib.Path(__file__).resolve().parents[3] / "deploy/grafana"


def exported() -> set[str]:
    """Names of all series that routers and ranks export."""
    registry = new_registry()
    RouterMetrics(registry, "r")
    registry.register(RankCollector(Members(1.0)))
    PrefillMetrics(registry)
    DecodeMetrics(registry)
    SenderMetrics(registry)
    ReceiverMetrics(registry)
    families = re.findall(r"^# TYPE (\S+) (\S+)", generate_latest(registry).decode(), re.MULTILINE)
    names = {name for name, _ in families}
    names |= {f"{name}_{part}" for name, kind in families if kind == "histogram" for part in ("bucket", "sum", "count")}
    return names


@pytest.mark.parametrize("name", ["baton.json", "alerts.yaml"])
def test_every_metric_named_exists(name: str) -> None:
    text = (GRAFANA / name).read_text()
    content = json.loads(text) if name.endswith("json") else yaml.safe_load(text)
    assert content
    used = set(re.findall(r"\bbaton_\w+", text))
    assert len(used) >= 5 and used <= exported()
