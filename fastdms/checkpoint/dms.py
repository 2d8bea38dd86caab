"""How a checkpoint declares what its KV cache forgets: where the metadata lies, and which layout it describes.

Metadata is taken from the first of these that exists:

1. ``dms_metadata.json`` in the model's folder;
2. ``training_log.json`` in the folder's parent, when its ``config`` object names a window, a scale, an offset or a
   target ratio; a file of that name that holds anything else belongs to another trainer, and is ignored;
3. the model's own configuration, when it has one of the ``dms_`` keys below;
4. adapter tensors alone, with default values.

An object named ``config`` inside the metadata counts as part of it. The layout is told from the first rule that fits:

1. **adapter**: ``dms_proj_alpha`` tensors exist, or ``dms_separate_alpha`` is true. Shift 1, no channel zeroed.
2. **nvidia**: the configuration's ``auto_map`` names DMS code. Shift 1, borrowed channel zeroed before and after RoPE.
3. **shisa**: the metadata came from ``dms_metadata.json`` or ``training_log.json``, or says which query channel is
   borrowed. Shift 0, borrowed channel zeroed before RoPE.
4. Only configuration keys: **nvidia** for Qwen3, **shisa** for every other family.

Metadata may also state ``shift`` and ``zero_borrowed``, which then override the layout's. A DMSConfig given to
``fastdms.compile`` replaces all that is found here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastdms.checkpoint.json_file import read_json_object
from fastdms.config import DMSConfig, ModelConfig

__all__ = ["LAYOUTS", "Layout", "read_dms"]

_WINDOW = ("window_size", "dms_window_size")
_SCALE = ("alpha_scale", "dms_alpha_scale")
_OFFSET = ("alpha_offset", "dms_alpha_offset", "dms_initial_alpha_offset")
_TARGET = ("target_cr", "dms_cr", "target_compression_ratio")
_CONFIG_KEYS = ("dms_window_size", "dms_alpha_scale", "dms_initial_alpha_offset", "dms_alpha_offset", "dms_cr")
_ADAPTER_TENSOR = re.compile(r"model\.layers\.(\d+)\.self_attn\.dms_proj_alpha(_norm)?\.(weight|bias)")

_HUGE = 1e300

Layout = Literal["adapter", "nvidia", "shisa"]
LAYOUTS: dict[Layout, DMSConfig] = {
    "adapter": DMSConfig(window_tokens=512, shift=1, zero_borrowed="none", source="adapter"),
    "nvidia": DMSConfig(window_tokens=512, shift=1, zero_borrowed="pre_and_post_rope"),
    "shisa": DMSConfig(window_tokens=256, shift=0, zero_borrowed="pre_rope"),
}


@dataclass(frozen=True, slots=True)
class _Place:
    """Metadata found in one place: its name, for messages, and the objects whose keys count."""

    where: str
    objects: tuple[Mapping[str, Any], ...]

    def value(self, *aliases: str) -> tuple[str, Any]:
        """The key and value of the one alias that is set; all that are set must agree. ``("", None)`` if none is."""
        found = [(key, scope[key]) for scope in self.objects for key in aliases if scope.get(key) is not None]
        for key, value in found[1:]:
            if value != found[0][1]:
                raise ValueError(f"{self.where}: {found[0][0]} {found[0][1]!r} and {key} {value!r} disagree")
        return found[0] if found else ("", None)

    def flag(self, key: str) -> bool | None:
        value = self.value(key)[1]
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"{self.where}: {key} must be true or false, got {value!r}")
        return value

    def integer(self, *aliases: str, at_least: int | None = None) -> int | None:
        key, value = self.value(*aliases)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{self.where}: {key} must be an integer, got {value!r}")
        if at_least is not None and value < at_least:
            raise ValueError(f"{self.where}: {key} must be >= {at_least}, got {value}")
        return value

    def number(self, *aliases: str, at_least: float = -_HUGE) -> float | None:
        key, value = self.value(*aliases)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _HUGE:
            raise ValueError(f"{self.where}: {key} must be a finite number, got {value!r}")
        if value < at_least:
            raise ValueError(f"{self.where}: {key} must be >= {at_least}, got {value}")
        return float(value)


def read_dms(
    values: Mapping[str, Any], where: str, folder: Path | None, tensor_names: Collection[str], config: ModelConfig
) -> DMSConfig | None:
    """What the checkpoint declares, as this module's docstring lays down; None when it declares no (active) eviction.

    values, where: the model's configuration as an object, and its name for messages.
    folder: the model's folder, if it has one.
    tensor_names: all tensors of the checkpoint.

    Raises ValueError, naming file and key, for values of a wrong type or range, for keys that disagree, and for adapter
    tensors that are declared but missing in some layer.
    """
    own = _Place(where, (values,))
    metadata = _metadata_file(folder) if folder is not None else None
    adapter_layers = _adapter_layers(tensor_names, where)
    separate = _first_flag("dms_separate_alpha", metadata, own)
    if adapter_layers and separate is False:
        raise ValueError(f"{where}: dms_separate_alpha is false, but the checkpoint has dms_proj_alpha tensors")
    is_adapter = bool(adapter_layers or separate)
    if not (metadata or is_adapter or any(own.value(key)[0] for key in _CONFIG_KEYS)):
        return None
    disabled = _first_flag("dms_disable_eviction", metadata, own)
    if disabled or _first_flag("trained_checkpoint", metadata, own) is False:
        return None
    if is_adapter:
        for place in (metadata, own):
            _refuse_shared_rows(place)
        _check_adapter(where, adapter_layers, config.num_layers)
    found = metadata or own
    _check_model(found, config)
    return _config(found, LAYOUTS["adapter" if is_adapter else _borrowed_layout(metadata, own)])


def _metadata_file(folder: Path) -> _Place | None:
    path = folder / "dms_metadata.json"
    if path.exists():
        return _from_file(path, read_json_object(path))
    path = folder.resolve().parent / "training_log.json"
    log = _training_config(path) if path.is_file() else None
    return None if log is None else _from_file(path, log)


def _training_config(path: Path) -> dict[str, Any] | None:
    """The ``config`` object of a DMS trainer's log; None of any other file."""
    try:
        config = read_json_object(path).get("config")
    except ValueError as error:
        if isinstance(error.__cause__, OSError):
            raise  # nobody can tell what it holds
        return None
    is_ours = isinstance(config, dict) and any(key in config for key in (*_WINDOW, *_SCALE, *_OFFSET, *_TARGET))
    return config if is_ours else None


