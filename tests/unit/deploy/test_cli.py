"""The command line and the cluster folder, without a cluster."""

from __future__ import annotations

import os
import pathlib
import socket
import subprocess
import sys
import threading
import time

import pytest

from core.errors import ConfigError, Unavailable
from deploy import folder as cluster_folder
from deploy import lifecycle
from deploy.cli import main, parse_counts, patience_s
from deploy.folder import MARKER, ClusterFolder, ClusterState, end_processes, find_cluster, new_secret, processes_of, started
from deploy.local import SOCKET_PATH_BYTES, SOCKET_TAIL, choose_ray_dir
from deploy.ports import refuse_taken
from deploy.spec import load_spec
from tests.support.patience import overload

ROOT = pathlib.Path(__file__).resolve().parents[3]
LOCAL_CPU = ROOT / "deploy/clusters/local_cpu.yaml"
STATE = ClusterState(marker="m", keeper_pid=1, control_address="127.0.0.1:1", ray_dir="/nowhere")


def recorded(home: pathlib.Path, name: str) -> ClusterFolder:
    folder = ClusterFolder(home, name)
    folder.path.mkdir(parents=True)
    folder.write(STATE)
    return folder


def test_counts_are_read() -> None:
    assert parse_counts(["prefill=3", "decode=0"]) == {"prefill": 3, "decode": 0}


@pytest.mark.parametrize("text", ["prefill", "prefill=", "prefill=-1", "prefill=1.5", "encode=1", "=1", "prefill=٣", "decode=9999999"])
def test_counts_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected ROLE=N"):
        parse_counts([text])


def test_a_refusal_goes_to_standard_error_with_status_1(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("name: demo\nmodel: {path: m}\nprefil: {}\n")
    for command in ("up", "check", "apply"):
        assert main(["--home", str(tmp_path / "home"), command, str(file)]) == 1
        assert capsys.readouterr().err == f"baton: {file}:3: unknown key 'prefil' in the file; did you mean 'prefill'?\n"
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(("arguments", "missing"), [(["up"], "file"), (["scale"], "ROLE=N"), (["drain"], "member")])
def test_usage_names_only_what_is_missing(arguments: list[str], missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(f"the following arguments are required: {missing}\n")


def test_a_good_file_passes_the_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(LOCAL_CPU), "prefill.replicas=2"]) == 0
    assert "is good: local_cpu serves baton-demo" in capsys.readouterr().out


def test_overrides_may_follow_an_option(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = ["--home", str(tmp_path)]
    for arguments in (["--dry-run", str(LOCAL_CPU), "decode.replicas=2"], [str(LOCAL_CPU), "--dry-run", "decode.replicas=2"]):
        assert main([*home, "apply", *arguments]) == 1
        assert "no cluster is running" in capsys.readouterr().err, "the arguments were understood"
    assert main([*home, "apply", str(LOCAL_CPU), "--dry-run", "decode.replica=2"]) == 1
    assert "unknown key 'replica'" in capsys.readouterr().err
    for arguments in (["apply", str(LOCAL_CPU), "--dri-run"], ["status", "decode.replicas=2"], ["down", "-x"]):
        with pytest.raises(SystemExit, match="2"):
            main([*home, *arguments])
        assert "unrecognized arguments" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["status"], ["scale", "prefill=1"], ["drain", "prefill/0"], ["chat"], ["apply", str(LOCAL_CPU)]])
def test_commands_say_when_the_keeper_is_gone(arguments: list[str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded(tmp_path, "local_cpu")
    assert main(["--home", str(tmp_path), *arguments]) == 1
    assert "local_cpu has ended: its keeper, process 1, is gone" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["status"], ["scale", "prefill=1"], ["down"], ["drain", "prefill/0"], ["chat"], ["logs"]])
