"""One frozen tree from YAML and flags; every mistake is one line that names the field."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from pdserve.core.config import RoutingPolicy, ServeConfig, load_config
from pdserve.core.errors import ConfigError


def test_flags_lie_on_top_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("prefill: {workers: 3, max_num_seqs: 7}\ncoordinator: {policy: random}\n")
    config = load_config(file, {"prefill": {"workers": 2}, "decode": {}})
    assert (config.prefill.workers, config.prefill.max_num_seqs) == (2, 7)
    assert config.coordinator.policy is RoutingPolicy.RANDOM
    assert config.decode == ServeConfig().decode


def test_no_file_and_no_flags_is_the_default() -> None:
    assert load_config(None, {}) == ServeConfig()


def test_the_tree_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        ServeConfig().cache.block_size = 1  # type: ignore[misc]  # what the test is about


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("cache: {block_sice: 3}", "cache.block_sice"),
        ("cache: {block_size: 0}", "cache.block_size"),
        ("decode: {workers: 0}", "decode.workers"),
        ("coordinator: {port: 70000}", "coordinator.port"),
        ("coordinator: {policy: best}", "coordinator.policy"),
        ("- a list", "wanted a mapping"),
        ("a: [", "--config"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_field(text: str, names: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(file, {})
    assert names in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        load_config(tmp_path / "nowhere.yaml", {})
