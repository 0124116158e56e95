"""Training, end to end on a tiny random Llama in 4 bits."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import config
import train_dpo
from config import TrainingSettings, UserError, parse_settings
from conftest import make_pairs
from data.pairs import ids_digest, load_pairs, preference_rows, split_pairs, write_pairs


def run_of(flags: list[str], stage: str) -> dict:
    return json.loads((folder_of(flags, stage) / "run.json").read_text())


def folder_of(flags: list[str], stage: str) -> Path:
    return config.adapter_folder(parse_settings(TrainingSettings, flags), stage)


@pytest.mark.parametrize(("init", "weights"), [("base", "unpacked"), ("sft", "unpacked"), ("base", "packed")])
def test_the_first_dpo_loss_is_ln_2(training_flags, monkeypatch, init, weights):
    if weights == "packed":  # as where memory is short
        monkeypatch.setattr(config, "fits_unpacked", lambda *about: False)
    train_dpo.main([*training_flags, "--init", init])
    run = run_of(training_flags, "dpo")
    assert run["first_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert run["last_loss"] != run["first_loss"]
    assert all(entry["grad_norm"] > 0 for entry in run["log_history"] if "grad_norm" in entry), "after evaluations, too"
    assert any("eval_loss" in entry for entry in run["log_history"])
    assert run["initial_adapter"] == (str(folder_of(training_flags, "sft")) if init == "sft" else None)


def test_dpo_goes_on_from_an_adapter_whose_layers_are_given_as_a_pattern(tiny_model, tmp_path, monkeypatch):
    """As Unsloth saves them of a base in 8 bits."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    layers = ["down_proj", "v_proj"]
    lora = LoraConfig(r=2, target_modules=r".*\.(?:v_proj|down_proj)", task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), lora).save_pretrained(tmp_path / "sft")
    asked = {}

    class FastLanguageModel:
        def get_peft_model(self, target_modules, **given):
            asked["layers"] = target_modules
            return get_peft_model(self, LoraConfig(r=given["r"], target_modules=target_modules, task_type="CAUSAL_LM"))

    monkeypatch.setitem(sys.modules, "unsloth", SimpleNamespace(FastLanguageModel=FastLanguageModel))
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    trained = config.add_unsloth_adapter(model, TrainingSettings(gradient_checkpointing=False), tmp_path / "sft")
    assert asked["layers"] == layers
    saved = load_file(tmp_path / "sft" / "adapter_model.safetensors")
    now = {name.replace(".default", ""): weight for name, weight in trained.state_dict().items() if "lora_" in name}
    assert saved.keys() == now.keys() and all(torch.equal(now[name], saved[name]) for name in saved)


