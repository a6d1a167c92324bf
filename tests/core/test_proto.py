"""The committed stubs are those of the .proto files."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdserve.core.proto import generate as generator
from pdserve.core.proto.pdserve.v1 import generation_pb2, generation_pb2_grpc


def test_generating_the_stubs_again_changes_nothing(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools", reason="stubs are made with the dev extra")
    generator.generate(tmp_path)
    made = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert [path.name for path in made] == [
        "admin_pb2.py",
        "admin_pb2.pyi",
        "admin_pb2_grpc.py",
        "admin_pb2_grpc.pyi",
        "generation_pb2.py",
        "generation_pb2.pyi",
        "generation_pb2_grpc.py",
        "generation_pb2_grpc.pyi",
    ]
    for path in made:
        committed = generator.ROOT / path.relative_to(tmp_path)
        assert committed.read_text() == path.read_text(), f"run python -m {generator.__name__}"


def test_the_stubs_are_importable_where_they_lie() -> None:
    assert generation_pb2.DESCRIPTOR.package == "pdserve.v1"
    assert hasattr(generation_pb2_grpc, "GenerationStub")


def test_an_unset_sampling_field_can_be_told_from_zero() -> None:
    sampling = generation_pb2.Sampling()
    assert not sampling.HasField("temperature")
    sampling.temperature = 0.0
    again = generation_pb2.Sampling.FromString(sampling.SerializeToString())
    assert again.HasField("temperature")
