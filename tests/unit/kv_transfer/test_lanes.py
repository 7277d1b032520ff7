from __future__ import annotations

import pathlib

import pytest

import kv_transfer.lanes
from core.metrics import new_registry
from kv_transfer.lanes import Machine, Path, expected_path, is_slower, path_of, this_machine
from kv_transfer.link_report import LinkReport
from kv_transfer.metrics import SenderMetrics

HERE = Machine("boot-1", has_rdma=False)


@pytest.mark.parametrize(
    ("lanes", "path"),
    [
        (("tcp/lo",), Path.TCP),
        (("tcp/lo", "cma/memory"), Path.SHARED_MEMORY),
        (("tcp/eth0", "rc_mlx5/mlx5_0:1"), Path.RDMA),
        (("srd/rdmap0s6:1",), Path.RDMA),
        (("ud_verbs/mlx5_0:1", "sysv/memory", "cuda_ipc/cuda"), Path.CUDA_IPC),
        (("quantum_link/q0", "tcp/lo"), Path.TCP),
        (("quantum_link/q0",), Path.UNKNOWN),
        ((), Path.UNKNOWN),
    ],
)
def test_the_path_is_the_fastest_lane(lanes: tuple[str, ...], path: Path) -> None:
    assert path_of(lanes) is path


@pytest.mark.parametrize(
    ("memory", "is_same_machine", "has_rdma", "expected"),
    [
        ("VRAM", True, True, Path.CUDA_IPC),
        ("VRAM", True, False, Path.CUDA_IPC),
        ("DRAM", True, True, Path.SHARED_MEMORY),
        ("VRAM", False, True, Path.RDMA),
        ("DRAM", False, True, Path.RDMA),
        ("VRAM", False, False, Path.TCP),
    ],
)
def test_what_two_ranks_should_get(memory: str, is_same_machine: bool, has_rdma: bool, expected: Path) -> None:
    assert expected_path(memory=memory, is_same_machine=is_same_machine, has_rdma=has_rdma) is expected
    assert not is_slower(expected, expected) and not is_slower(Path.UNKNOWN, expected) and not is_slower(Path.CUDA_IPC, expected)
    assert is_slower(Path.TCP, expected) == (expected is not Path.TCP)


def test_a_port_that_is_up_is_rdma_and_one_that_is_down_is_not(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = tmp_path / "mlx5_0" / "ports" / "1" / "state"
    state.parent.mkdir(parents=True)
    monkeypatch.setattr(kv_transfer.lanes, "RDMA_DEVICES", tmp_path)
    for text, has_rdma in (("1: DOWN\n", False), ("4: ACTIVE\n", True)):
        state.write_text(text)
        assert this_machine.__wrapped__().has_rdma is has_rdma
    assert this_machine().identity


class Reported:
    def __init__(self, machine: Machine, memory: str) -> None:
        self.registry = new_registry()
        self.report = LinkReport(SenderMetrics(self.registry), machine, memory)

    def links(self) -> set[tuple[str, str]]:
        metric = next(m for m in self.registry.collect() if m.name == "baton_transfer_link")
        return {(s.labels["peer"], s.labels["path"]) for s in metric.samples if s.value}

    def num_slow(self) -> float | None:
        return self.registry.get_sample_value("baton_transfer_slow_links")


def warnings_in(errors: str) -> list[str]:
    return [line for line in errors.splitlines() if "transfer.slow_path" in line]


def test_each_pair_is_reported_and_the_slow_one_by_name(caplog: pytest.LogCaptureFixture) -> None:
    found = Reported(HERE, "VRAM")
    found.report.made("a#1/1", "decode/0.0", ("tcp/lo", "cuda_ipc/cuda"), "boot-1", "VRAM")
    found.report.made("b#1/2", "decode/1.0", ("tcp/lo", "cuda_ipc/cuda"), "boot-1", "VRAM")
    assert found.report.summary == "2 links over cuda_ipc" and not warnings_in(caplog.text)
    found.report.made("c#1/3", "decode/2.0", ("tcp/lo",), "boot-1", "VRAM")
    assert found.report.summary == "decode/2.0 over tcp (cuda_ipc expected), 2 links over cuda_ipc"
    assert len(warnings_in(caplog.text)) == 1 and "decode/2.0" in warnings_in(caplog.text)[0]
    assert found.links() == {("decode/0.0", "cuda_ipc"), ("decode/1.0", "cuda_ipc"), ("decode/2.0", "tcp")} and found.num_slow() == 1
    for link in ("a#1/1", "c#1/3", "never"):
        found.report.gone(link)
    assert found.report.summary == "1 link over cuda_ipc" and found.links() == {("decode/1.0", "cuda_ipc")} and found.num_slow() == 0


@pytest.mark.parametrize(
    ("machine", "peer_machine", "peer_memory", "lanes", "is_slow"),
    [
        (Machine("boot-1", True), "boot-2", "VRAM", ("tcp/eth0",), True),
        (Machine("boot-1", True), "boot-2", "VRAM", ("tcp/eth0", "rc_mlx5/mlx5_0:1"), False),
        (Machine("boot-1", False), "boot-2", "VRAM", ("tcp/eth0",), False),
        (Machine("boot-1", False), "boot-1", "DRAM", ("tcp/lo",), True),
        (Machine("", False), "", "VRAM", ("tcp/lo",), False),
        (Machine("boot-1", True), "boot-2", "VRAM", (), False),
    ],
)
def test_a_warning_comes_where_a_faster_path_was_expected_and_only_there(
    machine: Machine, peer_machine: str, peer_memory: str, lanes: tuple[str, ...], is_slow: bool, caplog: pytest.LogCaptureFixture
) -> None:
    found = Reported(machine, "VRAM")
    found.report.made("a#1/1", "decode/0.0", lanes, peer_machine, peer_memory)
    assert bool(warnings_in(caplog.text)) is is_slow
    assert ("expected" in found.report.summary) is is_slow


def test_a_fast_path_whose_writes_crawl_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    found = Reported(HERE, "VRAM")
    found.report.made("a#1/1", "decode/0.0", ("tcp/lo", "cuda_ipc/cuda"), "boot-1", "VRAM")
    found.report.made("b#1/2", "decode/1.0", ("tcp/lo",), "boot-2", "VRAM")
    for link, num_bytes, seconds in (
        ("a#1/1", 10**8, 0.001),
        ("a#1/1", 10**6, 1.0),  # small: waiting for its turn is most of it
        ("b#1/2", 10**8, 1.0),  # nothing faster than TCP was expected of it
        ("never", 10**8, 1.0),
    ):
        found.report.wrote(link, num_bytes, seconds)
    assert found.report.summary == "1 link over cuda_ipc, 1 link over tcp" and "transfer.slow_rate" not in caplog.text
    for _ in range(3):
        found.report.wrote("a#1/1", 10**8, 0.25)
    assert found.report.summary == "decode/0.0 over cuda_ipc at 0.4 GB/s, 1 link over tcp"
    assert caplog.text.count("transfer.slow_rate") == 1
    found.report.gone("a#1/1")
    assert found.report.summary == "1 link over tcp"
