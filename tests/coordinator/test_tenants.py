"""A tenant's limits: what is too much, when to come back, and that nothing is remembered for nothing."""

from __future__ import annotations

import pytest

from coordinator.tenants import Tenants
from pdserve.core.errors import Overloaded
from pdserve.core.sla_settings import TenantSettings


def refusal(tenants: Tenants, tenant: str = "a", **asked: float) -> Overloaded | None:
    values = {"count": 1, "tokens": 1.0, "queued": 0, "now": 0.0, **asked}
    return tenants.refusal(tenant, **values)  # type: ignore[arg-type]  # as annotated


def take(tenants: Tenants, tenant: str = "a", *, tokens: float = 1.0, now: float = 0.0) -> bool:
    if refusal(tenants, tenant, tokens=tokens, now=now) is not None:
        return False
    tenants.admitted(tenant, tokens=tokens, now=now)
    return True


def test_requests_beyond_the_rate_are_refused_until_there_is_one_again() -> None:
    tenants = Tenants({"a": TenantSettings(max_requests_per_s=2, burst_s=2)})
    assert [take(tenants) for _ in range(6)] == [True] * 4 + [False] * 2
    refused = refusal(tenants)
    assert refused is not None
    assert refused.retry_after_s == pytest.approx(0.5)
    assert "tenant 'a': more than 2 requests per second" in str(refused)
    assert take(tenants, now=0.51)
    assert not take(tenants, now=0.52)


def test_tokens_are_charged_as_expected_and_settled_as_used() -> None:
    tenants = Tenants({"a": TenantSettings(max_tokens_per_s=100, burst_s=1)})
    assert take(tenants, tokens=100)
    assert refusal(tenants, tokens=50) is not None
    tenants.ended("a", charged=100, used=40, now=0.0)
    assert refusal(tenants, tokens=50) is None
    assert refusal(tenants, tokens=70) is not None


def test_a_request_larger_than_the_burst_passes_once_and_leaves_a_debt() -> None:
    tenants = Tenants({"a": TenantSettings(max_tokens_per_s=100, burst_s=1)})
    assert take(tenants, tokens=1000)
    refused = refusal(tenants, tokens=1)
    assert refused is not None
    assert refused.retry_after_s == pytest.approx(9.01)


def test_those_running_and_those_waiting_have_limits_of_their_own() -> None:
    tenants = Tenants({"a": TenantSettings(max_concurrent=2, max_queued=3)})
    assert take(tenants)
    assert refusal(tenants, count=2) is not None
    assert refusal(tenants, queued=3) is not None
    assert take(tenants)
    assert not take(tenants)
    tenants.ended("a", charged=1, used=1, now=0.0)
    assert take(tenants)


def test_the_star_gives_limits_to_each_of_the_others_and_nobody_else_has_any() -> None:
    tenants = Tenants({"a": TenantSettings(weight=5), "*": TenantSettings(max_concurrent=1)})
    assert [take(tenants, "a") for _ in range(9)] == [True] * 9
    assert [take(tenants, "b"), take(tenants, "b"), take(tenants, "c")] == [True, False, True]
    assert (tenants.weight("a"), tenants.weight("b")) == (5, 1)
    assert [take(Tenants({}), "x") for _ in range(9)] == [True] * 9


def test_tenants_that_rest_are_forgotten_and_those_in_debt_are_not() -> None:
    tenants = Tenants({"*": TenantSettings(max_tokens_per_s=1, burst_s=1)})
    take(tenants, "debtor", tokens=1e6)
    for index in range(10_000):
        take(tenants, f"t{index}", tokens=1, now=float(index))
        tenants.ended(f"t{index}", charged=1, used=1, now=float(index))
    assert len(tenants) < 5000
    assert not take(tenants, "debtor", now=10_000.0)
