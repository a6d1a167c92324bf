"""Make the stubs from the .proto files: `python -m pdserve.core.proto.generate`.

Paths are given to protoc from the repository's root, so that the stubs import each other as
`pdserve.core.proto...` and need no change of sys.path.
"""

from __future__ import annotations

import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[3]
SOURCES: Final = (
    "pdserve/core/proto/pdserve/v1/admin.proto",
    "pdserve/core/proto/pdserve/v1/generation.proto",
)


def generate(out: Path) -> None:
    """Write the stubs of every source under `out`, with the sources' own folders. Needs the `dev` extra."""
    well_known = str(resources.files("grpc_tools") / "_proto")
    flags = [f"--{kind}_out={out}" for kind in ("python", "grpc_python")]
    # Readable stubs: the .proto comments become docstrings.
    flags += [f"--mypy_out=readable_stubs:{out}", f"--mypy_grpc_out={out}"]
    # The plugins lie beside the interpreter, which need not be on PATH.
    tools = Path(sys.executable).parent
    flags += [f"--plugin={name}={tools / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")]
    # A process of its own: protoc brings another copy of protobuf, which corrupts the heap of a process that
    # loads NIXL later.
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT}", f"-I{well_known}", *flags, *SOURCES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"protoc failed; is the `dev` extra installed?\n{done.stderr}")


if __name__ == "__main__":
    generate(ROOT)
    sys.stdout.write(f"wrote stubs of {', '.join(SOURCES)}\n")
