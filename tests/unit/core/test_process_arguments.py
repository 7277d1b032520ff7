"""What `python -m router` and the ranks take on their command lines, and what they refuse."""

from __future__ import annotations

import asyncio
import sys

import pytest

from core.errors import ConfigError
from core.process import add_rank_arguments, new_parser
from router.__main__ import main as router_main


def test_overrides_may_follow_options() -> None:
    parser = new_parser("decode_worker", "")
    add_rank_arguments(parser)
    options = parser.parse_intermixed_args(["c.yaml", "a.b=1", "--port", "7002", "c.d=2"])
    assert (options.overrides, options.port) == (["a.b=1", "c.d=2"], 7002)
    assert parser.parse_intermixed_args(["c.yaml"]).overrides == []


@pytest.mark.parametrize("port", ["99999", "-1", "x", "65536"])
def test_a_port_that_is_none_is_refused(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = new_parser("decode_worker", "")
    add_rank_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_intermixed_args(["c.yaml", f"--port={port}"])
    assert "it must be in [0, 65535]" in capsys.readouterr().err


def test_a_router_takes_overrides_at_the_end_and_names_a_rank_that_is_no_address(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["router", "nofile.yaml", "--prefill", "127.0.0.1:7001", "--decode"]
    monkeypatch.setattr(sys, "argv", [*command, "127.0.0.1:7002", "router.port=8200"])
    with pytest.raises(ConfigError, match=r"nofile.yaml: No such file"):
        asyncio.run(router_main())
    monkeypatch.setattr(sys, "argv", [*command, "7002", "router.port=8200"])
    with pytest.raises(SystemExit):
        asyncio.run(router_main())
    assert "'7002' is no address; it must be HOST:PORT" in capsys.readouterr().err
