"""Begin, carry on and finish a training run."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastdms import __version__
from fastdms.checkpoint import Checkpoint
from fastdms.progress import progress
from fastdms.tokenizer import load_tokenizer
from fastdms.tools.retrofit.base import folder_of, load_base, open_base
from fastdms.tools.retrofit.plot import plot_log
from fastdms.tools.retrofit.run_folder import RunFolder
from fastdms.tools.retrofit.settings import RetrofitSettings
from fastdms.tools.retrofit.text import pack, read_documents, text_digest
from fastdms.tools.retrofit.trainer import Trainer
from fastdms.tools.retrofit.write import base_sha256, write_result

__all__ = ["begin", "resume"]

SAVE_EVERY_STEPS = 100


def begin(model: str | None, sources: list[str], out: Path, settings: RetrofitSettings, device: torch.device) -> Path:
    """Retrofit ``model`` with text from ``sources``; returns the finished checkpoint.

    model: a folder or hub id; None: the base of the default model.

    Raises ValueError for a checkpoint that has DMS already or can't be trained, for too little text, and for an ``out``
    that isn't empty or lies within the text; KeyboardInterrupt, after saving, when interrupted.
    """
    checkpoint = open_base(model, settings)
    folder = RunFolder(out)
    folder.check_free()
    _check_apart(out, sources)
    contexts = pack(read_documents(sources), load_tokenizer(folder_of(checkpoint)), settings.context)
    about = {
        "model": model,
        "base": folder_of(checkpoint).resolve().name,
        "base_sha256": base_sha256(folder_of(checkpoint)),
        "sources": sources,
        "text_sha256": text_digest(contexts),
        "contexts": len(contexts),
        "fastdms": __version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }
    folder.create(settings, about)
    return _train(folder, checkpoint, contexts, settings, about, device)


def resume(out: Path, device: torch.device) -> Path:
    """Go on with the run in ``out`` from its last state, exactly as if it had not stopped.

    Raises ValueError as ``begin`` does, and when text, base or kind of device are no longer what they were.
    """
    folder = RunFolder(out)
    settings, about = folder.read()
    if folder.checkpoint.exists():
        raise ValueError(f"the run in {out} is done: its checkpoint is {folder.checkpoint}")
    if (about["device"] == "cpu") != (device.type == "cpu"):
        raise ValueError(
            f"the run in {out} began on {about['device']}, and computes otherwise on {device}: see --device"
        )
    checkpoint = open_base(about["model"], settings)
    if base_sha256(folder_of(checkpoint)) != about["base_sha256"]:
        raise ValueError(f"the base of the run in {out} has changed since it began: {checkpoint.name}")
    contexts = pack(read_documents(about["sources"]), load_tokenizer(folder_of(checkpoint)), settings.context)
    if text_digest(contexts) != about["text_sha256"]:
        raise ValueError(f"the text of the run in {out} has changed since it began: {', '.join(about['sources'])}")
    return _train(folder, checkpoint, contexts, settings, about, device)


def _train(
    folder: RunFolder,
    checkpoint: Checkpoint,
    contexts: Any,
    settings: RetrofitSettings,
    about: dict[str, Any],
    device: torch.device,
) -> Path:
    state = folder.load_state()
    trainer = Trainer(load_base(checkpoint, settings, device), contexts, settings)
    done, trained_s = 0, 0.0
    if state is not None:
        trainer.load_state(state)
        done, trained_s = int(state["done"]), float(state["trained_s"])
    folder.cut_log(done)
    tokens = settings.sequences * settings.context
    with _stopping() as stopped, progress(total=settings.steps, desc="retrofit", unit=" steps") as bar:
        bar.update(done)
        while done < settings.steps:
            began = time.perf_counter()
            line = _step(trainer, done)
            elapsed = time.perf_counter() - began
            trained_s += elapsed
            line |= {"tokens_per_s": round(tokens / elapsed, 1), "trained_s": round(trained_s, 3)}
            folder.append_log(line)
            done += 1
            bar.set_postfix_str(
                f"CR {line['compression']:.2f}/{line['compression_asked']:.2f} KLD {line['kl']:.4f} "
                f"{line['tokens_per_s']:,.0f} tok/s"
            )
            bar.update(1)
            if stopped or done % SAVE_EVERY_STEPS == 0 or done == settings.steps:
                folder.save_state({**trainer.state(), "done": done, "trained_s": trained_s})
            if stopped:
                raise KeyboardInterrupt(f"stopped after step {done}")
    training = {"config": {**about, "settings": asdict(settings)}, "steps": done, "trained_s": round(trained_s, 1)}
    written = write_result(folder, checkpoint, trainer, training | {"last": folder.log()[-1]})
    folder.drop_state()
    _draw(folder, checkpoint)
    return written


def _step(trainer: Trainer, step: int) -> dict[str, Any]:
    try:
        return trainer.step(step)
    except torch.OutOfMemoryError as error:
        s = trainer.settings
        raise ValueError(
            f"no memory on {trainer.device} for {s.micro_batch or s.sequences} sequences of {s.context:,} tokens at "
            "once; ask for fewer with --micro-batch"
        ) from error


def _check_apart(out: Path, sources: Sequence[str]) -> None:
    """A run's own files must not become part of its text."""
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir() and out.resolve().is_relative_to(path.resolve()):
            raise ValueError(f"--out {out} lies within the text {source}; choose a folder outside of it")


def _draw(folder: RunFolder, checkpoint: Checkpoint) -> None:
    """The picture is no reason to lose a run."""
    try:
        plot_log(folder.path / "training.png", folder.log(), f"retrofit of {checkpoint.name}")
    except (ImportError, OSError) as error:
        print(f"fastdms: no picture of the run: {error}", file=sys.stderr)


@contextmanager
def _stopping() -> Iterator[list[int]]:
    """A list that a first SIGINT or SIGTERM fills, so that the step in flight ends and is saved; a second one kills."""
    received: list[int] = []

    def stop(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    try:
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread, whose own handlers stay
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
