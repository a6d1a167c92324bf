"""The random numbers are Philox4x32-10, bit for bit."""

from __future__ import annotations

import pytest

from pdserve.engine.philox import philox4x32, uniform

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "want"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers_of_random123(
    counter: tuple[int, int, int, int], key: tuple[int, int], want: tuple[int, int, int, int]
) -> None:
    assert philox4x32(counter, key) == want


def test_numbers_are_spread_over_the_unit_interval() -> None:
    numbers = [uniform(seed, position) for seed in (0, 1, 2**62) for position in range(1000)]
    assert len(set(numbers)) == 3000
    assert all(0.0 <= number < 1.0 for number in numbers)
    tenths = [0] * 10
    for number in numbers:
        tenths[int(number * 10)] += 1
    # 300 each, binomial sigma 16.4: five sigma.
    assert all(abs(count - 300) < 82 for count in tenths)


def test_large_seeds_and_positions_differ_in_every_word() -> None:
    base = uniform(1, 1)
    assert uniform(1 + 2**40, 1) != base
    assert uniform(1, 1 + 2**40) != base
