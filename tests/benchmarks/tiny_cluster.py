"""A model with the structure of V4-Flash that CPUs can serve, and what a cluster file for GPUs needs changed for it: devices and sizes."""

from __future__ import annotations

import json
import pathlib

from tests.support.checkpoints import SMALL

VOCAB = 4096
"""More than the demo model's tokenizer knows, as with the published shapes."""


def write_tiny(folder: pathlib.Path) -> pathlib.Path:
    """Its config.json; 16 experts of which a token has 4."""
    folder.mkdir(parents=True, exist_ok=True)
    config = SMALL | {"vocab_size": VOCAB, "n_routed_experts": 16, "num_experts_per_tok": 4}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def tiny_overrides(out: pathlib.Path) -> list[str]:
    return [
        f"model.path={write_tiny(out / 'tiny')}",
        "engine.device=cpu",
        "engine.max_model_len=2048",
        "engine.group_start_timeout_s=120",
        "placement.gpus_per_rank=0",
        "placement.cpus_per_rank=0.2",
        "prefill.num_pages=32",
        "prefill.num_slots=8",
        "prefill.chunk_tokens=256",
        "decode.num_pages=64",
        "decode.num_slots=18",
        "decode.max_running=16",
        "transfer.num_threads=0",
    ]
