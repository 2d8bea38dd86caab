"""``fastdms kv-error``: how it stores fp8 without a scale, and that the runtime is as before afterwards."""

from __future__ import annotations

import pytest
import torch

from fastdms.ops import quantise
from fastdms.tools.kv_error import _no_scale
from tests.source_tree import imports


def _stored(x: torch.Tensor) -> tuple[list[float], list[float]]:
    data, scale = quantise.quantise(x, torch.float8_e4m3fn)
    assert scale is not None
    return data.float().flatten().tolist(), scale.float().flatten().tolist()


def test_without_a_scale_numbers_are_cast_and_clamped() -> None:
    x = torch.tensor([[1.0, 600.0, -0.0625]])
    with _no_scale():
        assert _stored(x) == ([1.0, 448.0, -0.0625], [1.0])
    assert _stored(x)[1] != [1.0]


def test_the_quantiser_comes_back_whatever_happens() -> None:
    before = quantise.quantise
    with pytest.raises(KeyboardInterrupt):
        _fail_without_a_scale()
    assert quantise.quantise is before


def _fail_without_a_scale() -> None:
    with _no_scale():
        raise KeyboardInterrupt


def test_the_package_uses_no_test_tools() -> None:
    assert [i for i in imports() if i.target.split(".")[0] in ("unittest", "pytest", "hypothesis")] == []
