"""What the samples of a request are made of."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator import validation
from coordinator.events import NewRequest
from coordinator.models import LoadedModel, ServedModel
from pdserve.core.errors import CheckpointError, ConfigError, InvalidRequest, ModelNotFound
from pdserve.core.proto.pdserve.v1 import generation_pb2 as pb
from pdserve.core.sampling import SamplingLimits
from tests.support.scripted_model import make_scripted_model


def load(folder: Path, **generation: object) -> LoadedModel:
    make_scripted_model(folder)
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return LoadedModel.load(ServedModel.from_dir(folder, name="m"))


def samples_of(request: pb.GenerateRequest, model: LoadedModel) -> tuple[NewRequest, ...]:
    checked = validation.check(request, {"m": model}, limits=SamplingLimits(), default_max_tokens=256)
    tokens = validation.tokenise(request, model)
    return validation.samples(
        checked, tokens, max_model_len=512, arrival=1.0, arrived=2.0, deadline=3.0, first_epoch=0
    )


def test_what_a_request_leaves_out_is_the_models_and_then_ours(tmp_path: Path) -> None:
    model = load(tmp_path, temperature=0.6, top_p=0.9)
    request = pb.GenerateRequest(text="hi", sampling=pb.Sampling(top_p=0.5))
    (sample,) = samples_of(request, model)
    assert (sample.sampling.temperature, sample.sampling.top_p, sample.sampling.min_p) == (0.6, 0.5, 0.0)
    assert sample.sampling.max_tokens == 256
    assert sample.eos_token_ids == (0,)


def test_zero_is_a_value_and_not_a_missing_one(tmp_path: Path) -> None:
    model = load(tmp_path, temperature=0.6)
    (sample,) = samples_of(pb.GenerateRequest(text="hi", sampling=pb.Sampling(temperature=0.0)), model)
    assert sample.sampling.greedy


def test_every_request_gets_a_seed_of_its_own(tmp_path: Path) -> None:
    model = load(tmp_path)
    one, other = (samples_of(pb.GenerateRequest(text="hi"), model)[0] for _ in range(2))
    assert one.sampling.seed != other.sampling.seed
    assert one.id != other.id


def test_the_first_of_n_samples_is_the_answer_with_n_1(tmp_path: Path) -> None:
    model = load(tmp_path)
    alone = samples_of(pb.GenerateRequest(text="hi", sampling=pb.Sampling(seed=5)), model)
    several = samples_of(pb.GenerateRequest(text="hi", sampling=pb.Sampling(seed=5, n=3)), model)
    assert several[0].sampling == alone[0].sampling
    assert len({sample.sampling.seed for sample in several}) == 3
    assert [sample.id.rpartition(".")[2] for sample in several] == ["0", "1", "2"]


def test_the_seeds_of_samples_never_change_between_versions() -> None:
    seeds = [validation.sample_seed(7, index) for index in range(3)]
    assert seeds == [
        7,
        1067193964161751936,
        6003293486638518062,
    ]


def test_an_answer_is_cut_to_the_room_the_context_has(tmp_path: Path) -> None:
    model = load(tmp_path)
    request = pb.GenerateRequest(text="x" * 500, sampling=pb.Sampling(max_tokens=100, min_tokens=50))
    (sample,) = samples_of(request, model)
    assert (sample.sampling.max_tokens, sample.sampling.min_tokens) == (12, 12)


def test_tenants_do_not_share_a_cache(tmp_path: Path) -> None:
    salts = {
        validation.cache_salt(model, tenant)
        for model, tenant in (("m", ""), ("m", "a"), ("m", "b"), ("ma", ""), ("", "ma"))
    }
    assert len(salts) == 5


def test_targets_and_tenant_are_carried_along(tmp_path: Path) -> None:
    request = pb.GenerateRequest(
        text="hi", ttft_target_ms=250.0, tpot_target_ms=20.0, priority=-3, tenant="acme", request_id="id"
    )
    (sample,) = samples_of(request, load(tmp_path))
    assert (sample.ttft_target_s, sample.tpot_target_s) == (0.25, 0.02)
    assert (sample.priority, sample.tenant, sample.id) == (-3, "acme", "id")
    assert (sample.arrival, sample.arrived, sample.deadline) == (1.0, 2.0, 3.0)


def test_the_model_may_be_left_out_only_when_there_is_one(tmp_path: Path) -> None:
    model = load(tmp_path)
    assert validation.find_model("", {"m": model}) is model
    assert validation.find_model("", {"m": model, "alias": model}) is model
    other = replace(model, served=replace(model.served, name="other"))
    with pytest.raises(ModelNotFound):
        validation.find_model("", {"m": model, "other": other})


def test_a_conversation_can_be_left_open_or_closed(tmp_path: Path) -> None:
    model = load(tmp_path)
    turn = pb.ChatMessage(role="user", content="hi")
    open_, closed = (
        validation.tokenise(
            pb.GenerateRequest(chat=pb.Chat(messages=[turn], add_generation_prompt=opened)), model
        )
        for opened in (True, False)
    )
    assert bytes(open_) == b"[user]hi[assistant]"
    assert bytes(closed) == b"[user]hi"


def test_a_context_longer_than_the_checkpoints_is_refused(tmp_path: Path) -> None:
    make_scripted_model(tmp_path)
    assert ServedModel.from_dir(tmp_path, max_model_len=100).max_model_len == 100
    with pytest.raises(ConfigError, match="got 1000, the checkpoint's limit is 512"):
        ServedModel.from_dir(tmp_path, max_model_len=1000)


def test_a_directory_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ServedModel.from_dir(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 3}')
    with pytest.raises(CheckpointError, match="max_position_embeddings"):
        ServedModel.from_dir(tmp_path)


def test_a_field_is_judged_before_the_prompt_is_tokenised(tmp_path: Path) -> None:
    request = pb.GenerateRequest(text="x" * 10_000, sampling=pb.Sampling(temperature=-1))
    with pytest.raises(InvalidRequest, match="temperature"):
        validation.check(request, {"m": load(tmp_path)}, limits=SamplingLimits(), default_max_tokens=1)
