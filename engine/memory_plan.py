"""What a rank's memory goes into, said before it is taken: weights, workspace, slots and their histories, pages."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from core.errors import ConfigError
from core.kv_layout import PAGE_TOKENS, KVLayout

_CGROUP = pathlib.Path("/sys/fs/cgroup")
_MEMINFO = pathlib.Path("/proc/meminfo")

STEPS = "for the largest step, graphs, and experts that move in"


@dataclass(frozen=True, slots=True)
class WideOutputs:
    """Output projections' first halves in bf16 beside FP8, for decode steps of many sequences."""

    wanted_bytes: int = 0
    """0: not wanted."""
    has_room: bool = True
    """Else they are left out."""

    @property
    def kept_bytes(self) -> int:
        return self.wanted_bytes if self.has_room else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    weights_bytes: int
    """As packed for the ops that were chosen; loaded already."""
    num_pages: int
    page_bytes: int
    num_slots: int
    slot_bytes: int
    available_bytes: int | None
    """For all but the weights. None where the system does not say."""
    workspace_bytes: int = 0
    """For the largest step, the graphs, and experts that move in while the group serves, on a GPU."""
    num_widened: int = 0
    """Layers among the weights whose experts are kept as FP8 in place of MXFP4."""
    wide_outputs: WideOutputs = WideOutputs()
    """Among the weights, if kept."""
    history_bytes: int = 0
    """Of each slot beside it: what the device needs to draw tokens of requests with penalties or a logit bias, where it does."""

    @staticmethod
    def of(
        layout: KVLayout,
        num_pages: int,
        num_slots: int,
        *,
        least_pages: int,
        weights_bytes: int,
        device: torch.device,
        workspace_bytes: int = 0,
        history_bytes: int = 0,
        num_widened: int = 0,
        wide_outputs: WideOutputs = WideOutputs(),
    ) -> MemoryPlan:
        """num_pages 0: as many as fit, on a GPU. Raises ConfigError if the device is none, or if that is less than `least_pages`, which the
        longest sequence takes: it would be refused as if it were too long."""
        available, slot_bytes = available_bytes(device), layout.slot_bytes + history_bytes
        if not num_pages:
            if device.type != "cuda" or available is None:
                raise ConfigError("num_pages is 0, which fits pages to the memory of a GPU; without one, say how many")
            num_pages = max(0, available - workspace_bytes - num_slots * slot_bytes) // layout.page_bytes
            if num_pages < least_pages:
                raise ConfigError(
                    f"there is room for {num_pages} pages, and a sequence of engine.max_model_len takes {least_pages}: "
                    f"{_size(available).strip()} are free beside the weights, the largest step takes {_size(workspace_bytes).strip()} and "
                    f"num_slots={num_slots} of {slot_bytes} bytes the rest; lower num_slots, chunk_tokens, max_running or "
                    f"engine.max_model_len"
                )
        return MemoryPlan(
            weights_bytes=weights_bytes,
            num_widened=num_widened,
            wide_outputs=wide_outputs,
            workspace_bytes=workspace_bytes,
            history_bytes=history_bytes,
            num_pages=num_pages,
            page_bytes=layout.page_bytes,
            num_slots=num_slots,
            slot_bytes=layout.slot_bytes,
            available_bytes=available,
        )

    @property
    def cache_bytes(self) -> int:
        return self.num_pages * self.page_bytes + self.num_slots * (self.slot_bytes + self.history_bytes)

    def table(self) -> str:
        """A line each for weights, wide outputs, pages, slots and histories, and what stays free."""
        pages, slots, histories = self.num_pages * self.page_bytes, self.num_slots * self.slot_bytes, self.num_slots * self.history_bytes
        wide = self.wide_outputs
        kept = "of the weights: wo_a in bf16, beside FP8" if wide.has_room else "left out for want of room: wo_a in bf16, beside FP8"
        widened = f"  of which {self.num_widened} layers' experts widened to FP8" if self.num_widened else ""
        lines = [
            f"weights  {_size(self.weights_bytes)}{widened}",
            *([f"outputs  {_size(wide.wanted_bytes)}  {kept}"] if wide.wanted_bytes else []),
            *([f"steps    {_size(self.workspace_bytes)}  {STEPS}"] if self.workspace_bytes else []),
            f"pages    {_size(pages)}  {self.num_pages} x {self.page_bytes} B ({self.num_pages * PAGE_TOKENS} tokens)",
            f"slots    {_size(slots)}  {self.num_slots} x {self.slot_bytes} B ({self.num_slots} sequences)",
            *([f"history  {_size(histories)}  {self.num_slots} x {self.history_bytes} B (penalties and bias)"] if histories else []),
        ]
        if self.available_bytes is not None:
            free = self.available_bytes - self.workspace_bytes - self.cache_bytes
            lines.append(f"free     {_size(free)}  of {_size(self.available_bytes).strip()} beside the weights")
        return "\n".join(lines)

    def check(self) -> None:
        """Raise ConfigError, naming the sizes and what would fit, if pages and slots need more than there is."""
        if self.available_bytes is None or self.cache_bytes <= self.available_bytes - self.workspace_bytes:
            return
        room, slot_bytes = self.available_bytes - self.workspace_bytes, self.slot_bytes + self.history_bytes
        fitting = max(0, room - self.num_slots * slot_bytes) // self.page_bytes
        raise ConfigError(
            f"num_pages={self.num_pages} of {self.page_bytes} bytes and num_slots={self.num_slots} of {slot_bytes} bytes need "
            f"{_size(self.cache_bytes).strip()}, and {_size(room).strip()} are free: lower num_pages (with so many slots "
            f"{fitting} would fit) or num_slots"
        )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:8.2f} GiB" if abs(num_bytes) >= 2**30 else f"{num_bytes / 2**20:8.2f} MiB"


def available_bytes(device: torch.device) -> int | None:
    """Memory that could be taken on the device now: on CPU what the system says, or what its control group leaves."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = [_kilobytes("MemAvailable:", _MEMINFO), _left_in_cgroup()]
    known = [value for value in found if value is not None]
    return min(known) if known else None


def _kilobytes(key: str, path: pathlib.Path) -> int | None:
    try:
        line = next((line for line in path.read_text().splitlines() if line.startswith(key)), None)
    except OSError:
        return None
    return None if line is None else int(line.split()[1]) * 1024


def _left_in_cgroup() -> int | None:
    """None without a limit. File caches are not counted as used: they are given back when memory is wanted."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    if limit == "max":
        return None
    return int(limit) - used + int(stat["inactive_file"]) + int(stat["active_file"])


def tensor_bytes(root: object) -> int:
    """Bytes of all tensors reachable from an object of the engine; shared memory counts once."""
    tensors = (one for one in reachable(root) if isinstance(one, torch.Tensor))
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())


def reachable(root: object) -> Iterator[object]:
    """What an object of the engine consists of: objects of the engine, containers, tensors and what else those hold, each once."""
    seen: set[int] = set()
    stack = [root]
    while stack:
        one = stack.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        if not isinstance(one, torch.Tensor):
            stack.extend(_parts(one))


def _parts(one: object) -> Iterator[Any]:
    if isinstance(one, dict):
        yield from one.values()
    elif isinstance(one, list | tuple):
        yield from one
    elif type(one).__module__.startswith("engine."):
        names = [field.name for field in dataclasses.fields(one)] if dataclasses.is_dataclass(one) else vars(one)
        yield from (getattr(one, name) for name in names)
