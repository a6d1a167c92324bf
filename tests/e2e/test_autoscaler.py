"""Nodes come for workers that are added and go with them: Ray's own autoscaler, its nodes processes here."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import psutil
import pytest
import ray
from transformers import PreTrainedModel

from pdserve.client.admin import scale
from tests.e2e.conftest import config_of
from tests.e2e.test_disaggregated import prompt_of
from tests.e2e.test_faults import Streaming
from tests.e2e.test_restart import free_port
from tests.support.whole_cluster import RunningDeployment, greedy

pytestmark = [pytest.mark.ray, pytest.mark.slow]

Oracle = tuple[Path, PreTrainedModel]
_HEAD: Final = "ray.head.default"  # the one name that the provider knows


def autoscaling_config(address: str) -> dict[str, object]:
    """A head with two cores, and machines with one, started when they are asked for."""
    commands = [
        f"{kind}_commands"
        for kind in (
            "initialization",
            "setup",
            "head_setup",
            "worker_setup",
            "head_start_ray",
            "worker_start_ray",
        )
    ]
    return {
        "cluster_name": "autoscaled",
        "max_workers": 2,
        "provider": {
            "type": "fake_multinode",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "gcs_address": address,
        },
        "available_node_types": {
            _HEAD: {"resources": {"CPU": 2}, "node_config": {}, "max_workers": 0},
            "small": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
        },
        "head_node_type": _HEAD,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 0.1,
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        **{key: [] for key in commands},
    }


@pytest.fixture
def autoscaled() -> Iterator[str]:
    """The address of a Ray cluster that brings nodes by itself."""
    address = f"{socket.gethostbyname(socket.gethostname())}:{free_port()}"
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        config = Path(folder, "autoscaler.yaml")
        config.write_text(json.dumps(autoscaling_config(address)))
        ours = {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1", "RAY_AUTH_MODE": "disabled"}
        host, port = address.split(":")
        subprocess.run(
            [
                str(Path(sys.executable).with_name("ray")),
                "start",
                "--head",
                f"--node-ip-address={host}",
                f"--port={port}",
                "--num-cpus=2",
                "--include-dashboard=false",
                "--disable-usage-stats",
                f"--object-store-memory={100 << 20}",
                f"--temp-dir={folder}/ray",
                f"--autoscaling-config={config}",
            ],
            env=os.environ | ours,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            yield address
        finally:
            end_processes_of(folder, address)


def end_processes_of(folder: str, address: str) -> None:
    ours = []
    for process in psutil.process_iter(["cmdline"]):
        words = " ".join(process.info["cmdline"] or ())
        if folder in words or address in words:
            ours.append(process)
    for process in ours:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(ours, timeout=10)


def num_nodes() -> int:
    return sum(node["Alive"] for node in ray.nodes())  # type: ignore[no-untyped-call]  # Ray's own gap


def test_a_node_comes_for_a_worker_that_is_added_and_goes_when_it_is_retired(
    autoscaled: str, tiny_oracle: Oracle
) -> None:
    config = config_of(
        tiny_oracle[0],
        coordinator={"local_prefill": "never", "policy": "round_robin"},
        cluster={"address": autoscaled, "cpus_per_worker": 1},
        planner={"mode": "off", "place_timeout_s": 60.0},
    )
    with RunningDeployment(config) as running:
        assert num_nodes() == 1
        told = list(scale(running.deployment.grpc, decode=2))
        assert (told[-1].prefill, told[-1].decode) == (1, 2), told[-1]
        assert num_nodes() == 2
        prompts = [prompt_of(60 + seed, seed=seed) for seed in range(3)]
        streams = [Streaming(running, prompt, 200) for prompt in prompts]
        for stream in streams:
            stream.wait_for_tokens(5)
        told = list(scale(running.deployment.grpc, decode=1))
        assert (told[-1].prefill, told[-1].decode) == (1, 1)
        for stream, prompt in zip(streams, prompts, strict=True):
            stream.end()
            assert stream.tokens == greedy(tiny_oracle[1], prompt, 200, ignore_eos=True)
            assert stream.attempts == 1
        running.wait_until("every block back", running.idle)
        running.wait_until("the node has gone", lambda: num_nodes() == 1, 90)
