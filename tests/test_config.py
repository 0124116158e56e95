"""Settings, presets, paths, and loading a model in few bits."""

import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
import transformers.models.llama.modeling_llama  # noqa: F401  before a test lets CUDA seem to be there
from conftest import FUZZ_TIMES
from hypothesis import example, given
from hypothesis import settings as fuzz
from hypothesis import strategies as st

import config
import evaluate_dpo
import train_dpo
from config import EvaluationSettings, TrainingSettings, parse_settings, preset_settings
from data.errors import UserError


def test_small_is_the_preset_without_cuda_and_what_differs_is_printed(capsys):
    settings = parse_settings(TrainingSettings, ["--beta", "0.3"])
    assert (settings.preset, settings.base_model, settings.beta) == ("small", config.SMALL_MODEL, 0.3)
    assert capsys.readouterr().out == "preset small (no CUDA device)\n  beta: 0.1 -> 0.3\n"


def test_thesis_preset_is_the_experiment_of_the_thesis():
    settings = preset_settings(TrainingSettings, "thesis")
    assert settings.base_model == "unsloth/llama-3-8b-bnb-4bit"
    assert (settings.bits, settings.lora_rank, settings.lora_alpha, settings.lora_dropout) == (4, 16, 16, 0)
    assert (settings.sft_epochs, settings.sft_learning_rate) == (1, 2e-4)
    assert (settings.epochs, settings.learning_rate, settings.beta) == (3, 5e-5, 0.1)
    assert (settings.lr_scheduler, settings.warmup_steps, settings.weight_decay) == ("linear", 5, 0.01)
    assert (settings.optim, settings.effective_batch, settings.seed) == ("adamw_torch_fused", 8, 3407)
    assert config.adapter_folder(settings, "dpo").name == "llama3_dpo_4bit_final"


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--betta", "0.3"], "unknown setting --betta\nDid you mean --beta?"),
        (["--beta", "high"], "invalid float value: 'high'"),
        (["--beta", "-1"], "beta is -1.0\nGive --beta a value above 0"),
        (["--learning_rate", "inf"], "learning_rate is inf\nGive --learning_rate a value that is a number"),
        (["--lora_dropout", "1"], "Give --lora_dropout a value of 0 or more, below 1"),
        (["--test_share", "1"], "Give --test_share a value between 0 and 1"),
        (["--max_steps", "0"], "Give --max_steps a value of 1 or more, or -1"),
        (["--max_pairs", "1"], "Give --max_pairs a value of 2 or more"),
        (["--seed", "5000000000"], "Give --seed a value of 0 or more, below 4 billion"),
        (["--warmup_steps", "-1"], "Give --warmup_steps a value of 0 or more"),
        (["--bits", "3"], "--bits: invalid choice: '3'"),
        (["--preset", "large"], "--preset: invalid choice: 'large'"),
        (["--batch_size", "3"], "batch_size is 3\nGive --batch_size a value that divides 4"),
        (["--adapters", "a=b"], "unknown setting --adapters"),
        (["absent.yaml"], "cannot read the settings file absent.yaml"),
    ],
)
def test_a_wrong_setting_is_an_error_of_two_lines(flags, problem):
    with pytest.raises(UserError) as error:
        parse_settings(TrainingSettings, flags)
    assert problem in str(error.value)
    assert len(str(error.value).splitlines()) == 2


def test_a_settings_file_overrides_the_preset_and_a_flag_overrides_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("beta: 0.5\nmax_pairs: 8\ncheck: true\n")
    settings = parse_settings(TrainingSettings, [str(path), "--beta", "0.2"])
    assert (settings.beta, settings.max_pairs, settings.check) == (0.2, 8, True)
    path.write_text("preset: thesis\nbackend: unsloth\n")
    settings = parse_settings(TrainingSettings, [str(path), "--preset", "small", "--backend=hf"])
    assert (settings.preset, settings.base_model, settings.backend) == ("small", config.SMALL_MODEL, "hf")
    path.write_text("preset: small\nmax_pairs: null\n")
    assert parse_settings(TrainingSettings, [str(path)]).max_pairs is None, "and not the preset's"
    assert parse_settings(TrainingSettings, [str(path), "--max_pairs", "9"]).max_pairs == 9
    for text, problem in {
        "beta: null": "beta has no value",
        "bata: null": "unknown setting --bata",
        "bata: 0.5": "unknown setting --bata",
        "beta: [1, 2": "cannot read the settings file",
    }.items():
        path.write_text(text)
        with pytest.raises(UserError, match=problem):
            parse_settings(TrainingSettings, [str(path)])


