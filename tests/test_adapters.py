"""An adapter's folder, read without a model: plain LoRA, whole, of this base model and of this split?"""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig

from data.adapters import adapted_layers, adapter_mismatch, adapter_problem, unlike_plain_lora
from data.bases import Base
from data.display import read_results
from data.machine import ROOT
from data.report import report

LAYERS = {f"model.layers.{layer}.{name}": (8, 8) for layer in (0, 1) for name in ("self_attn.q_proj", "mlp.up_proj")}
BASE = Base("base", LlamaConfig(), LAYERS | {"lm_head": (8, 600)}, 1000, 600)
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "target_modules": ["q_proj", "up_proj"]}


def weights_of(layers: dict[str, tuple[int, int]], kind: type = np.float32) -> dict[str, np.ndarray]:
    """LoRA's two matrices of rank 2 for each layer, as PEFT names them."""
    made = {}
    for path, (inputs, outputs) in layers.items():
        made[f"base_model.model.{path}.lora_A.weight"] = np.ones((2, inputs), kind)
        made[f"base_model.model.{path}.lora_B.weight"] = np.ones((outputs, 2), kind)
    return made


@pytest.fixture
def adapter(tmp_path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    configure(folder)
    save_file(weights_of(LAYERS), folder / "adapter_model.safetensors")
    return folder


def configure(folder: Path, **lora: object) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(LORA | lora))


def mismatch(folder: Path, base_model: str = "base", test_digest: str = "digest") -> str:
    return adapter_mismatch(folder, BASE._replace(name=base_model), test_digest)


def test_an_adapter_of_another_base_model_or_split_is_told_so(adapter):
    assert mismatch(adapter) == "", "nothing is known of it"
    configure(adapter, base_model_name_or_path="mistralai/Mistral-7B-v0.1")
    assert mismatch(adapter) == f"{adapter} was trained on the base model mistralai/Mistral-7B-v0.1, not base"
    run = {"settings": {"base_model": "base"}, "data": {"test_digest": "digest"}, "vocabulary": 600}
    (adapter / "run.json").write_text(json.dumps(run))
    assert mismatch(adapter) == ""
    assert "may have seen the test pairs" in mismatch(adapter, test_digest="another")
    assert "trained on the base model base, not another/model" in mismatch(adapter, "another/model")
    run["data"]["prompt_digest"] = "another"
    (adapter / "run.json").write_text(json.dumps(run))
    assert "was trained with other words around the films" in mismatch(adapter)
    (adapter / "run.json").write_text("{")
    assert "cannot be read" in mismatch(adapter)


def test_the_same_base_model_by_another_path_is_the_same(adapter, tmp_path):
    run = {"settings": {"base_model": f"{tmp_path}/adapter/../base/"}, "data": {"test_digest": "digest"}}
    (adapter / "run.json").write_text(json.dumps(run))
    (tmp_path / "base").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "base")
    assert mismatch(adapter, str(tmp_path / "link")) == mismatch(adapter, f"{tmp_path}/base") == ""
    run["settings"]["base_model"] = "base-bnb-4bit"
    (adapter / "run.json").write_text(json.dumps(run))
    assert mismatch(adapter) == "", "an adapter of a base stored in 4 bits fits its original"


def test_a_truncated_adapter_is_refused_by_name(adapter):
    weights = adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:-1], whole + b"x", whole[:4], b"", b"\xff" * len(whole)):
        weights.write_bytes(damaged)
        assert adapter_problem(adapter, BASE).startswith(f"{weights} is damaged or cut short")


def test_a_folder_that_is_not_whole_is_refused(adapter, tmp_path):
    assert "there is no adapter" in adapter_problem(tmp_path / "absent", BASE)
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps({}))
    assert "is no adapter: it has no adapter_model.safetensors" in adapter_problem(adapter, BASE), "pickle is not read"
    (adapter / "adapter_config.json").unlink()
    assert "no adapter_config.json" in adapter_problem(adapter, BASE)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"peft_type": "IA3"}', "{}"])
def test_a_folder_of_another_kind_is_no_adapter(adapter, content):
    (adapter / "adapter_config.json").write_text(content)
    assert "describes no LoRA adapter" in adapter_problem(adapter, BASE)


@pytest.mark.parametrize(
    "setting",
    [
        {"bias": "lora_only"}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5]},
        {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"task_type": "SEQ_CLS"},
        {"alora_invocation_tokens": [5]}, {"layer_replication": [[0, 2]]}, {"a_setting_of_2027": {"x": 1}},
    ],
)  # fmt: skip
def test_what_is_more_than_updates_of_single_layers_is_refused_by_name(adapter, setting):
    """It would change the base model of the arms after it, or be scored as something that it is not."""
    configure(adapter, **setting)
    [(name, value)] = setting.items()
    assert adapter_problem(adapter, BASE) == f"{adapter} is no plain LoRA adapter: it has {name} {value!r}"


@pytest.mark.parametrize(
    "setting",
    [
        {"use_rslora": True}, {"init_lora_weights": "gaussian"}, {"target_modules": r".*\.layers\.\d+\..*_proj"},
        {"target_modules": ["q_proj", "up_proj", "lm_head"], "exclude_modules": ["lm_head"]},
        {"rank_pattern": {"q": 2}}, {"task_type": "CAUSAL_LM"},
        {"lora_dropout": 0.1, "lora_alpha": 32, "qalora_group_size": 16},
    ],
)  # fmt: skip
def test_plain_lora_is_taken_whatever_its_size_and_scale(adapter, setting):
    configure(adapter, **setting)
    assert adapter_problem(adapter, BASE) == ""


