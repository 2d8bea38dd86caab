"""``fastdms quantise``: a checkpoint with its linear layers in int4, as llm-compressor stores them and vLLM reads them.

Embedding, norms, biases, the output head and a DMS adapter stay as they are stored. ``fastdms.compile`` makes the same
int4 weights of the checkpoint itself; the folder is smaller, and loads faster.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from fastdms.checkpoint import Checkpoint, open_checkpoint
from fastdms.checkpoint.int4_config import quantization_config
from fastdms.checkpoint.json_file import read_json_object
from fastdms.cli.options import Parser
from fastdms.decoder import Decoder
from fastdms.linear import PARTS, int4_group
from fastdms.ops.int4 import quantise_int4
from fastdms.tools.checkpoint_folder import new_folder, write_json, write_weights
from fastdms.weights import load_weights

__all__ = ["main", "quantise"]

_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf")


def main(argv: list[str] | None = None) -> int:
    """Write the folder, and say where."""
    parser = Parser(prog="fastdms quantise", description=__doc__)
    parser.add_argument("model", help="a folder of safetensors or a hub id")
    parser.add_argument("--out", required=True, help="the folder to write, which must be new or empty")
    args = parser.parse_args(argv)
    print(f"written to {quantise(args.model, args.out)}")
    return 0


def quantise(model: str | os.PathLike[str], folder: str | os.PathLike[str]) -> Path:
    """Write ``model`` to ``folder``, which appears only once it is whole, and return it.

    The files beside its weights are copied, tokenizer and DMS metadata among them.
    Raises ValueError for a model that isn't a folder of unquantised safetensors, whose tensors are not those of its
    config, whose layers make no whole groups or whose weights are not finite, that declares its DMS rule outside of its
    folder, and for a folder that isn't empty.
    """
    checkpoint = open_checkpoint(model)
    source = checkpoint.tokenizer_path
    if source is None or not source.is_dir():
        raise ValueError(f"{checkpoint.name} is no folder of safetensors")
    if checkpoint.config.int4 is not None:
        raise ValueError(f"{checkpoint.name} is int4 already")
    group = int4_group(checkpoint.config)
    _check_tensors(checkpoint)
    with new_folder(folder) as new:
        for path in source.iterdir():
            if path.is_file() and path.name != "config.json" and not path.name.endswith(_WEIGHTS):
                shutil.copyfile(path, new / path.name)
        left: list[str] = []
        write_weights(new, _tensors(checkpoint, group, left))
        announced = quantization_config(group, sorted({"lm_head", *left}))
        values = read_json_object(source / "config.json") | {"quantization_config": announced}
        write_json(new / "config.json", values)
        if open_checkpoint(new).dms != checkpoint.dms:
            raise ValueError(f"{checkpoint.name} declares its DMS rule outside of its folder; put it there")
    return Path(folder)


def _check_tensors(checkpoint: Checkpoint) -> None:
    """ValueError, as of a model that is loaded, for a tensor that is missing, unknown or of another shape."""
    nowhere = torch.device("meta")  # where nothing is copied
    config = checkpoint.config
    decoder = Decoder(config, checkpoint.dms, num_positions=1, dtype=config.weight_dtype, device=nowhere)
    load_weights(decoder, checkpoint.tensors())


def _tensors(checkpoint: Checkpoint, group: int, left: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors to write; the names of matrices that stay as they are go into ``left``."""
    names = {
        f"model.layers.{index}.{part}"
        for index in range(checkpoint.config.num_layers)
        for parts in PARTS.values()
        for part in parts
    }
    for name, tensor in checkpoint.tensors():
        layer = name.removesuffix(".weight")
        if layer not in names or tensor.dim() != 2:
            if tensor.dim() == 2 and layer != "model.embed_tokens":
                left.append(layer)
            yield name, tensor
            continue
        if not tensor.isfinite().all():
            raise ValueError(f"tensor {name} has values that are not finite, which int4 weights can't be made of")
        packed, scale = quantise_int4(tensor, group)
        yield f"{layer}.weight_packed", packed
        yield f"{layer}.weight_scale", scale
        yield f"{layer}.weight_shape", torch.tensor(tensor.shape)