def test_commands_say_when_no_cluster_runs(arguments: list[str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--home", str(tmp_path), *arguments]) == 1
    assert "no cluster is running" in capsys.readouterr().err


def test_the_only_cluster_needs_no_name(tmp_path: pathlib.Path) -> None:
    recorded(tmp_path, "one")
    assert find_cluster(tmp_path, None).name == "one"
    recorded(tmp_path, "two")
    assert find_cluster(tmp_path, "two").name == "two"
    with pytest.raises(ConfigError, match="several clusters are running; choose with --name: one, two"):
        find_cluster(tmp_path, None)
    with pytest.raises(ConfigError, match="no cluster 'three' is running; choose with --name: one, two"):
        find_cluster(tmp_path, "three")


def test_a_folder_remembers_and_forgets(tmp_path: pathlib.Path) -> None:
    folder = recorded(tmp_path / "a home with spaces", "one")
    assert folder.read() == STATE
    folder.logs.mkdir()
    (folder.logs / "controller.log").touch()
    folder.forget()
    assert folder.read() is None and [path.name for path in folder.path.iterdir()] == ["logs"]


def test_a_damaged_record_is_named(tmp_path: pathlib.Path) -> None:
    folder = recorded(tmp_path, "one")
    for content in ("{", "[]", '{"marker": 1}', "\xff"):
        (folder.path / "cluster.json").write_text(content)
        with pytest.raises(ConfigError, match=r"cluster.json cannot be read"):
            folder.read()


def test_two_commands_cannot_start_one_cluster(tmp_path: pathlib.Path) -> None:
    folder = ClusterFolder(tmp_path, "one")
    with folder.locked(), pytest.raises(ConfigError, match="another baton command"), ClusterFolder(tmp_path, "one").locked():
        pass


def test_only_marked_processes_are_ended() -> None:
    our_marker, other_marker = (f"{name} of process {os.getpid()}" for name in ("ours", "other"))  # this test may run more than once
    sleeper = [
        sys.executable,
        "-c",
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)",
    ]
    ours = subprocess.Popen(sleeper, env=os.environ | {MARKER: our_marker}, stdout=subprocess.PIPE)
    other = subprocess.Popen(sleeper, env=os.environ | {MARKER: other_marker}, stdout=subprocess.PIPE)
    try:
        for process in (ours, other):
            assert process.stdout is not None and process.stdout.read(1) == b"1"
        assert processes_of(our_marker) == [ours.pid]
        assert end_processes(our_marker, ours.pid, grace_s=0.2) == 1  # it ignores the request
        assert ours.wait(5) == -9 and processes_of(our_marker) == []
        assert other.poll() is None and processes_of(other_marker) == [other.pid]
    finally:
        for process in (ours, other):
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def test_down_waits_for_what_a_process_holds_that_has_lost_its_marker_already(monkeypatch: pytest.MonkeyPatch) -> None:
    dying = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    scans = [[dying.pid]]  # a process that is killed has no environment any more, and its ports and memory for some time yet
    monkeypatch.setattr(cluster_folder, "processes_of", lambda marker: scans.pop() if scans else [])
    try:
        assert started(dying.pid) is not None
        with pytest.raises(Unavailable, match=f"processes \\[{dying.pid}\\] were told to end and do not"):
            end_processes("marker", 0, grace_s=0.0)
        scans.append([dying.pid])
        assert dying.stdin is not None
        ending = threading.Timer(0.02, dying.stdin.close)
        ending.start()
        assert end_processes("marker", 0, grace_s=20.0) == 0
        assert started(dying.pid) is None, "it is left as a zombie, which holds nothing"
        ending.join()
    finally:
        dying.kill()
        dying.wait()
    assert started(dying.pid) is None


def test_ray_lives_in_the_folder_unless_sockets_would_not_fit(tmp_path: pathlib.Path) -> None:
    short = ClusterFolder(pathlib.Path("/x"), "one")
    assert choose_ray_dir(short) == pathlib.Path("/x/one/ray")
    assert len(str(choose_ray_dir(short)) + SOCKET_TAIL) <= SOCKET_PATH_BYTES
    outside = choose_ray_dir(ClusterFolder(tmp_path / ("long" * 30), "one"))
    try:
        assert outside.is_dir() and len(str(outside) + SOCKET_TAIL) <= SOCKET_PATH_BYTES
    finally:
        outside.rmdir()


def test_a_taken_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"router.port: 127.0.0.1:{port} cannot be had"):
            refuse_taken("router.port", "127.0.0.1", port)


def test_a_port_that_others_would_share_is_taken() -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="cannot be had"):
            refuse_taken("router.port", "127.0.0.1", taken.getsockname()[1])


def test_a_host_that_is_not_this_machine_is_not_blamed_on_the_port() -> None:
    with pytest.raises(ConfigError, match=r"router.host: 192.0.2.1:0 cannot be had"):  # an address for documents, nobody's
        refuse_taken("router.port", "192.0.2.1", 0)


