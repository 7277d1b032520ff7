"""A router process and its port."""

from __future__ import annotations

import asyncio
import pathlib

import pytest

from core.errors import ConfigError
from router.config import RouterConfig
from router.server import Router

MODEL = pathlib.Path(__file__).resolve().parents[3] / "deploy" / "demo_model" / "checkpoint"


def new_router(port: int, is_port_shared: bool) -> Router:
    config = RouterConfig(port=port)
    return Router(config=config, served_name="demo", tokenizer_folder=MODEL, max_model_len=512, is_port_shared=is_port_shared)


@pytest.mark.parametrize(("first", "second"), [(False, False), (False, True), (True, False)])
def test_a_port_is_shared_only_by_routers_that_both_mean_to(first: bool, second: bool) -> None:
    async def live() -> None:
        there = new_router(0, first)
        await there.start()
        with pytest.raises(ConfigError, match=rf"router\.port: cannot listen on 127\.0\.0\.1:{there.port}: Address already in use"):
            await new_router(there.port, second).start()
        await there.stop()
        again = new_router(there.port, second)
        await again.start()
        await again.stop()

    asyncio.run(live())
