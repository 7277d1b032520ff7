"""Experts move to where they are needed while the group serves, a few layers at a time.

    every rank    its load of each layer  ->  store
    rank 0        sum; a better placement of each layer that gains enough, in batches  ->  store
    every rank    reads the experts of a batch that come to it, in a thread of its own; "prepared"  ->  store
    rank 0        when all have prepared it, the next step is marked: before it every rank puts the placements in force

A token's sum does not depend on where its experts are, so no result changes. The group need not be busy: an idle one moves with its next
step. A rank that cannot take an expert says so, and the batch's layers stay as they are on all ranks.

On a GPU this thread works on the stream on which steps run, so what it reads is there when a step puts it in its place, and that is after
the step before; graphs read the same memory as ever.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from core.errors import ConfigError, GroupLost
from core.log import get_logger
from engine.model.quantized import Weight
from engine.parallel.expert_placement import ExpertPlacement, imbalance, rebalanced
from engine.parallel.experts import ExpertShare, LayerShare
from engine.parallel.group import Group
from engine.parallel.lockstep import GroupSteps
from engine.parallel.packed import check_expert

if TYPE_CHECKING:
    from engine.engine import LoadedModel

log = get_logger("experts")

LEAST_GAIN = 0.05
"""Share of the busiest rank's work that a new placement must take off it; less is not worth reading weights for."""
LEAST_LOAD = 1000
"""(token, expert) pairs of a layer, for each rank, before experts are placed by them: of fewer, chance alone makes a rank busy."""
MOST_COMING = 16
"""Experts that a rank reads before it puts them in their places: they lie beside all others, and so does what packing takes."""
PACKING = 12
"""What packing one takes beside, in experts as they lie in memory: up to sixteen bytes a weight of one matrix."""

POLL_S = 0.1

Batch = dict[str, tuple[int, ...]]
"""Prefix of a layer -> the expert in each slot."""