def test_a_finished_run_leaves_whole_adapters_and_their_story(training_flags, pairs_file, capsys):
    train_dpo.main(training_flags)
    run = run_of(training_flags, "dpo")
    folder = folder_of(training_flags, "dpo")
    train, test = split_pairs(load_pairs(pairs_file), 0.3)
    names = [folder_of(training_flags, "dpo").name, folder_of(training_flags, "sft").name]
    assert [path.name for path in sorted(folder.parent.iterdir()) if not path.name.endswith("_reference")] == names
    assert (folder / "loss.png").stat().st_size > 10_000
    assert not (folder / "ref").exists(), "only the policy is saved"
    assert run["settings"]["beta"] == 0.1 and run["settings"]["seed"] == 3407
    assert run["data"]["pairs_sha256"] == config.file_sha256(pairs_file)
    assert run["data"]["test_digest"] == ids_digest(test)
    assert run["data"]["train_pairs"] == len(train) - 4
    assert run["steps"] == 3 and run["packages"]["trl"] and run["wall_seconds"] > 0 and run["peak_memory_gb"] > 0
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == training_flags[3]
    assert all(weight.dtype == torch.float32 for weight in load_file(folder / "adapter_model.safetensors").values())

    before = (folder_of(training_flags, "sft") / "run.json").stat().st_mtime_ns
    capsys.readouterr()
    train_dpo.main([*training_flags, "--beta", "0.2"])
    said = capsys.readouterr().out
    assert "is there and is not trained again" in said and "it was trained with" not in said
    train_dpo.main([*training_flags, "--sft_learning_rate", "0.1"])
    assert "; it was trained with sft_learning_rate 0.001, not 0.1" in capsys.readouterr().out
    assert (folder_of(training_flags, "sft") / "run.json").stat().st_mtime_ns == before


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(training_flags, tmp_path):
    weights = []
    for seed, name in (("1", "x"), ("1", "y"), ("2", "z")):
        flags = [*training_flags, "--stage", "sft", "--seed", seed, "--outputs", str(tmp_path / name)]
        train_dpo.main(flags)
        weights.append(load_file(folder_of(flags, "sft") / "adapter_model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def test_dpo_from_sft_starts_at_the_sft_adapter_and_refers_to_it(training_flags):
    train_dpo.main([*training_flags, "--stage", "sft"])
    settings = parse_settings(TrainingSettings, [*training_flags, "--validation_pairs", "0"])
    rows = preference_rows(make_pairs(20))
    trainer = train_dpo.build_trainer("dpo", settings, rows, [], folder_of(training_flags, "sft"))
    saved = load_file(folder_of(training_flags, "sft") / "adapter_model.safetensors")
    weights = dict(trainer.model.named_parameters())
    trainable = {name for name, weight in weights.items() if weight.requires_grad}
    assert trainable == {name for name in weights if ".default." in name}
    for name in trainable:
        assert weights[name].dtype == torch.float32
        assert torch.equal(weights[name], saved[name.replace(".default", "")]), "not rounded to bfloat16 on the way"
    trainer.train()
    after = dict(trainer.model.named_parameters())
    for name in trainable:
        assert torch.equal(after[name.replace(".default.", ".ref.")], saved[name.replace(".default", "")]), "the reference moved"
    assert any(not torch.equal(after[name], saved[name.replace(".default", "")]) for name in trainable)
    with pytest.raises(UserError, match="which has --lora_rank 16 --lora_alpha 16\nGive --lora_rank 16 --lora_alpha 16, or train SFT anew"):
        train_dpo.main([*training_flags, "--stage", "dpo", "--lora_rank", "4", "--lora_alpha", "8"])


def test_loss_is_on_the_completion_only_and_every_row_keeps_its_boundary(training_flags):
    settings = parse_settings(TrainingSettings, [*training_flags, "--validation_pairs", "0"])
    rows = preference_rows(make_pairs(40), "both")
    trainer = train_dpo.build_trainer("sft", settings, rows, [])
    tokenizer = trainer.processing_class
    assert len(trainer.train_dataset) == len(rows)
    for row, text in zip(trainer.train_dataset, rows, strict=True):
        labels = trainer.data_collator([row])["labels"][0]
        assert tokenizer.decode(labels[labels != -100]) == text["chosen"] + tokenizer.eos_token
    trainer = train_dpo.build_trainer("dpo", settings, rows, [])
    assert len(trainer.train_dataset) == len(rows)
    for row, text in zip(trainer.train_dataset, rows, strict=True):
        assert tokenizer.decode(row["prompt_ids"]) == text["prompt"]
        assert tokenizer.decode(row["chosen_ids"]) == text["chosen"] + tokenizer.eos_token
        assert tokenizer.decode(row["rejected_ids"]) == text["rejected"] + tokenizer.eos_token


def test_a_wrong_reference_stops_the_run(training_flags, monkeypatch):
    train_dpo.main([*training_flags, "--stage", "sft"])
    build = train_dpo.build_trainer

    def tampered(*arguments):
        trainer = build(*arguments)
        for name, weight in trainer.model.named_parameters():
            if ".ref." in name:
                weight.data += 0.5
        return trainer

    with pytest.raises(UserError, match="the reference is not the policy"), monkeypatch.context() as patched:
        patched.setattr(train_dpo, "build_trainer", tampered)
        train_dpo.main([*training_flags, "--stage", "dpo", "--trainer", "stock"])
    assert not folder_of(training_flags, "dpo").exists()

    train_dpo.main([*training_flags, "--stage", "dpo"])
    [file] = Path(training_flags[training_flags.index("--outputs") + 1]).glob("*_reference/*.json")
    wrong = {key: [value - 5 for value in values] for key, values in json.loads(file.read_text()).items()}
    file.write_text(json.dumps(wrong))
    with pytest.raises(UserError, match="is not the policy that training starts from: they differ by 5.* nats.*\nDelete the file"):
        train_dpo.main([*training_flags, "--stage", "dpo"])
    file.write_text("cut sho")
    train_dpo.main([*training_flags, "--stage", "dpo"])


def test_validation_and_used_pairs_come_from_the_training_users(training_flags, pairs_file):
    settings = parse_settings(TrainingSettings, [*training_flags, "--max_pairs", "10"])
    train, test = config.load_split(settings)
    used, validation = train_dpo.hold_back(train, settings)
    assert (len(used), len(validation), len(test)) == (10, 4, 18)
    assert not {pair.user_id for pair in used} & {pair.user_id for pair in validation}
    assert {*used, *validation} <= {*train}
    with pytest.raises(UserError, match="fewer than one step"):
        train_dpo.hold_back(train[:6], settings)


def test_check_tells_what_was_found_and_writes_nothing(training_flags, tmp_path, capsys):
    train_dpo.main([*training_flags, "--check"])
    out = capsys.readouterr().out
    for found in ("60 in", "42 train, 18 test", "48 A, 12 B; one letter alone would score 80%", "19 A, 19 B", "ready to train"):
        assert found in out
    assert not (tmp_path / "outputs").exists()
    with pytest.raises(SystemExit):
        train_dpo.main([*training_flags, "--check", "--stage", "dpo"])
    assert "there is no adapter" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        (["--max_length", "50"], "more than max_length 50"),
        (["--stage", "dpo"], "there is no adapter at"),
        (["--sft_adapter", "nowhere"], "there is no adapter at nowhere"),
        (["--pairs", "nowhere.jsonl"], "no pairs file nowhere.jsonl"),
        (["--base_model", "nowhere"], "cannot load the base model nowhere"),
        (["--optim", "adamw"], "trainer: adamw is not a valid OptimizerNames"),
        (["--lr_scheduler", "cosine_with_min_lr"], "trainer: One of min_lr or min_lr_rate .*\nGive another --optim or --lr_scheduler"),
        (["--report_to", "wandb"], "trainer: .*\nInstall wandb, or give --report_to none"),
    ],
)
def test_a_run_that_cannot_work_ends_before_the_model_is_loaded(training_flags, extra, problem, tmp_path, monkeypatch):
    monkeypatch.setattr(config, "load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match=problem):
        train_dpo.main([*training_flags, *extra])
    assert not (tmp_path / "outputs").exists()


def test_broken_pairs_train_nothing(training_flags, pairs_file, tmp_path):
    write_pairs(pairs_file, make_pairs(3))
    with open(pairs_file, "a") as file:
        file.write("junk\n")
    with pytest.raises(UserError, match="line 4: not JSON"):
        train_dpo.main(training_flags)
    assert not (tmp_path / "outputs").exists()


def test_out_of_memory_turns_on_checkpointing_then_halves_the_micro_batch_and_starts_again_cleanly(training_flags, monkeypatch, capsys):
    flags = [flag for flag in training_flags if flag != "2"]
    flags.remove("--batch_size")
    reference = [*flags, "--stage", "sft", "--batch_size", "1", "--outputs", training_flags[9] + "-reference"]
    train_dpo.main(reference)
    build = train_dpo.build_trainer
    sizes = []

    def short_of_memory(*arguments):
        trainer, batch_size = build(*arguments), arguments[-1]
        sizes.append((batch_size, trainer.args.gradient_accumulation_steps, trainer.args.gradient_checkpointing))
        step = trainer.training_step

        def training_step(*step_arguments, **named):
            if batch_size > 1 and trainer.state.global_step == 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return step(*step_arguments, **named)

        trainer.training_step = training_step
        return trainer

    monkeypatch.setattr(train_dpo, "build_trainer", short_of_memory)
    train_dpo.main([*flags, "--stage", "sft", "--batch_size", "4"])
    assert sizes == [(4, 1, False), (4, 1, True), (2, 2, True), (1, 4, True)]
    assert capsys.readouterr().out.count("out of memory; starting again") == 3
    assert (run_of(flags, "sft")["batch_size"], run_of(flags, "sft")["gradient_checkpointing"]) == (1, True)
    survived, undisturbed = (load_file(folder_of(case, "sft") / "adapter_model.safetensors") for case in (flags, reference))
    assert all(torch.equal(survived[name], undisturbed[name]) for name in survived)


def test_with_checkpointing_after_out_of_memory_there_are_no_cuda_graphs(training_flags, monkeypatch):
    tried = []

    def no_memory(stage, settings, *arguments):
        tried.append((settings.gradient_checkpointing, settings.cuda_graphs))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train_dpo, "build_trainer", no_memory)
    monkeypatch.setattr(config, "fitting_batch_size", lambda *given: (1, False, True))
    with pytest.raises(UserError, match="out of memory with a micro-batch of 1"):
        train_dpo.main([*training_flags, "--stage", "dpo", "--init", "base"])
    assert tried == [(False, True), (True, False)]


