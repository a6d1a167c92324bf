"""Representative launches of every kernel, for the compile report.

A case calls the real wrapper on tensors without memory (torch's meta device); the launch it would make is
what is compiled. Shapes: Llama 3 8B (32/8 heads of 128), SmolLM2 135M (9/3 of 64), Qwen2.5 (28/4 of 128),
a Gemma-like 256-wide head with window and soft cap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor

from pdkernels.activation import silu_mul
from pdkernels.blocks import gather_blocks, scatter_blocks
from pdkernels.decode_attention import DecodeWork, decode_attention
from pdkernels.digest import digest_pieces
from pdkernels.fp8_matmul import Fp8Matrix, fp8_matmul
from pdkernels.grouped_matmul import ExpertTiles, grouped_matmul, launch_config
from pdkernels.norm import add_rms_norm, rms_norm
from pdkernels.prefill_attention import PrefillWork, prefill_attention
from pdkernels.rope import QKNorm, rope_and_write
from pdkernels.sampling import Adjustments, DrawParams, adjust_logits, sample
from pdkernels.w4a16 import W4Weight, w4_half, w4_matmul

BF16: Final = torch.bfloat16
FP16: Final = torch.float16
FP32: Final = torch.float32


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    call: Callable[[], object]
    quick: bool = True
    """In the short list: together, one of every kernel and of every attention configuration in common use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """An attention geometry."""

    q: int
    kv: int
    dim: int
    dtype: torch.dtype = BF16
    block_tokens: int = 64
    window: int | None = None
    soft_cap: float | None = None
    fp8: bool = False
    """The KV cache."""

    def __str__(self) -> str:
        extras = [f"B{self.block_tokens}"] if self.block_tokens != 64 else []
        extras += [f"window {self.window}"] if self.window else []
        extras += ["FP8 cache"] if self.fp8 else []
        extras += [f"cap {self.soft_cap:g}"] if self.soft_cap else []
        return ", ".join([f"{self.q}/{self.kv} heads of {self.dim}", _short(self.dtype), *extras])


GEOMETRIES: Final = (
    Heads(q=32, kv=8, dim=128),
    Heads(q=28, kv=4, dim=128, dtype=FP16),
    Heads(q=9, kv=3, dim=64),
    Heads(q=32, kv=8, dim=128, block_tokens=16, window=4096),
    Heads(q=16, kv=8, dim=256, window=4096, soft_cap=50.0),
    Heads(q=32, kv=32, dim=80),
    Heads(q=32, kv=8, dim=128, fp8=True),
    Heads(q=9, kv=3, dim=64, fp8=True),
    Heads(q=16, kv=8, dim=256, window=4096, fp8=True),
    Heads(q=9, kv=3, dim=64, dtype=FP32),
    Heads(q=32, kv=8, dim=128, dtype=FP32),
)


def cases() -> Iterator[Case]:
    yield from _elementwise()
    for dtype in (BF16, FP32):
        for tokens in (64, 256, 4096) if dtype is BF16 else (64,):
            name = f"8 experts of 14336x4096, {tokens} tokens, {_short(dtype)}"
            yield Case(name, partial(_experts, tokens, dtype), tokens == 64)
    yield from _quantised()
    for index, heads in enumerate(GEOMETRIES):
        quick = index in (0, 2, 6, 9)
        yield Case(f"decode, {heads}", partial(_decode, heads), quick)
        yield Case(f"prefill, {heads}", partial(_prefill, heads), quick)


def _elementwise() -> Iterator[Case]:
    for shape, name in (((33, 4096), "E 4096, bf16"), ((33, 8, 128), "heads of 128, bf16")):
        yield Case(name, partial(rms_norm, _meta(*shape), _meta(shape[-1]), 1e-5), shape[-1] == 4096)
    for width in (576, 4096, 16384):
        x = _meta(33, width)
        yield Case(f"E {width}, bf16", partial(add_rms_norm, x, x, _meta(width), 1e-5), width == 4096)
    yield Case("F 14336, bf16", lambda: silu_mul(_meta(33, 28672)))
    yield Case("32/8 heads of 128, bf16", lambda: _rope(GEOMETRIES[0], None))
    norm = QKNorm(_meta(128), _meta(128), 1e-6)
    yield Case("32/8 heads of 128, bf16, normed", lambda: _rope(GEOMETRIES[0], norm))
    yield Case("32/8 heads of 128, bf16, FP8 cache", lambda: _rope(GEOMETRIES[6], None), False)
    yield Case("9/3 heads of 64, fp32", lambda: _rope(GEOMETRIES[9], None))
    yield Case(
        "gather, 32 layers, 8 heads of 128, bf16", lambda: gather_blocks(_pool(GEOMETRIES[0]), _index(9))
    )
    yield Case("scatter, half of the heads", _scatter)
    pieces = _meta(3, 64, dtype=torch.int64)
    yield Case(
        "64 pieces of 2 MiB", partial(digest_pieces, _meta(1 << 24, dtype=torch.int32), pieces, 1 << 17)
    )
    yield Case("V 128256", partial(sample, _meta(33, 128256, dtype=FP32), _draw_params(33)))
    yield Case("V 128256", _adjust)


