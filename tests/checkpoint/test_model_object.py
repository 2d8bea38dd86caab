"""A transformers model in memory as a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedModel,
)

from fastdms.checkpoint import open_checkpoint
from tests.checkpoint.files import assert_same_tensors
from tests.models import FAMILIES, Layout, dms_config, save_checkpoint, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_saved_folder(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    saved, live = open_checkpoint(tmp_path), open_checkpoint(model)
    assert live.config == saved.config
    assert live.dms is None
    assert live.tokenizer_path is None
    assert_same_tensors(live, dict(saved.tensors()))


def test_shares_the_memory_of_the_model() -> None:
    model = tiny_model("qwen3")
    parameters = dict(model.named_parameters())
    for name, tensor in open_checkpoint(model).tensors():
        assert tensor.data_ptr() == parameters[name].data_ptr()
        assert not tensor.requires_grad


def test_untied_by_hand() -> None:
    """A head that no longer shares the embedding's memory is the model's, whatever its configuration says."""
    model = tiny_model("llama")
    model.lm_head.weight = torch.nn.Parameter(torch.randn(300, 64))
    checkpoint = open_checkpoint(model)
    assert not checkpoint.config.tie_word_embeddings
    assert dict(checkpoint.tensors())["lm_head.weight"].equal(model.lm_head.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_is_that_of_the_parameters(dtype: torch.dtype) -> None:
    assert open_checkpoint(tiny_model("qwen2").to(dtype)).config.weight_dtype == dtype


def test_end_tokens_of_the_generation_config() -> None:
    model = tiny_model("qwen2")
    model.generation_config.eos_token_id = [7, 2, 9]
    assert open_checkpoint(model).config.eos_token_ids == (2, 7, 9)


@pytest.mark.parametrize("layout", ["shisa", "nvidia"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_dms_of_a_loaded_folder(family: str, layout: Layout, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_checkpoint(tiny_model(family), tmp_path, layout))
    assert open_checkpoint(model).dms == dms_config(layout)


def test_adapter_that_transformers_dropped(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_checkpoint(tiny_model("qwen3"), tmp_path, "adapter"))
    with pytest.raises(ValueError, match=r"Qwen3ForCausalLM: the checkpoint declares a DMS adapter but has no tensor"):
        open_checkpoint(model)


def test_name_and_tokenizer_of_a_loaded_folder(tmp_path: Path) -> None:
    tiny_model("mistral").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert open_checkpoint(model).name == str(tmp_path)
    assert open_checkpoint(model).tokenizer_path is None
    (tmp_path / "tokenizer.json").write_text("{}")
    assert open_checkpoint(model).tokenizer_path == tmp_path


def test_subclass_under_another_name() -> None:
    model = tiny_model("qwen3")
    model.__class__ = type("Qwen3ForCausalLMDMS", (type(model),), {})
    assert open_checkpoint(model).config.family == "qwen3"


def test_other_architecture() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=50))
    with pytest.raises(ValueError, match=r"'gpt2' with architectures .'GPT2LMHeadModel'. is not supported"):
        open_checkpoint(model)


@pytest.mark.parametrize("model_class", [LlamaModel, LlamaForSequenceClassification])
def test_model_without_a_language_head(model_class: type[PreTrainedModel]) -> None:
    model = model_class(tiny_model("llama_bias").config)
    with pytest.raises(ValueError, match=f"'{model_class.__name__}'. is not supported"):
        open_checkpoint(model)


def test_quantised_model() -> None:
    model = tiny_model("llama")
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ValueError, match="quantised by 'bitsandbytes' are not supported"):
        open_checkpoint(model)


def test_model_without_data() -> None:
    with torch.device("meta"):
        model = type(tiny_model("llama"))(tiny_model("llama").config)
    with pytest.raises(ValueError, match="is on the meta device and has no data"):
        open_checkpoint(model)


def test_parameter_of_an_unsupported_dtype() -> None:
    with pytest.raises(ValueError, match=r"tensor model.embed_tokens.weight is torch.float64; supported are float32"):
        open_checkpoint(tiny_model("llama").to(torch.float64))
