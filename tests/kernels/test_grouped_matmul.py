"""Grouped product against its reference, and the plan that it runs by."""

from __future__ import annotations

import pytest
import torch
from pdkernels.errors import KernelInputError
from pdkernels.reference import grouped_matmul as reference

from tests.support.kernels import assert_close

grouped = pytest.importorskip("pdkernels.grouped_matmul", exc_type=ImportError)


def distinct(tokens: int, experts: int, per_token: int, device: str) -> torch.Tensor:
    """A token's experts are different ones."""
    return torch.rand(tokens, experts, device=device).topk(per_token).indices.flatten()


@pytest.mark.parametrize(
    ("tokens", "per_token", "experts", "inputs", "outputs"),
    [(1, 2, 8, 64, 128), (5, 2, 3, 40, 24), (37, 4, 6, 33, 65), (3, 1, 1, 8, 8), (20, 8, 64, 16, 130)],
)
def test_every_row_is_multiplied_with_its_own_experts(
    device: str, dtype: torch.dtype, tokens: int, per_token: int, experts: int, inputs: int, outputs: int
) -> None:
    x = torch.randn(tokens, inputs, device=device).to(dtype)
    weight = (torch.randn(experts, outputs, inputs, device=device) * inputs**-0.5).to(dtype)
    expert = distinct(tokens, experts, per_token, device)
    tiles = grouped.plan_experts(expert, experts, dtype)
    wanted = reference.grouped_matmul(x, weight, expert)
    assert_close(grouped.grouped_matmul(x, weight, tiles), wanted)
    # One row for each product, as behind the activation.
    rows = torch.randn(tokens * per_token, inputs, device=device).to(dtype)
    wanted = reference.grouped_matmul(rows, weight, expert)
    assert_close(grouped.grouped_matmul(rows, weight, tiles), wanted)


@pytest.mark.parametrize("block_m", [16, 64, 128])
def test_tall_tiles_are_the_reference_too(device: str, block_m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = grouped.LaunchConfig(block_m=block_m, block_n=32, num_warps=4, num_stages=2)
    monkeypatch.setattr(grouped, "launch_config", lambda *_: config)
    x, weight = torch.randn(150, 20, device=device), torch.randn(3, 40, 20, device=device)
    expert = distinct(150, 3, 2, device)
    tiles = grouped.plan_experts(expert, 3, x.dtype)
    assert_close(
        grouped.grouped_matmul(x, weight, tiles), reference.grouped_matmul(x, weight, expert), scale=4
    )


def test_x_may_be_cut_from_wider_rows(device: str) -> None:
    x = torch.randn(6, 40, device=device)[::2, 4:36]
    weight = torch.randn(4, 24, 32, device=device)
    expert = distinct(3, 4, 2, device)
    tiles = grouped.plan_experts(expert, 4, x.dtype)
    assert_close(
        grouped.grouped_matmul(x, weight, tiles), reference.grouped_matmul(x, weight, expert), scale=4
    )


@pytest.mark.parametrize(
    "experts", [[0] * 40, [5] * 40, list(range(6)) * 7, [3], [2, 2, 0, 5, 5, 5] * 11, []]
)
def test_tiles_cover_every_product_once_and_hold_one_expert(device: str, experts: list[int]) -> None:
    tiles = grouped.plan_experts(torch.tensor(experts, dtype=torch.int64, device=device), 6, torch.float32)
    order = tiles.order_N.tolist()
    covered: list[int] = []
    for expert, first, end in zip(
        tiles.expert_L.tolist(), tiles.first_L.tolist(), tiles.end_L.tolist(), strict=True
    ):
        if expert == 6:
            continue
        places = range(first, min(first + tiles.block_m, end))
        assert len(places) > 0
        assert all(experts[order[place]] == expert for place in places)
        covered.extend(places)
    assert covered == list(range(len(experts)))
    assert sorted(order) == list(range(len(experts)))


def test_no_rows_give_no_rows(device: str) -> None:
    tiles = grouped.plan_experts(torch.zeros(0, dtype=torch.int64, device=device), 4, torch.float32)
    found = grouped.grouped_matmul(
        torch.zeros(0, 8, device=device), torch.zeros(4, 12, 8, device=device), tiles
    )
    assert found.shape == (0, 12)


@pytest.mark.parametrize("case", ["inputs", "dtype", "products", "strided"])
def test_arguments_that_do_not_fit_are_refused(device: str, case: str) -> None:
    x, weight = torch.zeros(4, 8, device=device), torch.zeros(3, 12, 8, device=device)
    expert = torch.zeros(7 if case == "products" else 8, dtype=torch.int64, device=device)
    tiles = grouped.plan_experts(expert, 3, x.dtype)
    match case:
        case "inputs":
            weight = weight[:, :, :4].contiguous()
        case "dtype":
            weight = weight.half()
        case "strided":
            weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
        case _:
            pass
    with pytest.raises(KernelInputError):
        grouped.grouped_matmul(x, weight, tiles)


def test_expert_numbers_of_another_type_are_refused(device: str) -> None:
    with pytest.raises(KernelInputError):
        grouped.plan_experts(torch.zeros(8, dtype=torch.int32, device=device), 3, torch.float32)