def test_a_role_without_replicas_is_pointed_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(LOCAL_CPU), "prefill.replicas=0"]) == 0
    said = capsys.readouterr().out
    assert "no prefill replica is wanted" in said and "no decode" not in said


def test_more_running_sequences_than_slots_are_pointed_out(capsys: pytest.CaptureFixture[str]) -> None:
    for num_slots, is_said in ((12, True), (16, False)):
        assert main(["check", str(LOCAL_CPU), "decode.max_running=16", f"decode.num_slots={num_slots}"]) == 0
        said = "decode.max_running is 16, of which decode.num_slots lets 12 be in a step"
        assert (said in capsys.readouterr().out) == is_said


def test_the_curl_line_asks_for_a_key_only_if_there_are_keys() -> None:
    assert "Bearer" not in lifecycle.curl_line(load_spec(LOCAL_CPU))
    line = lifecycle.curl_line(load_spec(LOCAL_CPU, ["router.api_keys_env=KEYS", "router.host=0.0.0.0"]))
    assert "Bearer YOUR_KEY" in line and "http://127.0.0.1:8000/" in line


@pytest.mark.parametrize(
    ("host", "control", "url"),
    [
        ("127.0.0.1", "127.0.0.1:8010", "http://127.0.0.1:8000"),
        ("0.0.0.0", "10.0.0.7:8010", "http://10.0.0.7:8000"),
        ("'::'", "'[fd00::7]:8010'", "http://[fd00::7]:8000"),
        ("'::1'", "127.0.0.1:8010", "http://[::1]:8000"),
    ],
)
def test_the_api_is_reached_where_the_routers_are(host: str, control: str, url: str) -> None:
    assert lifecycle.base_url(load_spec(LOCAL_CPU, [f"router.host={host}", f"router.control_address={control}"])) == url


def test_a_home_that_cannot_be_used_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match=r"--home: .*file/one cannot be used: Not a directory"),
        ClusterFolder(tmp_path / "file", "one").locked(),
    ):
        pass


def test_a_number_of_lines_is_no_negative_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["logs", "--lines", "-5"])
    assert "--lines: '-5' is no whole number from 0 on" in capsys.readouterr().err


def test_a_watched_status_outlives_a_controller_that_is_being_restarted(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = recorded(tmp_path, "one")
    asked = list[float]()

    def sleep(seconds: float) -> None:
        asked.append(seconds)
        if len(asked) == 2:
            folder.forget()

    monkeypatch.setattr("deploy.cli.time.sleep", sleep)
    assert main(["--home", str(tmp_path), "status", "-w"]) == 1
    shown = capsys.readouterr()
    assert shown.out.count("one has ended: its keeper") == 2 and "no cluster is running" in shown.err


def test_a_change_of_many_replicas_one_after_the_other_is_waited_for() -> None:
    one, eight = (load_spec(LOCAL_CPU, [f"decode.replicas={count}", "prefill.replicas=0"]) for count in (1, 8))
    times = one.placement
    assert patience_s(one) == times.drain_timeout_s + times.placement_timeout_s + times.start_timeout_s
    assert patience_s(eight) == 8 * patience_s(one)


def test_the_command_starts_quickly_and_without_torch_or_ray() -> None:
    code = "import sys, time; t = time.perf_counter(); import deploy.cli; print(sorted({'torch', 'ray'} & set(sys.modules)))"
    began = time.monotonic()
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    took = time.monotonic() - began
    assert result.stdout.strip() == "[]" and took < 10 * overload(), f"{result.stdout} after {took:.1f} s"


def test_the_control_token_is_new_for_each_start_and_the_owners_alone(tmp_path: pathlib.Path) -> None:
    folder = recorded(tmp_path, "a")
    with pytest.raises(ConfigError, match="control_token"):
        folder.read_control_token()
    folder.control_token_path.write_text("old and readable by all")
    folder.control_token_path.chmod(0o644)
    tokens = {new_secret(folder.control_token_path) for _ in range(3)}
    assert len(tokens) == 3 and all(len(token) == 64 for token in tokens)
    assert folder.read_control_token() in tokens
    assert folder.control_token_path.stat().st_mode & 0o777 == 0o600
    folder.forget()
    assert not folder.control_token_path.exists()