def test_a_settings_file_may_stand_anywhere_and_serve_both_scripts(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("preset: small\nbeta: 0.5\nbatch_users: 3\nadapters: []\n")
    assert parse_settings(EvaluationSettings, [str(path)]).batch_users == 3
    for flags in (["--seed", "1", str(path)], ["--check", str(path)], [str(path), "--seed=1"]):
        assert parse_settings(TrainingSettings, flags).beta == 0.5
    assert parse_settings(TrainingSettings, ["--beta", "0.2", str(path)]).beta == 0.2, "a flag overrides the file"
    found = parse_settings(TrainingSettings, ["--preset", "small", "--outputs", "a.json"])
    assert found.outputs == "a.json", "what follows a flag is its value"


def test_a_base_model_is_one_folder_wherever_it_is_named_from(tmp_path, monkeypatch):
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse_settings(EvaluationSettings, ["--base_model", "tiny"]).base_model == str(tmp_path / "tiny")
    assert parse_settings(EvaluationSettings, ["--base_model", "a/hub-id"]).base_model == "a/hub-id"


KINDS = (TrainingSettings, EvaluationSettings)
flags_of_both = st.sampled_from([f"--{name}" for kind in KINDS for name in kind.__dataclass_fields__])
odd_numbers = ["-1", "0", "1", "2.5", "nan", "inf", "-inf", "1e999", "4"]
odd_words = ["true", "none", "", "small", "sft", "[]", "é"]
values = st.sampled_from([*odd_numbers, *odd_words]) | st.text(max_size=5)


@fuzz(max_examples=100 * FUZZ_TIMES)
@example(arguments=[("--gradient_checkpointing", "\x1e")], kind=TrainingSettings)
@example(arguments=[("--seed", "1"), ("\n", "--x")], kind=TrainingSettings)
@given(arguments=st.lists(st.tuples(flags_of_both, values), max_size=3), kind=st.sampled_from(KINDS))
def test_any_flags_give_settings_or_an_error_of_two_lines(arguments, kind):
    try:
        found = parse_settings(kind, [word for flag in arguments for word in flag if word not in ("-h", "--help")])
    except UserError as error:
        assert len(str(error).splitlines()) == 2
        return
    numbers = [value for value in vars(found).values() if isinstance(value, float)]
    assert all(map(math.isfinite, numbers)), "no run can be told to learn at the rate nan"


odd_values = st.none() | st.floats() | st.text(max_size=4) | st.lists(st.integers(), max_size=2)
odd_files = st.dictionaries(st.sampled_from(["beta", "bits", "x", "seed"]), odd_values).map(json.dumps)


@fuzz(max_examples=50 * FUZZ_TIMES)
@given(text=st.text(max_size=60) | odd_files)
@example(text='{"x": "-h"}')
@example(text='{"help": 1}')
@example(text='{"optim": "-h"}')
def test_any_settings_file_gives_settings_or_an_error_of_two_lines(tmp_path, text):
    file = tmp_path / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    try:
        parse_settings(TrainingSettings, [str(file)])
    except UserError as error:
        assert len(str(error).splitlines()) == 2


def test_processes_that_the_effective_batch_of_the_preset_cannot_serve_take_one_that_can(monkeypatch):
    monkeypatch.setattr(config, "PROCESSES", 3)
    flags = ["--preset", "thesis", "--backend", "hf"]
    assert parse_settings(TrainingSettings, [*flags, "--effective_batch", "9"]).effective_batch == 9
    with pytest.raises(UserError, match="that 3 processes can share"):
        parse_settings(TrainingSettings, flags)


def test_every_setting_has_a_help_line():
    for kind in (TrainingSettings, EvaluationSettings):
        for setting in kind.__dataclass_fields__.values():
            assert setting.metadata["help"], setting.name


def test_every_preset_value_is_a_setting():
    names = {*TrainingSettings.__dataclass_fields__, *EvaluationSettings.__dataclass_fields__}
    for values in config.PRESETS.values():
        assert set(values) <= names


def test_a_missing_base_model_is_an_error_with_a_remedy(tmp_path):
    with pytest.raises(UserError, match="cannot load the base model .*absent"):
        config.load_tokenizer(EvaluationSettings(base_model=str(tmp_path / "absent")))


def test_a_base_model_that_brings_code_is_refused_and_the_code_not_run(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    tokenizer = {"AutoTokenizer": ["evil.Tokenizer", None]}
    code = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"} | tokenizer
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": code}))
    text = json.dumps({"tokenizer_class": "EvilTokenizer", "auto_map": code})
    (folder / "tokenizer_config.json").write_text(text)
    settings = EvaluationSettings(base_model=str(folder))
    for load in (lambda: config.load_tokenizer(settings), lambda: config.empty_model(str(folder)).num_parameters()):
        with pytest.raises(UserError, match="cannot load the base model"):
            load()
    assert not (tmp_path / "ran").exists()


def test_a_pickled_base_model_is_refused(tmp_path, tiny_model):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny_model.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).symlink_to(path)
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot load the base model"):
        config.load_model(EvaluationSettings(base_model=str(folder), bits=16), torch.float32)


@pytest.fixture
def packed(monkeypatch):
    """4-bit weights are not unpacked once, as on a GPU, or where memory is short."""
    monkeypatch.setattr(config, "fits_unpacked", lambda *about: False)


def test_4_bit_weights_are_the_same_whatever_is_computed_in(tiny_model, packed):
    """Training computes in bfloat16 and evaluation in float32, over the same 4-bit weights."""
    settings = EvaluationSettings(base_model=str(tiny_model))
    models = [config.load_model(settings, dtype)[0] for dtype in (torch.float32, torch.bfloat16)]
    found = [model.model.layers[0].mlp.up_proj.weight for model in models]
    assert found[0].dtype == torch.uint8
    assert torch.equal(found[0].data, found[1].data)
    others = [model.model.embed_tokens.weight for model in models]
    assert others[0].dtype == torch.float32
    assert torch.equal(others[0], others[1].float()), "what is not packed has 16 bits"


@pytest.mark.parametrize("bits", [8, 16])
def test_other_precisions_load_and_run(tiny_model, bits):
    model, tokenizer = config.load_model(EvaluationSettings(base_model=str(tiny_model), bits=bits), torch.float32)
    text = tokenizer("The better recommendation is Option A.", return_tensors="pt")
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=text["input_ids"]).logits).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_are_above_zero_after_an_evaluation_of_4_bit_weights(tiny_model, packed, dtype):
    """Through one layer alone: around it, the residual stream would carry a gradient in any case."""
    model, _ = config.load_model(EvaluationSettings(base_model=str(tiny_model)), dtype)
    layer = model.model.layers[0].mlp.up_proj
    inputs = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    model.eval()
    with torch.no_grad():
        before = layer(inputs)
    model.train()
    after = layer(inputs.requires_grad_())
    after.sum().backward()
    assert torch.equal(before, after)
    assert inputs.grad.norm() > 0
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False), "the weights were repacked"


