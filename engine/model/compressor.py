"""Gated pooling of the KV stream: a block of 4 or 128 tokens becomes one entry (deepseek-v4 spec, section 2.3).

Only complete blocks emit. What is pending lives in the sequence's slot: for ratio 4 a ring of 8 rows, for ratio 128 the online state.
Each class has two paths with the same result: `extend` for one sequence's chunk, `step` for one token of each of S sequences.
They return closed entries before norm, rotation and storage, which the attention and the indexer do in their own ways.
"""

from __future__ import annotations

import torch

from engine.model.linear import Build, Linear


class _Gated:
    def __init__(self, build: Build, prefix: str) -> None:
        self._ops = build.ops
        self._wkv = Linear(build, f"{prefix}.wkv.weight", torch.float32)
        self._wgate = Linear(build, f"{prefix}.wgate.weight", torch.float32)
        self._ape = build.tensor(f"{prefix}.ape").float()
        self.norm_weight = build.tensor(f"{prefix}.norm.weight")

    def _project(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """kv and score (ape added), fp32 [T, width]."""
        return self._wkv(x), self._wgate(x) + self._ape[positions % len(self._ape)]


class CompressorC4(_Gated):
    """Ratio 4 with overlap. ring: fp32 [slots, 8, 4, D] of kv A, kv B, score A, score B."""

    def _rows(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[T, 4, D]."""
        kv, score = self._project(x, positions)
        return torch.stack((*kv.chunk(2, dim=1), *score.chunk(2, dim=1)), dim=1)

    def _pool(self, blocks: torch.Tensor) -> torch.Tensor:
        """[S, n + 1, 4, 4, D] -> entries of the last n blocks, [S, n, D]."""
        entries: torch.Tensor = self._ops.compress_c4(blocks[..., :2, :], blocks[..., 2:, :])
        return entries

    def extend(self, x: torch.Tensor, start: int, ring: torch.Tensor, slot: int) -> torch.Tensor:
        """x: [T, d] at positions start.. of one sequence. Returns the entries closed, fp32 [n, D], blocks start // 4 onwards."""
        positions = torch.arange(start, start + len(x), device=x.device)
        new = self._rows(x, positions)
        #   block before the open one | pending rows | new rows      (before position 0 the ring holds neutral rows)
        old = torch.arange(start // 4 * 4 - 4, start, device=x.device)
        rows = torch.cat((ring[slot, old % 8], new))
        num_blocks = len(rows) // 4
        last = slice(-min(8, len(new)), None)
        ring[slot, positions[last] % 8] = new[last]
        return self._pool(rows[: 4 * num_blocks].unflatten(0, (1, num_blocks, 4)))[0]

    def step(self, x: torch.Tensor, positions: torch.Tensor, ring: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x: [S, d], one token each. Returns (int64 indices [C] of the sequences whose block closed, their entries fp32 [C, D])."""
        ring[slots, positions % 8] = self._rows(x, positions)
        closed = torch.nonzero(positions % 4 == 3)[:, 0]
        order = (positions[closed, None] + torch.arange(-7, 1, device=x.device)) % 8
        rows = ring[slots[closed, None], order]
        return closed, self._pool(rows.unflatten(1, (2, 4)))[:, 0]


class CompressorC128(_Gated):
    """Ratio 128, online. state: fp32 [slots, 3, D]."""

    def extend(self, x: torch.Tensor, start: int, state: torch.Tensor, slot: int) -> torch.Tensor:
        """As CompressorC4.extend; blocks start // 128 onwards."""
        end = start + len(x)
        kv, score = self._project(x, torch.arange(start, end, device=x.device))
        first_block, num_blocks = start // 128, (end - 1) // 128 - start // 128 + 1
        begins = [max(start, 128 * (first_block + block)) for block in range(num_blocks)]
        ends = [min(end, 128 * (first_block + block + 1)) for block in range(num_blocks)]
        longest = max(b - a for a, b in zip(begins, ends, strict=True))

        def by_block(rows: torch.Tensor) -> torch.Tensor:
            grid = rows.new_zeros(num_blocks, longest, rows.shape[1])
            for block, (a, b) in enumerate(zip(begins, ends, strict=True)):
                grid[block, : b - a] = rows[a - start : b - start]
            return grid

        before = state[slot].expand(num_blocks, -1, -1)
        first = torch.tensor([begin % 128 for begin in begins], device=x.device)
        count = torch.tensor([b - a for a, b in zip(begins, ends, strict=True)], device=x.device)
        after, entries = self._ops.compress_c128(by_block(kv), by_block(score), before, first, count)
        state[slot] = after[-1]
        result: torch.Tensor = entries[: num_blocks - (end % 128 != 0)]
        return result

    def step(self, x: torch.Tensor, positions: torch.Tensor, state: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kv, score = self._project(x, positions)
        count = torch.ones_like(positions)
        after, entries = self._ops.compress_c128(kv[:, None], score[:, None], state[slots], positions % 128, count)
        state[slots] = after
        closed = torch.nonzero(positions % 128 == 127)[:, 0]
        return closed, entries[closed]
