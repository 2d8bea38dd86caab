"""What tells two graphs apart."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
import torch

import fastdms
import fastdms.ops
from fastdms.graphs import GraphKey, fingerprint, make_buffers
from fastdms.graphs import key as key_module
from fastdms.graphs.artifacts import artifacts_path
from fastdms.graphs.key import MachineKey, machine_key, step_inputs
from fastdms.runner import _fingerprint
from tests.models import dms_config, tiny_model
from tests.running import compiled, engine_of

CPU = torch.device("cpu")


def a_key(**given: Any) -> GraphKey:
    fields: dict[str, Any] = {
        "bucket": 2, "inputs": step_inputs(make_buffers(2, CPU)), "kv_dtype": "torch.float32", "mode": "compile",
        "backend": "inductor", "model": "m", "machine": machine_key(CPU),
    }  # fmt: skip
    return GraphKey(**fields | given)


def test_every_field_tells_keys_and_files_apart(tmp_path) -> None:
    key = a_key()
    changes: list[dict[str, Any]] = [{field.name: "other"} for field in fields(GraphKey)]
    changes += [{"machine": replace(key.machine, **{field.name: "other"})} for field in fields(MachineKey)]
    others = [replace(key, **change) for change in changes]
    assert len({key, *others}) == len(others) + 1
    assert len({artifacts_path(tmp_path, [each]) for each in (key, *others)}) == len(others) + 1
    assert a_key() == key
    assert artifacts_path(tmp_path, [a_key()]) == artifacts_path(tmp_path, [key])
    with pytest.raises(FrozenInstanceError):
        key.bucket = 3  # type: ignore[misc]


def test_the_inputs_have_shapes_and_dtypes() -> None:
    inputs = {name: (shape, dtype) for name, shape, dtype in a_key().inputs}
    assert inputs["tokens"] == ((2,), "torch.int64")
    assert inputs["end_ids"] == ((2, 32), "torch.int32")
    assert len(inputs) == len(make_buffers(2, CPU))


def test_the_machine() -> None:
    machine = machine_key(CPU)
    assert machine.device_name == "cpu"
    assert machine.torch == torch.__version__
    assert len(machine.ops_sha256) == 64


def test_a_changed_op_is_another_version(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(fastdms.ops, "__path__", [str(tmp_path)])
    (tmp_path / "sub").mkdir()
    for source in ("a = 1", "a = 2", "a = 1"):
        (tmp_path / "sub" / "kernel.py").write_text(source)
        key_module._ops_sha256.cache_clear()
        seen.append(machine_key(CPU).ops_sha256)
    key_module._ops_sha256.cache_clear()
    assert seen[0] == seen[2] != seen[1]


@pytest.mark.gpu
def test_the_machine_with_a_gpu() -> None:
    machine = machine_key(torch.device("cuda"))
    assert machine.device_name == torch.cuda.get_device_name()
    assert machine.capability == ".".join(map(str, torch.cuda.get_device_capability()))


def test_fingerprints() -> None:
    assert fingerprint(1, "a") == fingerprint(1, "a")
    assert len({fingerprint(1, "a"), fingerprint("1", "a"), fingerprint("a", 1), fingerprint(1)}) == 4


def test_a_models_fingerprint_holds_all_that_the_step_is_made_of() -> None:
    """And nothing of the process: no address, no weight's value."""

    def of(seed: int = 0, family: str = "qwen3", **given: Any) -> str:
        with compiled(tiny_model(family, seed=seed), **{"dms": dms_config("nvidia", 7)} | given) as model:
            runner = engine_of(model).runner
            return _fingerprint(runner.decoder, runner.cache)

    plain = of()
    assert of() == of(seed=1) == plain
    changed = [
        of(family="llama"), of(dms=dms_config("nvidia", 8)), of(dms=dms_config("shisa", 7)), of(dms="off"),
        of(kv_dtype="bf16"), of(dtype="bf16", kv_dtype="fp32"), of(weights="fp8"), of(max_context=128),
        of(max_concurrency=2), of(pages=30),
    ]  # fmt: skip
    assert len({plain, *changed}) == len(changed) + 1