@pytest.mark.parametrize("script", ["train_dpo.py", "evaluate_dpo.py"])
def test_help_and_errors_on_the_command_line(script, tmp_path):
    def start(*flags: str) -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, config.ROOT / script, *flags], **pipes, cwd=tmp_path)

    helped, wrong = start("--help"), start("--bits", "3")
    shown, _ = helped.communicate()
    assert "--base_model" in shown and "Defaults are those of the preset small" in shown and "--no_" not in shown
    _, said = wrong.communicate()
    assert wrong.returncode == 2
    assert said.startswith("error: ") and "Traceback" not in said
    assert len(said.splitlines()) == 2


def test_special_tokens_outside_of_the_embeddings_are_refused(flags, tiny_model, tmp_path):
    """Padding would be read from beyond them."""
    from transformers import AutoTokenizer

    shutil.copytree(tiny_model, tmp_path / "padded")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path / "padded")
    with pytest.raises(UserError, match="has pad token 600 and .* the model embeddings of 600 tokens"):
        train_dpo.main([*flags, "--base_model", str(tmp_path / "padded"), "--check"])


def test_a_base_model_by_another_path_has_the_same_adapters(flags, tiny_model, tmp_path):
    (tmp_path / "link").symlink_to(tiny_model)
    named = [config.adapter_folder(parse_settings(EvaluationSettings, [*flags, "--base_model", str(path)]), "dpo")
             for path in (tiny_model, f"{tiny_model}/", tmp_path / "link")]  # fmt: skip
    assert len(set(named)) == 1


