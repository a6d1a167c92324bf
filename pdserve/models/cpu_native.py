"""`ModelOps` for bfloat16 models on pdcpu's kernels: whole runs of layers in one call, without the GIL.

What these kernels do not take (other dtypes, head sizes that are no multiple of 32, weights in 4 bits) falls
back to `CpuOps`, operation by operation.

Shape legend: T tokens of the step, E hidden, H query heads, K kv heads, S = H + 2K, D head_dim, N blocks,
L layers, B tokens of a block, R rows that go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from pdcpu import library as pdcpu
from torch import Tensor

from pdserve.models.config import ModelConfig
from pdserve.models.cpu_int4 import int4_linear
from pdserve.models.cpu_linear import BySize, Linear
from pdserve.models.cpu_native_linear import Arena, NativeLinear
from pdserve.models.layers import DecoderLayer
from pdserve.models.mlp import DenseMlp
from pdserve.models.ops import Linear as AnyLinear
from pdserve.models.ops import QKNorm, SliceMeta, Workload
from pdserve.models.ops_cpu import CpuOps
from pdserve.models.quantization.integers import IntWeight

TASK_QUERIES: Final = 64
"""Queries of one sequence that are attended together, per kv head."""
HEAD_MULTIPLE: Final = 32
GATED_MULTIPLE: Final = pdcpu.PANEL


@dataclass(frozen=True, slots=True)
class NativePlan:
    """A step's tables in the kernels' layout; `kept` are the arrays that `step` points into."""

    step: pdcpu.Step
    kept: tuple[Any, ...]


class NativeOps(CpuOps):
    """See `ModelOps`."""

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device,
        max_positions: int,
        workload: Workload,
        library: pdcpu.Library,
    ) -> None:
        super().__init__(config, device, max_positions, workload)
        self._library = library
        self._arena = Arena()
        self._model = pdcpu.Model(
            hidden=config.hidden_size,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            window=config.sliding_window or 0,
            eps=config.rms_norm_eps,
            qk_eps=config.rms_norm_eps,
            cos=self._cos_PD.data_ptr(),
            sin=self._sin_PD.data_ptr(),
        )

    def _native(self, weight_OI: Tensor, bias_O: Tensor | None) -> NativeLinear:
        return NativeLinear(self._library, self._arena, weight_OI, bias_O)

    def linear(self, weight_OI: Tensor, bias_O: Tensor | None) -> Linear:
        if weight_OI.dtype == torch.bfloat16:
            return self._native(weight_OI, bias_O)
        return super().linear(weight_OI, bias_O)

    def head(self, weight_VE: Tensor) -> Linear:
        if weight_VE.dtype == torch.bfloat16:
            return self._native(weight_VE, None)
        return super().head(weight_VE)

    def integer_linear(self, weight: IntWeight, bias_O: Tensor | None) -> Linear:
        if self._config.dtype != "bfloat16":
            return super().integer_linear(weight, bias_O)
        few = int4_linear(weight, bias_O) if self._workload is Workload.ANY else None
        many = self._native(weight.dequantised(torch.bfloat16), bias_O)
        made = many if few is None else BySize(few, many)
        self._unmeasured.append(made)
        return made

    def bind_pool(self, pool_NL2KBD: Tensor) -> None:
        super().bind_pool(pool_NL2KBD)
        _, layers, _, heads, block_tokens, head_dim = pool_NL2KBD.shape
        self._model.pool = pdcpu.PoolShape(pool_NL2KBD.data_ptr(), layers, heads, block_tokens, head_dim)
        self._attends = pool_NL2KBD.dtype == torch.bfloat16 and head_dim % HEAD_MULTIPLE == 0

    def plan(self, slices: Sequence[SliceMeta]) -> Any:
        return plan_step(slices) if self._attends else super().plan(slices)

    def rope_and_write(self, qkv_TSD: Tensor, layer: int, plan: Any, qk_norm: QKNorm | None) -> Tensor:
        if not isinstance(plan, NativePlan):
            return super().rope_and_write(qkv_TSD, layer, plan, qk_norm)
        rows, _, head_dim = qkv_TSD.shape
        q_THD = torch.empty((rows, self._config.num_heads, head_dim), dtype=torch.bfloat16)
        norms = (None, None) if qk_norm is None else (qk_norm.q_D.data_ptr(), qk_norm.k_D.data_ptr())
        self._library.rope_and_write(
            self._model, plan.step, *norms, layer, qkv_TSD.data_ptr(), q_THD.data_ptr()
        )
        return q_THD

    def attention(self, q_THD: Tensor, layer: int, plan: Any) -> Tensor:
        if not isinstance(plan, NativePlan):
            return super().attention(q_THD, layer, plan)
        out_THD = torch.empty_like(q_THD)
        self._library.attention(self._model, plan.step, layer, q_THD.data_ptr(), out_THD.data_ptr())
        return out_THD.float()

    def stack(self, layers: Sequence[Any], final_norm_E: Tensor, head: AnyLinear) -> NativeStack | None:
        """None where some projection around attention is in another form."""
        kinds = {self._config.dtype, self._config.kv_dtype}
        if self._config.head_dim % HEAD_MULTIPLE or kinds != {"bfloat16"}:
            return None
        around = [linear for layer in layers for linear in (layer.qkv, layer.out)]
        if not isinstance(head, NativeLinear) or not all(isinstance(x, NativeLinear) for x in around):
            return None
        pdcpu.compute_with(self._library)
        return NativeStack(self, self._library, self._model, layers, final_norm_E, head)


def plan_step(slices: Sequence[SliceMeta]) -> NativePlan:
    """The tables of one step: rows, slices, blocks, and tasks of attention."""
    lengths = [meta.length for meta in slices]
    starts = np.array([meta.start for meta in slices], dtype=np.int64)
    row_slice = np.repeat(np.arange(len(slices), dtype=np.int32), lengths)
    offsets = np.array([meta.offset for meta in slices], dtype=np.int64)
    rows = len(row_slice)
    positions = np.arange(rows, dtype=np.int64) + (starts - offsets)[row_slice]
    tables = np.array([block for meta in slices for block in meta.blocks], dtype=np.int32)
    ends = np.cumsum([len(meta.blocks) for meta in slices])
    described = np.empty((len(slices), 4), dtype=np.int64)
    described[:, 0], described[:, 1], described[:, 2] = offsets, lengths, starts
    described[:, 3] = [0, *ends[:-1]]
    tasks = np.array(
        [
            (index, begin, min(begin + TASK_QUERIES, length))
            for index, length in enumerate(lengths)
            for begin in range(0, length, TASK_QUERIES)
        ],
        dtype=np.int32,
    )
    kept = (positions, row_slice, described, tables, tasks)
    addresses = (array.ctypes.data for array in kept)
    return NativePlan(pdcpu.Step(rows, len(slices), len(tasks), *addresses), kept)


class NativeStack:
    """See `LayerStack`. A mixture of experts is computed by its own operations, between two calls."""

    def __init__(
        self,
        ops: NativeOps,
        library: pdcpu.Library,
        model: pdcpu.Model,
        layers: Sequence[DecoderLayer],
        final_norm_E: Tensor,
        head: NativeLinear,
    ) -> None:
        self._ops, self._library, self._model = ops, library, model
        self._layers, self._final_norm_E, self._head = tuple(layers), final_norm_E, head
        self._whole = tuple(_is_whole(layer) for layer in layers)
        described = [_describe(layer) for layer in layers]
        self._described = (pdcpu.Layer * len(described))(*described)
        self._ff = max((layer.down.inputs for layer in described), default=0)
        self._work = torch.empty(0, dtype=torch.uint8)

    def layers(
        self, first: int, last: int, residual_TE: Tensor, plan: NativePlan, keep_R: Tensor | None
    ) -> Tensor:
        size = self._library.work_bytes(self._model, plan.step.rows, self._ff)
        if self._work.numel() < size:
            self._work = torch.empty(size, dtype=torch.uint8)
        for begin, end in self._runs(first, last):
            keep = keep_R if end == last else None
            rows = self._library.layers(
                self._model,
                self._described,
                begin,
                end,
                self._ff,
                plan.step,
                residual_TE.data_ptr(),
                None if keep is None else keep.data_ptr(),
                -1 if keep is None else keep.shape[0],
                self._work.data_ptr(),
            )
            residual_TE = residual_TE[:rows]
            if rows and not self._whole[end - 1]:
                layer = self._layers[end - 1]
                hidden = self._ops.rms_norm(residual_TE, layer.post_norm_E, self._model.eps)
                residual_TE.add_(layer.mlp(hidden, self._ops))
        return residual_TE

    def _runs(self, first: int, last: int) -> list[tuple[int, int]]:
        """[first, last) cut after each layer whose MLP is computed elsewhere."""
        ends = [i + 1 for i in range(first, last) if i + 1 == last or not self._whole[i]]
        return list(zip([first, *ends[:-1]], ends, strict=True))

    def logits(self, residual_RE: Tensor) -> Tensor:
        return self._head.of_normed(residual_RE, self._final_norm_E, self._model.eps)


def _is_whole(layer: DecoderLayer) -> bool:
    """Whether the kernels can compute the MLP too."""
    mlp = layer.mlp
    return (
        isinstance(mlp, DenseMlp)
        and isinstance(mlp.gate_up, NativeLinear)
        and isinstance(mlp.down, NativeLinear)
        and mlp.down.shape[1] % GATED_MULTIPLE == 0
    )


def _describe(layer: DecoderLayer) -> pdcpu.Layer:
    assert isinstance(layer.qkv, NativeLinear)
    assert isinstance(layer.out, NativeLinear)
    made = pdcpu.Layer(
        input_norm=layer.input_norm_E.data_ptr(),
        post_norm=layer.post_norm_E.data_ptr(),
        qkv=layer.qkv.weight,
        out=layer.out.weight,
    )
    if layer.qk_norm is not None:
        made.q_norm, made.k_norm = layer.qk_norm.q_D.data_ptr(), layer.qk_norm.k_D.data_ptr()
    if _is_whole(layer):
        mlp = layer.mlp
        assert isinstance(mlp, DenseMlp)
        assert isinstance(mlp.gate_up, NativeLinear)
        assert isinstance(mlp.down, NativeLinear)
        made.gate_up, made.down = mlp.gate_up.weight, mlp.down.weight
    return made
