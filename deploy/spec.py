"""ClusterSpec: the cluster file as frozen dataclasses, and everything about it that can be checked before anything starts.

spec = load_spec(pathlib.Path("deploy/clusters/local_cpu.yaml"), overrides=["prefill.replicas=2"])
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from core.config import load_config, to_yaml
from core.errors import CheckpointError, ConfigError
from core.kv_layout import PAGE_TOKENS
from core.model_section import ModelSection
from decode_worker.config import DecodeConfig
from deploy.config import PlacementConfig
from engine.config import EngineConfig, ModelConfig
from engine.model.shards import find_tensors
from kv_transfer.config import TransferConfig
from prefill_worker.config import PrefillConfig
from router.config import RouterConfig

ROLES = ("router", "prefill", "decode")

MAX_REPLICAS = 1024
"""Of a role: a slip of the finger is not to keep the controller busy for ever."""

_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterSpec:
    name: str
    """Name of the cluster: lower-case letters, digits, - and _; the folder .baton/<name> holds what it keeps."""
    model: ModelSection
    engine: EngineConfig = field(default_factory=EngineConfig)
    prefill: PrefillConfig = field(default_factory=PrefillConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(f"name is {self.name!r}; it must be 1 to 32 of a-z, 0-9, - and _, and start with a letter")
        for role, key in (("router", "router.processes"), ("prefill", "prefill.replicas"), ("decode", "decode.replicas")):
            if self.replicas(role) > MAX_REPLICAS:
                raise ConfigError(f"{key} is {self.replicas(role)}; it must be at most {MAX_REPLICAS}")
        pages = -(-self.engine.max_model_len // PAGE_TOKENS)
        for role, section in (("prefill", self.prefill), ("decode", self.decode)):
            if 0 < section.num_pages < pages:
                raise ConfigError(
                    f"{role}.num_pages is {section.num_pages}; a sequence of engine.max_model_len = {self.engine.max_model_len} tokens "
                    f"needs {pages} pages of {PAGE_TOKENS} tokens"
                )
            if not section.num_pages and self.engine.device == "cpu":
                raise ConfigError(f'{role}.num_pages is 0, as many as a GPU has room for; engine.device is "cpu": say how many')
        host, _, port = self.router.control_address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ConfigError(f"router.control_address is {self.router.control_address!r}; it must be host:port")
        if self.router.port == 0:
            raise ConfigError("router.port is 0; clients need a port that is known beforehand")
        if self.router.port == int(port):
            raise ConfigError(f"router.control_address has port {port}, which is router.port already; choose another")
        if self.transfer.transport == "memory":
            raise ConfigError('transfer.transport is "memory", which works within one process only; a cluster needs "nixl"')
        if self.engine.device == "cuda" and self.placement.gpus_per_rank == 0:
            raise ConfigError('engine.device is "cuda"; then placement.gpus_per_rank must be 1')

    @property
    def model_path(self) -> pathlib.Path:
        return pathlib.Path(self.model.path)

    @property
    def served_name(self) -> str:
        return self.model.public_name

    @property
    def namespace(self) -> str:
        """Ray namespace of the cluster's actors."""
        return f"baton-{self.name}"

    def replicas(self, role: str) -> int:
        return {"router": self.router.processes, "prefill": self.prefill.replicas, "decode": self.decode.replicas}[role]

    def ranks_per_replica(self, role: str) -> int:
        return {"router": 1, "prefill": self.prefill.ranks_per_replica, "decode": self.decode.ranks_per_replica}[role]

    def revision(self, role: str) -> str:
        """Changes whenever a running replica of this role must be restarted to follow the file."""
        parts: list[Any] = [self.name, self.model, self.engine.max_model_len]
        if role == "router":
            parts.append(dataclasses.replace(self.router, processes=1))
        else:
            section = self.prefill if role == "prefill" else self.decode
            parts += [self.engine, self.transfer, dataclasses.replace(section, replicas=1)]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]

    def scaled(self, replicas: dict[str, int]) -> ClusterSpec:
        """With these replica counts. Raises ConfigError."""
        for role in replicas:
            if role not in ROLES:
                raise ConfigError(f"unknown role {role!r}; known are {', '.join(ROLES)}")
        return dataclasses.replace(
            self,
            router=dataclasses.replace(self.router, processes=replicas.get("router", self.router.processes)),
            prefill=dataclasses.replace(self.prefill, replicas=replicas.get("prefill", self.prefill.replicas)),
            decode=dataclasses.replace(self.decode, replicas=replicas.get("decode", self.decode.replicas)),
        )

    def to_yaml(self) -> str:
        return to_yaml(self)


def load_spec(path: pathlib.Path, overrides: Sequence[str] = ()) -> ClusterSpec:
    """Read a cluster file; relative paths in it become absolute, from the file's folder. Raises ConfigError with file and line."""
    spec = load_config(path, ClusterSpec, overrides)
    base = path.resolve().parent
    return dataclasses.replace(spec, model=spec.model.relative_to(base), router=spec.router.relative_to(base))


def check_files(spec: ClusterSpec) -> ModelConfig:
    """What the file names must be there, whole and fitting, as far as headers tell. Raises ConfigError or CheckpointError naming the file.

    Whether tensors have the shapes of the model is found by the ranks, before they read any."""
    model = ModelConfig.from_folder(spec.model_path)
    if spec.engine.max_model_len > model.max_position_embeddings:
        raise ConfigError(
            f"engine.max_model_len is {spec.engine.max_model_len}; the model in {spec.model_path} has max_position_embeddings = "
            f"{model.max_position_embeddings}"
        )
    for role, section in (("prefill", spec.prefill), ("decode", spec.decode)):
        if model.num_attention_heads % section.attention_tp or model.o_groups % section.attention_tp:
            raise ConfigError(
                f"{role}.attention_tp is {section.attention_tp}; it must divide the {model.num_attention_heads} heads and "
                f"{model.o_groups} output groups of the model in {spec.model_path}"
            )
    if not (spec.model.tokenizer_folder / "tokenizer.json").exists():
        key = "model.tokenizer" if spec.model.tokenizer else "model.path"
        remedy = "put the published one there, or name a folder that has one with model.tokenizer"
        raise ConfigError(f"{key}: {spec.model.tokenizer_folder} holds no tokenizer.json; {remedy}")
    refuse_broken_tokenizer(spec.model.tokenizer_folder / "tokenizer.json")
    if spec.engine.load == "checkpoint":
        if not any(spec.model_path.glob("*.safetensors")):
            raise ConfigError(f"model.path: {spec.model_path} holds no *.safetensors; engine.load: dummy does without")
        find_tensors(spec.model_path)
    spec.router.read_api_keys()
    return model


def refuse_broken_tokenizer(path: pathlib.Path) -> None:
    """Raises CheckpointError for a file that is no tokenizer at all, such as a download's error page."""
    try:
        raw = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(raw, dict) or "model" not in raw:
        raise CheckpointError(f"{path}: not a tokenizer: it lacks the key 'model'")


def restart_only(old: ClusterSpec, new: ClusterSpec) -> list[str]:
    """Why `new` cannot be applied to a cluster running as `old`: settings that hold for the cluster's whole life."""
    fixed = {
        "name": (old.name, new.name),
        "placement.ray": (old.placement.ray, new.placement.ray),
        "router.control_address": (old.router.control_address, new.router.control_address),
    }
    return [
        f"{key} cannot change while the cluster runs ({before!r} -> {after!r})" for key, (before, after) in fixed.items() if before != after
    ]
