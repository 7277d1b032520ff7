"""Experts move to where they are needed while the group serves, one layer after the other.

    every rank    its load of each layer  ->  store
    rank 0        sum; a better placement of each layer that gains enough  ->  store
    every rank    reads the experts that come to it, in a thread of its own; "prepared"  ->  store
    rank 0        when all have prepared a layer, the next step is marked: before it every rank puts the placement in force

A token's sum does not depend on where its experts are, so no result changes. The group need not be busy: an idle one moves with its next
step. A rank that cannot take an expert says so, and the layer stays as it is on all ranks.
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

POLL_S = 0.1


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
        """`weights`: of all experts. `pack(w1, w2, w3)`: as `moe_experts` wants them. Rank 0 begins a round every `interval_s`. `died`: the
        rank cannot go on."""
        self._group, self._share, self._steps, self._weights, self._pack = group, share, steps, weights, pack
        self._interval_s, self._died = interval_s, died
        self._keys: dict[int, set[str]] = {}
        """Of rounds whose entries in the store may still be needed."""
        self._store = group.store.clone()  # type: ignore[attr-defined]  # a connection of its own, so that waiting holds up nobody
        self._seen = share.load()
        self._prepared: tuple[LayerShare, ExpertPlacement, dict[int, Any]] | None = None
        self._is_in_force, self._is_closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="rebalance", daemon=True)
        self.num_moved = 0
        """Layers whose placement was changed."""
        steps.on_change = self._put_in_force

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._is_closed.set()
        self._thread.join()

    def _put_in_force(self) -> None:
        """In the thread that steps."""
        assert self._prepared is not None, "a change is in force that was not prepared here"
        layer, placement, coming = self._prepared
        layer.move(placement, coming)
        self._prepared = None
        self._is_in_force.set()

    # -- the thread ------------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        number = 0
        try:
            while True:
                if self._group.rank == 0:
                    if self._is_closed.wait(self._interval_s):
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

    def _round(self, number: int) -> bool:
        """False when closed in between."""
        load = self._share.load()
        self._tell(number, f"load/{self._group.rank}", json.dumps((load - self._seen).tolist()).encode())
        self._seen = load
        if self._group.rank == 0:
            parts = [self._ask(number, f"load/{rank}") for rank in range(self._group.size)]
            if not all(parts):
                return False
            total = torch.tensor([json.loads(part) for part in parts if part]).sum(0)
            self._tell(number, "plan", json.dumps(self._planned(total.tolist())).encode())
        plan = self._ask(number, "plan")
        return bool(plan) and all(self._move(number, prefix, tuple(experts)) for prefix, experts in json.loads(plan or b"{}").items())

    def _planned(self, load: list[list[int]]) -> dict[str, tuple[int, ...]]:
        plan = {}
        for (prefix, layer), counts in zip(self._share.layers.items(), load, strict=True):
            better = rebalanced(counts, layer.placement, LEAST_GAIN)
            if better is not None:
                plan[prefix] = better.experts
                before, after = imbalance(counts, layer.placement), imbalance(counts, better)
                log.info("experts.planned", layer=prefix, imbalance=round(before, 3), then=round(after, 3))
        return plan

    def _move(self, number: int, prefix: str, experts: tuple[int, ...]) -> bool:
        """Prepare one layer, and see it in force or given up. False when closed in between."""
        layer, placement = self._share.layers[prefix], ExpertPlacement(experts, self._group.size)
        self._is_in_force.clear()
        try:
            coming = {place: self._read(layer, prefix, expert) for place, expert in layer.missing(placement).items()}
            self._prepared = (layer, placement, coming)
        except ConfigError as error:
            log.warning("experts.stay", layer=prefix, error=error)
            self._prepared = None
        self._tell(number, f"{prefix}/{self._group.rank}", b"no" if self._prepared is None else b"yes")
        answers = [self._ask(number, f"{prefix}/{rank}") for rank in range(self._group.size)]
        if not all(answers):
            return False
        if b"no" in answers:
            self._prepared = None
            return True
        if self._group.rank == 0:
            self._steps.request_change()
        while not self._is_in_force.wait(POLL_S):
            if self._is_closed.is_set():
                return False
        self.num_moved += 1
        log.info("experts.moved", layer=prefix, member=self._group.seat.member, read=len(coming))
        return True

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


def new_rebalancer(loaded: LoadedModel, group: Group, steps: GroupSteps, died: Callable[[str], None]) -> Rebalancer | None:
    """None where the configuration does not ask for it."""
    if not loaded.engine.rebalance_interval_s:
        return None
    assert loaded.share is not None, "a group's model is shared"
    quantize, pack = loaded.engine.dtype == "bfloat16", loaded.ops.pack["moe_experts"]

    def packed(w1: list[Weight], w2: list[Weight], w3: list[Weight]) -> Any:
        return pack(w1, w2, w3, quantize)

    return Rebalancer(group, loaded.share, steps, loaded.everything, packed, loaded.engine.rebalance_interval_s, died)
