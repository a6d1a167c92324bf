"""What requests cost: device time and KV held, times the prices of the configuration.

Wasted is what gave nobody an answer: all of a sample that failed or was cancelled, and reading a prompt again
in a later attempt.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from coordinator.account import Leg
from coordinator.report import Report
from pdserve.core.errors import PdServeError
from pdserve.core.messages import FinishReason, Role
from pdserve.core.operation_settings import CostSettings

_HOUR_S: Final = 3600.0
_GIB: Final = 2.0**30
ANSWER: Final = "answer"
WASTED: Final = "wasted"


@dataclass(frozen=True, slots=True)
class Item:
    activity: str
    """prefill, decode or kv."""
    use: str
    """answer or wasted."""
    amount: float
    """Device-seconds, or byte-seconds of KV."""
    money: float


@dataclass(frozen=True, slots=True)
class Bill:
    items: tuple[Item, ...]

    @property
    def device_s(self) -> float:
        return sum(item.amount for item in self.items if item.activity != "kv")

    @property
    def wasted_device_s(self) -> float:
        return sum(i.amount for i in self.items if i.activity != "kv" and i.use == WASTED)

    @property
    def kv_byte_s(self) -> float:
        return sum(item.amount for item in self.items if item.activity == "kv")

    @property
    def money(self) -> float:
        return sum(item.money for item in self.items)


def bill(report: Report, outcome: FinishReason | PdServeError, prices: CostSettings) -> Bill:
    """Of one ended sample."""
    lost = isinstance(outcome, PdServeError)
    return Bill(tuple(item for leg in report.legs for item in _items(leg, lost, prices)))


def _items(leg: Leg, lost: bool, prices: CostSettings) -> Iterator[Item]:
    use = WASTED if lost else ANSWER
    for activity, seconds, role, wasted in (
        ("prefill", leg.prefill_device_s, leg.prefill_on, lost or leg.repeated),
        ("decode", leg.decode_device_s, leg.decode_on, lost),
    ):
        if seconds:
            hour = prices.prefill_hour if role is Role.PREFILL else prices.device_hour
            money = seconds * hour / _HOUR_S
            yield Item(activity, WASTED if wasted else ANSWER, seconds, money)
    if leg.kv_byte_s:
        yield Item("kv", use, leg.kv_byte_s, leg.kv_byte_s * prices.kv_gib_hour / _GIB / _HOUR_S)
