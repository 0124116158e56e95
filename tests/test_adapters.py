"""An adapter's folder, read without a model: whole, and of this base model and this split?"""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from data.adapters import adapted_layers, adapter_problem, original_name
from data.display import read_results
from data.machine import ROOT
from data.report import report


@pytest.fixture
def adapter(tmp_path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"layers.0.q_proj.lora_A.weight": np.zeros(64)}, folder / "adapter_model.safetensors")
    return folder


def problem_of(folder: Path, base_model: str = "base", test_digest: str = "digest") -> str:
    return adapter_problem(folder, base_model, lambda: 600, test_digest)


def test_an_adapter_of_other_settings_is_a_problem(adapter, tmp_path):
    assert "there is no adapter" in problem_of(tmp_path / "absent")
    assert problem_of(adapter) == "", "nothing is known of it"
    run = {"settings": {"base_model": "base"}, "data": {"test_digest": "digest"}, "vocabulary": 600}
    (adapter / "run.json").write_text(json.dumps(run))
    assert problem_of(adapter) == ""
    assert "may have seen the test pairs" in problem_of(adapter, test_digest="another")
    assert "trained on the base model base, not another/model" in problem_of(adapter, "another/model")

    def asked() -> int:
        raise AssertionError("a tokenizer would be fetched for nothing")

    assert "not another/model" in adapter_problem(adapter, "another/model", asked, "digest")
    (adapter / "run.json").write_text("{")
    assert "cannot be read" in problem_of(adapter)
    (adapter / "adapter_config.json").unlink()
    assert "no adapter_config.json" in problem_of(adapter)


def test_a_base_model_stored_in_4_bits_gives_way_to_its_original(adapter):
    assert original_name("unsloth/llama-3-8b-bnb-4bit") == "unsloth/llama-3-8b"
    assert original_name("meta-llama/Meta-Llama-3-8B") == "meta-llama/Meta-Llama-3-8B"
    run = {"settings": {"base_model": "base-bnb-4bit"}, "data": {"test_digest": "digest"}}
    (adapter / "run.json").write_text(json.dumps(run))
    assert problem_of(adapter) == "", "its adapters fit both"


def test_a_truncated_adapter_is_refused_by_name(adapter):
    weights = adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:-1], whole + b"x", whole[:4], b"", b"\xff" * len(whole)):
        weights.write_bytes(damaged)
        assert problem_of(adapter).startswith(f"{weights} is damaged or cut short")


def test_a_pickled_adapter_is_refused_and_never_opened(adapter):
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps({}))
    assert "is no adapter: it has no adapter_model.safetensors" in problem_of(adapter)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"peft_type": "IA3"}', "{}"])
def test_a_folder_of_another_kind_is_no_adapter(adapter, content):
    (adapter / "adapter_config.json").write_text(content)
    assert "describes no LoRA adapter" in problem_of(adapter)


def test_a_base_model_with_another_tokenizer_is_refused(adapter):
    run = {"settings": {"base_model": "base"}, "data": {"test_digest": "digest"}, "vocabulary": 32_000}
    (adapter / "run.json").write_text(json.dumps(run))
    told = "was trained with another tokenizer, of 32000 tokens; that of base has 600"
    assert told in problem_of(adapter)


@pytest.mark.parametrize(
    "run", [{}, [], {"settings": {}}, {"settings": {"base_model": "x"}, "data": {}}, {"settings": None}]
)
def test_a_run_json_of_an_older_version_is_told_so(adapter, run):
    (adapter / "run.json").write_text(json.dumps(run))
    assert "run.json cannot be read, or is of an older version" in problem_of(adapter)


def test_what_an_adapter_says_of_itself_cannot_steer_terminal_or_report(adapter):
    run = {"settings": {"base_model": "\x1b[2J<script>"}, "data": {"test_digest": ""}}
    (adapter / "run.json").write_text(json.dumps(run))
    assert "?[2J<script>" in problem_of(adapter)
    metrics, _ = read_results(ROOT / "docs" / "results" / "small")
    assert "<script>" not in report(metrics, {}, notes=[f"mismatch: {problem_of(adapter)}"])


def test_the_layers_of_an_adapter_are_read_from_its_weights(adapter):
    """Its configuration may hold them as a pattern."""
    layers = ["layers.0.mlp.up_proj.lora_A", "layers.0.mlp.up_proj.lora_B", "layers.1.self_attn.q_proj.lora_A", "norm"]
    weights = {f"base_model.model.{name}.weight": np.zeros(2) for name in layers}
    save_file(weights, adapter / "adapter_model.safetensors")
    assert adapted_layers(adapter) == {"up_proj", "q_proj"}
