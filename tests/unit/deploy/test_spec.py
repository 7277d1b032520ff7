"""The cluster file: what is checked before anything starts."""

from __future__ import annotations

import json
import pathlib
import pickle
import random
import subprocess
import sys

import pytest

from core.config import parse_config
from core.errors import CheckpointError, ConfigError
from deploy.spec import ROLES, ClusterSpec, check_files, load_spec, restart_only
from tests.support.patience import overload

ROOT = pathlib.Path(__file__).resolve().parents[3]
LOCAL_CPU = ROOT / "deploy/clusters/local_cpu.yaml"
MINIMAL = "name: demo\nmodel: {path: m}\n"


def read(text: str, *overrides: str) -> ClusterSpec:
    return parse_config(text, "c.yaml", ClusterSpec, overrides)


def refusal(text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(text, *overrides)
    return str(caught.value)


@pytest.mark.parametrize("path", sorted((ROOT / "deploy/clusters").rglob("*.yaml")), ids=lambda path: path.name)
def test_every_cluster_file_in_the_repository_is_good(path: pathlib.Path) -> None:
    assert load_spec(path).name == path.stem


def test_two_lines_make_a_cluster() -> None:
    spec = read(MINIMAL)
    assert [spec.replicas(role) for role in ROLES] == [1, 1, 1]
    assert spec.served_name == "m" and spec.namespace == "baton-demo"


def test_relative_paths_start_at_the_file(tmp_path: pathlib.Path) -> None:
    (tmp_path / "clusters").mkdir()
    file = tmp_path / "clusters/c.yaml"
    file.write_text("name: demo\nmodel: {path: ../a model}\nrouter: {api_keys_file: keys}\n")
    spec = load_spec(file)
    assert spec.model_path == tmp_path / "a model"
    assert spec.router.api_keys_file == str(tmp_path / "clusters/keys")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("decode: {replicas: 100000}", "c.yaml:3: decode.replicas is 100000; it must be at most 1024"),
        ("router: {processes: 2000}", "c.yaml:3: router.processes is 2000; it must be at most 1024"),
        ("router: {drain_timeout_s: -1}", "c.yaml:3: router.drain_timeout_s is -1.0; it must be at least 0"),
        ("decode: {replicas: -1}", "c.yaml:3: decode.replicas is -1; it must be at least 0"),
        ("decode:\n  num_slots: 1\n  max_runing: 4", "c.yaml:5: unknown key 'max_runing' in decode; did you mean 'max_running'?"),
        ("prefill:\n  num_pages: 8", "c.yaml:4: prefill.num_pages is 8; a sequence of engine.max_model_len = 8192 tokens needs 32 pages"),
        ("engine: {device: cpu}\ndecode: {num_pages: 0}", "c.yaml:4: decode.num_pages is 0, as many as a GPU has room for; engine"),
        ("router:\n  port: 8010", "c.yaml:4: router.control_address has port 8010, which is router.port already"),
        ("router:\n  port: 70000", "c.yaml:4: router.port is 70000; it must be in [0, 65535]"),
        ("router: {port: 0}", "c.yaml:3: router.port is 0; clients need a port"),
        ("router: {control_address: here}", "c.yaml:3: router.control_address is 'here'; it must be host:port"),
        ("transfer: {transport: memory}", 'c.yaml:3: transfer.transport is "memory", which works within one process only'),
        ("transfer: {transport: pigeon}", "c.yaml:3: transfer.transport is 'pigeon'; allowed: nixl, memory"),
        ("engine: {device: cuda}", 'c.yaml:3: engine.device is "cuda"; then placement.gpus_per_rank must be 1'),
        ("engine: {ops: {rms_nrm: triton}}", "c.yaml:3: engine.ops names the op 'rms_nrm', which does not exist; allowed: compress_c128, "),
        ("engine: {kv_format: fp7}", "c.yaml:3: engine.kv_format is 'fp7'; allowed: fp8, bf16, fp32"),
        ("placement: {ray: somewhere}", "c.yaml:3: placement.ray is 'somewhere'; it must be \"embedded\" or host:port"),
        ("placement: {gpus_per_rank: 2}", "c.yaml:3: placement.gpus_per_rank is 2; a rank has one device"),
        ("placement: {drain_timeout_s: 0}", "c.yaml:3: placement.drain_timeout_s is 0.0; it must be above 0"),
        ("decode: {attention_tp: 2}", "c.yaml:3: decode.attention_tp is 2; it must divide decode.ranks_per_replica, which is 1"),
        ("prefill: {attention_tp: 0}", "c.yaml:3: prefill.attention_tp is 0; it must be at least 1"),
        ("transfer: {lease_s: 0.3}", "c.yaml:3: transfer.lease_s is 0.3; it must be at least 1"),
        *(
            (
                f"{section}: {{liveness_timeout_s: 0.5}}",
                f"c.yaml:3: {section}.liveness_timeout_s is 0.5; it must be above 0.5, the time betw",
            )
            for section in ("prefill", "decode", "router", "transfer")
        ),
        ("placement: {cpus_per_rank: 0}", "c.yaml:3: placement.cpus_per_rank is 0.0; it must be at least 0.01"),
    ],
)
def test_a_bad_value_is_refused_with_its_line(line: str, message: str) -> None:
    assert refusal(f"name: demo\nmodel: {{path: m}}\n{line}\n").startswith(message)


