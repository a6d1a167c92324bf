"""TLS and mutual TLS at the endpoint, and between coordinator and workers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from pydantic import ValidationError

from coordinator.workers import dial
from pdserve.client import Access, AsyncClient, Client
from pdserve.core.channel import Channel, listen
from pdserve.core.errors import ConfigError, PdServeError, WorkerLost
from pdserve.core.messages import Role
from pdserve.core.security_settings import SecuritySettings, TlsFiles
from pdserve.core.tls import accepting, dialling
from tests.support.certificates import Authority, Pair
from tests.support.deployment import deployed, scenario
from tests.support.scripted_worker import ScriptedCluster


def served_with(pair: Pair, client_ca: Path | None = None) -> SecuritySettings:
    return SecuritySettings(
        tls_cert_file=str(pair.cert),
        tls_key_file=str(pair.key),
        tls_client_ca_file=None if client_ca is None else str(client_ca),
    )


async def refused(address: str, access: Access) -> None:
    async with AsyncClient(address, timeout_s=5, access=access) as client:
        with pytest.raises(PdServeError):
            await client.generate("hello", max_tokens=2)


@scenario
async def test_a_client_that_knows_the_authority_gets_an_answer_and_plain_text_none(tmp_path: Path) -> None:
    ours, others = Authority(tmp_path, "ours"), Authority(tmp_path, "others")
    security, access = served_with(ours.issue("server")), Access(ca_file=ours.file)
    async with deployed(tmp_path, security=security, access=access) as system:
        assert (await system.client.generate("hello", max_tokens=2)).usage.completion_tokens == 2

        def blocking() -> int:
            with Client(system.address, access=access) as client:
                return client.generate("hello", max_tokens=3).usage.completion_tokens

        assert await asyncio.to_thread(blocking) == 3
        await refused(system.address, Access())
        await refused(system.address, Access(ca_file=others.file))


@scenario
async def test_mutual_tls_lets_in_only_whom_the_authority_certified(tmp_path: Path) -> None:
    ours, others = Authority(tmp_path, "ours"), Authority(tmp_path, "others")
    mine, strange = ours.issue("client"), others.issue("stranger")
    access = Access(ca_file=ours.file, cert_file=mine.cert, key_file=mine.key)
    security = served_with(ours.issue("server"), ours.file)
    async with deployed(tmp_path, security=security, access=access) as system:
        assert (await system.client.generate("hello", max_tokens=2)).usage.completion_tokens == 2
        await refused(system.address, Access(ca_file=ours.file))
        await refused(system.address, Access(ca_file=ours.file, cert_file=strange.cert, key_file=strange.key))


@scenario
async def test_a_renewed_certificate_serves_without_a_restart(tmp_path: Path) -> None:
    old, new = Authority(tmp_path, "old"), Authority(tmp_path, "new")
    pair = old.issue("server")
    async with deployed(tmp_path, security=served_with(pair), access=Access(ca_file=old.file)) as system:
        await system.client.generate("hello", max_tokens=2)
        new.issue("server")
        async with AsyncClient(system.address, access=Access(ca_file=new.file)) as client:
            await client.generate("hello", max_tokens=2)


@scenario
async def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    security = SecuritySettings(tls_cert_file="/no/such.crt", tls_key_file="/no/such.key")
    with pytest.raises(ConfigError, match=r"/no/such\.crt"):
        async with deployed(tmp_path, security=security):
            pass
    with pytest.raises(ConfigError, match=r"/no/ca\.pem"):
        Client("127.0.0.1:1", access=Access(ca_file=Path("/no/ca.pem")))


@pytest.mark.parametrize("half", [{"tls_cert_file": "a"}, {"tls_key_file": "a"}, {"tls_client_ca_file": "a"}])
def test_half_a_configuration_is_refused(half: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="tls_"):
        SecuritySettings.model_validate(half)


def cluster_files(authority: Authority, name: str) -> TlsFiles:
    pair = authority.issue(name)
    return TlsFiles(cert_file=str(pair.cert), key_file=str(pair.key), ca_file=str(authority.file))


@scenario
async def test_workers_and_coordinator_know_each_other_by_certificate(tmp_path: Path) -> None:
    ours, others = Authority(tmp_path, "ours"), Authority(tmp_path, "others")
    cluster = ScriptedCluster(tmp_path)
    worker = await cluster.start("decode-0", Role.DECODE)
    files = cluster_files(ours, "worker")
    server, address = await listen("tcp:127.0.0.1:0", worker._converse, tls=accepting(files))
    try:
        channel, info, _ = await dial(address, sender="test", tls=dialling(files))
        assert info.worker == "decode-0"
        channel.abort()
        for stranger in (None, dialling(cluster_files(others, "stranger"))):
            with pytest.raises(WorkerLost):
                await dial(address, sender="test", tls=stranger, timeout_s=2.0)
    finally:
        server.close()
        await cluster.stop()


@scenario
async def test_renewed_files_are_used_between_workers_and_coordinator_too(tmp_path: Path) -> None:
    old, new = Authority(tmp_path, "old"), Authority(tmp_path, "new")
    pair, authorities = old.issue("node"), tmp_path / "authorities.pem"
    authorities.write_bytes(old.file.read_bytes())
    files = TlsFiles(cert_file=str(pair.cert), key_file=str(pair.key), ca_file=str(authorities))
    cluster = ScriptedCluster(tmp_path)
    worker = await cluster.start("decode-0", Role.DECODE)
    server, address = await listen("tcp:127.0.0.1:0", worker._converse, tls=accepting(files))
    ours = dialling(files)
    try:
        (await dial(address, sender="test", tls=ours))[0].abort()
        new.issue("node")
        authorities.write_bytes(new.file.read_bytes())
        (await dial(address, sender="test", tls=ours))[0].abort()
        with pytest.raises(WorkerLost):
            await dial(address, sender="test", tls=dialling(cluster_files(old, "left")), timeout_s=2.0)
    finally:
        server.close()
        await cluster.stop()


@scenario
async def test_a_coordinator_talks_to_no_worker_without_a_certificate_of_ours(tmp_path: Path) -> None:
    ours = Authority(tmp_path, "ours")

    async def plain(channel: Channel) -> None:
        await channel.receive()

    server, address = await listen("tcp:127.0.0.1:0", plain)
    try:
        with pytest.raises(WorkerLost):
            await dial(address, sender="test", tls=dialling(cluster_files(ours, "us")), timeout_s=1.0)
    finally:
        server.close()


def test_cluster_files_that_are_none_are_named(tmp_path: Path) -> None:
    files = TlsFiles(cert_file=str(tmp_path / "a"), key_file=str(tmp_path / "b"), ca_file=str(tmp_path / "c"))
    with pytest.raises(ConfigError, match="cluster_tls"):
        accepting(files)
