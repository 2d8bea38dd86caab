"""``fastdms bench profile``: where launches that overlap count, and a profile of a tiny model on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

import fastdms
from fastdms.cli import main
from fastdms.sampling_params import SamplingParams
from fastdms.tools.bench.profile import Launch, by_kernel, profile_steps
from fastdms.tools.shapes import SHAPES, random_model
from tests.models import save_checkpoint, tiny_model

TINY = ["bench", "profile", "--shape", "tiny", "--device", "cpu", "--window", "16", "--context", "64"]


def test_launches_that_overlap_count_once() -> None:
    """``a`` runs; ``b`` begins inside it and ends 3 later; ``c`` lies wholly inside; after a gap of 5, ``a`` again."""
    launches = [Launch("a", 0, 10), Launch("b", 4, 13), Launch("c", 5, 9), Launch("a", 18, 20)]
    for order in (launches, launches[::-1]):
        assert by_kernel(order, steps=2) == [
            {"name": "a", "launches": 1.0, "us": 6.0, "added_us": 6.0},
            {"name": "b", "launches": 0.5, "us": 9.0, "added_us": 1.5},
            {"name": "c", "launches": 0.5, "us": 4.0, "added_us": 0.0},
        ]


def test_a_step_of_a_tiny_model(capsys: pytest.CaptureFixture[str]) -> None:
    sampling = ["--temperature", "0.7", "--top-k", "5", "--top-p", "0.9"]
    assert main([*TINY, "--concurrency", "1", "2", "--repeats", "4", *sampling]) == 0
    out = capsys.readouterr().out
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert all((row["temperature"], row["top_k"], row["top_p"]) == (0.7, 5, 0.9) for row in rows)
    assert [(row["rows"], row["steps"], row["context"]) for row in rows] == [(1, 4, 64), (2, 4, 64)]
    for row in rows:
        kernels = {kernel["name"]: kernel for kernel in row["kernels"]}
        assert kernels["fastdms::decode_append"]["launches"] == kernels["fastdms::decode_attention"]["launches"] == 2
        assert kernels["fastdms::sample"]["launches"] == 1
        added = sum(kernel["added_us"] for kernel in row["kernels"])
        assert added + row["idle_us"] == pytest.approx(row["step_us"], abs=0.1)
        assert row["idle_us"] >= 0
        assert row["floor_us"] == pytest.approx((row["weight_bytes"] + row["live_bytes"]) / 3e12 * 1e6, abs=1e-3)
        # 2 x 2 spans of 128 bytes a token in fp32: the 16 + 1 tokens of the window are whole, and some of 80 are gone.
        assert 17 * 4 * row["rows"] < row["live_tokens"] < 80 * 4 * row["rows"]
        assert row["live_bytes"] == row["live_tokens"] * 128
        timeline = row["timeline"]
        assert [launch["layer"] for launch in timeline if launch["name"] == "fastdms::decode_attention"] == [0, 1]
        assert {launch["layer"] for launch in timeline} == {"head", 0, 1, "tail"}
        assert timeline[0]["begin_us"] == 0
        assert (timeline[-1]["name"], timeline[-1]["layer"]) == ("fastdms::sample", "tail")
        assert all(launch["gap_us"] >= 0 for launch in timeline)
    assert "2 rows x 64: " in out
    assert "added us" in out


def test_steps_that_do_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--new-tokens", "12", "--repeats", "3"]) == 2
    assert "3 steps take 13 new tokens of a context with room for 12" in capsys.readouterr().err


def test_prompts_of_many_chunks_need_no_more_room_than_the_steps(capsys: pytest.CaptureFixture[str]) -> None:
    """The last of 8 prompts is prefilled many steps after the first, which must not be decoded until then."""
    arguments = ["--concurrency", "8", "--prefill-chunk", "8", "--repeats", "3", "--new-tokens", "13"]
    assert main([*TINY, *arguments]) == 0
    (row,) = (json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{"))
    assert row["live_tokens"] > 8 * 4 * 17
    attention = [kernel for kernel in row["kernels"] if kernel["name"] == "fastdms::decode_attention"]
    assert attention[0]["launches"] == 2


def test_prompts_that_do_not_fit_together() -> None:
    with random_model(SHAPES["tiny"], None, device="cpu", max_concurrency=2, max_context=96, kv_memory=70_000) as model:
        prompts = [[1] * 64] * 2
        with pytest.raises(ValueError, match=r"1 of 2 rows were left after 3 steps: kv_memory is too small"):
            profile_steps(model, prompts, 3, SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=1))
        assert not model._open_engine().running


def test_quick_writes_a_page_and_lines_to_compare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model("llama", max_position_embeddings=4096)
    folder = save_checkpoint(model, tmp_path / "model", "adapter", window_tokens=7)
    monkeypatch.setattr(fastdms, "default_model", lambda: folder)
    page, lines = tmp_path / "page.html", tmp_path / "lines.json"
    command = ["bench", "profile", "--quick", "--context", "40", "--html", str(page), "--json", str(lines)]
    assert main(command) == 0
    (row,) = (json.loads(line) for line in lines.read_text().splitlines())
    root = ElementTree.fromstring(page.read_text())
    names = [cell.get("title") for cell in root.iterfind(".//table[@class='kernels']//td[@class='name']")]
    assert names == [kernel["name"] for kernel in row["kernels"]]
    assert len(root.findall(".//svg[@class='timeline']/text")) == 4, "head, two layers and tail"
    assert f"fastdms {' '.join(command)}" in "".join(root.itertext())
    capsys.readouterr()
    assert main(["bench", "compare", str(lines), str(lines)]) == 0
    assert " +0.0  fastdms::decode_attention" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["no-such-folder/page.html", "."])
def test_a_page_that_cannot_be_written_is_refused_first(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--html", name]) == 2
    assert "must be a file in a folder that exists" in capsys.readouterr().err
