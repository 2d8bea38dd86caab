"""Each field of SamplingParams: what it takes, and that its refusal names it."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdms.sampling_params import SamplingParams

REFUSED = {
    "temperature": [-1e-9, -1, float("inf"), float("nan"), "hot", "1", True, None, 10**400, 1j],
    "top_p": [0, -1, 1.0000001, float("nan"), float("inf"), "1", True, None],
    "top_k": [-2, 1.0, float("nan"), "1", True, None],
    "min_p": [-0.1, 1.1, float("nan"), float("inf"), "0", False, None],
    "presence_penalty": [-2.1, 2.0001, float("nan"), float("inf"), "1", True, None, 10**400],
    "frequency_penalty": [-2.1, 2.0001, float("nan"), -float("inf"), "1", True, None],
    "repetition_penalty": [0, -1, 2.0001, float("nan"), float("inf"), "1", True, None],
    "max_tokens": [0, -1, 2**31 + 1, 10**12, 1.0, "16", True, None],
    "min_tokens": [-1, 257, 1.0, "1", True, None],
    "stop": ["", [""], ["a", ""], [1], ["a", None], 7, b"a", {"a"}, ["x"] * 17, "x" * 1025, True],
    "stop_token_ids": [[-1], ["1"], [1.0], [True], [None], 1, "1", [2**31], list(range(17)), {1}],
    "seed": [-1, 2**63, 1.0, "7", True],
    "logprobs": [-1, 21, 10**9, 1.0, "5", True],
    "ignore_eos": [None, 1, "yes"],
}
TAKEN = {
    "temperature": [0, 1e-8, 1e-4, 100, np.float32(0.5), 1e30],
    "top_p": [1e-8, 1e-3, 1, np.float64(0.9)],
    "top_k": [-1, 0, 1, 300, 10**9, np.int64(5)],
    "min_p": [0, 1, 0.5],
    "presence_penalty": [-2, 0, 2, np.float32(0.5)],
    "frequency_penalty": [-2, 0, 2, 1e-300],
    "repetition_penalty": [5e-324, 0.5, 1, 2, np.float64(1.1)],
    "max_tokens": [1, 2**31, np.int32(3)],
    "min_tokens": [0, 256],
    "stop": [None, "a", ["a", "ab"], ("x",), ["x"] * 16, "x" * 1024, "👩‍👩‍👧‍👦", []],
    "stop_token_ids": [None, [], [0, 5], (7,), [np.int64(3)]],
    "seed": [None, 0, 2**63 - 1],
    "logprobs": [None, 0, 20],
    "ignore_eos": [True, False],
}


def cases(table):
    return [pytest.param(name, value, id=f"{name}-{i}") for name in table for i, value in enumerate(table[name])]


def test_every_field_has_cases():
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    assert set(REFUSED) == names
    assert set(TAKEN) == names


@pytest.mark.parametrize(("name", "value"), cases(REFUSED))
def test_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be .+, got ") as refusal:
        SamplingParams(**{name: value})
    assert len(str(refusal.value)) < 300
    if name not in ("stop", "stop_token_ids") and value != 10**400:
        assert repr(value) in str(refusal.value)


@pytest.mark.parametrize(("name", "value"), cases(TAKEN))
def test_taken(name, value):
    params = SamplingParams(**{name: value})
    if name == "stop":
        expected = (value,) if isinstance(value, str) else tuple(value or ())
        assert params.stop_strings == params.stop == expected
    elif name == "stop_token_ids":
        assert params.stop_ids == params.stop_token_ids == tuple(value or ())
    else:
        assert getattr(params, name) == value
    assert type(getattr(params, name)) in (int, float, bool, tuple, type(None)), "plain Python types only"


def test_min_tokens_may_not_exceed_max_tokens():
    assert SamplingParams(max_tokens=3, min_tokens=3).min_tokens == 3
    with pytest.raises(ValueError, match=r"^min_tokens must be an integer in \[0, max_tokens = 3\], got 4$"):
        SamplingParams(max_tokens=3, min_tokens=4)


def test_they_are_values():
    params = SamplingParams(stop=["a"], stop_token_ids=[1], temperature=np.float64(0.5))
    assert hash(params) == hash(SamplingParams(stop="a", stop_token_ids=(1,), temperature=0.5))
    assert copy.deepcopy(params) == pickle.loads(pickle.dumps(params)) == dataclasses.replace(params) == params
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.seed = 1  # type: ignore[misc]


texts = st.text(max_size=5)
numbers = st.one_of(st.booleans(), st.integers(), st.floats())
anything = st.one_of(
    st.none(), numbers, texts, st.binary(), st.lists(texts), st.lists(numbers), st.tuples(texts, numbers)
)


@given(st.dictionaries(st.sampled_from(sorted(TAKEN)), anything))
def test_nothing_but_a_value_error_ever_comes_out(fields):
    try:
        params = SamplingParams(**fields)
    except ValueError as error:
        message = str(error)
    else:
        assert params.temperature >= 0
        assert 0 < params.top_p <= 1
        assert 0 <= params.min_tokens <= params.max_tokens <= 2**31
        return
    assert message.split(" ")[0] in TAKEN
