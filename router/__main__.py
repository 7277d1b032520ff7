"""python -m router FILE [KEY=VALUE ...] --prefill HOST:PORT --decode HOST:PORT: a router alone, with ranks at fixed addresses."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from core.config import load_config
from core.model_section import ModelSection
from core.process import OtherSections, host_and_port, new_parser, run, serve
from router.addresses import Address, follow_addresses, wait_for_ranks
from router.config import RouterConfig
from router.members import Members
from router.server import Router


@dataclass(frozen=True, kw_only=True, slots=True)
class Sections(OtherSections):
    model: ModelSection
    router: RouterConfig = field(default_factory=RouterConfig)


async def main() -> None:
    parser = new_parser("router", "Run one router process for ranks at fixed addresses.")
    for role in ("prefill", "decode"):
        words = f"a {role} rank; may be repeated"
        parser.add_argument(f"--{role}", action="append", type=host_and_port, required=True, metavar="HOST:PORT", help=words)
    options = parser.parse_intermixed_args()
    base = options.file.resolve().parent
    sections = load_config(options.file, Sections, options.overrides)
    model = sections.model.relative_to(base)
    addresses = [Address("prefill", text) for text in options.prefill] + [Address("decode", text) for text in options.decode]

    async def watch(members: Members) -> None:
        ranks = await wait_for_ranks(addresses)
        router.learn_max_model_len(min(rank.max_model_len for rank in ranks))
        await follow_addresses(addresses, members)

    router = Router(
        config=sections.router.relative_to(base),
        served_name=model.public_name,
        tokenizer_folder=model.tokenizer_folder,
        watch=watch,
    )
    await serve(router)


if __name__ == "__main__":
    sys.exit(run(main))
