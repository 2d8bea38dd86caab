"""Checkpoints as written by the trainer: read back by our loader and by transformers, whole or not there at all."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastdms
import fastdms.tools.checkpoint_folder as module
from fastdms.checkpoint import open_checkpoint
from fastdms.config import DMSConfig
from fastdms.tools.retrofit.export import write_checkpoint
from tests import oracle
from tests.checkpoint.files import assert_same_tensors
from tests.models import DMS_LAYOUTS, Layout, adapter_weights, dms_config, save_checkpoint, tiny_model, tiny_tokens
from tests.tiny_tokenizers import byte_level
from tests.tolerance import assert_logits_close

FAMILIES = ("llama", "llama_bias", "qwen3", "mistral")
TRAINING = {"config": {"steps": 3}, "last": {"kl": 0.25}}


def rule_of(layout: Layout, **changes: Any) -> DMSConfig:
    rule = dms_config(layout, window_tokens=9)
    assert rule is not None
    return replace(rule, **changes)


def adapter_tensors(model: Any) -> dict[str, torch.Tensor]:
    prefix = "model.layers.{}.self_attn.dms_proj_alpha{}.weight"
    return {
        prefix.format(layer, suffix): tensor
        for layer, (norm, weight) in adapter_weights(model).items()
        for suffix, tensor in (("", weight), ("_norm", norm))
    }


def write(folder: Path, base: Path, layout: Layout, rule: DMSConfig, tensors: Any = None, **changes: Any) -> Path:
    """Export the checkpoint in ``base``; with an adapter for that layout."""
    if tensors is None:
        tensors = dict(open_checkpoint(base).tensors())
        if layout == "adapter":
            tensors |= adapter_tensors(AutoModelForCausalLM.from_pretrained(base))
        tensors = tensors.items()
    arguments = {
        "config_values": json.loads((base / "config.json").read_text()),
        "tensors": tensors,
        "dms": rule,
        "layout": layout,
        "tokenizer_path": base,
        "training": TRAINING,
    }
    return write_checkpoint(folder, **arguments | changes)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_checkpoint(tiny_model("llama"), tmp_path_factory.mktemp("base"))
    byte_level().save_pretrained(folder)
    (folder / "notes.txt").write_text("not part of a tokenizer")
    return folder


@pytest.mark.parametrize("layout", DMS_LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_what_was_trained(family: str, layout: Layout, tmp_path: Path) -> None:
    model = tiny_model(family)
    rule = rule_of(layout, alpha_scale=20.0, alpha_offset=0.5, target_compression=2.5)
    base = save_checkpoint(model, tmp_path / "base")
    folder = write(tmp_path / "out", base, layout, rule)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.dms == rule
    assert checkpoint.config == open_checkpoint(base).config
    expected = dict(open_checkpoint(base).tensors())
    assert_same_tensors(checkpoint, expected | (adapter_tensors(model) if layout == "adapter" else {}))

    ids = tiny_tokens(60)
    run = oracle.run(model, ids, rule, adapter_weights(model) if layout == "adapter" else None)
    assert not run.kept.all(), "nothing was evicted: the case tests nothing"
    with fastdms.compile(folder, device="cpu", kv_dtype="fp32", max_context=64, max_concurrency=1) as compiled:
        assert_logits_close(compiled.score(ids, 40), run.logits[39:])
        assert compiled.kv_report().live_tokens.tolist() == run.kept.sum(-1).tolist()
    plain = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(plain(torch.tensor([ids])).logits, model(torch.tensor([ids])).logits)


# What the published folders have; "-" stands for no dms_metadata.json.
PUBLIC = [
    ("qwen3", "nvidia", "-"),
    ("llama", "nvidia", {"shift": 1, "zero_borrowed": "pre_and_post_rope"}),
    ("qwen3", "adapter", "-"),
    ("llama", "adapter", "-"),
    ("qwen3", "shisa", {}),
    ("llama", "shisa", {}),
]


@pytest.mark.parametrize(("family", "layout", "more"), PUBLIC)
def test_the_files_are_those_of_the_public_layouts(family: str, layout: Layout, more: Any, tmp_path: Path) -> None:
    base = save_checkpoint(tiny_model(family), tmp_path / "base")
    folder = write(tmp_path / "out", base, layout, rule_of(layout, target_compression=8.0))
    written, before = (json.loads((path / "config.json").read_text()) for path in (folder, base))
    separate = {"dms_separate_alpha": True, "dms_alpha_per": "head"} if layout == "adapter" else {}
    keys = {"dms_window_size": 9, "dms_alpha_scale": 100.0, "dms_initial_alpha_offset": 5.0, "dms_cr": 8}
    if layout != "shisa":
        keys["dms_paged_attention_block_size"] = 8  # their runtime wants it to be smaller than the window
    assert written == before | keys | separate
    assert '"dms_cr": 8,' in (folder / "config.json").read_text().replace("\n", ",\n")
    path = folder / "dms_metadata.json"
    if more == "-":
        assert not path.exists()
    else:
        assert json.loads(path.read_text()) == more | {
            "window_size": 9,
            "alpha_scale": 100.0,
            "alpha_offset": 5.0,
            "target_cr": 8,
            "context_len": 1024,
            "compression_mode": "uniform",
        }


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ("shisa", {"shift": 1}),
        ("shisa", {"zero_borrowed": "none"}),
        ("nvidia", {"shift": 0}),
        ("nvidia", {"zero_borrowed": "pre_rope"}),
        ("adapter", {"shift": 0}),
        ("adapter", {"target_compression": None}),
        ("shisa", {"target_compression": None}),
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_rule_that_the_layout_does_not_imply_is_stated(
    family: str, layout: Layout, changes: Any, tmp_path: Path
) -> None:
    rule = rule_of(layout, **changes)
    base = save_checkpoint(tiny_model(family), tmp_path / "base")
    assert open_checkpoint(write(tmp_path / "out", base, layout, rule)).dms == rule


def test_tokenizer_training_and_mode(base: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "new" / "out", base, "shisa", rule_of("shisa"))
    names = {"config.json", "dms_metadata.json", "model.safetensors", "training.json", "generation_config.json"}
    names |= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {path.name for path in folder.iterdir()} == names
    assert json.loads((folder / "training.json").read_text()) == TRAINING
    text = "hello, tokenizer"
    assert AutoTokenizer.from_pretrained(folder)(text) == AutoTokenizer.from_pretrained(base)(text)
    (tmp_path / "plain").mkdir()
    assert folder.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


def test_keys_of_another_rule_and_of_other_code_are_dropped(base: Path, tmp_path: Path) -> None:
    values = json.loads((base / "config.json").read_text()) | {
        "dms_disable_eviction": True,
        "dms_separate_alpha": True,
        "auto_map": {"AutoModelForCausalLM": "modeling_llama_dms.LlamaForCausalLM"},
    }
    folder = write(tmp_path / "out", base, "shisa", rule_of("shisa"), config_values=values)
    assert open_checkpoint(folder).dms == rule_of("shisa")
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def test_large_weights_are_sharded(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 60_000
    monkeypatch.setattr(module, "SHARD_BYTES", limit)
    folder = write(tmp_path / "out", base, "adapter", rule_of("adapter"))
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    assert [path.name for path in shards] == [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]
    largest = max(tensor.nbytes for _, tensor in open_checkpoint(base).tensors())
    assert all(path.stat().st_size < max(limit, largest) + 4096 for path in shards)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = dict(open_checkpoint(folder).tensors())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert_same_tensors(open_checkpoint(base), {k: v for k, v in tensors.items() if "dms_" not in k})
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(plain.model.embed_tokens.weight, tensors["model.embed_tokens.weight"])


def test_views_and_strided_tensors_are_written_as_they_look(base: Path, tmp_path: Path) -> None:
    tensors = dict(open_checkpoint(base).tensors())
    names = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "kv"]
    expected = dict(tensors)
    fused = torch.cat([tensors[name] for name in names])
    tensors |= dict(zip(names, fused.chunk(2), strict=True))
    tensors["model.layers.0.self_attn.o_proj.weight"] = (
        tensors["model.layers.0.self_attn.o_proj.weight"].t().clone().t()
    )
    folder = write(tmp_path / "out", base, "shisa", rule_of("shisa"), tensors.items())
    assert_same_tensors(open_checkpoint(folder), expected)


def test_bf16_stays_bf16_beside_a_fp32_adapter(base: Path, tmp_path: Path) -> None:
    model = tiny_model("llama")
    tensors = {name: tensor.bfloat16() for name, tensor in open_checkpoint(base).tensors()} | adapter_tensors(model)
    folder = write(tmp_path / "out", base, "adapter", rule_of("adapter"), tensors.items())
    assert open_checkpoint(folder).config.weight_dtype == torch.bfloat16
    assert_same_tensors(open_checkpoint(folder), tensors)


@pytest.mark.parametrize("layout", ["nvidia", "shisa"])
def test_a_rule_of_another_source_is_refused(base: Path, tmp_path: Path, layout: Layout) -> None:
    with pytest.raises(ValueError, match=f"layout {layout} can't declare a rule with source 'adapter'"):
        write(tmp_path / "out", base, layout, rule_of("adapter"))
    with pytest.raises(ValueError, match="layout adapter can't declare a rule with source 'borrowed_q'"):
        write(tmp_path / "out", base, "adapter", rule_of(layout))
    with pytest.raises(ValueError, match=f"the layout {layout} can't declare .*prefill='dense'"):
        write(tmp_path / "out", base, layout, rule_of(layout, prefill="dense"))
    with pytest.raises(ValueError, match="layout must be adapter, nvidia or shisa, got 'mine'"):
        write(tmp_path / "out", base, "mine", rule_of(layout))  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensors": []}, "there are no tensors to write"),
        ({"tensors": [("a", torch.ones(2))] * 2}, "tensor a occurs twice"),
        ({"tensors": [("model.embed_tokens.weight", torch.ones(2).double())]}, "is F64; supported are F32"),
        ({"tokenizer_path": Path("no-such-folder")}, "tokenizer_path must be a folder"),
        ({"config_values": {"model_type": "gpt2"}}, "model_type 'gpt2'"),
    ],
)
def test_what_makes_no_checkpoint_leaves_nothing(
    base: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "out", base, "shisa", rule_of("shisa"), **changes)
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_is_taken_and_a_full_one_is_not(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    assert write(folder, base, "shisa", rule_of("shisa")) == folder
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match="is not an empty folder; nothing is overwritten"):
        write(folder, base, "nvidia", rule_of("nvidia"))
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ValueError, match="is not an empty folder"):
        write(tmp_path / "file", base, "shisa", rule_of("shisa"))
    with pytest.raises(ValueError, match=r"can't write .*file/out"):
        write(tmp_path / "file" / "out", base, "shisa", rule_of("shisa"))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]


def test_an_interruption_leaves_nothing(base: Path, tmp_path: Path) -> None:
    def interrupted() -> Iterator[tuple[str, torch.Tensor]]:
        yield from list(open_checkpoint(base).tensors())[:4]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", base, "shisa", rule_of("shisa"), interrupted())
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_error_and_leaves_nothing(base: Path, tmp_path: Path) -> None:
    """A file size limit stands for the disk: writing fails half way through the weights."""
    script = """
import sys
from pathlib import Path
from tests.tools.test_export import rule_of, write
try:
    write(Path(sys.argv[2]), Path(sys.argv[1]), "shisa", rule_of("shisa"))
except ValueError as error:
    sys.exit(str(error))
"""

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    assert (base / "model.safetensors").stat().st_size > 200_000
    done = subprocess.run(
        [sys.executable, "-c", script, str(base), str(tmp_path / "out")],
        preexec_fn=limited,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"can't write {tmp_path / 'out'}: ")
    assert not list(tmp_path.iterdir())
