"""Larger forms of weights: experts as FP8, in as many layers as fit beside what a prefill rank needs, equally many on all ranks of a group;
wo_a in bf16 beside FP8 where decode steps are large."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import pytest

from core.errors import ConfigError
from core.request import Request, SamplingParams
from engine.config import EngineConfig
from engine.engine import Engine, LoadedModel
from engine.parallel.experts import Sharing
from engine.parallel.group import Group
from engine.runner import ModelRunner
from engine.widening import AS_MANY_AS_FIT, PAGES_SHARE, Layer, num_fitting, widen_experts, widen_outputs
from tests.support.experts import packed
from tests.support.ranks import run_group

ENGINE = EngineConfig(device="cpu", max_model_len=1024)
EXTRA, NOW = 1 << 30, 1 << 10


@dataclasses.dataclass(frozen=True)
class Experts:
    """What a backend packs, in place of the reference's: the same weights, narrow or wide."""

    inner: Any
    widening_bytes: int | None = EXTRA
    num_bytes: int = NOW


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """`moe_experts` of every model that is loaded can be widened."""

    def bind(*args: Any) -> Any:
        ops = real(*args)
        run, pack = ops.moe_experts, ops.pack["moe_experts"]
        ops.moe_experts = lambda x, ids, weights, experts, limit: run(x, ids, weights, experts.inner, limit)
        ops.pack["moe_experts"] = lambda *weights: Experts(pack(*weights))
        ops.widen = {"moe_experts": lambda experts: dataclasses.replace(experts, widening_bytes=None)}
        return ops

    from engine import engine

    real = engine.bind
    monkeypatch.setattr(engine, "bind", bind)


def test_layers_are_widened_while_what_is_reserved_stays_free() -> None:
    layers = [Layer(10, 4)] * 5
    assert [num_fitting(layers, free, 7) for free in (16, 17, 36, 37, 56, 57, 1000)] == [0, 1, 2, 3, 4, 5, 5]


def test_for_a_moment_a_layer_needs_room_for_both_of_its_forms() -> None:
    assert [num_fitting([Layer(10, 4)] * 3, free, 0) for free in (13, 14, 23, 24)] == [0, 1, 1, 2]


def test_a_model_with_widened_layers_makes_the_same_tokens_and_says_how_many(small_checkpoint: pathlib.Path, narrow: None) -> None:
    loaded = LoadedModel.load(small_checkpoint, ENGINE)
    request = Request(request_id="a", token_ids=(5, 6, 7), prompt_len=3, sampling=SamplingParams(max_tokens=4, ignore_eos=True))
    before = Engine(loaded, num_pages=4, num_slots=1).generate([request])
    assert "widened" not in loaded.memory_plan(4, 1).table()
    loaded.network.widen(3)
    assert "of which 3 layers' experts widened to FP8" in loaded.memory_plan(4, 1).table()
    assert Engine(loaded, num_pages=4, num_slots=1).generate([request]) == before
    with pytest.raises(ConfigError, match="2 layers' experts are to be widened to FP8; 1 can be"):
        loaded.network.widen(2)
    assert loaded.network.num_widened == 3


