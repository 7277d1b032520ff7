"""The embedded Ray: a head on this machine that only this cluster uses.

`launch` starts the keeper, a process of its own (`python -m deploy.local FOLDER`), which holds Ray and lives until it is told to
end. Ray's own processes end with the keeper, however it ends, and the ranks end with Ray's. Everything listens on loopback, asks
for the token in the cluster's folder, writes into that folder, and reports to nobody.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import secrets
import signal
import subprocess
import sys
import tempfile
import threading

from core.config import load_config
from core.errors import BatonError
from deploy.folder import MARKER, ClusterFolder, ClusterState, new_secret
from deploy.spec import ClusterSpec

ROOT = pathlib.Path(__file__).resolve().parents[1]

SOCKET_PATH_BYTES = 107
"""Longest path of a unix socket (sockaddr_un)."""

SOCKET_TAIL = "/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"
"""What Ray adds to its folder."""

OBJECT_STORE_BYTES = 80_000_000
"""Nothing of ours goes through Ray's object store; this is the least that it accepts, rounded up."""

SYSTEM_CONFIG = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 5000,
    "health_check_failure_threshold": 5,
    "prestart_worker_first_driver": False,
    # Else the GCS keeps an account of the last 100,000 calls, and every question for health is one.
    "task_events_report_interval_ms": 0,
}


def choose_ray_dir(folder: ClusterFolder) -> pathlib.Path:
    """`folder`/ray, or a new folder under /tmp if sockets in there would have too long a path."""
    inside = folder.path / "ray"
    if len(os.fsencode(str(inside) + SOCKET_TAIL)) <= SOCKET_PATH_BYTES:
        return inside
    return pathlib.Path(tempfile.mkdtemp(prefix="baton-", dir="/tmp"))


def launch(folder: ClusterFolder, spec: ClusterSpec, ray_dir: pathlib.Path) -> tuple[subprocess.Popen[bytes], ClusterState]:
    """Start the keeper; returns at once. The state is written to the folder before the process starts."""
    folder.logs.mkdir(parents=True, exist_ok=True)
    for old in folder.logs.glob("*.log*"):
        old.unlink()
    folder.spec_path.write_text(spec.to_yaml())
    new_secret(folder.ray_token_path)
    new_secret(folder.control_token_path)
    marker = secrets.token_hex(8)
    environment = os.environ | {
        MARKER: marker,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder.ray_token_path),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Otherwise Ray replaces 127.0.0.1 by the machine's address and listens on all of them.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # A rank takes its memory at the start; Ray is not to choose a victim when something else fills the machine.
        "RAY_memory_monitor_refresh_ms": "0",
        # Ray would run ranks and routers at 15: whatever else this machine computes would come before tokens.
        "RAY_worker_niceness": "0",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
        "PYTHONUNBUFFERED": "1",
    }
    environment.pop("RAY_ADDRESS", None)
    state = ClusterState(
        marker=marker,
        keeper_pid=0,
        control_address=spec.router.control_address,
        ray_dir=str(ray_dir),
    )
    folder.write(state)
    with folder.keeper_log.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "deploy.local", str(folder.path)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    state = dataclasses.replace(state, keeper_pid=process.pid)
    folder.write(state)
    return process, state


def keep(path: pathlib.Path) -> None:
    """The keeper: start Ray and the controller, then wait for SIGTERM."""
    import ray

    from deploy.controller import start_controller

    folder = ClusterFolder(path.parent, path.name)
    spec, state = load_config(folder.spec_path, ClusterSpec), folder.read()
    assert state is not None, f"{path} holds no cluster.json"
    ray.init(
        namespace=spec.namespace,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        _temp_dir=state.ray_dir,
        _system_config=SYSTEM_CONFIG,
    )
    is_told_to_end = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: is_told_to_end.set())
    start_controller(spec, folder.logs, folder.read_control_token())
    is_told_to_end.wait()
    ray.shutdown()


if __name__ == "__main__":
    try:
        keep(pathlib.Path(sys.argv[1]))
    except BatonError as error:
        sys.exit(f"baton: {error}")
