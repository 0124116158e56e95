"""A base model, read without its weights."""

import pytest
from safetensors.numpy import save_file
from transformers import (
    BitsAndBytesConfig,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3NextConfig,
)

from config import LORA_TARGETS
from data.bases import Base, base_key, check_base, check_trainable, files_problem, original_name
from data.errors import UserError


class Nested:
    """A model of several parts, with its text's configuration inside."""

    quantization_config = None

    def __init__(self, text: object):
        self.text = text

    def get_text_config(self) -> object:
        return self.text


def problem_of(shape: object, max_length: int = 512, bits: int = 4) -> str:
    try:
        check_base(Base("base", shape, {}, 0, 0), bits, max_length)
    except UserError as error:
        return str(error).partition("\n")[0]
    return ""


PLAIN = [LlamaConfig(), MistralConfig(), Qwen2Config(), Nested(LlamaConfig()), GPTNeoXConfig()]


@pytest.mark.parametrize("shape", PLAIN)
def test_a_plain_model_serves(shape):
    assert problem_of(shape) == ""


@pytest.mark.parametrize("shape", [Gemma2Config(), Nested(Gemma2Config())])
def test_logits_that_are_capped_are_found_wherever_the_configuration_has_them(shape):
    assert problem_of(shape).startswith("base scales or caps its logits (final_logit_softcapping 30.0)")


def test_a_sliding_window_shorter_than_a_row_is_refused():
    """Trees are attended to by a mask of their own, which a window would not cut: scores would be another model's."""
    told = "attends to 256 tokens alone (sliding_window), fewer than max_length 512"
    assert told in problem_of(MistralConfig(sliding_window=256))
    assert problem_of(MistralConfig(sliding_window=256), 256) == ""
    assert problem_of(Qwen2Config(sliding_window=256, use_sliding_window=False)) == ""


def test_layers_that_mix_tokens_otherwise_than_by_attention_are_refused():
    """Texts that share a beginning are computed as one tree, which a state that runs along it would not follow."""
    assert problem_of(Qwen3NextConfig()) == "base has layers of another kind than attention (linear_attention)"


@pytest.mark.parametrize(
    "quantised, told",
    [
        (BitsAndBytesConfig(load_in_4bit=True), "stored in fp4, which is neither 16 bits, NF4 nor LLM.int8"),
        ({"quant_method": "gptq", "bits": 4}, "stored in gptq, which is neither"),
        ({"quant_method": "compressed-tensors"}, "stored in compressed-tensors, which is neither"),
        ({"group_size": 64, "bits": 4}, "stored in an unknown format, which is neither"),
        (BitsAndBytesConfig(load_in_8bit=True), "stored in 8 bits and cannot be had in 4"),
        (BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), ""),
    ],
)
def test_a_base_that_is_stored_otherwise_than_asked_is_refused(quantised, told):
    """It would be trained, and reported, as 4-bit NF4."""
    found = problem_of(LlamaConfig(quantization_config=quantised))
    assert told in found and bool(told) == bool(found)


def test_a_base_that_is_stored_in_8_bits_serves_in_8_bits_alone():
    shape = LlamaConfig(quantization_config=BitsAndBytesConfig(load_in_8bit=True).to_dict())
    assert problem_of(shape, bits=8) == ""
    assert problem_of(shape, bits=16) == "the weights of base are stored in 8 bits and cannot be had in 16"


def test_what_lora_would_not_find_and_a_mixture_of_experts_cannot_be_trained():
    layers = {f"model.layers.0.{name}": (8, 8) for name in LORA_TARGETS}
    check_trainable(Base("base", LlamaConfig(), layers, 0, 0), LORA_TARGETS)
    some = {path: size for path, size in layers.items() if "gate" not in path and "up" not in path}
    with pytest.raises(UserError, match="base lacks 2 of the 7 layers that LoRA adapts, gate_proj first\n"):
        check_trainable(Base("base", LlamaConfig(), some, 0, 0), LORA_TARGETS)
    with pytest.raises(UserError, match="is a mixture of experts"):
        check_trainable(Base("base", MixtralConfig(), layers, 0, 0), LORA_TARGETS)


def test_a_folder_without_all_of_its_weights_is_told(tmp_path):
    assert files_problem(tmp_path / "a-hub-id") == ""
    assert files_problem(tmp_path) == f"{tmp_path} has no model.safetensors"
    (tmp_path / "pytorch_model.bin").touch()
    assert files_problem(tmp_path).endswith("and pytorch_model.bin is a pickle, which is not read")
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "is damaged or cut short" in files_problem(tmp_path)
    save_file({}, tmp_path / "model.safetensors")
    assert files_problem(tmp_path) == ""
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2-of-2.safetensors"}}')
    assert files_problem(tmp_path) == f"{tmp_path} has no model-2-of-2.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    assert files_problem(tmp_path) == "", "transformers takes the one file"


def test_two_spellings_of_one_base_model_are_one(tmp_path, monkeypatch):
    llama = "unsloth/llama-3-8b"
    assert original_name("unsloth/llama-3-8b-bnb-4bit") == base_key("meta-llama/Meta-Llama-3-8B") == llama
    assert original_name("unsloth/Llama-3.2-1B-unsloth-bnb-4bit") == "unsloth/Llama-3.2-1B", "Unsloth's dynamic one"
    (tmp_path / "tiny").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    assert base_key("tiny") == base_key("tiny/") == base_key("link") == base_key(str(tmp_path / "tiny"))
