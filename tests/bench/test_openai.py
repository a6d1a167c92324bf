"""OpenAI endpoints of every kind: chat, text, pairs of vLLM instances, keys."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pdserve.bench.asks import Ask, Piece, Role, Said, as_words
from pdserve.bench.drivers import make_driver
from pdserve.bench.load import run_trial
from pdserve.bench.records import Trial
from pdserve.bench.scenario import Scenario, SystemSpec, parse_scenario, with_endpoint_key
from pdserve.bench.workload import ServerLimits, build_workload
from pdserve.client import Access
from pdserve.core.errors import ConfigError, PdServeError, WorkerLost
from tests.support.certificates import Authority

IDS = tuple(range(1000, 1048))
HELLO = Ask(turns=[Said(role=Role.USER, token_ids=IDS)], output_tokens=5)


def spec_of(address: str, **fields: Any) -> SystemSpec:
    return SystemSpec.model_validate({"name": "s", "address": address, "protocol": "openai"} | fields)


async def asked(address: str, ask: Ask = HELLO, **fields: Any) -> list[Piece]:
    driver = make_driver(spec_of(address, **fields), address)
    try:
        await driver.limits()
        return [piece async for piece in driver.stream(ask)]
    finally:
        await driver.close()


def answered(serve: Any, ask: Ask = HELLO, **fields: Any) -> list[Piece]:
    async def main() -> list[Piece]:
        async with serve() as address:
            return await asked(address, ask, **fields)

    return asyncio.run(main())


def test_chat_sends_messages_and_counts_what_is_written(fake_openai: Any) -> None:
    fake, serve = fake_openai
    *pieces, last = answered(serve, endpoint="chat")
    assert [piece.num_tokens for piece in pieces] == [1] * 5  # the role that comes first is no token
    assert (last.done, last.output_tokens) == (True, 5)
    (message,) = fake.bodies[-1]["messages"]
    assert message["role"] == "user"
    assert "prompt" not in fake.bodies[-1]


@pytest.mark.parametrize("fields", [{"endpoint": "chat"}, {"text_prompts": True}])
def test_text_is_as_long_in_the_servers_tokens_as_was_asked(fake_openai: Any, fields: dict[str, Any]) -> None:
    _, serve = fake_openai
    template = 9 if "endpoint" in fields else 0
    assert answered(serve, **fields)[-1].prompt_tokens == len(IDS) + template


def test_prompts_that_share_their_beginning_share_it_as_text() -> None:
    one, other = as_words([*IDS, *range(9000, 9024)], 3.0), as_words([*IDS, *range(7000, 7024)], 3.0)
    assert len(one.split()) == 24
    assert one.split()[:16] == other.split()[:16]
    assert one.split()[16:] != other.split()[16:]


def test_usage_in_every_message_counts_exactly(fake_openai: Any) -> None:
    fake, serve = fake_openai
    fake.tokens_per_message = 2
    options = {"include_usage": True, "continuous_usage_stats": True}
    *pieces, last = answered(serve, extra_body={"stream_options": options})
    assert [piece.num_tokens for piece in pieces] == [2, 2, 1]
    assert last.output_tokens == 5


def test_a_later_turn_of_a_chat_repeats_what_the_model_wrote(fake_openai: Any) -> None:
    fake, serve = fake_openai
    scenario = Scenario.model_validate(
        {
            "arrivals": {"kind": "uniform"},
            "warmup_s": 0,
            "duration_s": 0.02,
            "classes": [{"input": {"value": 9}, "output": {"value": 2}, "sessions": {"turns": {"value": 2}}}],
        }
    )
    workload = build_workload(scenario, 50, 0, ServerLimits(vocab_size=512, max_model_len=256))

    async def main() -> Trial:
        async with serve() as address:
            driver = make_driver(spec_of(address, endpoint="chat"), address)
            try:
                return await run_trial(driver, workload, system="s", rate=50, round=0, drain_s=9)
            finally:
                await driver.close()

    trial = asyncio.run(main())
    assert [record.ok for record in trial.records] == [True, True]
    messages: Sequence[dict[str, str]] = fake.bodies[-1]["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert messages[1]["content"] == " x x"
    assert messages[0] == fake.bodies[0]["messages"][0]


def test_a_pair_is_asked_in_turn_and_the_second_told_where_the_cache_is(
    fake_openai: Any, another_openai: Any
) -> None:
    (decode, serve), (prefill, serve_prefill) = fake_openai, another_openai
    prefill.is_prefill = True

    async def main() -> list[Piece]:
        async with serve_prefill() as first, serve() as second:
            return await asked(second, prefill_address=first + "/v1")

    pieces = asyncio.run(main())
    assert sum(piece.num_tokens for piece in pieces) == 5
    (read,), (written,) = prefill.bodies, decode.bodies
    assert (read["max_tokens"], read["stream"]) == (1, False)
    assert read["kv_transfer_params"]["do_remote_decode"] is True
    assert written["kv_transfer_params"] == {"block": 7}
    assert written["max_tokens"] == 5


def test_a_prefill_instance_that_hands_nothing_over_is_no_answer(fake_openai: Any) -> None:
    fake, serve = fake_openai
    fake.is_prefill, fake.handed_over = True, None

    async def main() -> None:
        async with serve() as address:
            await asked(address, prefill_address=address)

    with pytest.raises(PdServeError, match="gave no kv_transfer_params"):
        asyncio.run(main())


def test_keys_go_to_the_servers_they_are_for(fake_grpc: Any, fake_openai: Any) -> None:
    scenario = Scenario.model_validate(
        {
            "systems": [
                {"name": "a", "address": "http://a", "protocol": "openai"},
                {"name": "b", "address": "http://b", "protocol": "openai", "api_key": "own"},
                {"name": "c", "address": "c:1"},
                {"name": "d"},
            ]
        }
    )
    keys = [one.api_key for one in with_endpoint_key(scenario, "given").systems]
    assert keys == ["given", "own", None, None]
    answered(fake_openai[1], api_key="k1")

    async def over_grpc() -> None:
        async with fake_grpc[1]() as address:
            for own in (None, "k3"):
                spec = SystemSpec(name="g", address=address, api_key=own)
                driver = make_driver(spec, address, Access(api_key="k2"))
                async for _ in driver.stream(HELLO):
                    pass
                await driver.close()

    asyncio.run(over_grpc())
    assert fake_openai[0].keys == ["Bearer k1"]
    assert fake_grpc[0].keys == ["Bearer k2", "Bearer k3"]
    assert "own" not in repr(scenario)


def test_both_protocols_are_asked_over_tls(fake_grpc: Any, fake_openai: Any, tmp_path: Path) -> None:
    authority = Authority(tmp_path, "ours")
    pair = authority.issue("server")

    async def main() -> None:
        async with fake_openai[1](pair) as address:
            assert await asked(address, ca_file=authority.file)
            with pytest.raises(WorkerLost, match="certificate"):
                await asked(address)
        async with fake_grpc[1](pair) as address:
            for of_one, of_all in ((authority.file, None), (None, authority.file)):
                spec = SystemSpec(name="g", address=address, ca_file=of_one)
                driver = make_driver(spec, address, Access(ca_file=of_all))
                assert (await driver.limits()).vocab_size == 512
                await driver.close()

    asyncio.run(main())


def test_an_endpoint_without_a_list_of_models_wants_the_name(fake_openai: Any) -> None:
    fake, serve = fake_openai
    fake.has_models = False
    assert answered(serve, model="mine")
    assert fake.bodies[-1]["model"] == "mine"
    with pytest.raises(ConfigError, match="name one"):
        answered(serve)


@pytest.mark.parametrize(
    ("system", "said"),
    [
        ({"endpoint": "chat"}, "protocol openai"),
        ({"prefill_address": "http://a"}, "protocol openai"),
        ({"freeze": True}, "frozen"),
        ({"command": ["x"]}, "address"),
    ],
)
def test_a_system_that_makes_no_sense_is_named(system: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"system odd: .*{said}"):
        parse_scenario({"systems": [{"name": "odd"} | system]}, "f.yaml")


def test_a_certificate_that_cannot_be_read_is_named(fake_openai: Any) -> None:
    with pytest.raises(ConfigError, match="/no/such"):
        answered(fake_openai[1], ca_file="/no/such.pem")
