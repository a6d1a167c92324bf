"""`ModelOps` on a CPU, in plain torch. Activations are float32; weights and KV keep the model's dtype
(or the KV is FP8)."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from pdserve.core.errors import ConfigError
from pdserve.models.config import ModelConfig
from pdserve.models.cpu_attention import (
    CpuPlan,
    PoolGeometry,
    attend_decode,
    attend_prefill,
    decode_groups,
    prefill_group,
    write_rows,
)
from pdserve.models.cpu_experts import CpuExperts
from pdserve.models.cpu_linear import Linear, choose_products, make_head, make_integer_linear, make_linear
from pdserve.models.ops import LayerStack, QKNorm, SliceMeta, Workload
from pdserve.models.ops import Linear as AnyLinear
from pdserve.models.quantization.fp8 import Fp8Weight
from pdserve.models.quantization.integers import IntWeight
from pdserve.models.rope import rope_table

FP8_MAX: Final = 448.0
"""The largest number of float8_e4m3fn; torch makes NaN of what is greater."""


class CpuOps:
    """See `ModelOps`."""

    activation_dtype = torch.float32

    def __init__(
        self, config: ModelConfig, device: torch.device, max_positions: int, workload: Workload = Workload.ANY
    ) -> None:
        if device.type != "cpu":
            raise ConfigError(f"the CPU operations were asked to run on {device}")
        self._config = config
        self._workload = workload
        self._unmeasured: list[Linear] = []
        self._cos_PD, self._sin_PD = rope_table(config.rope, config.head_dim, max_positions)

    def linear(self, weight_OI: Tensor, bias_O: Tensor | None) -> Linear:
        made = make_linear(weight_OI, bias_O, self._workload)
        self._unmeasured.append(made)
        return made

    def head(self, weight_VE: Tensor) -> Linear:
        made = make_head(weight_VE)
        self._unmeasured.append(made)
        return made

    def integer_linear(self, weight: IntWeight, bias_O: Tensor | None) -> Linear:
        dtype: torch.dtype = getattr(torch, self._config.dtype)
        made = make_integer_linear(weight, bias_O, dtype, self._workload)
        self._unmeasured.append(made)
        return made

    def fp8_linear(self, weight: Fp8Weight, bias_O: Tensor | None) -> AnyLinear:
        dtype: torch.dtype = getattr(torch, self._config.dtype)
        return self.linear(weight.dequantised(dtype), bias_O)

    def experts(self, weights: Iterable[tuple[Tensor, Tensor]]) -> CpuExperts:
        pairs = [(self.linear(gate_up, None), self.linear(down, None)) for gate_up, down in weights]
        gate_up, down = zip(*pairs, strict=True)
        return CpuExperts(gate_up, down, self.silu_mul)

    def weights_loaded(self) -> None:
        choose_products(self._unmeasured)
        self._unmeasured.clear()

    def stack(self, layers: Sequence[Any], final_norm_E: Tensor, head: AnyLinear) -> LayerStack | None:
        return None

    def vector(self, weight: Tensor) -> Tensor:
        scaled: Tensor = weight.float() * weight.shape[-1] ** 0.5
        return scaled

    def bind_pool(self, pool_NL2KBD: Tensor) -> None:
        _, layers, _, heads, block_tokens, head_dim = pool_NL2KBD.shape
        self._geometry = PoolGeometry(
            num_layers=layers,
            num_kv_heads=heads,
            block_tokens=block_tokens,
            head_dim=head_dim,
            itemsize=pool_NL2KBD.element_size(),
        )
        self._pool = pool_NL2KBD
        # torch indexes FP8 as bytes only.
        self._fp8 = pool_NL2KBD.dtype == torch.float8_e4m3fn
        indexed = pool_NL2KBD.view(torch.uint8) if self._fp8 else pool_NL2KBD
        self._token_rows = indexed.view(-1, head_dim)
        self._head_rows = indexed.view(-1, block_tokens * head_dim)

    def plan(self, slices: Sequence[SliceMeta]) -> Any:
        window = self._config.sliding_window
        self._clear_tails(slices)
        positions = torch.cat([torch.arange(m.start, m.start + m.length) for m in slices])
        return CpuPlan(
            cos_T1D=self._cos_PD[positions].unsqueeze(1),
            sin_T1D=self._sin_PD[positions].unsqueeze(1),
            write_L=write_rows(slices, self._geometry),
            decode=decode_groups([m for m in slices if m.length == 1], self._geometry, window),
            prefill=tuple(prefill_group(m, self._geometry, window) for m in slices if m.length > 1),
        )

    def _clear_tails(self, slices: Sequence[SliceMeta]) -> None:
        """Zero each block that a slice begins and does not fill.

        Attention multiplies the rows behind the last token by a weight of zero: an infinity that a former
        user of the block left there would reach this one's answer as NaN.
        """
        size = self._geometry.block_tokens
        for meta in slices:
            end = meta.start + meta.length
            last = (end - 1) // size
            if end % size and last * size >= meta.start:
                self._pool[meta.blocks[last]].zero_()

    def rms_norm(self, x_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
        # x * w / sqrt(|x|^2 / E + eps), in fewer passes than torch's own; `vector` has put sqrt(E) into w.
        length_T1 = torch.linalg.vector_norm(x_TE, dim=-1, keepdim=True)
        normed: Tensor = (x_TE * weight_E).div_(length_T1.hypot_(_floor(eps, weight_E.shape[-1])))
        return normed

    def add_rms_norm(self, x_TE: Tensor, residual_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
        return self.rms_norm(residual_TE.add_(x_TE), weight_E, eps)

    def rope_and_write(self, qkv_TSD: Tensor, layer: int, plan: Any, qk_norm: QKNorm | None) -> Tensor:
        queries, keys = self._config.num_heads, self._config.num_kv_heads
        qk_TSD = qkv_TSD[:, : queries + keys]
        if qk_norm is not None:
            q_THD, k_TKD = qk_TSD[:, :queries], qk_TSD[:, queries:]
            q_THD.copy_(self.rms_norm(q_THD, qk_norm.q_D, qk_norm.eps))
            k_TKD.copy_(self.rms_norm(k_TKD, qk_norm.k_D, qk_norm.eps))
        swapped = qk_TSD.roll(qk_TSD.shape[-1] // 2, dims=-1)
        qk_TSD.mul_(plan.cos_T1D).addcmul_(swapped, plan.sin_T1D)
        kv_T2KD = qkv_TSD[:, queries:]
        if self._fp8:
            kv = kv_T2KD.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
        else:
            kv = kv_T2KD.to(self._token_rows.dtype)
        kv = kv.reshape(-1, qkv_TSD.shape[-1])
        self._token_rows.index_copy_(0, plan.write_L[layer], kv)
        return qkv_TSD[:, :queries]

    def attention(self, q_THD: Tensor, layer: int, plan: Any) -> Tensor:
        heads = self._config.num_kv_heads
        if len(plan.decode) == 1 and not plan.prefill and isinstance(plan.decode[0].rows, slice):
            return attend_decode(q_THD, self._head_rows, plan.decode[0], layer, heads)
        out = torch.empty(q_THD.shape)
        for group in plan.decode:
            out[group.rows] = attend_decode(q_THD[group.rows], self._head_rows, group, layer, heads)
        for chunk in plan.prefill:
            rows = chunk.rows
            attend_prefill(q_THD[rows], self._head_rows, chunk, layer, heads, out[rows])
        return out

    def silu_mul(self, gate_up_T2F: Tensor) -> Tensor:
        gate, up = gate_up_T2F.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def layers_done(self) -> None:
        """CPU products are finished when they return."""


@functools.cache
def _floor(eps: float, size: int) -> Tensor:
    """What keeps the norm of a vector of zeros from dividing by zero."""
    return torch.tensor((eps * size) ** 0.5)
