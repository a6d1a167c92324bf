"""`ModelOps` on CUDA devices, over the Triton kernels of `pdkernels`.

Activations and weights have the model's dtype, the KV too, or it is FP8. A step's index tensors are built in
numpy, packed into one pinned buffer and sent by one asynchronous copy; nothing here waits for the device but
`layers_done`.

Shape legend: T tokens of the step, E hidden, H query heads, K kv heads, S = H + 2K, D head_dim, F ff,
P positions; in the plan: Q sequences of one attention kind, M blocks of the longest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pdkernels._triton import interpreted
from pdkernels.activation import silu_mul
from pdkernels.decode_attention import DecodeWork, decode_attention, decode_tile
from pdkernels.grouped_matmul import grouped_matmul, plan_experts
from pdkernels.norm import add_rms_norm, rms_norm
from pdkernels.plan import decode_capacity, plan_decode, plan_prefill
from pdkernels.prefill_attention import PrefillWork, prefill_attention, prefill_tile_tokens
from pdkernels.rope import QKNorm as RopeNorm
from pdkernels.rope import rope_and_write
from pdkernels.tuning import program_slots
from torch import Tensor

from pdserve.core.errors import ConfigError
from pdserve.models.config import ModelConfig
from pdserve.models.gpu_linear import fp8_linear, int4_linear
from pdserve.models.graph_plan import ALIGN, PackedInts, padded, padded_tables
from pdserve.models.ops import LayerStack, Linear, QKNorm, SliceMeta
from pdserve.models.quantization.fp8 import Fp8Weight
from pdserve.models.quantization.integers import IntWeight
from pdserve.models.rope import inverse_frequencies

Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class TritonPlan:
    """Index tensors of one step, on the device."""

    positions_T: Tensor
    slots_T: Tensor
    decode: DecodeWork | None
    prefill: PrefillWork | None


@dataclass(frozen=True, slots=True)
class _Linear:
    weight_OI: Tensor
    bias_O: Tensor | None

    def __call__(self, x_TI: Tensor) -> Tensor:
        return F.linear(x_TI, self.weight_OI, self.bias_O)


@dataclass(frozen=True, slots=True)
class _Experts:
    """See `Experts`. X experts of width F, K of them for a token."""

    gate_up_X2FE: Tensor
    down_XEF: Tensor

    def __call__(self, x_TE: Tensor, weight_TK: Tensor, expert_TK: Tensor) -> Tensor:
        tokens, chosen = expert_TK.shape
        tiles = plan_experts(expert_TK.flatten(), self.down_XEF.shape[0], x_TE.dtype)
        hidden_NF = silu_mul(grouped_matmul(x_TE, self.gate_up_X2FE, tiles))
        y_NE = grouped_matmul(hidden_NF, self.down_XEF, tiles)
        weight_T1K = weight_TK.to(x_TE.dtype).unsqueeze(1)
        return torch.bmm(weight_T1K, y_NE.view(tokens, chosen, -1)).squeeze(1)


class TritonOps:
    """See `ModelOps`."""

    def __init__(self, config: ModelConfig, device: torch.device, max_positions: int) -> None:
        """Raises `ConfigError` for a device that Triton's kernels cannot run on."""
        if device.type != "cuda" and not interpreted():
            raise ConfigError(f"the Triton operations need a CUDA device, asked to run on {device}")
        self._config = config
        self._device = device
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        angle = torch.outer(
            torch.arange(max_positions, dtype=torch.float32),
            inverse_frequencies(config.rope, config.head_dim),
        )
        self._cos_sin_PD = torch.cat((angle.cos(), angle.sin()), dim=-1).to(device)
        self._scale = config.head_dim**-0.5

    @property
    def activation_dtype(self) -> torch.dtype:
        return self._dtype

    def linear(self, weight_OI: Tensor, bias_O: Tensor | None) -> _Linear:
        return _Linear(self.vector(weight_OI), self._bias(bias_O))

    def head(self, weight_VE: Tensor) -> _Linear:
        return self.linear(weight_VE, None)

    def integer_linear(self, weight: IntWeight, bias_O: Tensor | None) -> Linear:
        made = int4_linear(weight, self._bias(bias_O), self._device)
        return made or self.linear(weight.dequantised(self._dtype), bias_O)

    def fp8_linear(self, weight: Fp8Weight, bias_O: Tensor | None) -> Linear:
        made = fp8_linear(weight, self._bias(bias_O), self._device)
        return made or self.linear(weight.dequantised(self._dtype), bias_O)

    def _bias(self, bias_O: Tensor | None) -> Tensor | None:
        return None if bias_O is None else self.vector(bias_O)

    def experts(self, weights: Iterable[tuple[Tensor, Tensor]]) -> _Experts:
        # Each goes to the device as it is read: the host holds one at a time.
        pairs = [(self.vector(gate_up), self.vector(down)) for gate_up, down in weights]
        gate_up, down = zip(*pairs, strict=True)
        return _Experts(torch.stack(gate_up), torch.stack(down))

    def vector(self, weight: Tensor) -> Tensor:
        return weight.to(device=self._device, dtype=self._dtype).contiguous()

    def weights_loaded(self) -> None:
        """Nothing is measured at start."""

    def stack(self, layers: Sequence[Any], final_norm_E: Tensor, head: Linear) -> LayerStack | None:
        return None

    def bind_pool(self, pool_NL2KBD: Tensor) -> None:
        if pool_NL2KBD.dtype not in (self._dtype, torch.float8_e4m3fn):
            raise ConfigError(f"the KV pool is {pool_NL2KBD.dtype}, the model {self._dtype}")
        self._pool = pool_NL2KBD
        self._block_tokens = pool_NL2KBD.shape[4]
        self._decode_tile = decode_tile(pool_NL2KBD, self._dtype)
        self._prefill_tile_tokens = prefill_tile_tokens(pool_NL2KBD, self._config.num_heads, self._dtype)
        self._program_slots = program_slots(pool_NL2KBD.device)

    def plan(self, slices: Sequence[SliceMeta]) -> TritonPlan:
        decoding = [meta for meta in slices if meta.length == 1]
        reading = [meta for meta in slices if meta.length > 1]
        arrays = self._token_arrays(slices)
        if decoding:
            arrays |= self._decode_arrays(decoding)
        if reading:
            arrays |= self._prefill_arrays(reading)
        sent = _send(arrays, self._device)
        return TritonPlan(
            positions_T=sent["positions"],
            slots_T=sent["slots"],
            decode=_decode_work(sent) if decoding else None,
            prefill=_prefill_work(sent) if reading else None,
        )

    def _token_arrays(self, slices: Sequence[SliceMeta]) -> dict[str, Ints]:
        """Position and pool slot of every row. Only blocks that get a token are looked at."""
        size = self._block_tokens
        start_Q = np.array([meta.start for meta in slices])
        length_Q = np.array([meta.length for meta in slices])
        first_Q = start_Q // size
        count_Q = (start_Q + length_Q - 1) // size + 1 - first_Q
        blocks = [
            block
            for meta, first, count in zip(slices, first_Q.tolist(), count_Q.tolist(), strict=True)
            for block in meta.blocks[first : first + count]
        ]
        seq_T = np.repeat(np.arange(len(slices)), length_Q)
        position_T = np.arange(len(seq_T)) + (start_Q - (np.cumsum(length_Q) - length_Q))[seq_T]
        # Where the sequence's block 0 would be in the list of touched blocks.
        origin_Q = np.cumsum(count_Q) - count_Q - first_Q
        slot_T = np.array(blocks)[origin_Q[seq_T] + position_T // size] * size + position_T % size
        return {"positions": position_T.astype(np.int32), "slots": slot_T.astype(np.int32)}

    def _decode_arrays(self, slices: list[SliceMeta]) -> dict[str, Ints]:
        return {
            "decode_rows": np.array([meta.offset for meta in slices], dtype=np.int32),
            "decode_tables": _tables(slices, self._block_tokens),
            **self._split(np.array([meta.start + 1 for meta in slices], dtype=np.int32)),
        }

    def _split(self, context_Q: Ints) -> dict[str, Ints]:
        """How attention over these contexts is cut; 0 is a padding row."""
        items = plan_decode(
            context_Q,
            num_kv_heads=self._config.num_kv_heads,
            num_programs=self._program_slots,
            tile=self._decode_tile,
            window=self._config.sliding_window,
        )
        return {
            "decode_context": context_Q,
            "decode_seq": items.seq_C,
            "decode_begin": items.begin_C,
            "decode_end": items.end_C,
            "decode_slot": items.slot_C,
            "decode_first_slot": items.first_slot_S1,
        }

    def _prefill_arrays(self, slices: list[SliceMeta]) -> dict[str, Ints]:
        length_Q = np.array([meta.length for meta in slices], dtype=np.int32)
        start_Q = np.array([meta.start for meta in slices], dtype=np.int32)
        tiles = plan_prefill(length_Q, start_Q, tile_tokens=self._prefill_tile_tokens)
        return {
            "prefill_row": np.array([meta.offset for meta in slices], dtype=np.int32),
            "prefill_length": length_Q,
            "prefill_start": start_Q,
            "prefill_tables": _tables(slices, self._block_tokens),
            "prefill_seq": tiles.seq_I,
            "prefill_first": tiles.first_I,
        }

    def rms_norm(self, x_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
        return rms_norm(x_TE, weight_E, eps)

    def add_rms_norm(self, x_TE: Tensor, residual_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
        return add_rms_norm(x_TE, residual_TE, weight_E, eps)

    def rope_and_write(self, qkv_TSD: Tensor, layer: int, plan: TritonPlan, qk_norm: QKNorm | None) -> Tensor:
        keys = self._config.num_heads
        values = keys + self._config.num_kv_heads
        return rope_and_write(
            qkv_TSD[:, :keys],
            qkv_TSD[:, keys:values],
            qkv_TSD[:, values:],
            self._pool,
            layer,
            cos_sin_PD=self._cos_sin_PD,
            positions_T=plan.positions_T,
            slots_T=plan.slots_T,
            qk_norm=None if qk_norm is None else RopeNorm(qk_norm.q_D, qk_norm.k_D, qk_norm.eps),
        )

    def attention(self, q_THD: Tensor, layer: int, plan: TritonPlan) -> Tensor:
        out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
        window = self._config.sliding_window
        if plan.prefill is not None:
            prefill_attention(
                q_THD, self._pool, layer, plan.prefill, out_THD, scale=self._scale, window=window
            )
        if plan.decode is not None:
            decode_attention(q_THD, self._pool, layer, plan.decode, out_THD, scale=self._scale, window=window)
        return out_THD

    def silu_mul(self, gate_up_T2F: Tensor) -> Tensor:
        return silu_mul(gate_up_T2F)

    def layers_done(self) -> None:
        if self._device.type == "cuda":
            # An event, rather than the whole device: other streams may be copying.
            torch.cuda.current_stream(self._device).record_event().synchronize()


class TritonDecodeStep:
    """Index tensors of decode steps of up to `rows` sequences, always in one place (see `graph_plan`)."""

    def __init__(self, ops: TritonOps, rows: int, table_blocks: int) -> None:
        self._ops, self._rows, self._table_blocks = ops, rows, table_blocks
        slots = decode_capacity(rows, ops._config.num_kv_heads, ops._program_slots)
        items = dict.fromkeys(("decode_seq", "decode_begin", "decode_end", "decode_slot"), (slots,))
        each = ("tokens", "positions", "slots", "decode_rows", "decode_context")
        self._packed = PackedInts.of(
            {
                **dict.fromkeys(each, (rows,)),
                "decode_tables": (rows, table_blocks),
                **items,
                "decode_first_slot": (rows + 1,),
            }
        )
        self._buffer = torch.zeros(self._packed.total, dtype=torch.int32, device=ops._device)
        sent = {
            name: self._buffer[start : start + math.prod(shape)].view(shape)
            for (name, shape), start in zip(
                self._packed.shapes.items(), self._packed.starts.values(), strict=True
            )
        }
        self.tokens_R = sent["tokens"]
        self.plan = TritonPlan(
            positions_T=sent["positions"], slots_T=sent["slots"], decode=_decode_work(sent), prefill=None
        )

    def fill(self, tokens: Sequence[int], slices: Sequence[SliceMeta]) -> None:
        """Send one new token for each of the slices; the rows behind them are padding."""
        ops, rows, size = self._ops, self._rows, self._ops._block_tokens
        starts = [meta.start for meta in slices]
        context_R = padded([start + 1 for start in starts], rows, 0)
        slots = [meta.blocks[meta.start // size] * size + meta.start % size for meta in slices]
        arrays = {
            "tokens": padded(tokens, rows, 0),
            "positions": padded(starts, rows, 0),
            "slots": padded(slots, rows, -1),
            "decode_rows": np.arange(rows, dtype=np.int32),
            "decode_tables": padded_tables(slices, rows, self._table_blocks, size),
            **ops._split(context_R),
        }
        staging = torch.empty(self._packed.total, dtype=torch.int32, pin_memory=ops._device.type == "cuda")
        self._packed.fill(staging.numpy(), arrays)
        self._buffer.copy_(staging, non_blocking=True)


def _tables(slices: list[SliceMeta], block_tokens: int) -> Ints:
    """Block tables [Q, M], of the blocks that hold a token."""
    used = [-(-(meta.start + meta.length) // block_tokens) for meta in slices]
    tables_QM = np.zeros((len(slices), max(used)), dtype=np.int32)
    for row, (meta, count) in enumerate(zip(slices, used, strict=True)):
        tables_QM[row, :count] = meta.blocks[:count]
    return tables_QM


def _send(arrays: dict[str, Ints], device: torch.device) -> dict[str, Tensor]:
    """All arrays in one copy; the pinned buffer is torch's to reuse once the copy is done."""
    starts, total = {}, 0
    for name, array in arrays.items():
        starts[name] = total
        total += -(-array.size // ALIGN) * ALIGN
    staging = torch.empty(total, dtype=torch.int32, pin_memory=device.type == "cuda")
    view = staging.numpy()
    for name, array in arrays.items():
        view[starts[name] : starts[name] + array.size] = array.ravel()
    sent = staging.to(device, non_blocking=True)
    return {
        name: sent[starts[name] : starts[name] + array.size].view(array.shape)
        for name, array in arrays.items()
    }


def _decode_work(sent: dict[str, Tensor]) -> DecodeWork:
    return DecodeWork(
        rows_S=sent["decode_rows"],
        context_S=sent["decode_context"],
        tables_SM=sent["decode_tables"],
        seq_C=sent["decode_seq"],
        begin_C=sent["decode_begin"],
        end_C=sent["decode_end"],
        slot_C=sent["decode_slot"],
        first_slot_S1=sent["decode_first_slot"],
    )


def _prefill_work(sent: dict[str, Tensor]) -> PrefillWork:
    return PrefillWork(
        row_S=sent["prefill_row"],
        length_S=sent["prefill_length"],
        start_S=sent["prefill_start"],
        tables_SM=sent["prefill_tables"],
        seq_I=sent["prefill_seq"],
        first_I=sent["prefill_first"],
    )
