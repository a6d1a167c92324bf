"""Triton is optional: without it the package imports, and a kernel module says what to install."""

from __future__ import annotations

import subprocess
import sys
import textwrap

from tests.support.paths import REPO


def run_without_triton(code: str) -> str:
    prelude = f"""
        import sys
        sys.path[:0] = [{str(REPO)!r}, {str(REPO / "kernels")!r}]
        sys.modules["triton"] = None
    """
    command = [sys.executable, "-c", textwrap.dedent(prelude) + textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def test_the_package_its_plans_and_references_import_without_triton() -> None:
    run_without_triton("import pdkernels, pdkernels.plan, pdkernels.tuning, pdkernels.reference.attention")


def test_a_kernel_module_names_the_missing_package_and_the_way_out() -> None:
    out = run_without_triton(
        """
        from pdkernels.errors import TritonUnavailable
        from pdserve.core.errors import ConfigError
        try:
            import pdkernels.norm
        except TritonUnavailable as error:
            assert isinstance(error, ConfigError) and isinstance(error, ImportError)
            print(error)
        """
    )
    assert "triton" in out
    assert "pdserve[gpu]" in out


def test_importing_every_kernel_module_starts_no_cuda_context() -> None:
    code = """
        import pdkernels.decode_attention, pdkernels.prefill_attention, pdkernels.rope, pdkernels.blocks
        import torch
        assert not torch.cuda.is_initialized()
    """
    paths = f"import sys; sys.path[:0] = [{str(REPO)!r}, {str(REPO / 'kernels')!r}]\n"
    subprocess.run([sys.executable, "-c", paths + textwrap.dedent(code)], check=True, timeout=120)
