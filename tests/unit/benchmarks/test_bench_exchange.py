"""The benchmark of the exchange on CPU ranks: every backend beside what it calls, the same rows on all ranks."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

from engine.ops.registry import Impl, get_op
from engine.parallel.group import Group
from tests.benchmarks.bench_exchange import Load, measure
from tests.support.fake_deep_ep import FakeDeepEP
from tests.support.ranks import run_group

SIZES = {"hidden": 128, "experts": 8, "top_k": 2}
LOADS = [Load(tokens=3, is_decode=True, **SIZES), Load(tokens=20, is_decode=False, **SIZES)]


def rank(group: Group) -> list[dict[str, object]]:
    return list(measure(LOADS, group, torch.device("cpu")))


def test_every_backend_stands_beside_what_it_calls() -> None:
    first, second = run_group(2, rank)
    assert first == second
    backends = [("gather", "collectives"), ("reference", "collectives")]
    decode, prefill = [("collectives", "-"), *backends], [("collectives", "-"), ("collectives, wide", "-"), *backends]
    assert [(row["what"], row["beside"]) for row in first if row["mode"] == "decode"] == decode
    assert [(row["what"], row["beside"]) for row in first if row["mode"] == "prefill"] == prefill
    assert all(float(str(row["us"])) > 0 for row in first)


def test_deepep_stands_beside_its_own_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deep_ep", FakeDeepEP(2).module())
    monkeypatch.delitem(sys.modules, "engine.ops.expert_exchange.deepep", raising=False)
    monkeypatch.setenv("NVSHMEM_QP_DEPTH", "0")
    deepep = Impl("engine.ops.expert_exchange.deepep", lambda device: None)
    monkeypatch.setitem(get_op("expert_exchange").backends, "deepep", deepep)  # type: ignore[arg-type]  # a dict, though said to be fixed
    monkeypatch.setattr("tests.benchmarks.bench_exchange.REPEATS", 2)
    monkeypatch.setattr(importlib.import_module(deepep.module), "HIDDEN_SIZES", (SIZES["hidden"],))
    first, second = run_group(2, rank)
    assert first == second
    found = [(row["mode"], row["what"], row["beside"]) for row in first if "eep" in str(row["what"]).lower()]
    rows = [("decode", "DeepEP", "-"), ("decode", "DeepEP, copied", "-"), ("decode", "deepep", "DeepEP")]
    assert found == [*rows, ("prefill", "DeepEP", "-"), ("prefill", "DeepEP, wide", "-"), ("prefill", "deepep", "DeepEP")]
    sys.modules.pop("engine.ops.expert_exchange.deepep", None)
