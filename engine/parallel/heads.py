"""Ranks that attend together (`attention_tp`): each computes some of the heads of the same sequences, for one user's sake.

    ranks        0           1        |  2           3             attention_tp 2 in a group of four
    sequences    ------- a, b ------  |  ------- c -------         planned, sampled for and answered by the first rank of each pair
    heads        first half  second   |  first half  second        wq_b, attn_sink and wo_a have these rows only
    pages, slots all         all      |  all         all           equal bytes under equal ids
    experts      ------------------- over all four -------------   each rank takes some of its pair's rows to them

Two gatherings a layer: of what the heads leave, before wo_b, and of what the experts leave. No sum crosses ranks, so each value is the one
that a rank alone would have. Everything else (hyper-connections, compressors, indexer, wq_a, wkv, wo_b, the shared expert, the head,
sampling) is computed by each rank for all rows. Who tells the others what to compute: `engine/following.py`.
"""

from __future__ import annotations

import torch

from core.errors import ConfigError
from engine.config import ModelConfig
from engine.parallel.group import Group

_CPU = torch.device("cpu")
_ENVELOPE = 8192
"""Bytes that go without a second message: an order of a decode step in which some 300 sequences go on."""


class HeadShare:
    """A rank's part of the heads, and its ties to the ranks that have the others. Collective calls: all of them make the same, in the same
    order. What needs the others raises GroupLost."""

    def __init__(self, group: Group, size: int, model: ModelConfig) -> None:
        """Ranks [k size, (k + 1) size) of the group attend together. Raises ConfigError if the model's heads do not spread so."""
        heads, groups = model.num_attention_heads, model.o_groups
        if heads % size or groups % size:
            raise ConfigError(
                f"{group.seat.name}: attention_tp is {size}; it must divide the model's {heads} heads and its {groups} output groups"
            )
        self.size, self.rank = size, group.rank % size
        self._group = group
        self.leader = group.seat.member_of(group.rank - self.rank)
        """The name of the rank that answers for all."""
        with group.working("the opening of heads"):
            group.backend(_CPU, size)

    def part(self, count: int) -> slice:
        """This rank's of so many things that are spread evenly, in their order."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def rows_each(self, count: int) -> int:
        """How many of so many rows each rank takes to the experts, the last ones filled up."""
        return -(-count // self.size)

    def columns(self, z: torch.Tensor) -> torch.Tensor:
        """[T, N] of each rank -> [T, size * N], side by side in the order of ranks."""
        return self._gathered(z).unflatten(0, (self.size, len(z))).transpose(0, 1).flatten(1)

    def mine(self, x: torch.Tensor, filler: int = 0) -> torch.Tensor:
        """[T, ...], equal on all ranks -> this rank's `rows_each`, [N, ...]; those beyond T are `filler`."""
        each = self.rows_each(len(x))
        part = x[each * self.rank : each * (self.rank + 1)]
        missing = each - len(part)
        return torch.cat((part, part.new_full((missing, *part.shape[1:]), filler))) if missing else part

    def whole(self, part: torch.Tensor, count: int) -> torch.Tensor:
        """What became of `mine`, [N, ...] -> that of all T = `count` rows."""
        return self._gathered(part)[:count]

    def _gathered(self, x: torch.Tensor) -> torch.Tensor:
        """[N, ...] of each rank -> [size * N, ...]."""
        out = x.new_empty(self.size * len(x), *x.shape[1:])
        if len(x):
            with self._group.working("the gathering of heads"):
                whole, part = out.view(torch.uint8), x.contiguous().view(torch.uint8)
                self._group.backend(x.device, self.size)._allgather_base(whole, part).wait()
        return out

    def tell(self, order: bytes) -> None:
        """The leader's word to the others."""
        letter = torch.zeros(_ENVELOPE, dtype=torch.uint8)
        letter[:8] = torch.tensor([len(order)]).view(torch.uint8)
        told = torch.frombuffer(bytearray(order), dtype=torch.uint8)
        head = told[: _ENVELOPE - 8]
        letter[8 : 8 + len(head)] = head
        self.copy(letter)
        if len(head) < len(told):
            self.copy(told[len(head) :])

    def hear(self) -> bytes:
        """What the leader tells."""
        letter = torch.empty(_ENVELOPE, dtype=torch.uint8)
        self.copy(letter)
        length = int(letter[:8].view(torch.int64))
        rest = torch.empty(max(0, length - (_ENVELOPE - 8)), dtype=torch.uint8)
        if len(rest):
            self.copy(rest)
        return torch.cat((letter[8:], rest))[:length].numpy().tobytes()

    def led(self, tokens: torch.Tensor) -> torch.Tensor:
        """int64 [S], drawn by each rank: those of the leader, on all. Values that differ in their last bits may draw another one."""
        self.copy(tokens)
        return tokens

    def copy(self, rows: torch.Tensor) -> None:
        """The leader's contiguous bytes into the others'."""
        options = torch.distributed.BroadcastOptions()
        options.rootRank = 0
        with self._group.working("the word of the rank that leads"):
            self._group.backend(rows.device, self.size).broadcast([rows], options).wait()
