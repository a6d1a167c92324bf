"""The kernels are compiled once per machine; where they cannot be, torch computes and the log says why."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pdcpu import build, library
from pdcpu.build import INSTRUCTION_SETS, KernelsUnavailable, best_instructions, recipe

from pdserve.core.config import DType
from pdserve.engine.build import Engine
from pdserve.models import cpu
from pdserve.models.cpu_native import NativeOps
from tests.support.engines import engine_for
from tests.support.tiny_models import make_tiny_model

X86 = build.platform.machine() == "x86_64" and sys.platform.startswith("linux")
needs_compiler = pytest.mark.skipif(not X86 or build.find_compiler() is None, reason="no compiler")


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that counts how often it is called and writes an empty file."""
    script = tmp_path / "c++"
    script.write_text(
        f'#!/bin/sh\necho called >> {tmp_path}/calls\nwhile [ "$1" != -o ]; do shift; done\n: > "$2"\n'
    )
    script.chmod(0o755)
    monkeypatch.setattr(build, "find_compiler", lambda: (str(script),))
    return script


def calls(compiler: Path) -> int:
    log = compiler.with_name("calls")
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_the_best_instruction_set_that_a_cpu_has_is_taken() -> None:
    everything = frozenset().union(*(wanted for wanted, _ in INSTRUCTION_SETS.values()))
    assert best_instructions(everything) == "avx512_bf16"
    assert best_instructions(everything - {"avx512_bf16"}) == "avx512"
    assert best_instructions(frozenset({"avx2", "fma", "sse2"})) == "avx2"
    assert best_instructions(frozenset({"neon"})) is None


@pytest.mark.skipif(not X86, reason="no kernels here")
def test_a_library_is_compiled_once_and_again_when_its_source_changes(
    compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = recipe("avx2", tmp_path / "cache")
    assert not first.built
    assert build.build(first) == build.build(first)
    assert first.built
    assert calls(compiler) == 1
    copied = tmp_path / "src"
    copied.mkdir()
    for source in build.SOURCES.iterdir():
        (copied / source.name).write_bytes(source.read_bytes())
    (copied / "simd.h").write_text("// changed\n")
    monkeypatch.setattr(build, "SOURCES", copied)
    assert recipe("avx2", tmp_path / "cache").path != first.path
    assert recipe("avx512", tmp_path / "cache").path != recipe("avx2", tmp_path / "cache").path


@pytest.mark.skipif(not X86, reason="no kernels here")
def test_processes_that_start_together_compile_once(compiler: Path, tmp_path: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom pdcpu import build\n"
        "build.find_compiler = lambda: (sys.argv[1],)\n"
        "print(build.build(build.recipe('avx2', Path(sys.argv[2]))))\n"
    )
    command = [sys.executable, "-c", script, str(compiler), str(tmp_path / "cache")]
    environment = {**os.environ, "PYTHONPATH": str(build.SOURCES.parent.parent)}
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) for _ in range(4)]
    outputs = {process.communicate()[0] for process in running}
    assert [process.returncode for process in running] == [0] * 4
    assert len(outputs) == 1
    assert calls(compiler) == 1


@pytest.mark.skipif(not X86, reason="no kernels here")
def test_what_was_built_is_found_when_the_compiler_is_gone(
    compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build.build(recipe("avx2", tmp_path))
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    assert build.build(recipe("avx2", tmp_path)) == path
    with pytest.raises(KernelsUnavailable, match="compiler"):
        recipe("avx512", tmp_path)


@pytest.mark.skipif(not X86, reason="no kernels here")
def test_a_compiler_that_fails_is_quoted(compiler: Path, tmp_path: Path) -> None:
    compiler.write_text("#!/bin/sh\necho 'pdcpu.cpp:3: error: no such thing' >&2\nexit 1\n")
    with pytest.raises(KernelsUnavailable, match="no such thing") as caught:
        build.build(recipe("avx2", tmp_path / "cache"))
    assert "ziglang" in caught.value.advice
    assert list((tmp_path / "cache").glob("*.so")) == []


@pytest.mark.skipif(not X86, reason="no kernels here")
def test_a_file_that_is_no_library_is_refused_with_its_name(compiler: Path, tmp_path: Path) -> None:
    path = build.build(recipe("avx2", tmp_path / "cache"))
    with pytest.raises(KernelsUnavailable, match="cannot load"):
        library.Library(path)


@pytest.mark.skipif(not X86, reason="no kernels here")
def test_a_cache_that_cannot_be_written_is_named(compiler: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(KernelsUnavailable, match="cannot write"):
        build.build(recipe("avx2", tmp_path / "cache"))


def engine(folder: Path, dtype: DType) -> Engine:
    return engine_for(make_tiny_model("qwen3_qk_norm", folder).path, dtype)


def test_without_kernels_torch_computes_and_the_log_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    monkeypatch.setattr(build, "CACHE", tmp_path)
    caplog.set_level(logging.WARNING)
    made = engine(tmp_path, DType.BFLOAT16)
    assert not isinstance(made.runner._model.ops, NativeOps)
    assert made.runner._model.stack is None
    if X86:
        assert "ziglang" in caplog.text


@needs_compiler
def test_float32_models_are_computed_by_torch(tmp_path: Path) -> None:
    assert not isinstance(engine(tmp_path, DType.FLOAT32).runner._model.ops, NativeOps)


@needs_compiler
def test_a_wait_for_the_compiler_is_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "CACHE", tmp_path)
    monkeypatch.setattr(cpu, "load", lambda: None)
    said: list[str] = []
    cpu.native_library(said.append)
    assert ["compiling" in words for words in said] == [True]