def test_pages_and_slots_come_first(small_checkpoint: pathlib.Path, narrow: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4 layers two fit; pages for the slots' longest sequences are set aside, though num_pages leaves their number open."""
    loaded = LoadedModel.load(small_checkpoint, ENGINE)
    needed = 3 * 4 * loaded.layout.page_bytes + 3 * loaded.layout.slot_bytes + 99
    free = needed + 2 * EXTRA
    monkeypatch.setattr("engine.widening.available_bytes", lambda device: free)
    with pytest.raises(ConfigError, match=r"prefill.widened_layers is 3: beside 12 pages, 3 slots and the largest step 2 fit"):
        widen_experts(loaded, 3, 0, 3, 99)
    assert widen_experts(loaded, AS_MANY_AS_FIT, 0, 3, 99) and loaded.network.num_widened == 2
    free = needed + EXTRA - 1
    assert not widen_experts(LoadedModel.load(small_checkpoint, ENGINE), AS_MANY_AS_FIT, 0, 3, 99)


def test_experts_that_no_backend_widens_stay_as_they_are(small_checkpoint: pathlib.Path) -> None:
    loaded = LoadedModel.load(small_checkpoint, ENGINE)
    ModelRunner(loaded, 4, 1, widened_layers=AS_MANY_AS_FIT)
    assert loaded.network.num_widened == 0
    with pytest.raises(ConfigError, match="0 can be"):
        ModelRunner(loaded, 4, 1, widened_layers=1)


def test_a_group_widens_what_fits_on_all_its_ranks_and_takes_experts_that_come(
    small_checkpoint: pathlib.Path, narrow: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.widening.available_bytes", lambda device: (100 if fits.pop() else 3) * EXTRA)
    fits = [True, False]

    def rank(group: Group) -> tuple[int, list[bool]]:
        loaded = LoadedModel.load(small_checkpoint, ENGINE, Sharing(group=group, max_tokens=64, is_latency_bound=True))
        widen_experts(loaded, AS_MANY_AS_FIT, 4, 1, 0)
        assert loaded.share is not None
        layers = [layer for layer in loaded.share.layers.values() if layer.experts]
        coming = [layer.form(Experts(packed((0,)))) for layer in layers]
        return loaded.network.num_widened, [
            one.widening_bytes is None and layer.experts.widening_bytes is None for one, layer in zip(coming, layers, strict=True)
        ]

    assert run_group(2, rank) == [(2, [True, True, False, False])] * 2


OUTPUTS = 4 * EXTRA
"""What wo_a takes in the layers of the small model."""


@dataclasses.dataclass(frozen=True)
class Output:
    inner: Any
    widening_bytes: int = EXTRA


@pytest.fixture
def narrow_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """`grouped_linear` of every model that is loaded can be widened."""

    def bind(*args: Any) -> Any:
        ops = real(*args)
        run, pack = ops.grouped_linear, ops.pack["grouped_linear"]
        ops.grouped_linear = lambda x, weight: run(x, weight.inner)
        ops.pack["grouped_linear"] = lambda *weights: Output(pack(*weights))
        ops.widen = {"grouped_linear": lambda weight: dataclasses.replace(weight, widening_bytes=0)}
        return ops

    from engine import engine

    real = engine.bind
    monkeypatch.setattr(engine, "bind", bind)


def test_wo_a_is_kept_in_bf16_where_decode_steps_are_large(
    small_checkpoint: pathlib.Path, narrow_outputs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.widening.available_bytes", lambda device: 1000 * EXTRA)
    loaded = LoadedModel.load(small_checkpoint, ENGINE)
    for max_decode in (0, 64):
        ModelRunner(loaded, 4, 1, max_decode=max_decode)
        assert "outputs" not in loaded.memory_plan(4, 1).table()
    ModelRunner(loaded, 4, 1, max_decode=65)
    assert "outputs      4.00 GiB  of the weights: wo_a in bf16" in loaded.memory_plan(4, 1).table()
    assert loaded.network.outputs_widening_bytes() == 0 and loaded.network.wide_outputs.kept_bytes == OUTPUTS
    ModelRunner(loaded, 4, 1, max_decode=65)
    assert loaded.network.wide_outputs.kept_bytes == OUTPUTS, "a second runner finds them"


@pytest.mark.parametrize(("num_pages", "needed"), [(4, OUTPUTS), (0, OUTPUTS * PAGES_SHARE)])
def test_wo_a_is_left_out_without_room_and_the_plan_says_so(
    small_checkpoint: pathlib.Path, narrow_outputs: None, monkeypatch: pytest.MonkeyPatch, num_pages: int, needed: int
) -> None:
    loaded = LoadedModel.load(small_checkpoint, ENGINE)
    free = num_pages * loaded.layout.page_bytes + 3 * loaded.layout.slot_bytes + 99 + needed - 1
    monkeypatch.setattr("engine.widening.available_bytes", lambda device: free)
    widen_outputs(loaded, 256, num_pages, 3, 99)
    assert loaded.network.wide_outputs.kept_bytes == 0
    assert "outputs      4.00 GiB  left out for want of room" in loaded.memory_plan(4, 1).table()
    free += 1
    widen_outputs(loaded, 256, num_pages, 3, 99)
    assert loaded.network.wide_outputs.kept_bytes == OUTPUTS


def test_a_group_keeps_wo_a_in_bf16_on_all_its_ranks_or_on_none(
    small_checkpoint: pathlib.Path, narrow_outputs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.widening.available_bytes", lambda device: (100 if fits.pop() else 3) * EXTRA)
    fits = [True, False]

    def rank(group: Group) -> int:
        loaded = LoadedModel.load(small_checkpoint, ENGINE, Sharing(group=group, max_tokens=128, is_latency_bound=True))
        widen_outputs(loaded, 128, 4, 1, 0)
        return loaded.network.wide_outputs.kept_bytes

    assert run_group(2, rank) == [0, 0]
