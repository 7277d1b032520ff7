"""A cluster on a Ray that is there already (`placement.ray: host:port`): started there, and ended through it if its controller is gone."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import ray
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get

from core.config import load_config, parse_config
from core.errors import ConfigError, Unavailable
from deploy.controller import ACTOR_NAME, spec_key, start_controller
from deploy.folder import ClusterFolder, ClusterState, new_secret
from deploy.replica_life import living_actors, remove_groups
from deploy.spec import ClusterSpec

ANSWER_TIMEOUT_S = 5.0


def start(folder: ClusterFolder, spec: ClusterSpec) -> None:
    """Connect to the Ray cluster that the file names, create the controller there, and leave. Raises ConfigError, also when a cluster of
    this name is there, and Unavailable when no Ray answers; then, and when interrupted, nothing is left."""
    folder.logs.mkdir(parents=True, exist_ok=True)
    folder.spec_path.write_text(spec.to_yaml())
    folder.write(ClusterState(marker="", keeper_pid=0, control_address=spec.router.control_address, ray_dir=""))
    try:
        with _connected(spec):
            if ACTOR_NAME in {found["name"] for found in living_actors(spec.namespace)}:
                raise ConfigError(f"name: a cluster {spec.name!r} that was started elsewhere runs on this Ray cluster; choose another name")
            _end_all(spec.namespace)  # what a controller that was killed through Ray has left, its specification first of all
            try:
                start_controller(spec, folder.logs, new_secret(folder.control_token_path))
            except BaseException:
                _end_all(spec.namespace)
                raise
    except BaseException:
        folder.forget()
        raise


def end(folder: ClusterFolder) -> int:
    """End through Ray what is left of a cluster whose controller does not answer. Returns the number of actors that there were. Raises
    Unavailable when no Ray answers, either."""
    spec = load_config(folder.spec_path, ClusterSpec)
    with contextlib.ExitStack() as connection:
        try:
            connection.enter_context(_connected(spec))
        except Unavailable as error:
            raise Unavailable(f"{error}; if that Ray has ended for good, remove {folder.path}/cluster.json") from error
        kept = _internal_kv_get(spec_key(spec.namespace))
        if kept and parse_config(kept.decode(), "Ray", ClusterSpec).router.control_address != spec.router.control_address:
            return 0  # one of the same name, started elsewhere since
        return _end_all(spec.namespace)


@contextlib.contextmanager
def _connected(spec: ClusterSpec) -> Iterator[None]:
    host, _, port = spec.placement.ray.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_TIMEOUT_S).close()  # Ray would try for over a minute
        ray.init(address=spec.placement.ray, namespace=spec.namespace, log_to_driver=False)
    except OSError as error:
        raise Unavailable(f"placement.ray: no Ray cluster answers at {spec.placement.ray}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _end_all(namespace: str) -> int:
    """Kill every actor of this process's namespace, the controller first, and give the resources back."""
    names = sorted((found["name"] for found in living_actors(namespace)), key=lambda name: name != ACTOR_NAME)
    for name in names:
        with contextlib.suppress(ValueError):  # ended meanwhile
            ray.kill(ray.get_actor(name, namespace=namespace), no_restart=True)
    remove_groups()
    _internal_kv_del(spec_key(namespace))
    return len(names)
