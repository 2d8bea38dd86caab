"""The folder of one training run: settings, log and state, written so that no interruption spoils them."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastdms.checkpoint.json_file import read_json_object
from fastdms.tools.retrofit.settings import RetrofitSettings

__all__ = ["RunFolder"]

_SETTINGS, _LOG, _STATE = "run.json", "log.jsonl", "state.pt"


class RunFolder:
    """``run.json`` (what was asked for), ``log.jsonl`` (a line a step), ``state.pt`` (until the run is done).

    Raises ValueError, naming the file, for a folder that holds another run, none, or a damaged one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def log_path(self) -> Path:
        return self.path / _LOG

    @property
    def checkpoint(self) -> Path:
        """Where the finished model goes."""
        return self.path / "final"

    def check_free(self) -> None:
        """ValueError unless a run can begin here."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file; choose another --out")
        if self.path.is_dir() and any(self.path.iterdir()):
            raise ValueError(f"{self.path} is not empty; go on with its run by --resume, or choose another --out")

    def create(self, settings: RetrofitSettings, about: dict[str, Any]) -> None:
        """Begin a run in an empty or missing folder. about: model, sources of text, and their digests."""
        self.check_free()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"can't make the folder {self.path}: {error}") from error
        self._replace(_SETTINGS, json.dumps({"settings": asdict(settings), **about}, indent=2) + "\n")

    def read(self) -> tuple[RetrofitSettings, dict[str, Any]]:
        """The settings and ``about`` of the run that was begun here."""
        path = self.path / _SETTINGS
        if not path.is_file():
            raise ValueError(f"{self.path} holds no training run: {_SETTINGS} is missing")
        about = read_json_object(path)
        try:
            values = dict(about.pop("settings"))
            chosen = values["trainable"]
            settings = RetrofitSettings(**(values | {"trainable": None if chosen is None else tuple(chosen)}))
            for key in ("model", "sources", "text_sha256", "base_sha256", "device"):
                about[key]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} doesn't describe a training run: {error}") from error
        return settings, about

    def log(self) -> list[dict[str, Any]]:
        """The lines of the log up to the first that is not whole, which a run that was killed may have left."""
        if not self.log_path.exists():
            return []
        lines = []
        for line in self.log_path.read_text(encoding="utf-8").splitlines():
            try:
                value = json.loads(line)
                int(value["step"])
            except (ValueError, TypeError, KeyError):
                break
            lines.append(value)
        return lines

    def cut_log(self, steps: int) -> None:
        """Keep the first ``steps`` steps: what a killed run logged after its last state happens again."""
        kept = [json.dumps(line) + "\n" for line in self.log() if line["step"] < steps]
        self._replace(_LOG, "".join(kept))

    def append_log(self, line: dict[str, Any]) -> None:
        """Add one step."""
        try:
            with self.log_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise self._unwritable(error) from error

    def save_state(self, state: dict[str, Any]) -> None:
        """Replace the state in one go: until the new one is whole on the disk, the old one stays."""
        new = self.path / (_STATE + ".new")
        try:
            torch.save(state, new)
            with new.open("rb") as file:
                os.fsync(file.fileno())
            new.replace(self.path / _STATE)
        except (OSError, RuntimeError) as error:
            new.unlink(missing_ok=True)
            raise self._unwritable(error) from error

    def load_state(self) -> dict[str, Any] | None:
        """The last state saved; None if there is none yet."""
        path = self.path / _STATE
        if not path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(state, dict) or not {"parameters", "optimizer", "done", "trained_s"} <= state.keys():
                raise ValueError("it holds something else")
            return state
        except Exception as error:  # torch.load raises whatever its unpickler and zip reader do
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{path} is damaged, and the run can't go on from it: {reason}") from error

    def drop_state(self) -> None:
        """The run is done."""
        (self.path / _STATE).unlink(missing_ok=True)

    def _replace(self, name: str, text: str) -> None:
        new = self.path / (name + ".new")
        try:
            new.write_text(text, encoding="utf-8")
            new.replace(self.path / name)
        except OSError as error:
            new.unlink(missing_ok=True)
            raise self._unwritable(error) from error

    def _unwritable(self, error: Exception) -> ValueError:
        return ValueError(
            f"can't write the run in {self.path}: {error}; its last whole state is kept: make room and go on with "
            "--resume"
        )
