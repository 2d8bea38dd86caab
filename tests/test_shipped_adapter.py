"""The adapter that comes with the package: what it declares, and that it evicts much at little cost."""

from __future__ import annotations

from pathlib import Path

import pytest

import fastdms
from fastdms.bundled_model import GGUF_SHA256
from fastdms.checkpoint import open_checkpoint
from fastdms.checkpoint.adapter_file import read_adapter
from fastdms.config import DMSConfig
from fastdms.tools.quality.masked import measure_masked, relative_differences
from fastdms.tools.quality.measure import measure, open_subject
from fastdms.tools.quality.settings import Settings
from fastdms.tools.quality.texts import read_texts
from tests.tolerance import QUALITY_RELATIVE

ASSETS = Path(fastdms.__file__).parent / "assets"
ADAPTER = ASSETS / "smollm2-135m-dms" / "adapter.safetensors"
# The project's bound for the shipped adapter, on the passage of this test.
MOST_KEPT_OUTSIDE, MOST_KLD = 0.25, 0.03


def test_the_default_model_declares_it() -> None:
    adapter = read_adapter(ADAPTER)
    assert adapter.base_sha256 == GGUF_SHA256
    assert (adapter.num_layers, adapter.num_kv_heads) == (30, 3)
    assert adapter.dms == DMSConfig(window_tokens=256, shift=1, source="adapter", target_compression=5.0)
    assert open_checkpoint(fastdms.default_model()).dms == adapter.dms
    assert open_checkpoint(fastdms.default_model(adapter=False)).dms is None


def test_it_names_no_path_of_the_machine_it_was_trained_on() -> None:
    config = read_adapter(ADAPTER).training["config"]
    assert config["model"] is None
    assert config["sources"] == ["corpus/train"]


def test_runtime_and_transformers_agree_on_what_it_costs() -> None:
    """On a passage of a book that it was not trained on; the last tokens through the decode path."""
    settings = Settings(
        context=900, prompt_tokens=868, sequences=1, prefill_points=0, kv_dtypes=("fp32",), device="cpu"
    )
    subject = open_subject(fastdms.default_model(), read_texts([ASSETS / "demo.txt"]), settings)
    (runtime,), (masked,) = measure(subject), measure_masked(subject)
    for name, difference in relative_differences(runtime, masked).items():
        assert difference == pytest.approx(0.0, abs=QUALITY_RELATIVE), name
    assert runtime["live_share_outside_window"] <= MOST_KEPT_OUTSIDE
    assert runtime["decode"]["kld"] <= MOST_KLD
