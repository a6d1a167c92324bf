"""Workers of several ranks as Ray actors: the tokens of one rank, and no rank outlives another."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest
from transformers import PreTrainedModel

from pdserve.core.errors import ConfigError
from tests.e2e.conftest import config_of
from tests.e2e.test_disaggregated import prompt_of
from tests.e2e.test_faults import Streaming
from tests.support.whole_cluster import RunningDeployment, greedy

pytestmark = [pytest.mark.ray, pytest.mark.slow]

Oracle = tuple[Path, PreTrainedModel]


def deployment(folder: Path, prefill: int, decode: int) -> RunningDeployment:
    return RunningDeployment(
        config_of(
            folder,
            prefill={"tensor_parallel_size": prefill, "max_num_batched_tokens": 64},
            decode={"tensor_parallel_size": decode},
            coordinator={"local_prefill": "never"},
        )
    )


def follower_pids() -> list[int]:
    """Processes of this test's Ray that are ranks other than the first."""
    children = psutil.Process().children(recursive=True)
    return [child.pid for child in children if "ray::RankActor" in " ".join(child.cmdline())]


@pytest.mark.parametrize(("prefill", "decode"), [(1, 2), (4, 2)])
def test_greedy_tokens_equal_transformers(prefill: int, decode: int, tiny_oracle: Oracle) -> None:
    with deployment(tiny_oracle[0], prefill, decode) as running:
        assert len(follower_pids()) == prefill + decode - 2
        with running.client() as client:
            for length in (1, 16, 200):
                prompt = prompt_of(length)
                completion = client.generate(prompt_token_ids=prompt, max_tokens=16, temperature=0.0)
                assert list(completion.token_ids) == greedy(tiny_oracle[1], prompt, 16)
                assert completion.timings.prefill_worker == "prefill-0"
                assert completion.timings.bytes_moved > 0
        running.wait_until("every block back", running.idle)


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_whose_rank_dies_or_stops_is_replaced_and_the_stream_goes_on(
    sign: signal.Signals, tiny_oracle: Oracle
) -> None:
    with deployment(tiny_oracle[0], 1, 2) as running:
        (follower,) = follower_pids()
        prompt = prompt_of(40)
        stream = Streaming(running, prompt, 80)
        stream.wait_for_tokens(5)
        psutil.Process(follower).send_signal(sign)
        stream.end()
        assert stream.error is None
        assert stream.tokens == greedy(tiny_oracle[1], prompt, 80, ignore_eos=True)
        assert stream.attempts > 1
        assert not psutil.pid_exists(follower)
        (successor,) = follower_pids()
        assert successor != follower
        running.wait_until("every block back", running.idle)


def test_a_number_of_ranks_that_does_not_divide_the_model_is_refused(tiny_oracle: Oracle) -> None:
    wanted = r"tensor_parallel_size 3: .*8 attention heads.*: 1, 2"
    with pytest.raises(ConfigError, match=wanted), deployment(tiny_oracle[0], 1, 3):
        pass
