"""Router shapes: V4-Flash (256 experts) and V4-Pro (384), score and hash layers, one token to a prefill chunk."""

from __future__ import annotations

import torch

from engine.ops.cases import Bench, Case, Draw, generator, randn

TOP_K, SCALING = 6, 1.5
VOCABULARY = 512
REASON = "weights: one fp32 division in place of a float64 one; expert ids are compared exactly"


def _tokens(device: torch.device, seed: int, tokens: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (tokens,), generator=generator(device, seed), device=device)


def _scored(tokens: int, experts: int, spread: float = 2.0) -> Draw:
    def draw(device: torch.device, seed: int) -> tuple[object, ...]:
        bias = randn(device, seed + 1, experts, scale=0.1)
        return randn(device, seed, tokens, experts, scale=spread), bias, None, _tokens(device, seed + 2, tokens), TOP_K, SCALING

    return draw


def _ties(tokens: int, experts: int) -> Draw:
    """Few distinct logits and no bias: the lowest ids among equal scores must win."""

    def draw(device: torch.device, seed: int) -> tuple[object, ...]:
        logits = torch.randint(-2, 3, (tokens, experts), generator=generator(device, seed), device=device).float()
        return logits, torch.zeros(experts, device=device), None, _tokens(device, seed + 2, tokens), TOP_K, SCALING

    return draw


def _hashed(tokens: int, experts: int) -> Draw:
    def draw(device: torch.device, seed: int) -> tuple[object, ...]:
        table = torch.rand(VOCABULARY, experts, generator=generator(device, seed + 1), device=device).argsort(1)[:, :TOP_K].contiguous()
        return randn(device, seed, tokens, experts), None, table, _tokens(device, seed + 2, tokens), TOP_K, SCALING

    return draw


def _case(name: str, draw: Draw, small: bool = False) -> Case:
    return Case(name, draw, 1e-6, REASON, small)


CASES = (
    _case("no tokens", _scored(0, 256), small=True),
    _case("no tokens of a hash layer", _hashed(0, 256), small=True),
    _case("one token", _scored(1, 256), small=True),
    _case("ties", _ties(5, 256), small=True),
    _case("Pro ties", _ties(5, 384), small=True),
    _case("hash layer", _hashed(3, 256), small=True),
    _case("logits of large range", _scored(4, 256, spread=40.0), small=True),
    _case("Pro decode", _scored(32, 384)),
    _case("Pro hash layer", _hashed(33, 384)),
    _case("Flash prefill", _scored(8192, 256)),
    _case("Flash prefill ties", _ties(1000, 256)),
    _case("Pro prefill", _scored(8192, 384)),
)


def _bench(tokens: int, experts: int) -> Bench:
    return Bench(f"T={tokens} E={experts}", _scored(tokens, experts), tokens * (experts * 4 + TOP_K * 12) + experts * 4)


BENCH = (_bench(1, 256), _bench(32, 256), _bench(128, 384), _bench(8192, 256))
