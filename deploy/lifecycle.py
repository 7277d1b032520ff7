"""Starting a cluster, waiting for it, and taking it down: what `baton up`, `scale` and `down` do."""

from __future__ import annotations

import contextlib
import json
import pathlib
import shutil
import subprocess
import time
import urllib.error
from collections.abc import Callable
from typing import Any

from core.config import differences, parse_config
from core.errors import ConfigError, DeadlineExceeded, Unavailable
from core.rpc import address_of
from deploy.client import ControlClient, NotOurs, open_url
from deploy.folder import ClusterFolder, ClusterState, end_processes, has_keeper, processes_of
from deploy.local import choose_ray_dir, launch
from deploy.ports import refuse_taken
from deploy.spec import ClusterSpec, check_files

Say = Callable[[str], None]

KEEPER_TIMEOUT_S = 180.0
"""Ray takes 5 s to start, and over 60 on two cores that are busy with much else. One that fails ends at once."""

CONTROLLER_TIMEOUT_S = 30.0
"""On a Ray that is there already: it starts a controller that died within seconds."""

RAY_TRIES = 3
RAY_WAS_LATE = "The current node timed out during startup"
"""How a keeper ends whose Ray did not start its node in the 30 s that Ray 2.60 gives it, whatever the environment says."""

GRACE_S = 15.0


def up(folder: ClusterFolder, spec: ClusterSpec, say: Say) -> None:
    """Start the cluster, or find it running, and wait until it is ready. Whatever was started is taken down again on failure.

    Raises ConfigError (also when a cluster of this name runs from another file), Unavailable, DeadlineExceeded.
    """
    check_files(spec)
    with folder.locked():
        if is_running(folder, say):
            say(f"{spec.name} is running already")
            refuse_other_spec(folder, spec)
            wait_until_settled(folder, start_s(spec), say)
            return
        sweep(folder)
        if spec.placement.ray == "embedded":
            refuse_taken("router.port", spec.router.host, spec.router.port)
            control_host, _, control_port = spec.router.control_address.rpartition(":")
            refuse_taken("router.control_address", control_host.strip("[]"), int(control_port))
        try:
            start(folder, spec, say)
            wait_until_settled(folder, start_s(spec), say)
            wait_for_router(spec)
        except BaseException:
            say("start failed; taking down what was started")
            for remark in stop(folder):
                say(remark)
            raise


def start_s(spec: ClusterSpec) -> float:
    """Longest time that replicas which are started side by side may take: to find a place, then to be ready."""
    return spec.placement.placement_timeout_s + spec.placement.start_timeout_s


def start(folder: ClusterFolder, spec: ClusterSpec, say: Say) -> None:
    """Ray (if embedded) and the controller. Returns when the controller answers."""
    if spec.placement.ray != "embedded":
        say(f"creating the controller on the Ray cluster at {spec.placement.ray}")
        from deploy import existing  # which imports Ray

        existing.start(folder, spec)
        return
    ray_dir = choose_ray_dir(folder)
    say(f"starting Ray in {ray_dir}, on loopback only")
    if not ray_dir.is_relative_to(folder.path):
        say(f"  ({folder.path} is too long for unix sockets; {ray_dir} is removed by `baton down`)")
    for tries_left in reversed(range(RAY_TRIES)):
        keeper, state = launch(folder, spec, ray_dir)
        if has_started(folder, keeper, state):
            return
        problem = _last_line(folder.keeper_log)
        if not tries_left or RAY_WAS_LATE not in problem:
            raise Unavailable(f"Ray or the controller did not start: {problem} (see {folder.keeper_log})")
        say("  Ray did not start its node in 30 s, on a machine that is busy; trying again")
        end_processes(state.marker, state.keeper_pid, GRACE_S)
        shutil.rmtree(ray_dir, ignore_errors=True)


def has_started(folder: ClusterFolder, keeper: subprocess.Popen[bytes], state: ClusterState) -> bool:
    """Returns when the controller answers; False when the keeper has ended before that, or took too long."""
    deadline = time.monotonic() + KEEPER_TIMEOUT_S
    with ControlClient(state.control_address, folder.read_control_token()) as client:
        while True:
            with contextlib.suppress(Unavailable):
                client.status()
                return True
            if keeper.poll() is not None or time.monotonic() > deadline:
                return False
            time.sleep(0.2)


def stop(folder: ClusterFolder) -> list[str]:
    """Take everything down, orderly where the controller answers, by force where not. Returns remarks for the user."""
    state, remarks = folder.read(), list[str]()
    if state is None:
        return remarks
    try:
        # Where no process is left, whoever answers at the address is another cluster.
        if not state.marker or processes_of(state.marker):
            _shut_down(folder, state)
    except (Unavailable, ConfigError) as error:
        remarks.append(f"the controller could not be asked to stop: {error}")
        if not state.marker and not isinstance(error, NotOurs):
            from deploy import existing  # which imports Ray

            remarks.append(f"{existing.end(folder)} actors were ended through Ray")
    if state.marker:
        if killed := end_processes(state.marker, state.keeper_pid, GRACE_S):
            remarks.append(f"{killed} processes had to be killed")
        if not pathlib.Path(state.ray_dir).is_relative_to(folder.path):
            shutil.rmtree(state.ray_dir, ignore_errors=True)
    folder.forget()
    return remarks


