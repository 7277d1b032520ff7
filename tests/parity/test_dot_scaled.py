"""The baseline of the experts' benchmark multiplies what it says: Triton's `dot_scaled` against products in float64."""

from __future__ import annotations

import pytest
import torch

from engine.ops.moe_experts.cases import mxfp4


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 70])
def test_rows_times_4_bit_weights(rows: int) -> None:
    from engine.ops.moe_experts.triton_dot_scaled import multiply

    device, (experts, n, k) = torch.device("cuda"), (3, 256, 512)
    weights = [mxfp4(device, seed, n, k) for seed in range(experts)]
    x = torch.randn(experts, rows, k, generator=torch.Generator().manual_seed(rows)).bfloat16().to(device)
    out = torch.empty(experts, rows, n, dtype=torch.bfloat16, device=device)
    multiply(x, torch.stack([weight.data for weight in weights]), torch.stack([weight.scale for weight in weights]), out)
    expected = torch.stack([x[expert].double() @ weight.dequantize(torch.float64).T for expert, weight in enumerate(weights)])
    assert (out.double() - expected).norm() <= 3e-3 * expected.norm(), "bf16 results of fp32 sums"
