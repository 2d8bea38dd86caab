"""Every numeric tolerance of the test suite, named once, and the assertions that apply them."""

from __future__ import annotations

import torch

# fp32 runtime against the fp32 transformers oracle: the runtime's sums run in another order, nothing else differs.
LOGITS_RELATIVE = 1e-4

# What eviction costs by the runtime against the written-out evaluation in transformers, as a share of it; for a trained
# checkpoint or on a GPU, where a decision near its threshold may fall either way.
QUALITY_RELATIVE = 0.01

# A kernel may be this many times as far from fp64 as the plain low-precision reference plus one rounding of its result.
ERROR_BUDGET_FACTOR = 2.0


def assert_logits_close(actual: torch.Tensor, expected: torch.Tensor, relative: float = LOGITS_RELATIVE) -> None:
    """actual, expected: [..., vocab]. For each row: max |actual - expected| <= relative * max |expected|.

    Row by row, so that a wrong row can't hide among rows of larger logits. NaN and infinity fail.
    """
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    actual, expected = actual.double().cpu(), expected.double().cpu()
    error = (actual - expected).abs().amax(dim=-1) / expected.abs().amax(dim=-1)
    bad = ~(error <= relative)
    if bad.any():
        rows = bad.nonzero()
        worst = error.nan_to_num(nan=torch.inf, posinf=torch.inf).max()
        raise AssertionError(
            f"{len(rows)} of {bad.numel()} rows differ by more than {relative:g} of the row's largest logit; "
            f"worst {worst:.3g}, first row {rows[0].tolist()} with {error[tuple(rows[0])]:.3g}"
        )


def rounding_band(oracle: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The most that rounding an element of ``oracle`` to ``dtype`` can move it: half the distance of its neighbours.

    oracle: any shape, fp64. Below the smallest normal number the distance is constant.
    """
    info = torch.finfo(dtype)
    return 0.5 * info.eps * oracle.double().abs().clamp_min(info.smallest_normal)


def assert_within_error_budget(
    actual: torch.Tensor, reference: torch.Tensor, oracle: torch.Tensor, dtype: torch.dtype | None = None
) -> None:
    """actual: the kernel's result; reference: the plain implementation in the same low precision; oracle: in fp64.

    The kernel's error against the oracle may be at most twice (the reference's own error + one rounding band of the
    dtype), once for the largest element and once for the root mean square, so that neither one bad element nor a
    small error everywhere passes. No rtol is picked by hand: a hard problem has a larger reference error.

    dtype: whose rounding counts; that of ``actual`` when None (for results kept in fp32 of fp8 storage, say).
    """
    assert actual.shape == reference.shape == oracle.shape, f"{actual.shape}, {reference.shape}, {oracle.shape}"
    assert oracle.dtype == torch.float64, f"the oracle must be fp64, got {oracle.dtype}"
    if actual.numel() == 0:
        return
    oracle = oracle.cpu()
    band = rounding_band(oracle, dtype or actual.dtype)
    error, reference_error = ((x.cpu().double() - oracle).abs() for x in (actual, reference))
    for name, norm in (("largest", torch.Tensor.amax), ("root mean square", _rms)):
        budget = ERROR_BUDGET_FACTOR * (norm(reference_error) + norm(band))
        assert norm(error) <= budget, (
            f"{name} error {norm(error):.3g} exceeds its budget {budget:.3g} = {ERROR_BUDGET_FACTOR:g} * "
            f"(reference error {norm(reference_error):.3g} + rounding band {norm(band):.3g})"
        )


def _rms(x: torch.Tensor) -> torch.Tensor:
    return x.square().mean().sqrt()