def _experts(tokens: int, dtype: torch.dtype) -> None:
    block_m = launch_config(2 * tokens, 8, dtype).block_m
    tiles = _index(2 * tokens // block_m + min(8, 2 * tokens))
    grouped_matmul(
        _meta(tokens, 4096, dtype=dtype),
        _meta(8, 28672, 4096, dtype=dtype),
        ExpertTiles(order_N=_index(2 * tokens), expert_L=tiles, first_L=tiles, end_L=tiles, block_m=block_m),
    )


def _quantised() -> Iterator[Case]:
    for tokens, outputs, dtype in ((1, 512, BF16), (16, 28672, BF16), (32, 28672, FP16), (512, 28672, BF16)):
        shape = f"{outputs}x4096, {tokens} tokens, {_short(dtype)}"
        for group, zeros in ((128, True), (128, False), (32, True)):
            name = f"{shape}, groups of {group}" + ("" if zeros else ", no zero points")
            quick = group == 128 and zeros and tokens in (1, 512)
            yield Case(name, partial(_w4, tokens, outputs, group, zeros, dtype), quick)
        for tall, wide in ((128, 128), (1, 4096)):
            name = f"{shape}, " + ("blocks of 128x128" if tall > 1 else "a scale per output")
            yield Case(
                name, partial(_fp8, tokens, outputs, tall, wide, dtype), tall > 1 and tokens in (1, 512)
            )
    yield Case("512x4096, 16 tokens, fp32, groups of 128", partial(_w4, 16, 512, 128, True, FP32), False)
    yield Case("512x4096, 16 tokens, fp32, blocks", partial(_fp8, 16, 512, 128, 128, FP32), False)


def _w4(tokens: int, outputs: int, group: int, zeros: bool, dtype: torch.dtype) -> None:
    groups, half = 4096 // group, w4_half(4096, 4096 // group) or 0
    weight = W4Weight(
        packed_JOH=_meta(4096 // (2 * half), outputs, half, dtype=torch.uint8),
        zeros_GO=_meta(groups, outputs, dtype=torch.uint8) if zeros else None,
        zero=8,
        scales_GO=_meta(groups, outputs, dtype=FP16),
        inputs=4096,
        group=group,
    )
    w4_matmul(_meta(tokens, 4096, dtype=dtype), weight)


def _fp8(tokens: int, outputs: int, tall: int, wide: int, dtype: torch.dtype) -> None:
    weight = Fp8Matrix(
        codes_OI=_meta(outputs, 4096, dtype=torch.float8_e4m3fn),
        scales_RK=_meta(outputs // tall, 4096 // wide, dtype=FP32),
        tall=tall,
        wide=wide,
    )
    fp8_matmul(_meta(tokens, 4096, dtype=dtype), weight)


def _draw_params(rows: int) -> DrawParams:
    fp32, int64 = _meta(rows, dtype=FP32), _meta(rows, dtype=torch.int64)
    return DrawParams(
        temperature_N=fp32, top_k_N=_index(rows), top_p_N=fp32, min_p_N=fp32, seed_N=int64, position_N=int64
    )


def _adjust() -> None:
    fp32 = _meta(99, dtype=FP32)
    entries = Adjustments(
        rows_X=_index(99), tokens_X=_index(99), bias_X=fp32, repetition_X=fp32, subtract_X=fp32
    )
    adjust_logits(_meta(33, 128256, dtype=FP32), entries)


def _scatter() -> None:
    packed = _meta(9, 32, 2, 4, 64, 128)
    scatter_blocks(packed, _pool(GEOMETRIES[0]), _index(9), heads=range(4, 8))


def _rope(heads: Heads, norm: QKNorm | None) -> None:
    qkv = _meta(33, heads.q + 2 * heads.kv, heads.dim, dtype=heads.dtype)
    k_from, v_from = heads.q, heads.q + heads.kv
    q, k, v = qkv[:, :k_from], qkv[:, k_from:v_from], qkv[:, v_from:]
    rope_and_write(
        q,
        k,
        v,
        _pool(heads),
        1,
        cos_sin_PD=_meta(8192, heads.dim, dtype=FP32),
        positions_T=_index(33),
        slots_T=_index(33),
        qk_norm=norm,
    )


def _decode(heads: Heads) -> None:
    q = _meta(33, heads.q, heads.dim, dtype=heads.dtype)
    decode_attention(
        q,
        _pool(heads),
        1,
        DecodeWork(
            rows_S=_index(33),
            context_S=_index(33),
            tables_SM=_index(33, 130),
            seq_C=_index(66),
            begin_C=_index(66),
            end_C=_index(66),
            slot_C=_index(66),
            first_slot_S1=_index(34),
        ),
        torch.empty_like(q),
        scale=heads.dim**-0.5,
        window=heads.window,
        soft_cap=heads.soft_cap,
    )


def _prefill(heads: Heads) -> None:
    q = _meta(333, heads.q, heads.dim, dtype=heads.dtype)
    prefill_attention(
        q,
        _pool(heads),
        1,
        PrefillWork(
            row_S=_index(3),
            length_S=_index(3),
            start_S=_index(3),
            tables_SM=_index(3, 130),
            seq_I=_index(17),
            first_I=_index(17),
        ),
        torch.empty_like(q),
        scale=heads.dim**-0.5,
        window=heads.window,
        soft_cap=heads.soft_cap,
    )


def _pool(heads: Heads) -> Tensor:
    dtype = torch.float8_e4m3fn if heads.fp8 else heads.dtype
    return _meta(1000, 32, 2, heads.kv, heads.block_tokens, heads.dim, dtype=dtype)


def _meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _index(*shape: int) -> Tensor:
    return _meta(*shape, dtype=torch.int32)


def _short(dtype: torch.dtype) -> str:
    return {BF16: "bf16", FP16: "fp16", FP32: "fp32"}[dtype]