def _from_file(path: Path, values: dict[str, Any]) -> _Place:
    nested = values.get("config")
    if nested is not None and not isinstance(nested, dict):
        raise ValueError(f"{path}: config must be an object, got {nested!r}")
    return _Place(str(path), (values, nested) if nested else (values,))


def _first_flag(key: str, *places: _Place | None) -> bool | None:
    flags = (place.flag(key) for place in places if place is not None)
    return next((flag for flag in flags if flag is not None), None)


def _borrowed_layout(metadata: _Place | None, own: _Place) -> Layout:
    if "dms" in str(own.value("auto_map")[1]).lower():
        return "nvidia"
    if metadata or own.value("borrowed_query_channel")[0] or own.value("zero_borrowed_query_channel")[0]:
        return "shisa"
    return "nvidia" if own.value("model_type")[1] == "qwen3" else "shisa"


def _config(found: _Place, layout: DMSConfig) -> DMSConfig:
    zero_borrowed: Any = found.value("zero_borrowed")[1]
    if zero_borrowed is None:
        unzeroed = found.flag("zero_borrowed_query_channel") is False
        zero_borrowed = "none" if unzeroed else layout.zero_borrowed
    shift: Any = found.integer("shift")
    window = found.integer(*_WINDOW, at_least=0)
    scale, offset, target = found.number(*_SCALE), found.number(*_OFFSET), found.number(*_TARGET, at_least=1)
    try:
        return DMSConfig(
            window_tokens=layout.window_tokens if window is None else window,
            alpha_scale=layout.alpha_scale if scale is None else scale,
            alpha_offset=layout.alpha_offset if offset is None else offset,
            shift=layout.shift if shift is None else shift,
            zero_borrowed=zero_borrowed,
            source=layout.source,
            target_compression=target,
        )
    except ValueError as error:
        raise ValueError(f"{found.where}: {error}") from error


def _adapter_layers(tensor_names: Collection[str], where: str) -> dict[int, set[str]]:
    """Layer -> which of ``dms_proj_alpha`` ("") and ``dms_proj_alpha_norm`` ("_norm") it has."""
    layers: dict[int, set[str]] = {}
    for name in tensor_names:
        match = _ADAPTER_TENSOR.fullmatch(name)
        if match is None:
            continue
        if match[3] == "bias":
            raise ValueError(f"{where}: tensor {name} is not supported: an adapter has no bias")
        layers.setdefault(int(match[1]), set()).add(match[2] or "")
    return layers


def _refuse_shared_rows(place: _Place | None) -> None:
    key, per = place.value("dms_alpha_per") if place else ("", None)
    if place and per not in (None, "head"):
        raise ValueError(f"{place.where}: {key} {per!r} is not supported; supported is 'head'")


def _check_adapter(where: str, layers: Mapping[int, set[str]], num_layers: int) -> None:
    for layer in range(num_layers):
        for suffix in ("", "_norm"):
            if suffix not in layers.get(layer, ()):
                name = f"model.layers.{layer}.self_attn.dms_proj_alpha{suffix}.weight"
                raise ValueError(f"{where}: the checkpoint declares a DMS adapter but has no tensor {name}")


def _check_model(found: _Place, config: ModelConfig) -> None:
    """What metadata says of the model must be true of it, or it belongs to another model."""
    expected = {
        "num_layers": (config.num_layers,),
        "num_q_heads": (config.num_heads,),
        "num_kv_heads": (config.num_kv_heads,),
        "head_dim": (config.head_dim,),
        "borrowed_query_channel": (-1, config.head_dim - 1),
    }
    for key, allowed in expected.items():
        value = found.integer(key)
        if value is not None and value not in allowed:
            raise ValueError(f"{found.where}: {key} is {value}, but the model needs {' or '.join(map(str, allowed))}")
    if found.flag("corrected_mask") is False:
        raise ValueError(f"{found.where}: corrected_mask false is not supported")
