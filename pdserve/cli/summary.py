"""The one line under an answer: how long it took and where its KV cache went."""

from __future__ import annotations

from pdserve.client import Timings, Usage

_KILO = 1000.0


def summary_line(usage: Usage, timings: Timings, finish: str) -> str:
    """TTFT, TPOT, tokens, KV bytes moved, their path and speed, and who did the work."""
    parts = [f"TTFT {milliseconds(timings.ttft_s)}"]
    if timings.tpot_s > 0:
        parts.append(f"TPOT {milliseconds(timings.tpot_s)} ({1 / timings.tpot_s:.1f} tokens/s)")
    parts.append(f"{usage.prompt_tokens} tokens in, {usage.completion_tokens} out ({finish})")
    parts.append(_moved(timings))
    if timings.attempts > 1:
        parts.append(f"{timings.attempts} attempts")
    if timings.preemptions:
        parts.append(f"interrupted {timings.preemptions} times by more urgent requests")
    parts += promises(timings)
    return " | ".join(parts)


def promises(timings: Timings) -> list[str]:
    """For each target: met or missed, by how much, and what took the time."""
    named = f" ({timings.sla_class})" if timings.sla_class else ""
    return [
        f"{what} target {milliseconds(target)}{named} {_verdict(late, blamed)}"
        for what, target, late, blamed in (
            ("TTFT", timings.ttft_target_s, timings.ttft_late_s, timings.ttft_missed_in),
            ("TPOT", timings.tpot_target_s, timings.tpot_late_s, timings.tpot_missed_in),
        )
        if target is not None
    ]


def _verdict(late_s: float | None, blamed: str) -> str:
    if late_s is None:
        return "met"  # fewer than two tokens have no time between them
    if late_s <= 0:
        return f"met with {milliseconds(-late_s)} to spare"
    return f"missed by {milliseconds(late_s)}, most of it in {blamed.replace('_', ' ')}"


def milliseconds(seconds: float) -> str:
    """A duration with three digits: 8.21 ms, 83.4 ms, 1.27 s."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * _KILO:.3g} ms"


def size(num_bytes: int) -> str:
    """Decimal units, as transfer speeds use them."""
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < _KILO:
            return f"{value:.3g} {unit}"
        value /= _KILO
    return f"{value:.3g} TB"


def _moved(timings: Timings) -> str:
    if not timings.prefill_worker:
        return f"no KV moved: {timings.decode_worker} read the prompt itself"
    return (
        f"KV {size(timings.bytes_moved)} {timings.prefill_worker} -> {timings.decode_worker} "
        f"over {timings.transfer_path} at {timings.transfer_gb_per_s:.2f} GB/s"
    )
