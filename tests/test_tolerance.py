from __future__ import annotations

import pytest
import torch

from tests.tolerance import LOGITS_RELATIVE, assert_logits_close, assert_within_error_budget, rounding_band


def _rows() -> torch.Tensor:
    return torch.stack([torch.linspace(-1, 1, 50), torch.linspace(-1000, 1000, 50)])


def test_logits_close_is_judged_row_by_row() -> None:
    expected = _rows()
    off = expected.clone()
    off[1, 3] += 0.9 * LOGITS_RELATIVE * 1000
    assert_logits_close(off, expected)
    off = expected.clone()
    off[0, 3] += 2 * LOGITS_RELATIVE
    with pytest.raises(AssertionError, match=r"1 of 2 rows .* first row \[0\]"):
        assert_logits_close(off, expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_close_refuses_non_finite(value: float) -> None:
    off = _rows()
    off[0, 3] = value
    with pytest.raises(AssertionError, match="1 of 2 rows"):
        assert_logits_close(off, _rows())


def test_logits_close_refuses_another_shape() -> None:
    with pytest.raises(AssertionError, match="shape"):
        assert_logits_close(_rows()[:1], _rows())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_rounding_stays_within_its_band(dtype: torch.dtype) -> None:
    exact = torch.linspace(-300, 300, 4001, dtype=torch.float64)
    assert ((exact.to(dtype).double() - exact).abs() <= rounding_band(exact, dtype)).all()


def _matmul_case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 64, generator=generator).bfloat16() for _ in range(2))
    oracle = a.double() @ b.double()
    return oracle.to(torch.bfloat16), a @ b, oracle


def test_error_budget_accepts_a_correct_result() -> None:
    assert_within_error_budget(*_matmul_case())


@pytest.mark.parametrize(("spoil", "message"), [("one", "largest"), ("all", "root mean square"), ("nan", "largest")])
def test_error_budget_refuses_a_wrong_one(spoil: str, message: str) -> None:
    actual, reference, oracle = _matmul_case()
    if spoil == "one":
        actual[5, 5] += 1
    elif spoil == "all":
        actual = (oracle + 0.2 * torch.sign(oracle)).to(torch.bfloat16)
    else:
        actual[5, 5] = torch.nan
    with pytest.raises(AssertionError, match=message):
        assert_within_error_budget(actual, reference, oracle)


def test_error_budget_of_nothing() -> None:
    empty = torch.zeros(0, 4)
    assert_within_error_budget(empty, empty, empty.double())
