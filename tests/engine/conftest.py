"""Fixtures: a tiny engine, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.tiny_models import TinyModel, make_tiny_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_tiny_model("llama2_no_gqa", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_dir(tiny: TinyModel) -> Path:
    return tiny.path
