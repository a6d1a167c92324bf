"""A recorded run replays exactly, and a coordinator that decides otherwise is found out."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.recording import Recording, RecordingRegistry, Replayed, replay
from coordinator.registry import Registry
from coordinator.router import Router
from pdserve.core.config import RoutingPolicy
from pdserve.core.errors import ConfigError
from pdserve.core.ids import WorkerId
from pdserve.core.messages import Role
from tests.support.registry_world import SETTINGS, World, new_request


def record(path: Path, policy: RoutingPolicy, *, seed: int = 7) -> None:
    """Requests, losses, cancels and drains, in an order drawn from the seed."""
    world, rng = World(policy=policy), random.Random(seed)
    registry = RecordingRegistry(SETTINGS, Router(policy, seed), path, "as it was")
    world.registry = registry
    for index in range(3):
        world.join(f"prefill-{index}", Role.PREFILL)
        world.join(f"decode-{index}", Role.DECODE)
    for index in range(60):
        request = new_request(f"r{index}", prompt=[1 + index % 9] * rng.randrange(1, 40), arrived=world.now)
        world.submit(replace(request, ttft_target_s=rng.choice([None, 0.5]), tenant=rng.choice(["", "a"])))
        if rng.random() < 0.1:
            world.cancel(f"r{rng.randrange(index + 1)}")
        if index in (20, 40):
            world.end_process(f"decode-{index // 20}")
            world.join(f"decode-{index // 20}", Role.DECODE, epoch=index)
        if index == 30:
            world.drain("decode-0", 1.0)
        for worker in list(world.workers):
            world.beat(WorkerId(worker))
        if rng.random() < 0.5:
            world.run()
        world.tick(rng.random() / 10)
    world.run()
    registry.close()


def again(path: Path, policy: RoutingPolicy, *, seed: int = 7) -> Replayed:
    return replay(Recording(path), Registry(SETTINGS, Router(policy, seed)))


@pytest.mark.parametrize("policy", list(RoutingPolicy))
def test_the_same_inputs_and_seed_give_the_same_decisions(tmp_path: Path, policy: RoutingPolicy) -> None:
    path = tmp_path / "run"
    record(path, policy)
    assert Recording(path).config == "as it was"
    result = again(path, policy)
    assert result.difference is None
    assert result.num_events > 300
    assert result.num_placements >= 50


def test_another_seed_is_found_out_with_what_was_sent_instead(tmp_path: Path) -> None:
    path = tmp_path / "run"
    record(path, RoutingPolicy.RANDOM)
    result = again(path, RoutingPolicy.RANDOM, seed=8)
    assert result.difference is not None
    assert result.difference.recorded != result.difference.replayed
    assert any(line.startswith("StartDecode decode-") for line in result.difference.replayed)


def test_a_recording_that_was_cut_off_is_replayed_up_to_there(tmp_path: Path) -> None:
    path = tmp_path / "run"
    record(path, RoutingPolicy.SLA)
    whole = again(path, RoutingPolicy.SLA)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    part = again(path, RoutingPolicy.SLA)
    assert part.difference is None
    assert 0 < part.num_events < whole.num_events


def test_what_is_no_recording_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "something"
    for content in (b"", b"hello", b"\x92\x63\xa0"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="recording"):
            Recording(path)
    with pytest.raises(ConfigError, match="record"):
        RecordingRegistry(SETTINGS, Router("sla", 0), tmp_path / "no" / "folder", "")
