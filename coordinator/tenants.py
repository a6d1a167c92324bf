"""What each tenant may use: requests and tokens per second, and how many at the same time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from pdserve.core.errors import Overload, Overloaded
from pdserve.core.sla_settings import TenantSettings

ANYONE: Final = "*"
"""Whose settings hold for each tenant that has none of its own."""
_REMEMBERED: Final = 4096
"""Tenants beyond this many are forgotten once they have nothing running and full buckets."""
_WAIT_FOR_ONE_S: Final = 1.0
_NO_LIMIT: Final = TenantSettings()


@dataclass(slots=True)
class Bucket:
    """`rate` units per second, of which `burst_s` seconds' worth may come at once. It may go into debt."""

    rate: float
    burst_s: float
    at: float
    """When it was filled last."""
    level: float = field(init=False)

    def __post_init__(self) -> None:
        self.level = self.capacity

    @property
    def capacity(self) -> float:
        return self.rate * self.burst_s

    def refill(self, now: float) -> None:
        self.level = min(self.capacity, self.level + (now - self.at) * self.rate)
        self.at = now

    def wait_s(self, amount: float, now: float) -> float:
        """Until `amount` may be taken; 0: now. More than the bucket holds may be taken when it is full."""
        self.refill(now)
        return max(min(amount, self.capacity) - self.level, 0.0) / self.rate

    def take(self, amount: float, now: float) -> None:
        """Below zero where that is more than there is; a negative amount is given back."""
        self.refill(now)
        self.level = min(self.level - amount, self.capacity)


@dataclass(slots=True)
class _Use:
    requests: Bucket | None
    tokens: Bucket | None
    active: int = 0

    def rested(self, now: float) -> bool:
        """Nothing would be lost by forgetting it."""
        return self.active == 0 and all(
            bucket is None or bucket.wait_s(bucket.capacity, now) == 0
            for bucket in (self.requests, self.tokens)
        )


class Tenants:
    """Times on the caller's clock, in seconds."""

    def __init__(self, settings: Mapping[str, TenantSettings]) -> None:
        self._settings = settings
        self._uses: dict[str, _Use] = {}

    def __len__(self) -> int:
        return len(self._uses)

    def settings_of(self, tenant: str) -> TenantSettings:
        return self._settings.get(tenant) or self._settings.get(ANYONE) or _NO_LIMIT

    def weight(self, tenant: str) -> float:
        return self.settings_of(tenant).weight

    def refusal(
        self, tenant: str, *, count: int, tokens: float, queued: int, now: float
    ) -> Overloaded | None:
        """Why `count` more requests of `tokens` in all are too many for this tenant; None: they are not.

        queued: how many of its requests wait.
        """
        limits, use = self.settings_of(tenant), self._use(tenant, now)
        who = f"tenant {tenant!r}" if tenant else "requests without a tenant"
        if limits.max_concurrent is not None and use.active + count > limits.max_concurrent:
            what = f"{who}: {use.active} at the same time, {limits.max_concurrent} allowed"
            return Overloaded(what, retry_after_s=_WAIT_FOR_ONE_S, why=Overload.TENANT_LIMIT)
        if limits.max_queued is not None and queued + count > limits.max_queued:
            what = f"{who}: {queued} waiting, {limits.max_queued} allowed"
            return Overloaded(what, retry_after_s=_WAIT_FOR_ONE_S, why=Overload.TENANT_LIMIT)
        for bucket, amount, unit in ((use.requests, count, "requests"), (use.tokens, tokens, "tokens")):
            wait_s = 0.0 if bucket is None else bucket.wait_s(amount, now)
            if bucket is not None and wait_s > 0:
                what = f"{who}: more than {bucket.rate:g} {unit} per second"
                return Overloaded(what, retry_after_s=wait_s, why=Overload.TENANT_LIMIT)
        return None

    def admitted(self, tenant: str, *, tokens: float, now: float) -> None:
        """One request begins to count, as so many tokens."""
        use = self._use(tenant, now)
        use.active += 1
        if use.requests is not None:
            use.requests.take(1, now)
        if use.tokens is not None:
            use.tokens.take(tokens, now)

    def ended(self, tenant: str, *, charged: float, used: float, now: float) -> None:
        """It has ended: what it used counts, instead of what it was charged."""
        use = self._use(tenant, now)
        use.active -= 1
        if use.tokens is not None:
            use.tokens.take(used - charged, now)
        if len(self._uses) > _REMEMBERED:
            self._uses = {name: use for name, use in self._uses.items() if not use.rested(now)}

    def _use(self, tenant: str, now: float) -> _Use:
        use = self._uses.get(tenant)
        if use is None:
            limits = self.settings_of(tenant)
            use = self._uses[tenant] = _Use(
                requests=_bucket(limits.max_requests_per_s, limits.burst_s, now),
                tokens=_bucket(limits.max_tokens_per_s, limits.burst_s, now),
            )
        return use


def _bucket(rate: float | None, burst_s: float, now: float) -> Bucket | None:
    return None if rate is None else Bucket(rate, burst_s, at=now)
