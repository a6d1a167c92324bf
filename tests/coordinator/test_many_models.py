"""Several models behind one endpoint: names, aliases, pools and classes of their own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from coordinator.models import ServedModel
from coordinator.service import Coordinator
from pdserve.client import AsyncClient
from pdserve.core.config import CoordinatorSettings, ServeConfig
from pdserve.core.errors import ConfigError, ModelNotFound
from pdserve.core.messages import Role
from pdserve.core.sla_settings import SlaClassSettings
from tests.support.deployment import scenario
from tests.support.scripted_model import make_scripted_model
from tests.support.scripted_worker import ScriptedCluster

BIG_CLASSES = {"interactive": SlaClassSettings(ttft_target_ms=90_000)}


def served(folder: Path, name: str, **more: object) -> ServedModel:
    return ServedModel.from_dir(make_scripted_model(folder / name), name=name, **more)  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def two_models(folder: Path) -> AsyncIterator[tuple[Coordinator, ScriptedCluster, AsyncClient]]:
    """`big` (also `large`) with a prefill worker, `small` without; both with a decode worker."""
    models = [
        served(folder, "big", aliases=("large",), classes=BIG_CLASSES, default_class="interactive"),
        served(folder, "small"),
    ]
    coordinator = Coordinator(ServeConfig(coordinator=CoordinatorSettings(port=0)), models)
    cluster = ScriptedCluster(folder)
    try:
        endpoints = await coordinator.start()
        async with AsyncClient(endpoints.grpc, timeout_s=20) as client:
            for name, role, model in (
                ("prefill-0", Role.PREFILL, "big"),
                ("decode-0", Role.DECODE, "big"),
                ("decode-1", Role.DECODE, "small"),
            ):
                worker = await cluster.start(name, role)
                await coordinator.add_worker(worker.address, model=model)
            yield coordinator, cluster, client
    finally:
        await coordinator.stop(0.0)
        await cluster.stop()


@scenario
async def test_each_model_is_served_by_its_own_workers_under_every_name(tmp_path: Path) -> None:
    async with two_models(tmp_path) as (_, _, client):
        answers = await asyncio.gather(
            *(client.generate("hello", model=name, max_tokens=4) for name in ("big", "large", "small"))
        )
        assert [answer.model for answer in answers] == ["big", "big", "small"]
        assert [a.timings.decode_worker for a in answers] == ["decode-0", "decode-0", "decode-1"]
        assert answers[2].timings.prefill_worker == ""


@scenario
async def test_the_list_shows_each_model_once_with_its_other_names(tmp_path: Path) -> None:
    async with two_models(tmp_path) as (_, _, client):
        big, small = await client.list_models()
        assert (big.name, big.aliases, big.prefill_workers, big.decode_workers) == ("big", ("large",), 1, 1)
        assert (small.name, small.aliases, small.prefill_workers, small.decode_workers) == ("small", (), 0, 1)
        assert big.ready
        assert small.sla_classes == ("batch", "interactive")


@scenario
async def test_a_model_that_is_not_served_is_answered_with_those_that_are(tmp_path: Path) -> None:
    async with two_models(tmp_path) as (_, _, client):
        with pytest.raises(ModelNotFound, match="'huge' is not here; known: big, large, small"):
            await client.generate("hello", model="huge")
        with pytest.raises(ModelNotFound, match="several models are served, name one: big, large"):
            await client.generate("hello")


@scenario
async def test_a_class_means_what_the_model_says_it_means(tmp_path: Path) -> None:
    async with two_models(tmp_path) as (_, _, client):
        by_default = await client.generate("hello", model="large", max_tokens=2)
        assert (by_default.timings.sla_class, by_default.timings.ttft_target_s) == ("interactive", 90.0)
        other = await client.generate("hello", model="small", sla_class="interactive", max_tokens=2)
        assert (other.timings.sla_class, other.timings.ttft_target_s) == ("interactive", None)


def test_two_models_cannot_have_the_same_name(tmp_path: Path) -> None:
    models = [served(tmp_path, "a", aliases=("b",)), served(tmp_path, "b")]
    with pytest.raises(ConfigError, match="must differ, got a, b, b"):
        Coordinator(ServeConfig(), models)
