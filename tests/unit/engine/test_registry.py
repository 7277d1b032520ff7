"""The op registry: one definition an op, a choice made once, and refusals with reasons."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import pathlib
import shutil
import tomllib

import pytest
import torch

from core.errors import ConfigError
from engine.config import EngineConfig
from engine.ops import registry, requires
from engine.ops.names import OP_NAMES, backends_of
from engine.ops.registry import Impl, Op, bind, get_op, load_backend

CPU = torch.device("cpu")


def test_every_folder_is_an_op_and_every_op_a_folder() -> None:
    folder = pathlib.Path(__file__).resolve().parents[3] / "engine" / "ops"
    assert sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name != "__pycache__") == list(OP_NAMES)
    for name in OP_NAMES:
        assert get_op(name).reference.__doc__, f"{name}: the reference is the definition and says what it promises"


def test_all_ops_are_bound_and_the_table_names_them() -> None:
    ops = bind(EngineConfig(ops={"rms_norm": "reference"}), CPU)
    assert ops.named == {"rms_norm"}
    assert {choice.op for choice in ops.choices} == set(OP_NAMES)
    assert all(name in ops.table() for name in OP_NAMES)
    x = torch.randn(3, 8)
    assert torch.allclose(ops.rms_norm(x, torch.ones(8), 0.0).square().mean(-1), torch.ones(3), atol=1e-5)


def test_the_backends_that_a_configuration_may_name_are_those_of_the_ops() -> None:
    assert {name: backends_of(name) for name in OP_NAMES} == {name: ("reference", *get_op(name).backends) for name in OP_NAMES}


@pytest.mark.parametrize(
    ("overrides", "words"), [({"rms_nrm": "reference"}, "'rms_nrm', which does not exist"), ({"rms_norm": "tpu"}, "unknown backend")]
)
def test_unknown_choices_are_refused(overrides: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        EngineConfig(ops=overrides)


def test_an_explicit_backend_that_cannot_run_is_refused_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    op = get_op("rms_norm")
    broken = Op(op.name, op.reference, op.pack, {"triton": Impl("no.such.module", lambda device: "needs a GPU")})
    monkeypatch.setattr("engine.ops.rms_norm.OP", broken)
    with pytest.raises(ConfigError, match=r"cannot run here: needs a GPU; allowed here: reference$"):
        bind(EngineConfig(ops={"rms_norm": "triton"}), CPU)
    (choice,) = [choice for choice in bind(EngineConfig(), CPU).choices if choice.op == "rms_norm"]
    assert (choice.backend, choice.reasons) == ("reference", ("triton: needs a GPU",))


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("0.1.4", None),
        ("0.2.0", "deep_gemm is of sgl-deep-gemm 0.2.0; needs sgl-deep-gemm 0.1.4, for use_psum_layout"),
        ("", "deep_gemm is not of sgl-deep-gemm; needs sgl-deep-gemm 0.1.4, for use_psum_layout"),
    ],
)
def test_another_deep_gemm_is_passed_over_for_triton(version: str, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def version_of(package: str) -> str:
        if not version:
            raise importlib.metadata.PackageNotFoundError(package)
        return version

    monkeypatch.setattr(requires, "cuda", lambda device: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(importlib.metadata, "version", version_of)
    monkeypatch.setattr(registry, "OP_NAMES", ("moe_experts",))
    monkeypatch.setattr(registry, "load_backend", lambda op, backend: (op.reference, None))
    (choice,) = bind(EngineConfig(), CPU).choices
    if reason is None:
        assert (choice.backend, choice.reasons) == ("deep_gemm", ())
        return
    assert choice.backend == "triton" and choice.reasons[0].startswith(f"deep_gemm: {reason}")
    with pytest.raises(ConfigError, match=f"cannot run here: {reason}.*; allowed here: reference, triton"):
        bind(EngineConfig(ops={"moe_experts": "deep_gemm"}), CPU)


def test_the_deep_gemm_that_is_asked_for_is_the_one_that_the_extra_installs() -> None:
    project = tomllib.loads((pathlib.Path(__file__).resolve().parents[3] / "pyproject.toml").read_text())
    assert "==".join(requires.DEEP_GEMM) in project["project"]["optional-dependencies"]["kernels"]


def test_a_backend_with_another_signature_is_a_mistake_of_ours() -> None:
    op = get_op("rms_norm")
    with pytest.raises(AttributeError):
        load_backend(Op(op.name, op.reference, op.pack, {"x": Impl("math", lambda device: None)}), "x")
