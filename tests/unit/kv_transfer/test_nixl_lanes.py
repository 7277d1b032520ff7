"""What UCX chose on this machine, as UCX itself says it about NIXL's connections."""

from __future__ import annotations

import ctypes

import pytest

from core.metrics import new_registry
from core.region import Region
from kv_transfer.config import TransferConfig
from kv_transfer.lanes import Path, path_of, this_machine
from kv_transfer.link_report import LinkReport
from kv_transfer.metrics import SenderMetrics
from kv_transfer.transport import Write
from kv_transfer.transports import open_transport
from kv_transfer.transports.nixl import NixlTransport
from kv_transfer.transports.ucx_lanes import endpoints

pytest.importorskip("nixl_cu13")

PIECE, COUNT = 4096, 4


class End:
    def __init__(self, config: TransferConfig, name: str, fill: int) -> None:
        self.memory = (ctypes.c_uint8 * (2 * PIECE * COUNT))(*([fill] * 2 * PIECE * COUNT))
        address = ctypes.addressof(self.memory)
        self.regions = tuple(Region(address=address + i * PIECE * COUNT, num_pieces=COUNT, piece_bytes=PIECE) for i in range(2))
        self.transport, self.agent = open_transport(config, name, *self.regions)

    def connect(self, name: str, peer: End) -> tuple[str, ...]:
        return self.transport.connect(name, peer.agent, *peer.regions)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a TransferConfig sets there is taken back."""
    for name in ("UCX_TLS", "UCX_NET_DEVICES", "UCX_TCP_USER_TIMEOUT", "UCX_LOG_LEVEL", "NIXL_LOG_LEVEL"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(("ucx_tls", "path"), [("", Path.SHARED_MEMORY), ("tcp", Path.TCP)])
def test_the_lanes_of_each_peer_are_those_that_ucx_gave_it(
    ucx_tls: str, path: Path, environment: None, caplog: pytest.LogCaptureFixture
) -> None:
    config = TransferConfig(ucx_tls=ucx_tls).on_loopback()
    ours = End(config, f"prefill/0.0#4611686018427387904-{path}", 7)
    peers = [End(config, f"decode/{i}.0#4611686018427387905-{path}", 0) for i in range(2)]
    report = LinkReport(SenderMetrics(new_registry()), this_machine(), "DRAM")
    try:
        for i, peer in enumerate(peers):
            lanes = ours.connect(f"p{i}", peer)
            assert "tcp/lo" in lanes and path_of(lanes) is path, lanes
            report.made(f"p{i}", f"decode/{i}.0", lanes, this_machine().identity, "DRAM")
        warned = [record.getMessage() for record in caplog.records if "transfer.slow_path" in record.getMessage()]
        assert len(warned) == (2 if path is Path.TCP else 0), warned
        assert all("expected=shared_memory" in line for line in warned)
        made = endpoints()
        assert made, "there are connections"
        write_id = ours.transport.write("p1", Write(((1, 2),)))
        while not any(done == write_id for done, _ in ours.transport.poll().finished):
            peers[1].transport.poll()
        assert peers[1].memory[2 * PIECE] == 7 and peers[0].memory[2 * PIECE] == 0
    finally:
        for end in (ours, *peers):
            end.transport.close()
    assert not made & endpoints(), "an agent that is closed takes its connections with it"


def test_a_transport_that_cannot_be_asked_says_nothing(environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kv_transfer.transports.ucx_lanes._library", lambda name: None)
    config = TransferConfig().on_loopback()
    ours, peer = End(config, "prefill/9.0#1", 0), End(config, "decode/9.0#1", 0)
    try:
        assert isinstance(ours.transport, NixlTransport)
        assert ours.connect("p", peer) == () and endpoints() == frozenset()
    finally:
        ours.transport.close()
        peer.transport.close()
