"""Every Triton kernel of engine/ops compiles ahead of time for the GPUs we mean to run on, without one.

A module with kernels (functions named *_kernel) exports AOT: a list of (kernel, signature, constexprs, options). `signature` gives
the type of each argument that is no constexpr, by name: "*bf16", "i32", "fp32"; ":16" at an integer's end says that it is divisible
by 16. Pointers are taken as aligned to 16 bytes, as the allocator makes them. Sizes that change from step to step belong into
`do_not_specialize`: else a step whose size is divisible by 16 would be compiled once more.

A module with a CUDA C++ kernel exports CUDA_AOT: a list of (source file, kernel, macros, architectures). These compile with NVRTC, as on
a GPU, or with nvcc where only that is at hand.
"""

from __future__ import annotations

import importlib
import pathlib
import re
import shutil
import subprocess
from typing import Any

import pytest

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from engine.ops.cuda_source import compile_cubin, nvrtc_library

OPS = pathlib.Path(__file__).resolve().parents[3] / "engine" / "ops"


def modules_with(pattern: str) -> list[str]:
    paths = sorted(path for path in OPS.rglob("*.py") if re.search(pattern, path.read_text()))
    return [str(path.relative_to(OPS.parents[1]).with_suffix("")).replace("/", ".") for path in paths]


MODULES = modules_with(r"@triton\.jit.*\ndef \w+_kernel\(")
CUDA_CASES = [
    (module, architecture)
    for module in modules_with(r"\nCUDA_AOT")
    for architecture in sorted({number for *_, numbers in importlib.import_module(module).CUDA_AOT for number in numbers})
]
ARCHITECTURES = (90, 100, 103)
ONE_OF_EACH = (103,)
"""Architectures for which each kernel is compiled once, not in all its variants: Triton writes for sm_103 what it writes for sm_100, save
for some reductions."""
SHARED_BYTES = 227 * 1024
"""A block's shared memory on all of them."""


def kernels(module: str) -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    return importlib.import_module(module).AOT


def compile_for(
    architecture: int, kernel: JITFunction, signature: dict[str, str], constexprs: dict[str, Any], options: dict[str, Any]
) -> Any:
    names = kernel.arg_names
    assert set(names) == set(signature) | set(constexprs), (
        f"{kernel.__name__}: {set(names) ^ (set(signature) | set(constexprs))} missing or too many"
    )
    types = {name: signature[name].removesuffix(":16") if name in signature else "constexpr" for name in names}
    aligned = [name for name, kind in signature.items() if kind.startswith("*") or kind.endswith(":16")]
    source = ASTSource(
        kernel,
        signature=types,
        constexprs={(names.index(name),): value for name, value in constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_with_kernels_says_how_they_are_compiled(module: str) -> None:
    source = importlib.import_module(module)
    own = {
        name
        for name, value in vars(source).items()
        if isinstance(value, JITFunction) and value.__module__ == module and name.endswith("_kernel")
    }
    listed = {kernel.__name__ for kernel, *_ in kernels(module)}
    assert own == listed, "kernels are named *_kernel, and each is in AOT"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("module", MODULES)
def test_kernels_compile_for_the_target(module: str, architecture: int) -> None:
    listed = kernels(module)
    for kernel, signature, constexprs, options in {entry[0]: entry for entry in listed}.values() if architecture in ONE_OF_EACH else listed:
        compiled = compile_for(architecture, kernel, signature, constexprs, options)
        assert len(compiled.asm["cubin"]) > 0
        assert compiled.metadata.shared <= SHARED_BYTES, (
            f"{kernel.__name__} {constexprs}: {compiled.metadata.shared} bytes of shared memory"
        )


@pytest.mark.parametrize(("module", "architecture"), CUDA_CASES)
def test_cuda_sources_compile_for_the_target(module: str, architecture: int, tmp_path: pathlib.Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvrtc_library() is None and nvcc is None:
        pytest.skip("neither NVRTC nor nvcc is installed")
    listed = [entry for entry in importlib.import_module(module).CUDA_AOT if architecture in entry[3]]
    for source, kernel, macros, _ in listed:
        if nvrtc_library() is not None:
            cubin = compile_cubin(source, architecture, **macros)
        else:
            out = tmp_path / "kernel.cubin"
            defines = [f"-D{name}={value}" for name, value in macros.items()]
            command = [nvcc, "-cubin", f"-arch=sm_{architecture}a", "-std=c++17", *defines, str(source), "-o", str(out)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            cubin = out.read_bytes()
        assert kernel.encode() in cubin