def test_some_layers_alone_are_taken_where_the_configuration_says_so(adapter):
    some = {path: size for path, size in LAYERS.items() if ".1." in path}
    save_file(weights_of(some), adapter / "adapter_model.safetensors")
    told = "the weights of 2 layers are not those that adapter_config.json names, such as model.layers.0.mlp.up_proj"
    assert adapter_problem(adapter, BASE) == f"{adapter}: {told}"
    configure(adapter, layers_to_transform=[1])
    assert adapter_problem(adapter, BASE) == ""
    assert unlike_plain_lora(adapter, ["q_proj", "up_proj"]) == ["layers_to_transform"], "no start for training"


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda weights: {}, "holds no weights"),
        (lambda weights: {name.replace(".model.layers", "._orig_mod.model.layers"): weights[name] for name in weights},
         "holds base_model.model._orig_mod.model.layers.0.mlp.up_proj.lora_A.weight, which updates no layer of base"),
        (lambda weights: weights | {"base_model.model.model.embed_tokens.weight": np.ones(3, np.float32)},
         "holds base_model.model.model.embed_tokens.weight, which updates no layer of base"),
        (lambda weights: {name: np.zeros(0, np.float32) for name in weights}, "shape [0], where base needs [2, 8]"),
        (lambda weights: {name: np.ones((3, 3), np.float32) for name in weights}, "has the shape [3, 3]"),
        (lambda weights: {name: weights[name] for name in weights if "lora_A" in name}, "weights of 4 layers are not"),
        (lambda weights: {name: weights[name] * np.float32("nan") for name in weights}, "what is no finite number"),
        (lambda weights: {name: (weights[name] * np.inf).astype(np.float16) for name in weights}, "no finite number"),
        (lambda weights: {name: weights[name].astype(np.int8) for name in weights}, "no finite number"),
    ],
)  # fmt: skip
def test_tensors_that_are_not_the_layers_updates_are_refused(adapter, change, told):
    """Each loads with a warning at most, and would be scored as that arm."""
    weights = adapter / "adapter_model.safetensors"
    save_file(change(load_file(weights)), weights)
    assert told in adapter_problem(adapter, BASE)


def test_weights_in_16_bits_are_looked_into_as_well(adapter):
    from safetensors.torch import load_file as load
    from safetensors.torch import save_file as save

    weights = adapter / "adapter_model.safetensors"
    found = {name: tensor.bfloat16() for name, tensor in load(weights).items()}
    save(found, weights)
    assert adapter_problem(adapter, BASE) == ""
    save({name: tensor / 0 for name, tensor in found.items()}, weights)
    assert "no finite number" in adapter_problem(adapter, BASE)


@pytest.mark.parametrize(
    "setting", [{"target_modules": "("}, {"layers_to_transform": "0"}, {"rank_pattern": 3, "target_modules": 5},
                {"r": "2"}, {"r": 0}, {"r": None}, {"lora_alpha": "NaN"}]
)  # fmt: skip
def test_a_configuration_of_another_form_is_told(adapter, setting):
    configure(adapter, **setting)
    assert f"{adapter}/adapter_config.json " in adapter_problem(adapter, BASE)


def test_a_base_model_with_another_tokenizer_is_refused(adapter):
    run = {"settings": {"base_model": "base"}, "data": {"test_digest": "digest"}, "vocabulary": 32_000}
    (adapter / "run.json").write_text(json.dumps(run))
    assert "was trained with another tokenizer, of 32000 tokens; that of base has 600" in mismatch(adapter)


@pytest.mark.parametrize(
    "run", [{}, [], {"settings": {}}, {"settings": {"base_model": "x"}, "data": {}}, {"settings": None}]
)
def test_a_run_json_of_an_older_version_is_told_so(adapter, run):
    (adapter / "run.json").write_text(json.dumps(run))
    assert "run.json cannot be read, or is of an older version" in mismatch(adapter)


def test_what_an_adapter_says_of_itself_cannot_steer_terminal_or_report(adapter):
    run = {"settings": {"base_model": "\x1b[2J<script>"}, "data": {"test_digest": "digest"}}
    (adapter / "run.json").write_text(json.dumps(run))
    assert "?[2J<script>" in mismatch(adapter)
    metrics, _ = read_results(ROOT / "docs" / "results" / "small")
    assert "<script>" not in report(metrics, {}, notes=[f"mismatch: {mismatch(adapter)}"])


def test_the_layers_of_an_adapter_are_read_from_its_weights(adapter):
    """Its configuration may hold them as a pattern."""
    assert adapted_layers(adapter) == {"up_proj", "q_proj"}


def test_the_adapter_that_training_writes_is_plain(mine):
    """And so is DoRA on the same layers, whose magnitudes are part of its updates."""
    import config

    settings = config.parse_settings(config.EvaluationSettings, mine[1])
    base, folder = config.read_base(settings), config.adapter_folder(settings, "dpo")
    assert adapter_problem(folder, base) == ""
    lora = json.loads((folder / "adapter_config.json").read_text())
    weights = load_file(folder / "adapter_model.safetensors")
    for path in [name.removesuffix(".lora_A.weight") for name in weights if "lora_A" in name]:
        size = base.layers[path.removeprefix("base_model.model.")][1]
        weights[f"{path}.lora_magnitude_vector"] = np.ones(size, np.float32)
    dora = folder.with_name("dora")
    shutil.copytree(folder, dora)
    save_file(weights, dora / "adapter_model.safetensors")
    assert "not those that adapter_config.json names" in adapter_problem(dora, base)
    (dora / "adapter_config.json").write_text(json.dumps(lora | {"use_dora": True}))
    assert adapter_problem(dora, base) == ""