def test_out_of_memory_at_micro_batch_1_says_what_to_lower(training_flags, monkeypatch):
    def no_memory(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train_dpo, "build_trainer", no_memory)
    with pytest.raises(UserError, match="out of memory with a micro-batch of 1\nLower"):
        train_dpo.main([*training_flags, "--batch_size", "1"])


def test_the_loss_of_sft_is_drawn_so_that_its_end_can_be_read():
    history = [{"step": step, "loss": loss} for step, loss in enumerate((3.0, 1.0, 0.02, 0.015), 1)]
    assert train_dpo.draw_losses(history, "sft").axes[0].get_yscale() == "log"
    history = [{"step": step, "loss": loss, "rewards/margins": 0.1} for step, loss in enumerate((0.69, 0.6, 0.5), 1)]
    assert [axis.get_yscale() for axis in train_dpo.draw_losses(history, "dpo").axes] == ["linear"] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_unpacked_once_are_those_of_4_bits(tiny_model, tmp_path, monkeypatch, dtype):
    """To the rounding of `dtype`: a model that is stored in 16 bits would have them unpacked to these."""
    if torch.cuda.is_available():
        pytest.skip("a GPU unpacks them at every pass")
    LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(tmp_path)
    PreTrainedTokenizerFast.from_pretrained(tiny_model).save_pretrained(tmp_path)
    settings = config.preset_settings(config.TrainingSettings, "small", base_model=str(tmp_path))
    memory, given = psutil.virtual_memory(), torch.randn(10, 64, dtype=dtype)
    found = {}
    for name, free in (("packed", 2**16), ("unpacked", memory.available)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: memory._replace(available=free))
        model, _ = config.load_model(settings, dtype)
        layer, row = model.model.layers[0].mlp.up_proj, given.clone().requires_grad_()
        out = layer(row)
        out.square().sum().backward()
        found[name] = layer.weight, out.detach(), row.grad
    weights = found["unpacked"][0]
    assert found["packed"][0].dtype == torch.uint8 and weights.dtype == dtype and not weights.requires_grad
    assert max(len(block.unique()) for block in weights.reshape(-1, 64)) <= 16, "a block of 64 has the values of 4 bits"
    (out, gradient), (expected, rounded) = found["unpacked"][1:], found["packed"][1:]
    torch.testing.assert_close(out, expected, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)
    torch.testing.assert_close(gradient, 2 * out @ weights)
    assert (gradient - rounded).norm() < 0.01 * gradient.norm(), "bitsandbytes' backward pass rounds weights to what is stored"


