"""Next tokens from logits on the device: adjust, filter and draw without a sort and without the host.

Filters keep every token at least as likely as the last one they must keep, so ties stay together. That token
is found by bisecting the ordered bit patterns of float32, eight pivots a pass, so about ten passes over the
row replace a sort. The draw is the inverse of the cumulative distribution in token order, at one number of
Philox4x32-10 (Salmon et al. 2011) keyed by (seed, position): a row's result does not depend on its batch.

Shape legend: N rows, V vocabulary, X entries of the flat list of adjustments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from pdkernels._triton import jit, jit_for_any, tl
from pdkernels.validate import ceil_div, next_power_of_2, require, require_int32, require_rows, require_shape

BLOCK_V: Final = 4096
BLOCK_X: Final = 256


@jit_for_any("num_entries")
def adjust_logits_kernel(
    logits: tl.tensor,
    rows: tl.tensor,
    tokens: tl.tensor,
    bias: tl.tensor,
    repetition: tl.tensor,
    subtract: tl.tensor,
    num_entries: tl.tensor,
    stride: tl.tensor,
    BLOCK_X: tl.constexpr,
) -> None:
    # grid (ceil(X / BLOCK_X),).
    x_X = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)
    live_X = x_X < num_entries
    row_X = tl.load(rows + x_X, mask=live_X, other=0).to(tl.int64)
    at_X = logits + row_X * stride + tl.load(tokens + x_X, mask=live_X, other=0)
    value_X = tl.load(at_X, mask=live_X, other=0.0) + tl.load(bias + x_X, mask=live_X, other=0.0)
    factor_X = tl.load(repetition + x_X, mask=live_X, other=1.0)
    value_X = tl.where(value_X > 0.0, value_X / factor_X, value_X * factor_X)
    tl.store(at_X, value_X - tl.load(subtract + x_X, mask=live_X, other=0.0), mask=live_X)


@jit
def _ordered(x: tl.tensor) -> tl.tensor:
    """int32 with the order of float32 (both zeros differ, which no filter can tell)."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def _uniform(seed: tl.tensor, position: tl.tensor) -> tl.tensor:
    """float64 in [0, 1) with 53 random bits."""
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = low & 0
    a, b, _, _ = tl.philox(seed, low, high, zero, zero)
    return ((a.to(tl.uint64) << 21) | (b.to(tl.uint64) >> 11)).to(tl.float64) * 1.1102230246251565e-16


@jit
def _bisect(
    row: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    wanted: tl.tensor,
    V: tl.tensor,
    best: tl.tensor,
    temperature: tl.tensor,
    min_p: tl.tensor,
    floor: tl.tensor,
    BY_MASS: tl.constexpr,
    BLOCK_V: tl.constexpr,
) -> tl.tensor:
    """The greatest key in [low, high) such that the tokens at or above it number (or weigh) `wanted`.

    low satisfies that, high does not. int64, so that differences do not overflow.
    """
    part_P = tl.arange(0, 8).to(tl.int64) + 1
    while high - low > 1:
        pivot_P = low + (high - low) * part_P // 9
        pivot_P = tl.minimum(tl.maximum(pivot_P, low + 1), high - 1)
        key_P = pivot_P.to(tl.int32)
        reached_P = tl.zeros([8], tl.float64)
        for v in range(0, V, BLOCK_V):
            v_V = v + tl.arange(0, BLOCK_V)
            x_V = tl.load(row + v_V, mask=v_V < V, other=float("-inf"))
            above_PV = (_ordered(x_V)[None, :] >= key_P[:, None]) & (v_V < V)[None, :]
            if BY_MASS:
                w_V = tl.exp((x_V - best) / temperature)
                w_V = tl.where((w_V >= min_p) & (_ordered(x_V) >= floor), w_V, 0.0)
                part = tl.sum(tl.where(above_PV, w_V[None, :], 0.0), axis=1)
            else:
                part = tl.sum(above_PV.to(tl.int32), axis=1)
            reached_P += part.to(tl.float64)
        enough_P = reached_P >= wanted
        # Both from the old bounds, which the loop condition has made apart.
        new_low = tl.maximum(low, tl.max(tl.where(enough_P, pivot_P, low), axis=0))
        high = tl.minimum(high, tl.min(tl.where(enough_P, high, pivot_P), axis=0))
        low = new_low
    return low


