"""exchange_take: nothing, experts without rows, full rooms; Flash (4,096 channels) and Pro (7,168) on groups of different sizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.ops.cases import Bench, Case, Draw, generator, randn

REASON = "moved"


def _check(outputs: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    """Equal; codes and scales only of the rows that have come."""
    is_row = expected[4].cpu() >= 0
    for index, (out, ref) in enumerate(zip(outputs, expected, strict=True)):
        assert out.shape == ref.shape and out.dtype == ref.dtype and out.is_contiguous(), f"output {index}: {out.dtype} {out.shape}"
        kept = is_row if index < 2 else slice(None)
        found, wanted = (one.cpu().view(torch.uint8)[kept] for one in (out, ref))
        assert torch.equal(found, wanted), f"output {index} differs"


def _draw(experts: int, room: int, width: int, most: int, share: float) -> Draw:
    """`share` of the rows that there may be have come, unevenly; NaN behind them."""

    def draw(device: torch.device, seed: int) -> tuple[object, ...]:
        wanted = torch.rand(experts, generator=generator(device, seed), device=device) ** 3
        counts = (wanted / wanted.sum() * share * most).floor().clamp(max=room).int()
        codes = randn(device, seed + 1, experts, room, width, scale=20.0).to(torch.float8_e4m3fn)
        exponents = torch.randint(-12, 5, (experts, width // 128, room), generator=generator(device, seed + 2), device=device)
        scales = torch.exp2(exponents.float()).transpose(1, 2)
        behind = torch.arange(room, device=device)[None, :] >= counts[:, None]
        codes.view(torch.uint8).masked_fill_(behind[..., None], 0x7F)
        scales.masked_fill_(behind[..., None], torch.nan)
        return codes, scales, counts, most

    return draw


CASES = (
    Case("nothing has come", _draw(4, 8, 128, 6, 0.0), 0.0, REASON, small=True, check=_check),
    Case("no room", _draw(2, 4, 128, 0, 0.0), 0.0, REASON, small=True, check=_check),
    Case("some rows", _draw(5, 8, 256, 12, 0.8), 0.0, REASON, small=True, check=_check),
    Case("all rows", _draw(3, 40, 128, 20, 1.0), 0.0, REASON, small=True, check=_check),
    Case("Flash", _draw(128, 512, 4096, 384, 0.5), 0.0, REASON, check=_check),
    Case("Pro", _draw(12, 512, 7168, 768, 0.9), 0.0, REASON, check=_check),
)


def _bench(experts: int, width: int, most: int) -> Bench:
    return Bench(f"E={experts} d={width} R={most}", _draw(experts, 512, width, most, 0.5), most * width)


BENCH = (_bench(128, 4096, 12), _bench(128, 4096, 384), _bench(128, 4096, 1536), _bench(12, 7168, 768))
