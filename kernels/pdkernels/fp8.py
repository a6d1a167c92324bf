"""FP8 (e4m3fn) in kernels: tensors are passed as uint8, numbers are made of bits where the GPU cannot.

e4m3fn: sign, 4 bits of exponent (bias 7), 3 of mantissa; largest 448, no infinity, NaN where all other bits
are set (Micikevicius et al. 2022, "FP8 formats for deep learning").
"""

from __future__ import annotations

from pdkernels._triton import jit, tl


@jit
def from_e4m3(bits: tl.tensor, dtype: tl.constexpr, NATIVE: tl.constexpr) -> tl.tensor:
    """Numbers of uint8 `bits`, exact in every dtype. NaN becomes 480 where NATIVE is false."""
    if NATIVE:
        number = bits.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        # The bits of a float16 (bias 15) that is 2^8 too small, its subnormal numbers among them.
        wide = bits.to(tl.int16)
        number = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0
    return number.to(dtype)


@jit
def to_e4m3(x: tl.tensor) -> tl.tensor:
    """uint8 bits of float32 x, rounded to nearest even; beyond 448 becomes 448. x is not NaN."""
    x = tl.minimum(tl.maximum(x, -448.0), 448.0)
    # Times 2^-120 its exponent has the bias of e4m3, and what is subnormal there is so here.
    word = (tl.abs(x) * 7.52316384526264e-37).to(tl.int32, bitcast=True)
    word = (word + 0x7FFFF + ((word >> 20) & 1)) >> 20
    return (word | tl.where(x < 0, 0x80, 0)).to(tl.uint8)
