"""Generated pages are what is committed, and no knob appears by accident."""

from __future__ import annotations

import pytest

from pdserve.cli.reference import PAGES, knobs
from pdserve.core.config import ServeConfig
from pdserve.core.lifecycle import NEXT, Phase
from tests.support.paths import REPO

KNOBS = """
model.model                      text                = `SmolLM2-135M-Instruct`
model.served_model_name          text or list or nothing = nothing
model.dtype                      `auto`, `bfloat16`, `float16`, `float32` = `auto`
model.max_model_len              integer or nothing  = nothing
model.load_format                `auto`, `dummy`     = `auto`
model.local_dir                  text or nothing     = nothing
model.cuda_graph_sizes           list                = `(1, 2, 4, 8, 16, 24, 32, 48, 64)`
cache.block_size                 integer             = `64`
cache.kv_cache_dtype             `auto`, `fp8_e4m3`  = `auto`
cache.num_blocks                 integer or nothing  = nothing
cache.memory_gib                 number or nothing   = nothing
cache.gpu_memory_utilization     number              = `0.9`
cache.enable_prefix_caching      true or false       = `true`
cache.host_tier_gib              number              = `0.0`
cache.disk_tier_gib              number              = `0.0`
cache.disk_tier_path             text or nothing     = nothing
prefill.workers                  integer             = `1`
prefill.max_num_batched_tokens   integer             = `512`
prefill.max_num_seqs             integer             = `32`
prefill.tensor_parallel_size     integer             = `1`
decode.workers                   integer             = `1`
decode.standby                   integer             = `0`
decode.max_num_seqs              integer             = `64`
decode.max_num_batched_tokens    integer             = `512`
decode.tensor_parallel_size      integer             = `1`
speculative.method               `off`, `ngram`, `draft_model` = `off`
speculative.num_speculative_tokens integer           = `5`
speculative.prompt_lookup_min    integer             = `2`
speculative.prompt_lookup_max    integer             = `5`
speculative.model                text or nothing     = nothing
speculative.memory_gib           number              = `0.5`
speculative.adaptive             true or false       = `true`
transfer.backend                 `nixl`, `local`, `fake` = `nixl`
transfer.layer_groups            integer             = `4`
transfer.deadline_s              number              = `30.0`
transfer.lease_s                 number              = `30.0`
transfer.verify                  `on`, `off`, `auto` = `auto`
transfer.max_inflight_mib        integer             = `32`
transfer.tcp_fallback            `allow`, `warn`, `refuse` = `warn`
transfer.ucx                     mapping             = `{}`
coordinator.host                 text                = `127.0.0.1`
coordinator.port                 integer             = `50051`
coordinator.metrics_port         integer             = `0`
coordinator.console_host             text                = `127.0.0.1`
coordinator.console_port integer or nothing = `0`
coordinator.policy `power_of_two`, `least_loaded`, `round_robin`, `random`, `prefix_aware`, `sla` or text = `power_of_two`
coordinator.local_prefill        `auto`, `never`, `always` = `auto`
coordinator.whole_on_prefill     `auto`, `never`     = `auto`
coordinator.fetch_prefixes       true or false       = `true`
coordinator.admission            `off`, `deadline`, `ttft`, `targets` = `deadline`
coordinator.max_queued_requests  integer             = `1024`
coordinator.queue_ttl_s          number or nothing   = nothing
coordinator.preemption           true or false       = `true`
coordinator.max_preemptions      integer             = `3`
coordinator.classes              mapping             = `interactive`, `batch`
coordinator.classes.NAME.ttft_target_ms number or nothing = nothing
coordinator.classes.NAME.tpot_target_ms number or nothing = nothing
coordinator.classes.NAME.tokens_per_second number or nothing = nothing
coordinator.classes.NAME.deadline_s number or nothing = nothing
coordinator.classes.NAME.priority integer or nothing = nothing
coordinator.classes.NAME.preemptible true or false or nothing = nothing
coordinator.classes.NAME.queue_ttl_s number or nothing = nothing
coordinator.default_class        text or nothing     = nothing
coordinator.tenants              mapping             = `{}`
coordinator.tenants.NAME.weight  number              = `1.0`
coordinator.tenants.NAME.max_requests_per_s number or nothing = nothing
coordinator.tenants.NAME.max_tokens_per_s number or nothing = nothing
coordinator.tenants.NAME.burst_s number              = `10.0`
coordinator.tenants.NAME.max_concurrent integer or nothing = nothing
coordinator.tenants.NAME.max_queued integer or nothing = nothing
coordinator.record               text or nothing     = nothing
coordinator.max_message_mib      integer             = `16`
coordinator.max_attempts         integer             = `3`
coordinator.heartbeat_timeout_s  number              = `5.0`
coordinator.step_timeout_s  number              = `300.0`
coordinator.drain_timeout_s  number              = `120.0`
coordinator.grace_s              number              = `20.0`
coordinator.default_max_tokens   integer             = `256`
coordinator.default_timeout_s    number              = `600.0`
coordinator.explain_last         integer             = `512`
cluster.address                  text                = `local`
cluster.accelerator_type         text or nothing     = nothing
cluster.gpus_per_worker          number or nothing   = nothing
cluster.prefill_node_resource text or nothing = nothing
cluster.decode_node_resource text or nothing = nothing
cluster.cpus_per_worker          integer or nothing  = nothing
cluster.lend_cores               true or false       = `true`
cluster.dashboard                true or false       = `true`
cluster.dashboard_port           integer             = `8265`
cluster.heartbeat_s              number              = `0.5`
cluster.profile_s                number              = `0.8`
cluster.start_timeout_s          number              = `300.0`
cluster.join_timeout_s number = `0.0`
cluster.linger_s                 number              = `60.0`
logging.format                   `human`, `json`     = `human`
logging.level                    `debug`, `info`, `warning`, `error` = `info`
logging.requests                 true or false       = `true`
tracing.exporter `none`, `console`, `file`, `otlp_grpc`, `otlp_http` = `none`
tracing.endpoint                 text or nothing     = nothing
tracing.file                     text or nothing     = nothing
tracing.sample_ratio             number              = `1.0`
cost.currency                    text                = `USD`
cost.device_hour                 number              = `0.0`
cost.prefill_device_hour         number or nothing   = nothing
cost.kv_gib_hour                 number              = `0.0`
planner.mode                     `off`, `advisory`, `active` = `advisory`
planner.budget_workers           integer or nothing  = nothing
planner.budget_devices           number or nothing   = nothing
planner.min_prefill              integer             = `1`
planner.max_prefill              integer or nothing  = nothing
planner.min_decode               integer             = `1`
planner.max_decode               integer or nothing  = nothing
planner.place_timeout_s          number              = `600.0`
planner.interval_s               number              = `10.0`
planner.dwell_s                  number              = `60.0`
planner.min_gain                 number              = `0.02`
planner.season_s                 number              = `0.0`
security.tls_cert_file           text or nothing     = nothing
security.tls_key_file            text or nothing     = nothing
security.tls_client_ca_file      text or nothing     = nothing
security.api_keys_file           text or nothing     = nothing
security.cluster_tls             mapping or nothing  = nothing
seed                             integer             = `0`
models                           list                = `()`
"""  # noqa: E501 - a knob is a line


def test_every_knob_is_known_with_its_type_and_default() -> None:
    found = [" ".join(f"{path} {kind} = {default}".split()) for path, kind, default in knobs()]
    assert found == [" ".join(line.split()) for line in KNOBS.strip().splitlines()]


def test_every_knob_has_words() -> None:
    for name, field in ServeConfig.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        for key, knob in (inner or {name: field}).items():
            assert knob.description, f"{name}.{key} needs a docstring in pdserve/core/config.py"


@pytest.mark.parametrize("name", sorted(PAGES))
def test_a_generated_page_is_the_committed_one(name: str) -> None:
    assert (REPO / "docs" / name).read_text() == PAGES[name](), "run `make docs`"


def test_the_lifecycle_page_draws_every_transition() -> None:
    page = PAGES["lifecycle.md"]()
    for phase in Phase:
        for after in NEXT[phase]:
            assert f"    {phase} --> {after}\n" in page
