"""The digest of a push's pieces: the kernel against its reference, and what a digest is for."""

from __future__ import annotations

import pytest
import torch
from pdkernels.errors import KernelInputError
from pdkernels.reference import digest as reference

digest = pytest.importorskip("pdkernels.digest", exc_type=ImportError)

WORDS = 20_000


def words_of(device: str, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (WORDS,), generator=generator).int().to(device)


def pieces_of(device: str, *pieces: tuple[int, int, int]) -> torch.Tensor:
    return torch.tensor(pieces, dtype=torch.int64, device=device).reshape(-1, 3).T.contiguous()


def run(words: torch.Tensor, *pieces: tuple[int, int, int]) -> torch.Tensor:
    table = pieces_of(str(words.device), *pieces)
    return digest.digest_pieces(words, table, max((count for _, count, _ in pieces), default=0))


@pytest.mark.parametrize(
    "pieces",
    [
        [],
        [(0, 0, 0)],
        [(7, 1, 0)],
        [(0, 1024, 0)],
        [(3, 1025, 11)],
        [(25, 2250, 1 << 40), (0, 1, 5), (9, 0, 3), (3750, 1250, 77)],
    ],
)
def test_the_kernel_is_the_reference(device: str, pieces: list[tuple[int, int, int]]) -> None:
    words = words_of(device)
    found = run(words, *pieces)
    assert torch.equal(found, reference.digest_pieces(words, pieces_of(device, *pieces)))


def test_a_push_has_one_digest_however_it_is_cut(device: str) -> None:
    words = words_of(device)
    whole = run(words, (50, 900, 0)).sum()
    parts = run(words, (650, 300, 600), (50, 600, 0)).sum()
    assert whole == parts


@pytest.mark.parametrize("bit", [0, 13, 31])
def test_one_flipped_bit_changes_it(device: str, bit: int) -> None:
    words = words_of(device)
    before = run(words, (0, 500, 0)).sum()
    words[1999] ^= torch.tensor((1 << bit) - (1 << 32 if bit == 31 else 0), dtype=torch.int32)
    assert run(words, (0, 500, 0)).sum() != before


def test_pieces_that_changed_places_change_it(device: str) -> None:
    words = words_of(device)
    assert run(words, (0, 100, 0), (100, 100, 100)).sum() != run(words, (100, 100, 0), (0, 100, 100)).sum()


def test_zeros_where_data_should_be_change_it(device: str) -> None:
    words = words_of(device)
    before = run(words, (0, 256, 0)).sum()
    words[:256] = 0
    assert run(words, (0, 256, 0)).sum() not in (before, 0)


def test_words_of_another_type_are_refused(device: str) -> None:
    with pytest.raises(KernelInputError):
        digest.digest_pieces(words_of(device).float(), pieces_of(device, (0, 1, 0)), 1)
    with pytest.raises(KernelInputError):
        digest.digest_pieces(words_of(device), pieces_of(device, (0, 1, 0)).int(), 1)
