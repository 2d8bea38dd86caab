"""Hub ids, without a network: from the local cache, from a stand-in for the hub, and every way not to get a model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from fastdms.checkpoint import open_checkpoint
from fastdms.checkpoint.hub import is_hub_id
from tests.checkpoint.files import assert_same_tensors
from tests.models import dms_config, save_checkpoint, tiny_model

HUB_ID = "some-owner/Tiny-1.5"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no way to the hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def _fill(cache: Path) -> Path:
    """Puts a model into the cache as the hub's client lays it out; returns the snapshot's folder."""
    storage = cache / "models--some-owner--Tiny-1.5"
    (storage / "refs").mkdir(parents=True)
    (storage / "refs" / "main").write_text(COMMIT)
    return save_checkpoint(tiny_model("qwen3"), storage / "snapshots" / COMMIT, "nvidia")


def test_offline_with_a_cached_copy(cache: Path) -> None:
    folder = _fill(cache)
    checkpoint = open_checkpoint(HUB_ID)
    assert checkpoint.name == HUB_ID
    assert checkpoint.tokenizer_path == folder
    assert checkpoint.dms == dms_config("nvidia")
    assert_same_tensors(checkpoint, dict(open_checkpoint(folder).tensors()))


def test_offline_without_a_copy(cache: Path) -> None:
    with pytest.raises(ValueError, match=rf"^{HUB_ID} could not be fetched .*give the path of a folder") as caught:
        open_checkpoint(HUB_ID)
    assert "\n" not in str(caught.value)


def test_offline_with_half_a_copy(cache: Path) -> None:
    (_fill(cache) / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has neither model\.safetensors nor"):
        open_checkpoint(HUB_ID)


def test_folder_of_that_name_comes_first(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("llama").save_pretrained(tmp_path / HUB_ID)
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint(HUB_ID).config.family == "llama"


def _hub(remote: Path, local: Path) -> Callable[..., str]:
    """Stands in for the hub's client: copies what the patterns select."""

    def download(repo_id: str, *, allow_patterns: list[str], local_files_only: bool = False) -> str:
        assert repo_id == HUB_ID
        names = [str(path.relative_to(remote)) for path in remote.rglob("*") if path.is_file()]
        for name in names:
            if not any(fnmatch(name, pattern) for pattern in allow_patterns):
                continue
            (local / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(remote / name, local / name)
        return str(local)

    return download


def test_downloads_what_is_needed_and_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote, local = tmp_path / "remote", tmp_path / "local"
    save_checkpoint(tiny_model("llama"), remote, "shisa")
    wanted = {path.name for path in remote.iterdir()} | {
        *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt"),
        *("chat_template.jinja", "special_tokens_map.json"),
    }
    unwanted = {"pytorch_model.bin", "consolidated.safetensors", "model.gguf", "modeling_dms.py", "README.md", "a.pth"}
    for name in wanted | unwanted:
        if not (remote / name).exists():
            (remote / name).write_text("x")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", _hub(remote, local))
    checkpoint = open_checkpoint(HUB_ID)
    assert {path.name for path in local.iterdir()} == wanted
    assert checkpoint.dms == dms_config("shisa")


def test_sharded_model_arrives_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote, local = tmp_path / "remote", tmp_path / "local"
    tiny_model("qwen2").save_pretrained(remote, max_shard_size="60KB")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", _hub(remote, local))
    assert_same_tensors(open_checkpoint(HUB_ID), dict(open_checkpoint(remote).tensors()))


def _response(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://hub.invalid"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RepositoryNotFoundError("404", response=_response(404)), "the hub has no model .*check the name"),
        (GatedRepoError("403", response=_response(403)), "only to accounts that accepted its terms"),
        (httpx.ProxyError("proxy said no\nat length"), r"could not be fetched.*\(proxy said no\); connect once"),
        (httpx.ConnectError("Name or service not known"), r"could not be fetched.*\(Name or service not known\)"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_what_could_not_be_had(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*args: Any, **kwargs: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ValueError, match=f"(?s){message}") as caught:
        open_checkpoint(HUB_ID)
    assert HUB_ID in str(caught.value)
    assert caught.value.__cause__ is error


def test_cached_copy_serves_when_the_client_gives_up(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client itself falls back for some failures only: not for a proxy's, for one."""
    folder, real = _fill(cache), huggingface_hub.snapshot_download

    def download(*args: Any, local_files_only: bool = False, **kwargs: Any) -> Any:
        if not local_files_only:
            raise httpx.ProxyError("no way through")
        return real(*args, local_files_only=True, **kwargs)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert open_checkpoint(HUB_ID).tokenizer_path == folder


@pytest.mark.parametrize("text", ["a/b", "shisa-ai/Llama-3.2-1B-DMS-8x", "nvidia/Qwen3-8B-DMS-8x", "0x/y_z"])
def test_hub_ids(text: str) -> None:
    assert is_hub_id(text)


@pytest.mark.parametrize(
    "text", ["", "a", "/a/b", "a/b/c", "./a", "../a", "a/..", "a b/c", "~/a", "a/b\n", "a\\b", "/"]
)
def test_texts_that_are_no_hub_ids(text: str) -> None:
    assert not is_hub_id(text)