@pytest.mark.parametrize("script", [train_dpo, evaluate_dpo])
def test_a_base_model_that_caps_its_logits_is_refused(script, flags, tiny_model, tmp_path, monkeypatch):
    """Scores would leave that out, policy and reference alike: the first loss would be ln 2 all the same."""
    shutil.copytree(tiny_model, tmp_path / "capped")
    shape = json.loads((tmp_path / "capped" / "config.json").read_text())
    (tmp_path / "capped" / "config.json").write_text(json.dumps(shape | {"final_logit_softcapping": 30.0}))
    monkeypatch.setattr(config, "load_model", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.setattr(evaluate_dpo, "find_adapters", lambda *_: ({}, []))
    with pytest.raises(UserError, match="scales or caps its logits .final_logit_softcapping 30.0."):
        script.main([*flags, "--base_model", str(tmp_path / "capped")])


def test_micro_batch_and_checkpointing_follow_the_memory_of_the_card(monkeypatch, tmp_path):
    from transformers import LlamaConfig

    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    shape = {"vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32} | heads
    LlamaConfig(**shape).save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda: 1.0)

    def fitting(gigabytes, shared_prompt=True, share=8, **changes):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (gigabytes * 1e9, gigabytes * 1e9))
        settings = config.preset_settings(TrainingSettings, "thesis", base_model=str(tmp_path), **changes)
        return config.fitting_batch_size(settings, share, 260 if shared_prompt else 400, shared_prompt)

    assert fitting(24) == (8, False, True), "Llama 3 8B on an RTX 3090, a prompt once"
    assert fitting(24, shared_prompt=False) == (8, True, False)
    assert fitting(8) == (8, True, False)
    assert fitting(8, gradient_checkpointing=False) == (1, False, True), "as asked"
    assert fitting(80, share=64) == (32, False, True)
    assert fitting(24, batch_size=4) == (4, False, True)
    assert fitting(24, share=16, batch_size=16, effective_batch=16) == (16, True, False)


def test_cuda_graphs_are_for_where_they_give_the_same_numbers(monkeypatch, tmp_path):
    from transformers import LlamaConfig

    shape = {"vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    LlamaConfig(**shape, num_attention_heads=9).save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda: 1.0)

    def graphs(gigabytes=24, shared_prompt=True, **changes):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (gigabytes * 1e9, gigabytes * 1e9))
        settings = config.preset_settings(TrainingSettings, "thesis", base_model=str(tmp_path), **changes)
        return config.fitting_batch_size(settings, 8, 260, shared_prompt)[2]

    assert graphs() and graphs(bits=16) and graphs(cuda_graphs=True)
    assert not graphs(gigabytes=1), "with gradient checkpointing, a graph would record it twice"
    assert not graphs(cuda_graphs=False) and not graphs(shared_prompt=False)
    for elsewhere in ({"backend": "hf"}, {"bits": 8}, {"gradient_checkpointing": True}, {"trainer": "stock"}):
        assert not graphs(**elsewhere, shared_prompt="trainer" not in elsewhere)
        with pytest.raises(UserError, match="CUDA graphs are for the shared trainer through Unsloth on one GPU"):
            graphs(cuda_graphs=True, **elsewhere)
    monkeypatch.setattr(config, "PROCESSES", 2)
    assert not graphs()


def test_a_home_folder_a_tab_and_the_projects_own_pairs_are_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.json").write_text('{\n\t"beta": 0.2,\n\t"outputs": "~/runs"\n}')
    settings = config.parse_settings(TrainingSettings, ["mine.json", "--preset", "small"])
    assert (settings.beta, settings.outputs) == (0.2, f"{tmp_path}/runs")
    monkeypatch.setattr(config, "ROOT", tmp_path / "project")
    there = tmp_path / "project" / "data" / "pairs_ml-100k.jsonl"
    there.parent.mkdir(parents=True)
    there.touch()
    assert config.parse_settings(TrainingSettings, ["--preset", "small"]).pairs == str(there)
    with pytest.raises(UserError, match="seed is -1\nGive --seed a value of 0 or more"):
        config.parse_settings(TrainingSettings, ["--preset", "small", "--seed", "-1"])