class Rebalancer:
    """Owner of a rank's part in it: a thread from `start` to `close`."""

    def __init__(
        self,
        group: Group,
        share: ExpertShare,
        steps: GroupSteps,
        weights: Mapping[str, Weight],
        pack: Callable[..., Any],
        interval_s: float,
        died: Callable[[str], None],
    ) -> None:
        """`weights`: of all experts. `pack(w1, w2, w3)`: as `moe_experts` wants them. Rank 0 begins a round `interval_s` after the first
        step since the last one. `died`: the rank cannot go on."""
        self._group, self._share, self._steps, self._weights, self._pack = group, share, steps, weights, pack
        self._interval_s, self._died = interval_s, died
        self._keys: dict[int, set[str]] = {}
        """On rank 0: of rounds whose entries in the store may still be needed."""
        self._store = group.store.clone()  # type: ignore[attr-defined]  # a connection of its own, so that waiting holds up nobody
        self._seen = share.load()
        self._counted = torch.zeros_like(self._seen)
        """On rank 0: of all ranks, since experts were last placed by it."""
        self._prepared: list[tuple[LayerShare, ExpertPlacement, dict[int, Any]]] | None = None
        self._is_in_force, self._is_closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="rebalance", daemon=True)
        steps.on_change = self._put_in_force

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._is_closed.set()
        self._thread.join()

    def _put_in_force(self) -> None:
        """In the thread that steps."""
        assert self._prepared is not None, "a change is in force that was not prepared here"
        for layer, placement, coming in self._prepared:
            layer.move(placement, coming)
        self._prepared = None
        self._is_in_force.set()

    # -- the thread ------------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        number = 0
        try:
            while True:
                if self._group.rank == 0:
                    if not self._wait():
                        return
                    self._forget(number - 2)  # all ranks have begun the round after it
                    self._tell(number, "begin", b"-")
                elif not self._ask(number, "begin"):
                    return
                if not self._round(number):
                    return
                number += 1
        except GroupLost as error:  # whoever steps finds the same, and ends the rank
            log.info("experts.ended", member=self._group.seat.member, error=error)
        except Exception as error:  # outermost
            log.exception("experts.failed", member=self._group.seat.member)
            self._died(repr(error))

    def _wait(self) -> bool:
        """Until a round is due. False when closed."""
        begun = self._steps.number
        while self._steps.number == begun:
            if self._is_closed.wait(min(self._interval_s, POLL_S)):
                return False
        return not self._is_closed.wait(self._interval_s)

    def _round(self, number: int) -> bool:
        """False when closed in between."""
        load = self._share.load()
        self._tell(number, f"load/{self._group.rank}", json.dumps((load - self._seen).tolist()).encode())
        self._seen = load
        if self._group.rank == 0:
            parts = [self._ask(number, f"load/{rank}") for rank in range(self._group.size)]
            if not all(parts):
                return False
            self._counted += torch.tensor([json.loads(part) for part in parts if part]).sum(0)
            self._tell(number, "plan", json.dumps(self._planned()).encode())
        plan = self._ask(number, "plan")
        batches: list[Batch] = json.loads(plan or b"[]")
        self._share.num_awaited = sum(map(len, batches))
        return bool(plan) and all(self._move(number, place, batch) for place, batch in enumerate(batches))

    def _planned(self) -> list[Batch]:
        if self._counted.sum(1).max() < LEAST_LOAD * self._group.size:
            return []
        plan = {}
        for (prefix, layer), counts in zip(self._share.layers.items(), self._counted.tolist(), strict=True):
            better = rebalanced(counts, layer.placement, LEAST_GAIN, MOST_COMING)
            if better is not None:
                plan[prefix] = better
                before, after = imbalance(counts, layer.placement), imbalance(counts, better)
                log.info("experts.planned", layer=prefix, imbalance=round(before, 3), then=round(after, 3))
        self._counted.zero_()
        return batches_of(plan, {prefix: self._share.layers[prefix].placement for prefix in plan})

    def _move(self, number: int, place: int, batch: Batch) -> bool:
        """Prepare some layers, and see them in force or given up. False when closed in between."""
        self._is_in_force.clear()
        try:
            self._prepared = [self._prepare(prefix, tuple(experts)) for prefix, experts in batch.items()]
        except (ConfigError, torch.OutOfMemoryError) as error:
            log.warning("experts.stay", layers=", ".join(batch), member=self._group.seat.member, error=error)
            self._prepared = None
        read = 0 if self._prepared is None else sum(len(coming) for _, _, coming in self._prepared)
        self._tell(number, f"{place}/{self._group.rank}", b"no" if self._prepared is None else b"yes")
        answers = [self._ask(number, f"{place}/{rank}") for rank in range(self._group.size)]
        if not all(answers):
            return False
        if b"no" in answers:
            self._prepared = None
        else:
            if self._group.rank == 0:
                self._steps.request_change()
            while not self._is_in_force.wait(POLL_S):
                if self._is_closed.is_set():
                    return False
            log.info("experts.moved", layers=", ".join(batch), member=self._group.seat.member, read=read)
        self._share.num_awaited -= len(batch)
        return True

    def _prepare(self, prefix: str, experts: tuple[int, ...]) -> tuple[LayerShare, ExpertPlacement, dict[int, Any]]:
        layer, placement = self._share.layers[prefix], ExpertPlacement(experts, self._group.size)
        return layer, placement, {at: self._read(layer, prefix, expert) for at, expert in layer.missing(placement).items()}

    def _read(self, layer: LayerShare, prefix: str, expert: int) -> Any:
        """Raises ConfigError if it cannot take another's place."""
        one = layer.form(self._pack(*([self._weights[f"{prefix}.experts.{expert}.{name}.weight"]] for name in ("w1", "w2", "w3"))))
        check_expert(layer.experts, one)
        return one

    def _tell(self, number: int, name: str, value: bytes) -> None:
        with self._group.working("the moving of experts"):
            self._store.set(f"experts/{number}/{name}", value)

    def _ask(self, number: int, name: str) -> bytes:
        """Waits; empty when closed in between."""
        key = f"experts/{number}/{name}"
        if self._group.rank == 0:
            self._keys.setdefault(number, set()).add(key)
        with self._group.working("the moving of experts"):
            while not self._store.check([key]):
                if self._is_closed.wait(POLL_S):
                    return b""
            return bytes(self._store.get(key))

    def _forget(self, number: int) -> None:
        """Rank 0 asks for everything, so it knows every entry."""
        with self._group.working("the moving of experts"):
            for key in (*self._keys.pop(number, ()), f"experts/{number}/begin"):
                self._store.delete_key(key)


def batches_of(plan: Mapping[str, ExpertPlacement], now: Mapping[str, ExpertPlacement]) -> list[Batch]:
    """Layers that move with the same step: as many, in order, as bring no rank more than MOST_COMING experts; one at least."""
    batches: list[Batch] = []
    coming: list[int] = []
    for prefix, new in plan.items():
        pairs = [zip(new.local(rank), now[prefix].local(rank), strict=True) for rank in range(new.num_ranks)]
        more = [sum(wanted != held for wanted, held in pair) for pair in pairs]
        together = [a + b for a, b in zip(coming, more, strict=True)] if batches else [MOST_COMING + 1]
        if max(together) > MOST_COMING:
            batches.append({})
            together = more
        batches[-1][prefix], coming = new.experts, together
    return batches


def moving_bytes(loaded: LoadedModel) -> int:
    """What a GPU must have free for experts that come, as its experts are now packed; 0 where none will."""
    if not loaded.engine.rebalance_interval_s or loaded.device.type != "cuda" or loaded.share is None:
        return 0
    return (MOST_COMING + PACKING) * loaded.share.expert_bytes()


def new_rebalancer(loaded: LoadedModel, group: Group, steps: GroupSteps, died: Callable[[str], None]) -> Rebalancer | None:
    """None where the configuration does not ask for it."""
    if not loaded.engine.rebalance_interval_s:
        return None
    assert loaded.share is not None, "a group's model is shared"
    quantize, pack = loaded.engine.dtype == "bfloat16", loaded.ops.pack["moe_experts"]

    def packed(w1: list[Weight], w2: list[Weight], w3: list[Weight]) -> Any:
        return pack(w1, w2, w3, quantize)

    return Rebalancer(group, loaded.share, steps, loaded.everything, packed, loaded.engine.rebalance_interval_s, died)