@jit
def _total(
    row: tl.tensor,
    V: tl.tensor,
    best: tl.tensor,
    temperature: tl.tensor,
    min_p: tl.tensor,
    floor: tl.tensor,
    BLOCK_V: tl.constexpr,
) -> tl.tensor:
    """Weight of the tokens that are kept, float64."""
    total = tl.zeros([], tl.float64)
    for v in range(0, V, BLOCK_V):
        v_V = v + tl.arange(0, BLOCK_V)
        x_V = tl.load(row + v_V, mask=v_V < V, other=float("-inf"))
        w_V = tl.exp((x_V - best) / temperature)
        kept_V = (v_V < V) & (w_V >= min_p) & (_ordered(x_V) >= floor)
        total += tl.sum(tl.where(kept_V, w_V, 0.0).to(tl.float64), axis=0)
    return total


@jit
def sample_kernel(
    logits: tl.tensor,
    tokens: tl.tensor,
    valid: tl.tensor,
    temperatures: tl.tensor,
    top_ks: tl.tensor,
    top_ps: tl.tensor,
    min_ps: tl.tensor,
    seeds: tl.tensor,
    positions: tl.tensor,
    V: tl.tensor,
    stride: tl.tensor,
    BLOCK_V: tl.constexpr,
) -> None:
    # grid (N,): one row each.
    n = tl.program_id(0)
    row = logits + n.to(tl.int64) * stride
    best = float("-inf")
    winner = 0
    bad = 0
    for v in range(0, V, BLOCK_V):
        v_V = v + tl.arange(0, BLOCK_V)
        x_V = tl.load(row + v_V, mask=v_V < V, other=float("-inf"))
        bad += tl.sum((x_V != x_V).to(tl.int32), axis=0)
        top = tl.max(x_V, axis=0)
        at = tl.argmax(x_V, axis=0)
        winner = tl.where(top > best, v + at, winner)
        best = tl.maximum(best, top)
    sound = (bad == 0) & (best > float("-inf")) & (best < float("inf"))
    tl.store(valid + n, tl.where(sound, 1, 0))
    temperature = tl.load(temperatures + n)
    if (temperature == 0.0) | (not sound):
        tl.store(tokens + n, winner)
        return
    min_p = tl.load(min_ps + n)
    top_k = tl.load(top_ks + n)
    top_p = tl.load(top_ps + n)
    high = _ordered(best).to(tl.int64) + 1
    floor = tl.full([], -(2**31), tl.int32)
    if (top_k > 0) & (top_k < V):
        wanted = top_k.to(tl.float64)
        key = _bisect(
            row, floor.to(tl.int64), high, wanted, V, best, temperature, min_p, floor, False, BLOCK_V
        )
        floor = key.to(tl.int32)
    total = _total(row, V, best, temperature, min_p, floor, BLOCK_V)
    if top_p < 1.0:
        wanted = total * top_p
        key = _bisect(
            row, floor.to(tl.int64), high, wanted, V, best, temperature, min_p, floor, True, BLOCK_V
        )
        floor = key.to(tl.int32)
        total = _total(row, V, best, temperature, min_p, floor, BLOCK_V)
    target = _uniform(tl.load(seeds + n), tl.load(positions + n)) * total
    # The token is the number of tokens whose cumulative weight has not passed the target.
    before = tl.zeros([], tl.float64)
    passed = 0
    last = 0
    for v in range(0, V, BLOCK_V):
        v_V = v + tl.arange(0, BLOCK_V)
        x_V = tl.load(row + v_V, mask=v_V < V, other=float("-inf"))
        w_V = tl.exp((x_V - best) / temperature)
        kept_V = (v_V < V) & (w_V >= min_p) & (_ordered(x_V) >= floor) & (w_V > 0.0)
        w_V = tl.where(kept_V, w_V, 0.0).to(tl.float64)
        reached_V = before + tl.cumsum(w_V, axis=0)
        passed += tl.sum(((reached_V <= target) & (v_V < V)).to(tl.int32), axis=0)
        last = tl.maximum(last, tl.max(tl.where(kept_V, v_V, 0), axis=0))
        before += tl.sum(w_V, axis=0)
    # Rounding of the last sums may leave the target behind all of them.
    tl.store(tokens + n, tl.minimum(passed, last).to(tl.int64))


