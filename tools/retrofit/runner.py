"""Begin, carry on and finish a training run."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastdms import __version__
from fastdms.bundled_model import default_model
from fastdms.checkpoint import Checkpoint, open_checkpoint
from fastdms.progress import progress
from fastdms.tokenizer import load_tokenizer
from fastdms.tools.retrofit.plot import plot_log
from fastdms.tools.retrofit.run_folder import RunFolder
from fastdms.tools.retrofit.settings import RetrofitSettings
from fastdms.tools.retrofit.text import pack, read_documents, text_digest
from fastdms.tools.retrofit.trainer import Trainer
from fastdms.tools.retrofit.write import write_result

__all__ = ["begin", "resume"]

SAVE_EVERY_STEPS = 100


def begin(model: str | None, sources: list[str], out: Path, settings: RetrofitSettings, device: torch.device) -> Path:
    """Retrofit ``model`` with text from ``sources``; returns the finished checkpoint.

    model: a folder or hub id; None: the base of the default model.

    Raises ValueError for a checkpoint that has DMS already or can't be trained, for too little text, and for an ``out``
    that isn't empty; KeyboardInterrupt, after saving, when interrupted.
    """
    checkpoint = _trainable(model)
    contexts = pack(read_documents(sources), load_tokenizer(_folder(checkpoint)), settings.context)
    folder = RunFolder(out)
    about = {
        "model": model,
        "base": _folder(checkpoint).resolve().name,
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

    Raises ValueError as ``begin`` does, and when the text is no longer what it was.
    """
    folder = RunFolder(out)
    settings, about = folder.read()
    if folder.checkpoint.exists():
        raise ValueError(f"the run in {out} is done: its checkpoint is {folder.checkpoint}")
    checkpoint = _trainable(about["model"])
    contexts = pack(read_documents(about["sources"]), load_tokenizer(_folder(checkpoint)), settings.context)
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
    trainer = Trainer(_transformers_model(checkpoint, settings, device), contexts, settings)
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
            line = trainer.step(done)
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
            if stopped or done % SAVE_EVERY_STEPS == 0:
                folder.save_state({**trainer.state(), "done": done, "trained_s": trained_s})
            if stopped:
                raise KeyboardInterrupt(f"stopped after step {done}")
    _draw(folder, checkpoint)
    training = {"config": {**about, "settings": asdict(settings)}, "steps": done, "trained_s": round(trained_s, 1)}
    written = write_result(folder, checkpoint, trainer, training | {"last": folder.log()[-1]})
    folder.drop_state()
    return written


def _trainable(given: str | None) -> Checkpoint:
    model = str(default_model(adapter=False)) if given is None else given
    checkpoint = open_checkpoint(model)
    if checkpoint.dms is not None:
        raise ValueError(f"{model} already has DMS (window {checkpoint.dms.window_tokens}); give its base model")
    if checkpoint.tokenizer_path is None or not checkpoint.tokenizer_path.is_dir():
        raise ValueError(f"{model} is no folder of safetensors or hub id, which training needs")
    return checkpoint


def _folder(checkpoint: Checkpoint) -> Path:
    assert checkpoint.tokenizer_path is not None
    return checkpoint.tokenizer_path


def _transformers_model(checkpoint: Checkpoint, settings: RetrofitSettings, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM

    # A frozen base is read as it is stored; weights that are trained need fp32 masters.
    stored = settings.layout == "adapter" and device.type == "cuda"
    dtype = checkpoint.config.weight_dtype if stored else torch.float32
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            _folder(checkpoint), dtype=dtype, attn_implementation="sdpa", local_files_only=True
        )
        return model.to(device)
    except (RuntimeError, MemoryError) as error:
        raise ValueError(f"no memory on {device} for the weights of {checkpoint.name}: {error}") from error


def _draw(folder: RunFolder, checkpoint: Checkpoint) -> None:
    try:
        plot_log(folder.path / "training.png", folder.log(), f"retrofit of {checkpoint.name}")
    except ImportError as error:
        print(f"fastdms: no picture of the run: {error}")


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
    except ValueError:  # not in the main thread: whoever started us handles signals
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
