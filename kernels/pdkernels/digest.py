"""A 64-bit digest of scattered pieces of a KV pool: what a push sent, and what arrived.

Every 32-bit word is mixed with its place in the push and all are added up, modulo 2^64: pieces may be taken
in any order, a push in any fragments, and a word that is wrong, missing or elsewhere changes the sum. It
finds what goes wrong by accident, not what somebody forges.

Shape legend: P pieces.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pdkernels._triton import jit_for_any, tl
from pdkernels.validate import ceil_div, require

BLOCK = 4096

# Odd constants with well spread bits, and two rounds of multiplying and folding: the finaliser of SplitMix64
# (Steele, Lea and Flood 2014), as int64.
K_PLACE = -0x61C8864680B583EB
K_FIRST = -0x40A7B892E31B1A47
K_SECOND = -0x6B2FB644ECCEEE15
LOW_32 = 0xFFFFFFFF
LOW_35 = 0x7FFFFFFFF


@jit_for_any("num_pieces")
def digest_kernel(
    words: tl.tensor,
    pieces: tl.tensor,
    out: tl.tensor,
    num_pieces: tl.tensor,
    K_PLACE: tl.constexpr,
    K_FIRST: tl.constexpr,
    K_SECOND: tl.constexpr,
    LOW_32: tl.constexpr,
    LOW_35: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    # grid (P, ceil(longest piece / BLOCK)): a stretch of one piece. `pieces` is [3, P]: where it begins
    # in the pool, its length, where it begins in the push.
    piece = tl.program_id(0)
    at_W = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # Counted in 16 bytes, so that the compiler knows that it may read as much at once.
    first = tl.load(pieces + piece) * 4
    count = tl.load(pieces + num_pieces + piece) * 4
    place = tl.load(pieces + 2 * num_pieces + piece) * 4
    live_W = at_W < count
    word_W = tl.load(words + first + at_W, mask=live_W, other=0).to(tl.int64) & LOW_32
    mixed_W = word_W ^ ((place + at_W) * K_PLACE)
    mixed_W = (mixed_W ^ ((mixed_W >> 32) & LOW_32)) * K_FIRST
    mixed_W = (mixed_W ^ ((mixed_W >> 29) & LOW_35)) * K_SECOND
    mixed_W = mixed_W ^ ((mixed_W >> 32) & LOW_32)
    tl.atomic_add(out + piece, tl.sum(tl.where(live_W, mixed_W, 0)), sem="relaxed")


def digest_pieces(words: Tensor, pieces_3P: Tensor, longest: int) -> Tensor:
    """The digest of each piece; their sum is the push's.

    words: int32 [n], the pool's memory. pieces_3P: int64 [3, P], contiguous, on its device: where it begins
    in the pool, its length, where it begins in the push, in units of 16 bytes. longest: length of the longest
    piece; the host knows it. Returns int64 [P]; reads each piece once. Raises `KernelInputError`.
    """
    op = "digest_pieces"
    flat = words.dim() == 1 and words.dtype is torch.int32 and words.is_contiguous()
    require(flat, op, "words", wanted="int32 [n], contiguous", found=(words.dtype, list(words.shape)))
    fits = pieces_3P.dim() == 2 and pieces_3P.shape[0] == 3 and pieces_3P.is_contiguous()
    fits = fits and pieces_3P.dtype is torch.int64
    found = (pieces_3P.dtype, list(pieces_3P.shape))
    require(fits, op, "pieces", wanted="int64 [3, P], contiguous", found=found)
    count = pieces_3P.shape[1]
    out_P = torch.zeros(count, dtype=torch.int64, device=words.device)
    if count == 0 or longest == 0:
        return out_P
    digest_kernel[(count, ceil_div(4 * longest, BLOCK))](
        words,
        pieces_3P,
        out_P,
        count,
        K_PLACE=K_PLACE,
        K_FIRST=K_FIRST,
        K_SECOND=K_SECOND,
        LOW_32=LOW_32,
        LOW_35=LOW_35,
        BLOCK=BLOCK,
        num_warps=8,
    )
    return out_P
