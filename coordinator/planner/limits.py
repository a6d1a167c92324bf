"""How many workers of each role a model may have."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.planner.proposal import Split


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    min_prefill: int = 1
    min_decode: int = 1
    max_prefill: int | None = None
    max_decode: int | None = None
    budget_workers: int | None = None
    budget_devices: float | None = None
    """What this model's workers may take: the budget of all models less what the others take."""
    prefill_devices: float = 1.0
    """What one worker takes."""
    decode_devices: float = 1.0

    @property
    def bounded(self) -> bool:
        """Something says where growth ends."""
        budgets = self.budget_workers is not None or self.budget_devices is not None
        return budgets or self.max_prefill is not None or self.max_decode is not None

    def may_grow(self, now: Split) -> Split:
        """The most of each role, were there no more of the other than its minimum; of a role that nothing
        limits, as many as there are."""
        prefill, decode = [], []
        if self.budget_workers is not None:
            prefill.append(self.budget_workers - self.min_decode)
            decode.append(self.budget_workers - self.min_prefill)
        if self.budget_devices is not None:
            for mine, other, least, found in (
                (self.prefill_devices, self.decode_devices, self.min_decode, prefill),
                (self.decode_devices, self.prefill_devices, self.min_prefill, decode),
            ):
                found.append(int((self.budget_devices - other * least) / mine + 1e-9))
        if self.max_prefill is not None:
            prefill.append(self.max_prefill)
        if self.max_decode is not None:
            decode.append(self.max_decode)
        return Split(min(prefill, default=now.prefill), min(decode, default=now.decode))

    def refusal(self, split: Split, now: Split | None = None) -> str | None:
        """Which limit a split breaks, in words; None: none. now: a fleet that is above the limits may shrink
        step by step."""
        shrinks = now is not None and split.prefill <= now.prefill and split.decode <= now.decode
        for role, wanted, least, most in (
            ("prefill", split.prefill, self.min_prefill, self.max_prefill),
            ("decode", split.decode, self.min_decode, self.max_decode),
        ):
            if wanted < least:
                return f"planner.min_{role} is {least}"
            if most is not None and wanted > most and not shrinks:
                return f"planner.max_{role} is {most}"
        if shrinks:
            return None
        if self.budget_workers is not None and split.total > self.budget_workers:
            return f"planner.budget_workers is {self.budget_workers}"
        taken = split.prefill * self.prefill_devices + split.decode * self.decode_devices
        if self.budget_devices is not None and taken > self.budget_devices + 1e-9:
            return f"{taken:g} devices, and planner.budget_devices leaves {self.budget_devices:g}"
        return None