@pytest.mark.parametrize("name", ["", "Demo", "9lives", "a b", "../up", "a" * 33, "a/b"])
def test_a_name_that_is_no_folder_name_is_refused(name: str) -> None:
    assert "name is" in refusal(f'name: "{name}"\nmodel: {{path: m}}\n')


def test_overrides_are_checked_like_the_file() -> None:
    assert read(MINIMAL, "prefill.replicas=3").prefill.replicas == 3
    assert refusal(MINIMAL, "prefill.replicas=-3").startswith("override 'prefill.replicas=-3': prefill.replicas is -3")


def test_what_is_named_must_be_there(tmp_path: pathlib.Path) -> None:
    spec = read(f"name: demo\nmodel: {{path: {tmp_path}}}\nengine: {{max_model_len: 512}}\n")
    with pytest.raises(CheckpointError, match=r"config.json: no such file"):
        check_files(spec)
    config = json.loads((ROOT / "deploy/demo_model/checkpoint/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 256}))
    with pytest.raises(ConfigError, match="max_position_embeddings = 256"):
        check_files(spec)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"holds no tokenizer.json"):
        check_files(spec)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer.json: not a tokenizer"):
        check_files(spec)
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(ConfigError, match=r"holds no \*.safetensors"):
        check_files(spec)
    check_files(read(f"name: demo\nmodel: {{path: {tmp_path}}}\nengine: {{max_model_len: 512, load: dummy}}\n"))
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")  # what a clone without LFS leaves
    with pytest.raises(CheckpointError, match=r"model.safetensors: not a safetensors file, or cut off"):
        check_files(spec)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_heads_that_do_not_spread_are_refused_before_anything_starts(role: str) -> None:
    spec = load_spec(LOCAL_CPU, [f"{role}.ranks_per_replica=4", f"{role}.attention_tp=4"])
    with pytest.raises(ConfigError, match=rf"{role}\.attention_tp is 4; it must divide the 4 heads and 2 output groups of the model in "):
        check_files(spec)
    check_files(load_spec(LOCAL_CPU, [f"{role}.ranks_per_replica=4", f"{role}.attention_tp=2"]))


def test_a_file_is_checked_without_loading_torch() -> None:
    code = "import sys, deploy.cli; deploy.cli.main(['check', 'deploy/clusters/local_cpu.yaml']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, timeout=60 * overload())


def test_a_spec_survives_its_text_and_a_pickle() -> None:
    spec = load_spec(LOCAL_CPU, ["placement.node_labels={zone: no, rack: '7'}", "decode.expected_output=0.25"])
    assert parse_config(spec.to_yaml(), "again", ClusterSpec) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_a_revision_changes_with_what_a_replica_was_started_with() -> None:
    spec = read(MINIMAL)
    assert spec.scaled({"prefill": 5, "decode": 0, "router": 2}).revision("decode") == spec.revision("decode")
    longer = read(MINIMAL, "engine.max_model_len=4096")
    assert all(longer.revision(role) != spec.revision(role) for role in ROLES)
    chunked = read(MINIMAL, "prefill.chunk_tokens=64")
    assert [chunked.revision(role) != spec.revision(role) for role in ROLES] == [False, True, False]
    assert read(MINIMAL, "placement.drain_timeout_s=1").revision("prefill") == spec.revision("prefill")


def test_scaling_is_checked() -> None:
    with pytest.raises(ConfigError, match="unknown role 'encode'; known are router, prefill, decode"):
        read(MINIMAL).scaled({"encode": 1})
    with pytest.raises(ConfigError, match=r"router\.processes is 0"):
        read(MINIMAL).scaled({"router": 0})


def test_what_holds_for_life_cannot_be_applied() -> None:
    spec = read(MINIMAL)
    assert restart_only(spec, read(MINIMAL, "prefill.replicas=2")) == []
    other = read(MINIMAL, "router.control_address=127.0.0.1:9000", "placement.ray=10.0.0.1:6379")
    assert [line.split()[0] for line in restart_only(spec, other)] == ["placement.ray", "router.control_address"]


@pytest.mark.parametrize("seed", range(300))
def test_a_damaged_cluster_file_is_read_or_refused(seed: int, tmp_path: pathlib.Path) -> None:
    rng = random.Random(seed)
    lines = LOCAL_CPU.read_text().splitlines()
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(lines))
        match rng.randrange(5):
            case 0:
                lines[at] = lines[at][: rng.randrange(len(lines[at]) + 1)]
            case 1:
                lines[at] = lines[at].replace(":", rng.choice(["", "::", ": -", ": [", ": {", ": *", ": &a ", ":\t"]))
            case 2:
                lines[at] = " " * rng.randint(0, 5) + lines[at].strip()
            case 3:
                del lines[at]
            case _:
                lines.insert(at, rng.choice(lines))
    path = tmp_path / "c.yaml"
    path.write_text("\n".join(lines))
    try:
        spec = load_spec(path)
    except ConfigError as error:
        message = str(error)
        assert message.startswith(str(path))
    else:
        assert isinstance(spec, ClusterSpec)
