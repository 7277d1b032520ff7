"""How evenly a group's ranks are loaded before and after their experts are placed by measured load. No device needed: counts only.

python -m tests.benchmarks.expert_balance [--experts 256] [--layers 43] [--tokens 200000] [--seed 0]

Each layer's experts have a popularity of their own, rank^-skew in a random order; a token takes `top_k` different ones. The first half
of the trace is measured and placed by, the second half is what the table shows: the busiest rank's rows over the mean, averaged over
layers and at worst. A layer is as slow as its busiest rank, so the mean is also what the experts' share of a step loses.
"""

from __future__ import annotations

import argparse

import torch

from engine.parallel.expert_placement import balanced_placement, even_placement, imbalance


def counts_of(popularity: torch.Tensor, tokens: int, top_k: int, generator: torch.Generator) -> list[int]:
    """Rows of each expert. Different experts of a token with these chances: the largest of log p + Gumbel noise."""
    total = torch.zeros(len(popularity), dtype=torch.int64)
    for part in range(0, tokens, 20_000):
        noise = -torch.empty(min(20_000, tokens - part), len(popularity)).exponential_(generator=generator).log()
        total += torch.bincount((popularity.log() + noise).topk(top_k, dim=1).indices.flatten(), minlength=len(popularity))
    return [int(count) for count in total]


def main() -> None:
    parser = argparse.ArgumentParser(description="Imbalance of expert-parallel ranks before and after placement by load.")
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=6)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=100_000, help="of each half of the trace")
    parser.add_argument("--ranks", default="2,4,8,16,32")
    parser.add_argument("--redundant", default="0,16,32,64")
    parser.add_argument("--skews", default="0.3,0.6,1.0")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(options.seed)
    redundant = [int(one) for one in options.redundant.split(",")]
    print("| skew | ranks | as numbered | " + " | ".join(f"by load, {extra} redundant" for extra in redundant) + " |")
    print("|---|---|---|" + "---|" * len(redundant))
    for skew in map(float, options.skews.split(",")):
        halves = []
        for _ in range(options.layers):
            order = torch.randperm(options.experts, generator=generator)
            popularity = (order + 1).double() ** -skew
            halves.append([counts_of(popularity, options.tokens, options.top_k, generator) for _ in range(2)])
        for ranks in map(int, options.ranks.split(",")):
            cells = [[imbalance(after, even_placement(options.experts, ranks)) for _, after in halves]]
            for extra in redundant:
                slots = -(-(options.experts + extra) // ranks)
                cells.append([imbalance(after, balanced_placement(before, ranks, slots)) for before, after in halves])
            said = " | ".join(f"{sum(cell) / len(cell):.2f} ({max(cell):.2f})" for cell in cells)
            print(f"| {skew:g} | {ranks} | {said} |")


if __name__ == "__main__":
    main()
