"""python -m prefill_worker FILE [KEY=VALUE ...] --port 7001: one prefill rank alone, with no controller and no Ray."""

from __future__ import annotations

import pathlib
import sys
from dataclasses import dataclass, field

from core.config import load_config
from core.model_section import ModelSection
from core.process import OtherSections, add_rank_arguments, die, new_parser, place_of, run, serve
from engine.config import EngineConfig
from kv_transfer.config import TransferConfig
from prefill_worker.config import PrefillConfig
from prefill_worker.worker import PrefillWorker


@dataclass(frozen=True, kw_only=True, slots=True)
class Sections(OtherSections):
    model: ModelSection
    engine: EngineConfig = field(default_factory=EngineConfig)
    prefill: PrefillConfig = field(default_factory=PrefillConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)


async def main() -> None:
    parser = new_parser("prefill_worker", "Run one prefill rank.")
    add_rank_arguments(parser)
    options = parser.parse_intermixed_args()
    sections = load_config(options.file, Sections, options.overrides)
    is_local = options.host == "127.0.0.1"
    worker = PrefillWorker(
        model_path=pathlib.Path(sections.model.relative_to(options.file.resolve().parent).path),
        engine=sections.engine,
        config=sections.prefill,
        transfer=sections.transfer.on_loopback() if is_local else sections.transfer,
        place=place_of(options),
        on_death=die,
    )
    await serve(worker)


if __name__ == "__main__":
    sys.exit(run(main))