@dataclass(frozen=True, slots=True, kw_only=True)
class Adjustments:
    """Changes to single logits, each (row, token) at most once: + bias, the repetition penalty (Keskar et al.
    2019), - subtract. A bias of -inf forbids a token. rows and tokens are int32, the rest fp32."""

    rows_X: Tensor
    tokens_X: Tensor
    bias_X: Tensor
    repetition_X: Tensor
    subtract_X: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawParams:
    """One entry per row, contiguous."""

    temperature_N: Tensor
    """fp32; 0 takes the best token."""
    top_k_N: Tensor
    """int32; 0 keeps all."""
    top_p_N: Tensor
    min_p_N: Tensor
    seed_N: Tensor
    """int64."""
    position_N: Tensor
    """int64; of the token that is drawn."""


def _require_logits(op: str, logits_NV: Tensor) -> None:
    require_shape(op, "logits", logits_NV, (None, None))
    require(logits_NV.dtype == torch.float32, op, "logits", wanted="float32", found=logits_NV.dtype)
    require_rows(op, "logits", logits_NV)


def adjust_logits(logits_NV: Tensor, entries: Adjustments) -> None:
    """Apply `entries` in place. logits_NV: fp32, dense rows. Raises `KernelInputError`."""
    op = "adjust_logits"
    _require_logits(op, logits_NV)
    x = entries.rows_X.shape[0]
    for name in ("rows_X", "tokens_X"):
        require_int32(op, name, getattr(entries, name), (x,))
    for name in ("bias_X", "repetition_X", "subtract_X"):
        _require_vector(op, name, getattr(entries, name), x, torch.float32)
    if x == 0:
        return
    adjust_logits_kernel[(ceil_div(x, BLOCK_X),)](
        logits_NV,
        entries.rows_X,
        entries.tokens_X,
        entries.bias_X,
        entries.repetition_X,
        entries.subtract_X,
        x,
        logits_NV.stride(0),
        BLOCK_X=BLOCK_X,
        num_warps=4,
    )


def sample(logits_NV: Tensor, params: DrawParams) -> tuple[Tensor, Tensor]:
    """One token per row: temperature, min_p, top_k, top_p, draw, in this order.

    logits_NV: fp32, dense rows, V >= 1; not changed. Returns tokens int64 [N] and valid int32 [N]: 0 where a
    row holds NaN or +inf, or no finite logit, and its token means nothing. One launch, no synchronisation.
    Raises `KernelInputError`.
    """
    op = "sample"
    _require_logits(op, logits_NV)
    n, v = logits_NV.shape
    require(v >= 1, op, "logits", wanted="of at least one token", found=v)
    for name in ("temperature_N", "top_p_N", "min_p_N"):
        _require_vector(op, name, getattr(params, name), n, torch.float32)
    _require_vector(op, "top_k_N", params.top_k_N, n, torch.int32)
    for name in ("seed_N", "position_N"):
        _require_vector(op, name, getattr(params, name), n, torch.int64)
    tokens_N = torch.empty(n, dtype=torch.int64, device=logits_NV.device)
    valid_N = torch.empty(n, dtype=torch.int32, device=logits_NV.device)
    if n > 0:
        sample_kernel[(n,)](
            logits_NV,
            tokens_N,
            valid_N,
            params.temperature_N,
            params.top_k_N,
            params.top_p_N,
            params.min_p_N,
            params.seed_N,
            params.position_N,
            v,
            logits_NV.stride(0),
            BLOCK_V=min(BLOCK_V, max(16, next_power_of_2(v))),
            num_warps=16,
        )
    return tokens_N, valid_N


def _require_vector(op: str, name: str, vector: Tensor, size: int, dtype: torch.dtype) -> None:
    require_shape(op, name, vector, (size,))
    require(vector.dtype == dtype, op, name, wanted=str(dtype), found=vector.dtype)
    require(vector.is_contiguous(), op, name, wanted="contiguous", found=vector.stride())