def _shut_down(folder: ClusterFolder, state: ClusterState) -> None:
    with ControlClient(state.control_address, folder.read_control_token()) as client:
        if (name := client.status().name) != folder.name:
            raise NotOurs(f"the controller at {state.control_address} is that of {name!r}")
        client.shut_down()


def is_running(folder: ClusterFolder, say: Say) -> bool:
    """Whether the cluster was started and has not ended. A controller that is away for a while, or has yet to start, is waited for:
    ranks may serve without it. Raises Unavailable if it stays away."""
    state = folder.read()
    if state is None or not has_keeper(state):
        return False
    deadline, has_told = time.monotonic() + (KEEPER_TIMEOUT_S if state.marker else CONTROLLER_TIMEOUT_S), False
    with ControlClient(state.control_address, folder.read_control_token()) as client:
        while has_keeper(state):
            try:
                return bool(client.status().name == folder.name)
            except NotOurs:
                return False
            except Unavailable as error:
                if time.monotonic() > deadline:
                    raise Unavailable(
                        f"{folder.name} was started, but {error}; `baton down -n {folder.name}` ends what there is"
                    ) from error
            if not has_told:
                say(f"{folder.name} was started before; waiting for its controller")
                has_told = True
            time.sleep(0.3)
    return False


def sweep(folder: ClusterFolder) -> None:
    """Remove what a cluster of this name that ended badly has left."""
    if folder.read() is not None:
        stop(folder)


def refuse_other_spec(folder: ClusterFolder, spec: ClusterSpec) -> None:
    """Raises ConfigError with the differences if the cluster runs with another specification."""
    state = folder.read()
    assert state is not None, "only a running cluster is asked"
    with ControlClient(state.control_address, folder.read_control_token()) as client:
        running = running_spec(client)
    if changes := differences(running, spec):
        lines = "\n  ".join(changes)
        raise ConfigError(f"{folder.name} runs with another specification; use `baton apply` to change it:\n  {lines}")


def running_spec(client: ControlClient) -> ClusterSpec:
    """The specification in force."""
    return parse_config(client.status().spec_yaml, "the running cluster", ClusterSpec)


def wait_until_settled(folder: ClusterFolder, timeout_s: float, say: Say) -> None:
    """Follow the controller until everything wanted is ready, saying what changes. Raises Unavailable when a replica does not come up."""
    state = folder.read()
    assert state is not None, "only a started cluster is waited for"
    deadline = time.monotonic() + timeout_s
    seen: dict[str, str] = {}
    with ControlClient(state.control_address, folder.read_control_token()) as client:
        while True:
            try:
                status = client.status()
            except Unavailable as error:  # a controller that is being restarted answers again in a second or two
                if not has_keeper(state):
                    raise Unavailable(f"the keeper of {folder.name} has ended: {_last_line(folder.keeper_log)}") from error
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.3)
                continue
            say_changes(status, seen, say)
            if status.problems and status.quiet:
                raise Unavailable("; ".join(status.problems))
            if status.settled:
                return
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"{folder.name} is not as wanted after {timeout_s:g} s; see `baton status` and `baton logs`")
            time.sleep(0.3)


def say_changes(status: Any, seen: dict[str, str], say: Say) -> None:
    """One line for each member whose state is another than in `seen`; those found ready at first are not news."""
    now = {f"{row.member.role}/{row.member.replica}.{row.member.rank}": row for row in (*status.routers, *status.ranks)}
    if not seen:
        seen.update((name, "ready") for name, row in now.items() if row.member.state == "ready")
    for name, row in now.items():
        if seen.get(name) != row.member.state:
            note = f": {row.note}" if row.note else ""
            say(f"  {name} {row.member.state}{note}")
            seen[name] = row.member.state
    for name in [name for name in seen if name not in now]:
        say(f"  {name} gone")
        del seen[name]


def wait_for_router(spec: ClusterSpec) -> None:
    """Returns when /ready answers 200: the routers have sessions with the ranks."""
    if spec.prefill.replicas == 0 or spec.decode.replicas == 0:
        return
    deadline = time.monotonic() + 30
    problem = ""
    while time.monotonic() < deadline:
        try:
            with open_url(f"{base_url(spec)}/ready", 5.0):
                return
        except (urllib.error.URLError, OSError) as error:
            problem = str(error)
        time.sleep(0.2)
    raise Unavailable(f"{base_url(spec)}/ready does not answer 200: {problem}")


def base_url(spec: ClusterSpec) -> str:
    """Of the API, as reached from this machine."""
    host = spec.router.host
    if host in ("0.0.0.0", "::"):  # routers live where the controller does
        host = spec.router.control_address.rpartition(":")[0].strip("[]")
    return f"http://{address_of(host, spec.router.port)}"


def curl_line(spec: ClusterSpec) -> str:
    body = {"model": spec.served_name, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 32}
    has_keys = bool(spec.router.api_keys_file or spec.router.api_keys_env)
    key = " -H 'Authorization: Bearer YOUR_KEY'" if has_keys else ""
    return f"curl {base_url(spec)}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{json.dumps(body)}'"


def _last_line(path: pathlib.Path) -> str:
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"