def test_what_is_computed_in_is_not_left_to_accelerate(training_flags, monkeypatch):
    """Its configuration may ask for fp16, in which run.json would not be what was trained."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    settings = config.parse_settings(config.TrainingSettings, training_flags)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(config, "training_dtype", lambda dtype=dtype: dtype)
        found[dtype] = train_dpo.trainer_arguments("dpo", settings, 2).mixed_precision
    assert found == {torch.float32: "no", torch.bfloat16: "bf16"}


def test_dpo_starts_from_plain_lora_alone(training_flags):
    """Unsloth would make other layers of the rest, and the shared trainer leaves out what is on the output layer."""
    train_dpo.main([*training_flags, "--stage", "sft"])
    [folder] = Path(config.parse_settings(config.TrainingSettings, training_flags).outputs).glob("*_sft_*_final")
    lora = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(lora | {"use_rslora": True}))
    with pytest.raises(UserError, match="an adapter with use_rslora\nTrain SFT with --stage sft"):
        train_dpo.main([*training_flags, "--stage", "dpo"])
    (folder / "adapter_config.json").write_text(json.dumps(lora))
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(weights | {"base_model.model.lm_head.lora_A.weight": torch.zeros(8, 64)}, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="an adapter with lm_head"):
        train_dpo.main([*training_flags, "--stage", "dpo"])


def test_one_process_trains_on_one_gpu(monkeypatch):
    """transformers would give each further GPU rows of its own, and so train with another effective batch than the one asked for."""
    from transformers import TrainingArguments

    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda arguments: 2))
    settings = config.preset_settings(config.TrainingSettings, "small", gradient_checkpointing=False)
    for stage in ("sft", "dpo"):
        assert train_dpo.trainer_arguments(stage, settings, 2)._n_gpu == 1
