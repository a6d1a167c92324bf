"""Workers that stand by take no requests until one is lost, and give its place back."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from coordinator.models import ServedModel
from coordinator.service import Coordinator
from coordinator.standby import Standbys
from pdserve.core.config import CoordinatorSettings, DecodeSettings, ServeConfig
from pdserve.core.errors import ConfigError
from pdserve.core.ids import WorkerId
from pdserve.core.messages import Role
from pdserve.core.operation_settings import PlannerMode, PlannerSettings
from tests.support.deployment import scenario
from tests.support.registry_world import MODEL, World, new_request
from tests.support.scripted_model import make_scripted_model


class Watched(World):
    """A world whose fleet is looked at on every tick."""

    def __init__(self, standby: int = 1, prefill: int = 1, decode: int = 3) -> None:
        super().__init__()
        self.standbys = Standbys({MODEL: standby})
        for index in range(prefill):
            self.join(f"prefill-{index}", Role.PREFILL)
        for index in range(decode):
            self.join(f"decode-{index}", Role.DECODE)
        self.look()

    def look(self) -> None:
        for event in self.standbys.ticked(self.registry.fleet, self.now):
            self.handle(event)
        self.flush()
        for worker in list(self.workers):
            self.beat(worker)
        self.flush()

    def used(self) -> dict[str, Role]:
        fleet = self.registry.fleet
        return {w.id: w.info.role for w in sorted(fleet, key=lambda w: w.id) if w.up and not w.draining}


def test_the_last_decode_worker_stands_by_and_gets_no_request() -> None:
    world = Watched()
    assert list(world.used()) == ["decode-0", "decode-1", "prefill-0"]
    assert world.standbys.stands_by(WorkerId("decode-2"))
    world.submit(*(new_request(f"r{number}") for number in range(9)))
    world.run()
    assert {end.report.decode_worker for end in world.ends.values()} == {"decode-0", "decode-1"}


def test_it_stands_in_for_one_that_is_lost_until_that_one_is_back() -> None:
    world = Watched()
    world.end_process("decode-0")
    world.look()
    assert list(world.used()) == ["decode-1", "decode-2", "prefill-0"]
    assert not world.standbys.stands_by(WorkerId("decode-2"))
    world.submit(*(new_request(f"r{number}") for number in range(9)))
    world.run()
    assert {end.report.decode_worker for end in world.ends.values()} == {"decode-1", "decode-2"}
    world.join("decode-0", Role.DECODE, epoch=2)
    world.look()
    world.look()
    assert list(world.used()) == ["decode-0", "decode-1", "prefill-0"]


def test_one_that_is_lost_while_it_stands_in_stands_by_again_when_it_is_back() -> None:
    world = Watched()
    world.end_process("decode-1")
    world.look()
    world.end_process("decode-2")
    world.look()
    world.join("decode-1", Role.DECODE, epoch=2)
    world.join("decode-2", Role.DECODE, epoch=2)
    world.look()
    world.look()
    assert list(world.used()) == ["decode-0", "decode-1", "prefill-0"]


def test_a_silent_worker_is_stood_in_for_and_one_that_was_drained_is_not() -> None:
    world = Watched()
    world.drain("decode-0")
    world.look()
    world.end_process("decode-0")
    world.look()
    assert list(world.used()) == ["decode-1", "prefill-0"]
    world.lose("decode-1")
    world.look()
    assert list(world.used()) == ["decode-2", "prefill-0"]


def test_of_two_that_are_lost_one_is_stood_in_for_by_one() -> None:
    world = Watched(decode=4)
    world.end_process("decode-0")
    world.end_process("decode-1")
    world.look()
    world.look()
    assert list(world.used()) == ["decode-2", "decode-3", "prefill-0"]


@scenario
async def test_the_planner_and_standbys_do_not_both_give_roles(tmp_path: Path) -> None:
    served = ServedModel.from_dir(make_scripted_model(tmp_path / "model"), name="scripted")
    config = ServeConfig(
        coordinator=CoordinatorSettings(port=0),
        decode=DecodeSettings(workers=2, standby=1),
        planner=PlannerSettings(mode=PlannerMode.ACTIVE),
    )
    with pytest.raises(ConfigError, match=r"decode\.standby"):
        await Coordinator(config, [served]).start()


def test_somebody_must_be_left_to_write() -> None:
    with pytest.raises(ValidationError, match="standby"):
        DecodeSettings(workers=1, standby=1)
