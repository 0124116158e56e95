"""Training, end to end on a tiny random Llama: what it makes, what stops it, and how it goes on."""

import functools
import importlib.util
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import psutil
import pytest
import torch
from conftest import make_pairs
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from trl.trainer.dpo_trainer import DataCollatorForPreference

import config
import evaluate_dpo
import train_dpo
from config import EvaluationSettings, TrainingSettings
from data.adapters import adapter_mismatch
from data.errors import UserError, failed_kernel
from data.files import SEAL, file_sha256, only_run_in
from data.pairs import hold_back, ids_digest, load_pairs, preference_rows, split_pairs, write_pairs
from data.predictions import LOG_PROBS, MARGINS, read_predictions
from data.report import CARD_MARK
from data.runs import RUN, WEIGHTS, last_whole_checkpoint
from data.tokens import pair_tree


def settings_of(flags: list[str]) -> TrainingSettings:
    return config.parse_settings(TrainingSettings, flags)


def folder_of(flags: list[str], stage: str) -> Path:
    return config.adapter_folder(settings_of(flags), stage)


def run_of(flags: list[str], stage: str) -> dict:
    return json.loads((folder_of(flags, stage) / RUN).read_text())


def losses_of(flags: list[str], stage: str) -> list[float]:
    return [entry["loss"] for entry in run_of(flags, stage)["log_history"] if "loss" in entry]


def weights_of(flags: list[str], stage: str) -> dict[str, torch.Tensor]:
    return load_file(folder_of(flags, stage) / WEIGHTS)


def data_of(rows: list[dict], validation_rows: list[dict] | None = None) -> train_dpo.Data:
    return train_dpo.Data(rows, validation_rows or [], {})


# ------------------------------------------------------------------------------------------- stages, whole


@pytest.mark.parametrize(("init", "weights"), [("base", "unpacked"), ("sft", "unpacked"), ("base", "packed")])
def test_the_first_dpo_loss_is_ln_2(training_flags, monkeypatch, init, weights):
    if weights == "packed":  # as where memory is short
        monkeypatch.setattr(config, "fits_unpacked", lambda *about: False)
    train_dpo.main([*training_flags, "--init", init])
    run = run_of(training_flags, "dpo")
    assert run["first_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert run["last_loss"] != run["first_loss"]
    norms = [entry["grad_norm"] for entry in run["log_history"] if "grad_norm" in entry]
    assert all(norm > 0 for norm in norms), "after evaluations, too"
    assert any("eval_loss" in entry for entry in run["log_history"])
    assert run["initial_adapter"] == (str(folder_of(training_flags, "sft")) if init == "sft" else None)


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
    assert run["data"]["pairs_sha256"] == file_sha256(pairs_file)
    assert run["data"]["test_digest"] == ids_digest(test)
    assert run["data"]["train_pairs"] == len(train) - 4
    assert run["steps"] == 3 and run["packages"]["trl"] and run["wall_seconds"] > 0 and run["peak_memory_gb"] > 0
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == training_flags[3]
    assert all(weight.dtype == torch.float32 for weight in weights_of(training_flags, "dpo").values())
    card = (folder / "README.md").read_text()
    assert CARD_MARK in card and "Not evaluated" in card and str(folder.parent) not in card



def test_what_is_there_with_the_same_settings_is_not_trained_again(mine, monkeypatch, capsys):
    flags, _ = mine
    monkeypatch.setattr(train_dpo, "train_stage", lambda *_: pytest.fail("it was trained again"))
    train_dpo.main([*flags, "--batch_size", "1", "--restart", "true"])
    said = capsys.readouterr().out
    for stage in ("sft", "dpo"):
        assert f"{stage}: {folder_of(flags, stage)} is there, trained with these settings: nothing to do" in said


def test_other_words_around_the_films_are_another_training(mine, monkeypatch):
    flags, evaluation = mine
    monkeypatch.setattr("data.pairs.INSTRUCTION", "Compare two books.")
    with pytest.raises(SystemExit):
        train_dpo.main([*flags, "--check"])
    with pytest.raises(UserError, match="was trained with other words around the films than data/pairs.py has now"):
        evaluate_dpo.main(evaluation)


def test_a_base_model_is_another_by_its_files_and_not_by_its_folder(training_flags, tiny_model, tmp_path, capsys):
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    flags = [*training_flags, "--base_model", str(base), "--stage", "sft", "--max_steps", "1"]
    train_dpo.main(flags)
    before, shape = (base / "model.safetensors").read_bytes(), base / "config.json"
    weights = {name: value + 1 for name, value in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="is there, with hash of the base model's files .*\nGive --restart true"):
        train_dpo.main(flags)
    base_now, split = config.read_base(settings_of(flags)), run_of(flags, "sft")["data"]["test_digest"]
    told = adapter_mismatch(folder_of(flags, "sft"), base_now, split)
    assert told.endswith(f"was trained on other weights or settings than {base} holds now")
    (base / "model.safetensors").write_bytes(before)
    assert adapter_mismatch(folder_of(flags, "sft"), base_now, split) == "", "the same bytes are the same"
    settings = shape.read_text()
    shape.write_text(settings.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert adapter_mismatch(folder_of(flags, "sft"), base_now, split) == told
    shape.write_text(settings)
    moved = base.rename(tmp_path / "moved")
    assert adapter_mismatch(folder_of(flags, "sft"), base_now._replace(name=str(moved)), split) == ""
    folder_of(flags, "sft").rename(folder_of(flags, "sft").with_name("moved_sft_4bit_final"))
    capsys.readouterr()
    train_dpo.main([*flags, "--base_model", str(moved)])
    assert "is there, trained with these settings: nothing to do" in capsys.readouterr().out


def test_a_finished_adapter_that_was_damaged_is_trained_again_when_asked(mine, capsys):
    flags, _ = mine
    weights = folder_of(flags, "dpo") / WEIGHTS
    for spoil in (lambda: weights.write_bytes(weights.read_bytes()[:-9]), weights.unlink):
        spoil()
        with pytest.raises(UserError, match="with weights that are damaged or cut short\nGive --restart true"):
            train_dpo.main([*flags, "--stage", "dpo"])
        train_dpo.main([*flags, "--stage", "dpo", "--restart", "true"])
        assert load_file(weights)
        capsys.readouterr()


def test_the_last_line_of_training_is_the_command_that_finds_its_adapters(mine, tmp_path, monkeypatch, capsys):
    flags, _ = mine
    monkeypatch.setattr(train_dpo, "train_stage", lambda *_: None)
    monkeypatch.chdir(tmp_path)

    def said(*more: str) -> list[str]:
        train_dpo.main([*flags, "--control", "false", *more])
        return shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("next: "))

    first, elsewhere = folder_of(flags, "sft"), tmp_path / "my sft"
    shutil.copytree(first, elsewhere)
    for more, sft in ([], first), (["--sft_adapter", str(elsewhere)], elsewhere):
        python, script, *found = said(*more)
        assert python == "python" and Path(script).samefile(config.ROOT / "evaluate_dpo.py")
        settings = config.parse_settings(EvaluationSettings, found)
        adapters, _ = evaluate_dpo.find_adapters(settings, config.load_split(settings)[1])
        assert [folder for runs in adapters.values() for folder in runs.values()] == [sft, folder_of(flags, "dpo")]
    weights = (first / WEIGHTS).read_bytes()
    (first / WEIGHTS).write_bytes(weights + b" ")
    assert "--stage all --restart true" in shlex.join(said("--stage", "sft", "--restart", "true"))
    shutil.rmtree(first)
    assert "--stage all" in shlex.join(said()), "there is no arm sft to compare DPO with"
    small = config.preset_settings(TrainingSettings, "small")
    monkeypatch.setattr(config, "adapters_there", lambda *_: [tmp_path])
    monkeypatch.chdir(config.ROOT)
    monkeypatch.setattr(sys, "executable", str(config.ROOT / ".venv" / "bin" / "python"))
    assert config.next_command(small) == ".venv/bin/python evaluate_dpo.py --preset small"


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (["--beta", "0.2"], "dpo: .*_dpo_4bit_final is there, with beta 0.1, not 0.2"),
        (["--sft_learning_rate", "0.1"], "sft: .*_sft_4bit_final is there, with sft_learning_rate 0.001, not 0.1"),
        (["--stage", "dpo", "--init", "base"], "with init 'sft', not 'base'"),
    ],
)
def test_an_adapter_of_other_settings_is_not_trained_over(mine, changed, named, monkeypatch, capsys):
    """The evaluation beside it would go on describing the adapter that is gone."""
    flags = [*mine[0], *changed]
    monkeypatch.setattr(config, "load_model", lambda *_: pytest.fail("before a model is loaded"))
    with pytest.raises(UserError, match=named + ".*\nGive --restart true to replace it, or --outputs another folder"):
        train_dpo.main(flags)
    with pytest.raises(SystemExit):
        train_dpo.main([*flags, "--check"])
    assert "!!" in capsys.readouterr().out
    train_dpo.main([*flags, "--check", "--restart", "true"])
    assert "and is replaced" in capsys.readouterr().out


def test_restart_replaces_what_was_trained_otherwise_and_what_came_of_it(mine):
    flags, _ = mine
    before = weights_of(flags, "dpo")
    changed = [*flags, "--sft_learning_rate", "0.01", "--restart", "true"]
    train_dpo.main(changed)
    assert run_of(flags, "sft")["settings"]["sft_learning_rate"] == 0.01
    assert run_of(flags, "dpo")["initial_adapter_sha256"] == file_sha256(folder_of(flags, "sft") / WEIGHTS)
    assert not all(torch.equal(weight, before[name]) for name, weight in weights_of(flags, "dpo").items())


@pytest.mark.parametrize("changed", ["--lora_rank 8 --lora_alpha 8", "--pairs OTHER", "DAMAGED"])
def test_restart_replaces_an_sft_that_could_be_no_start_of_dpo(mine, changed, tmp_path):
    flags, _ = mine
    write_pairs(tmp_path / "other.jsonl", make_pairs(70))
    weights = folder_of(flags, "sft") / WEIGHTS
    if changed == "DAMAGED":
        changed = "--max_steps 3"
        weights.write_bytes(weights.read_bytes()[:-9])
    train_dpo.main([*flags, *changed.replace("OTHER", str(tmp_path / "other.jsonl")).split(), "--restart", "true"])
    assert run_of(flags, "dpo")["initial_adapter_sha256"] == file_sha256(weights)


def test_check_tells_the_steps_that_are_trained(training_flags, capsys):
    flags = [*training_flags, "--stage", "sft", "--max_pairs", "8", "--max_steps", "3"]
    train_dpo.main([*flags, "--check"])
    assert "3 steps of 4" in capsys.readouterr().out, "more than the two of an epoch"
    train_dpo.main(flags)
    assert run_of(flags, "sft")["steps"] == 3


def test_the_control_goes_on_from_sft_for_as_many_steps_and_pairs_as_dpo(training_flags, monkeypatch):
    monkeypatch.setattr(config, "training_dtype", lambda: torch.float32)
    flags = [*training_flags, "--max_steps", "-1", "--epochs", "2", "--control", "true", "--max_pairs", "10"]
    train_dpo.main([*flags, "--control_learning_rate", "0.01"])
    sft, more, dpo = (run_of(flags, stage) for stage in ("sft", "sft_more", "dpo"))
    assert more["initial_adapter_sha256"] == dpo["initial_adapter_sha256"] is not None
    assert (more["steps"], more["rows_seen"]) == (dpo["steps"], dpo["rows_seen"]) == (6, 20)
    assert (sft["pairs_seen"], more["pairs_seen"], dpo["pairs_seen"]) == (10, 30, 30)
    assert more["first_loss"] < sft["first_loss"], "it begins where SFT ended"
    assert max(entry.get("learning_rate", 0) for entry in more["log_history"]) == pytest.approx(0.01)
    assert more["data"] == sft["data"]


def test_each_further_run_has_its_seed_in_a_folder_of_its_own(training_flags, tmp_path):
    flags = [*training_flags, "--control", "true", "--seeds", "2"]
    planned = config.planned_runs(settings_of(flags))
    names = [str(run.folder.relative_to(tmp_path / "outputs")) for run in planned]
    stem = folder_of(flags, "sft").name.partition("_sft_")[0]
    first = [f"{stem}_{stage}_4bit_final" for stage in ("sft", "sft_more", "dpo")]
    assert names == first + [f"seed3408/{name}" for name in first]
    assert [run.settings.seed for run in planned] == [3407] * 3 + [3408] * 3
    assert config.planned_runs(planned[4].settings) == planned[3:], "its settings alone make it again"
    assert planned[4].start == planned[5].start == planned[3].folder
    assert [run.stage for run in config.planned_runs(settings_of([*flags, "--sft_adapter", "mine"]))] == [
        *("sft_more", "dpo", "sft_more", "dpo")
    ]
    train_dpo.main([*training_flags, "--seeds", "2", "--stage", "sft"])
    alone = [*training_flags, "--seed", "3408", "--stage", "sft", "--outputs", str(tmp_path / "alone")]
    train_dpo.main(alone)
    found = load_file(tmp_path / "outputs" / "seed3408" / first[0] / WEIGHTS)
    assert all(torch.equal(found[name], weight) for name, weight in weights_of(alone, "sft").items())


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(training_flags, tmp_path):
    weights = []
    for seed, name in (("1", "x"), ("1", "y"), ("2", "z")):
        flags = [*training_flags, "--stage", "sft", "--seed", seed, "--outputs", str(tmp_path / name)]
        train_dpo.main(flags)
        weights.append(weights_of(flags, "sft"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


# ----------------------------------------------------------------------------------------------------- checks


def test_check_tells_what_was_found_and_writes_nothing(training_flags, tmp_path, capsys):
    train_dpo.main([*training_flags, "--check"])
    out = capsys.readouterr().out
    for found in ("60 in", "42 train, 18 test", "19 A, 19 B", "ready to train"):
        assert found in out
    assert "48 A, 12 B; one letter alone would score 80%" in out
    assert not (tmp_path / "outputs").exists()
    with pytest.raises(SystemExit):
        train_dpo.main([*training_flags, "--check", "--stage", "dpo"])
    assert "there is no adapter" in capsys.readouterr().out


UNWORKABLE = {  # flags: what is said
    "--max_length 50": "more than max_length 50",
    "--stage dpo": "there is no adapter at",
    "--sft_adapter nowhere": "there is no adapter at nowhere",
    "--pairs nowhere.jsonl": "no pairs file nowhere.jsonl",
    "--base_model nowhere": "cannot load the base model nowhere",
    "--optim adamw": "trainer: adamw is not a valid OptimizerNames",
    "--lr_scheduler cosine_with_min_lr": "trainer: One of min_lr or .*\nGive another --optim, --lr_scheduler or --w",
    "--lr_scheduler polynomial --warmup_steps 3": "trainer: division by zero\nGive another --optim",
    "--lr_scheduler greedy": "trainer: greedy is no schedule: .*\nGive another --optim, --lr_scheduler",
    "--lr_scheduler reduce_lr_on_plateau": "trainer: reduce_lr_on_plateau is no schedule: .*\nGive another",
    "--cuda_graphs true": "CUDA graphs are for the shared trainer through Unsloth",
    "--optim galore_adamw": "trainer: You need to install `galore_torch`",
    "--report_to wandb": "trainer: .*\nInstall wandb, or give --report_to none",
}


@pytest.mark.parametrize(("extra", "problem"), UNWORKABLE.items())
def test_a_run_that_cannot_work_ends_before_the_model_is_loaded(training_flags, extra, problem, tmp_path, monkeypatch):
    monkeypatch.setattr(config, "load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(UserError, match=problem):
        train_dpo.main([*training_flags, *extra.split()])
    assert not (tmp_path / "outputs").exists()


def test_check_finds_outputs_that_are_a_file_and_a_start_that_is_no_sft(training_flags, mine, tmp_path, capsys):
    (tmp_path / "file").touch()
    dpo = ["--stage", "dpo", "--sft_adapter", str(folder_of(mine[0], "dpo"))]
    more = ["--stage", "dpo", "--sft_adapter", str(shutil.copytree(folder_of(mine[0], "sft"), tmp_path / "more"))]
    (tmp_path / "more" / RUN).write_text(json.dumps(run_of(mine[0], "sft") | {"stage": "sft_more"}))
    for extra, told in ((["--outputs", str(tmp_path / "file")], "file is no folder that you may write to"),
                        (["--outputs", str(tmp_path / "new"), *more], "more is an adapter of sft_more"),
                        (["--outputs", str(tmp_path / "new"), *dpo], "_final is an adapter of dpo")):  # fmt: skip
        with pytest.raises(SystemExit):
            train_dpo.main([*mine[0], *extra, "--check"])
        assert told in capsys.readouterr().out


def test_check_does_not_call_an_adapter_done_whose_start_is_replaced(mine, capsys):
    train_dpo.main([*mine[0], "--check", "--restart", "true", "--sft_learning_rate", "0.5"])
    told = capsys.readouterr().out
    assert "and is replaced" in told and "nothing to do unless its start becomes another" in told


def test_broken_pairs_train_nothing(training_flags, pairs_file, tmp_path):
    write_pairs(pairs_file, make_pairs(3))
    with open(pairs_file, "a") as file:
        file.write("junk\n")
    with pytest.raises(UserError, match="line 4: not JSON"):
        train_dpo.main(training_flags)
    assert not (tmp_path / "outputs").exists()


def test_validation_and_used_pairs_come_from_the_training_users(training_flags):
    settings = settings_of([*training_flags, "--max_pairs", "10"])
    train, test = config.load_split(settings)
    used, validation = hold_back(train, settings.validation_pairs, settings.max_pairs)
    assert (len(used), len(validation), len(test)) == (10, 4, 18)
    assert not {pair.user_id for pair in used} & {pair.user_id for pair in validation}
    assert {*used, *validation} <= {*train}
    problem = r"2 pairs are left to train on, fewer than one step's 4\nLower .* --validation_pairs \(40\), or give more"
    with pytest.raises(UserError, match=problem):
        train_dpo.main([*training_flags, "--validation_pairs", "40"])
    with pytest.raises(UserError, match="or give more pairs and a higher --max_pairs"):
        train_dpo.main([*training_flags, "--validation_pairs", "0", "--max_pairs", "3"])


def test_dpo_starts_from_plain_lora_alone(training_flags):
    """Unsloth would make other layers of the rest, and the shared trainer leaves out what is on the output layer."""
    train_dpo.main([*training_flags, "--stage", "sft"])
    folder = folder_of(training_flags, "sft")
    lora = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(lora | {"use_rslora": True}))
    with pytest.raises(UserError, match="an adapter with use_rslora\nTrain SFT with --stage sft"):
        train_dpo.main([*training_flags, "--stage", "dpo"])
    (folder / "adapter_config.json").write_text(json.dumps(lora))
    output_layer = {"base_model.model.lm_head.lora_A.weight": torch.zeros(8, 64)}
    save_file(load_file(folder / WEIGHTS) | output_layer, folder / WEIGHTS)
    with pytest.raises(UserError, match="base_model.model.lm_head.lora_A.weight has the shape"):
        train_dpo.main([*training_flags, "--stage", "dpo"])


# ------------------------------------------------------------------------------------------- out of memory


def no_memory(*arguments):
    raise torch.OutOfMemoryError("CUDA out of memory")


def short_of_memory(monkeypatch, step: int) -> list[tuple[int, int, bool]]:
    """Let memory run out in this step of a trainer whose micro-batch is above 1; the trainers that are built."""
    built, build = [], train_dpo.build_trainer

    def build_trainer(*arguments):
        trainer, batch_size = build(*arguments), arguments[-1]
        built.append((batch_size, trainer.args.gradient_accumulation_steps, trainer.args.gradient_checkpointing))
        train_one = trainer.training_step

        def training_step(*inputs, **named):
            if batch_size > 1 and trainer.state.global_step == step:
                no_memory()
            return train_one(*inputs, **named)

        trainer.training_step = training_step
        return trainer

    monkeypatch.setattr(train_dpo, "build_trainer", build_trainer)
    return built


def test_out_of_memory_turns_on_checkpointing_then_halves_the_micro_batch_and_starts_again_cleanly(
    training_flags, tmp_path, monkeypatch, capsys
):
    flags = [*training_flags, "--stage", "sft", "--batch_size", "4"]
    undisturbed = [*flags, "--batch_size", "1", "--outputs", str(tmp_path / "undisturbed")]
    train_dpo.main(undisturbed)
    built = short_of_memory(monkeypatch, step=1)
    train_dpo.main(flags)
    assert built == [(4, 1, False), (4, 1, True), (2, 2, True), (1, 4, True)]
    assert capsys.readouterr().out.count("out of memory; starting again") == 3
    assert (run_of(flags, "sft")["batch_size"], run_of(flags, "sft")["gradient_checkpointing"]) == (1, True)
    survived, expected = weights_of(flags, "sft"), weights_of(undisturbed, "sft")
    assert all(torch.equal(survived[name], expected[name]) for name in survived)


def test_out_of_memory_late_in_a_run_goes_on_from_the_checkpoint(long_flags, monkeypatch, capsys):
    flags = [*long_flags, "--stage", "sft"]
    short_of_memory(monkeypatch, step=3)
    train_dpo.main(flags)
    assert "goes on from" in capsys.readouterr().err
    run = run_of(flags, "sft")
    assert (run["resumed_from_step"], run["batch_size"], run["steps"]) == (2, 1, 6)


def test_out_of_memory_at_micro_batch_1_says_what_to_lower(training_flags, monkeypatch):
    monkeypatch.setattr(train_dpo, "build_trainer", no_memory)
    with pytest.raises(UserError, match="out of memory with a micro-batch of 1\nLower"):
        train_dpo.main([*training_flags, "--batch_size", "1"])


def test_with_checkpointing_after_out_of_memory_there_are_no_cuda_graphs(training_flags, monkeypatch):
    tried = []

    def build_trainer(stage, settings, *arguments):
        tried.append((settings.gradient_checkpointing, settings.cuda_graphs))
        no_memory()

    monkeypatch.setattr(train_dpo, "build_trainer", build_trainer)
    monkeypatch.setattr(config, "fitting_batch_size", lambda *given: (1, False, True))
    with pytest.raises(UserError, match="out of memory with a micro-batch of 1"):
        train_dpo.main([*training_flags, "--stage", "dpo", "--init", "base"])
    assert tried == [(False, True), (False, False), (True, False)]


def test_a_kernel_that_fails_on_the_card_leads_to_the_stock_trainer(training_flags, monkeypatch, capsys):
    class OutOfResources(Exception):
        pass

    build_trainer = train_dpo.build_trainer

    def build(stage, settings, *arguments):
        if train_dpo.shares_prompt(settings):
            try:
                raise OutOfResources("shared memory, Required: 131072, Hardware limit: 101376\nin a long story")
            except OutOfResources as error:
                raise RuntimeError("compiling failed") from error
        return build_trainer(stage, settings, *arguments)

    monkeypatch.setattr(train_dpo, "build_trainer", build)
    flags = [*training_flags, "--stage", "dpo", "--init", "base"]
    train_dpo.main(flags)
    told = "dpo: a kernel does not run on this card (shared memory, Required: 131072, Hardware limit: 101376)"
    assert f"{told}; starting again with the stock trainer\n" in capsys.readouterr().out
    assert run_of(flags, "dpo")["trainer"] == "stock"
    assert losses_of(flags, "dpo")[0] == pytest.approx(math.log(2), abs=1e-3)
    monkeypatch.setattr(train_dpo, "build_trainer", lambda *_: int("a bug"))
    with pytest.raises(ValueError, match="a bug"):
        train_dpo.main([*flags, "--restart", "true", "--seed", "2"])


# -------------------------------------------------------------------------------------------- the trainer


def test_dpo_from_sft_starts_at_the_sft_adapter_and_refers_to_it(training_flags):
    train_dpo.main([*training_flags, "--stage", "sft"])
    settings = settings_of([*training_flags, "--validation_pairs", "0"])
    data = data_of(preference_rows(make_pairs(20)))
    trainer = train_dpo.build_trainer("dpo", settings, data, folder_of(training_flags, "sft"))
    saved = weights_of(training_flags, "sft")
    weights = dict(trainer.model.named_parameters())
    trainable = {name for name, weight in weights.items() if weight.requires_grad}
    assert trainable == {name for name in weights if ".default." in name}
    for name in trainable:
        assert weights[name].dtype == torch.float32
        assert torch.equal(weights[name], saved[name.replace(".default", "")]), "not rounded to bfloat16 on the way"
    trainer.train()
    after = dict(trainer.model.named_parameters())
    for name in trainable:
        reference = after[name.replace(".default.", ".ref.")]
        assert torch.equal(reference, saved[name.replace(".default", "")]), "the reference moved"
    assert any(not torch.equal(after[name], saved[name.replace(".default", "")]) for name in trainable)
    other = "--lora_rank 16 --lora_alpha 16"
    with pytest.raises(UserError, match=f"which has {other}\nGive {other}, or train SFT again"):
        train_dpo.main([*training_flags, "--stage", "dpo", "--lora_rank", "4", "--lora_alpha", "8"])


@pytest.mark.parametrize("stage", ["sft_more", "dpo"])
@pytest.mark.parametrize("bits", ["4", "8"])
def test_control_and_dpo_start_at_the_same_weights(training_flags, stage, bits):
    """TRL rounds those of a quantised model's adapter to bfloat16."""
    flags = [*training_flags, "--bits", bits, "--validation_pairs", "0"]
    train_dpo.main([*flags, "--stage", "sft"])
    start, rows = folder_of(flags, "sft"), preference_rows(make_pairs(20))
    trainer = train_dpo.build_trainer(stage, settings_of(flags), data_of(rows), start)
    weights = dict(trainer.model.named_parameters())
    for name, saved in load_file(start / WEIGHTS).items():
        assert torch.equal(weights[name.replace(".weight", ".default.weight")], saved)


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
    saved = load_file(tmp_path / "sft" / WEIGHTS)
    now = {name.replace(".default", ""): weight for name, weight in trained.state_dict().items() if "lora_" in name}
    assert saved.keys() == now.keys() and all(torch.equal(now[name], saved[name]) for name in saved)


def test_loss_is_on_the_completion_only_and_every_row_keeps_its_boundary(training_flags):
    settings = settings_of([*training_flags, "--validation_pairs", "0"])
    rows = preference_rows(make_pairs(40), "both")
    trainer = train_dpo.build_trainer("sft", settings, data_of(rows))
    tokenizer = trainer.processing_class
    assert len(trainer.train_dataset) == len(rows)
    for row, text in zip(trainer.train_dataset, rows, strict=True):
        labels = trainer.data_collator([row])["labels"][0]
        assert tokenizer.decode(labels[labels != -100]) == text["chosen"] + tokenizer.eos_token
    trainer = train_dpo.build_trainer("dpo", settings, data_of(rows))
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

    dpo = [*training_flags, "--stage", "dpo"]
    train_dpo.main(dpo)
    [file] = Path(settings_of(training_flags).outputs).glob("*_reference/*.json")
    wrong = {key: [value - 5 for value in values] for key, values in json.loads(file.read_text()).items()}
    file.write_text(json.dumps(wrong))
    problem = "is not the policy that training starts from: 5.* nats.*\nDelete the file"
    shutil.rmtree(folder_of(dpo, "dpo"))
    with pytest.raises(UserError, match=problem):
        train_dpo.main(dpo)
    file.write_text("cut sho")
    train_dpo.main(dpo)


@pytest.mark.parametrize(
    ("cuda", "dtype", "flags", "tolerance"),
    [
        (True, torch.bfloat16, {}, 0.2),  # the lengths of a batch round the sums of an adapter in another way
        (True, torch.bfloat16, {"trainer": "stock"}, 1e-3),
        (True, torch.float32, {}, 1e-3),
        (False, torch.bfloat16, {}, 1e-3),
        (False, torch.float32, {"bits": 8}, 0.2),
    ],
)
def test_a_remembered_reference_may_be_rounded_by_the_rows_beside_it(monkeypatch, cuda, dtype, flags, tolerance):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(config, "training_dtype", lambda: dtype)
    assert train_dpo.first_loss_tolerance(TrainingSettings(beta=0.2, **flags)) == tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_unpacked_once_are_those_of_4_bits(tiny_model, tmp_path, monkeypatch, dtype):
    """To the rounding of `dtype`: a model that is stored in 16 bits would have them unpacked to these."""
    if torch.cuda.is_available():
        pytest.skip("a GPU unpacks them at every pass")
    LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(tmp_path)
    PreTrainedTokenizerFast.from_pretrained(tiny_model).save_pretrained(tmp_path)
    settings = config.preset_settings(TrainingSettings, "small", base_model=str(tmp_path))
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
    assert (gradient - rounded).norm() < 0.01 * gradient.norm(), "bitsandbytes' backward pass rounds to what is stored"


def test_what_is_computed_in_is_not_left_to_accelerate(training_flags, monkeypatch):
    """Its configuration may ask for fp16, in which run.json would not be what was trained."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    settings = settings_of(training_flags)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(config, "training_dtype", lambda dtype=dtype: dtype)
        found[dtype] = train_dpo.trainer_arguments("dpo", settings, 2).mixed_precision
    assert found == {torch.float32: "no", torch.bfloat16: "bf16"}


def test_one_process_trains_on_one_gpu(monkeypatch):
    """transformers would give each further GPU rows of its own, and so train with another effective batch."""
    from transformers import TrainingArguments

    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda arguments: 2))
    settings = config.preset_settings(TrainingSettings, "small", gradient_checkpointing=False)
    for stage in ("sft", "dpo"):
        assert train_dpo.trainer_arguments(stage, settings, 2)._n_gpu == 1


# ---------------------------------------------------------------------------------- the shared-prompt trainer


def trainer_of(flags: list[str], kind: str, init: str, stage: str = "dpo"):
    """A trainer, stock or shared, of a policy that has left its reference."""
    flags = [*flags, "--trainer", kind, "--bits", "16"]
    settings, rows = settings_of(flags), preference_rows(make_pairs(12), "balanced", 0)
    start = config.adapter_folder(settings, "sft") if init == "sft" else None
    if start and not start.is_dir():
        train_dpo.main([*flags, "--stage", "sft"])
    torch.manual_seed(1)
    trainer = train_dpo.build_trainer(stage, settings, data_of(rows, rows[:2]), start, 4)
    for name, weight in trainer.model.named_parameters():
        if weight.requires_grad:
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    trainer.model.train()
    return trainer


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_checkpointing_computes_layers_again_in_the_shared_trainer_too(training_flags, monkeypatch, stage):
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    forward, calls, passes = LlamaDecoderLayer.forward, [], {}
    count = lambda layer, *given, **named: calls.append(1) or forward(layer, *given, **named)  # noqa: E731
    monkeypatch.setattr(LlamaDecoderLayer, "forward", count)
    for checkpointing in (False, True):
        trainer = trainer_of([*training_flags, "--gradient_checkpointing", str(checkpointing)], "shared", "base", stage)
        if checkpointing:
            trainer.model.gradient_checkpointing_enable()  # as train() does
        inputs = train_dpo.first_inputs(trainer, 2)
        calls.clear()
        trainer.compute_loss(trainer.model, inputs).backward()
        passes[checkpointing] = len(calls)
    assert passes == {False: 2, True: 4}, "two layers"


def loss_and_gradients(trainer, examples, count=None):
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(examples), num_items_in_batch=count)
    loss.backward()
    logged = trainer._metrics["train"].items()
    logs = {name: values[-1] for name, values in logged if name.startswith(("logps", "rewards"))}
    assert not any(getattr(value, "requires_grad", False) for value in logs.values()), "a step's memory is given back"
    weights = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    return loss.item(), logs, {name: weight.grad.clone() for name, weight in weights.items()}


def states_of_a_row(model, batch, leaky=False):
    """What Unsloth's kernel gives, without a GPU: hidden states of pairs in one row, by a mask of its labels.

    leaky: whatever the response is.
    """
    pairs, responses = batch["tree_pairs"], batch["tree_responses"]
    seen = (responses < 0) | (responses[:, None] == responses) | leaky
    mask = ((pairs[:, None] == pairs) & seen).tril()[None, None]
    nodes = {"input_ids": batch["tree_tokens"], "position_ids": batch["tree_positions"]}
    return model(**nodes, attention_mask=mask, use_cache=False).last_hidden_state


@pytest.mark.parametrize("init", ["base", "sft"])
@pytest.mark.parametrize("one_row", [False, True])
def test_log_probs_and_gradients_are_those_of_the_stock_trainer(training_flags, init, one_row, monkeypatch):
    monkeypatch.setattr(config, "training_dtype", lambda: torch.float32)
    monkeypatch.setattr(train_dpo, "in_one_row", lambda settings: one_row)
    monkeypatch.setattr(train_dpo, "flat_hidden_states", states_of_a_row)
    stock, shared = (trainer_of(training_flags, kind, init) for kind in ("stock", "shared"))
    rows = [list(stock.train_dataset), list(shared.train_dataset)]
    lengths = [len(row["prompt_ids"]) for row in rows[0]]
    assert len(set(lengths)) > 1, "the batch is padded"
    for loss_type in get_args(config.LossType):
        for trainer in (stock, shared):
            trainer.loss_types = loss_type.split("+")
            trainer.loss_weights = [1.0, 0.5][: len(trainer.loss_types)]
        for part in (slice(0, 4), slice(4, 5)):
            one, logs, wanted = loss_and_gradients(stock, rows[0][part])
            other, found_logs, found = loss_and_gradients(shared, rows[1][part])
            assert other == pytest.approx(one, rel=1e-4), loss_type
            assert found_logs == pytest.approx(logs, abs=1e-4)
            assert wanted.keys() == found.keys()
            for name, gradient in wanted.items():
                assert torch.allclose(found[name], gradient, atol=1e-4 * gradient.abs().max()), (loss_type, name)


def test_in_one_row_attention_takes_blocks_that_fit_every_card(monkeypatch):
    """Unsloth's own take most of a card's shared memory, and more registers than there are where a head has 64."""
    unsloth = importlib.util.find_spec("unsloth")  # not imported, for it wants a GPU
    path = Path(unsloth.origin).parent / "utils" / "prefix_grouper_kernel.py"
    spec = importlib.util.spec_from_file_location("unsloth.utils.prefix_grouper_kernel", path)
    kernel, taken = importlib.util.module_from_spec(spec), []
    utils = SimpleNamespace(prefix_grouper_kernel=kernel)
    for name, module in {"unsloth": SimpleNamespace(utils=utils), "unsloth.utils": utils, spec.name: kernel}.items():
        monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(kernel)
    monkeypatch.setattr(kernel, "get_block_mask", lambda *_, **__: None)

    def attention(q, k, v, kernel_options, **how):
        taken.append(kernel_options)
        return q

    def model(prefix_seg_info, **nodes):
        heads = torch.zeros(1, prefix_seg_info.T, 3, 64, dtype=torch.bfloat16)
        states = kernel.flex_shared_prefix_attention(heads, heads, heads, prefix_seg_info)
        return SimpleNamespace(last_hidden_state=states)

    monkeypatch.setattr(kernel, "_flex_attention_compiled", attention)
    row = torch.zeros(128, dtype=torch.long)
    batch = {"tree_tokens": row[None], "tree_positions": row[None], "tree_pairs": row, "tree_responses": row - 1}
    assert train_dpo.flat_hidden_states(model, batch).shape == (1, 128, 3, 64)
    of_backward = {"bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 32}
    assert taken == [{"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2} | of_backward]

    def does_not_fit(graph, inputs):
        raise RuntimeError("No valid triton configs. OutOfResources: shared memory, Required: 131072")

    failing = torch.compile(lambda q, k, v, **how: q + 1, backend=does_not_fit)
    monkeypatch.setattr(kernel, "_flex_attention_compiled", failing)
    monkeypatch.setattr(torch._dynamo.config, "suppress_errors", True)  # as Unsloth sets it
    with pytest.raises(Exception) as raised:
        train_dpo.flat_hidden_states(model, batch)
    assert "OutOfResources: shared memory" in failed_kernel(raised.value)


def test_the_reference_is_of_the_same_batches_with_and_without_cuda_graphs():
    """Where rows have few lengths; else the longest come first, for the least padding."""
    examples, batches = [{"prompt_ids": [0] * count} for count in (1, 3, 2, 4)], []

    def log_probs(model, inputs):
        batches.append([len(row["prompt_ids"]) for row in inputs])
        return torch.zeros(2), torch.zeros(2)

    about = {"args": SimpleNamespace(per_device_train_batch_size=2), "model": None, "compute_ref_log_probs": log_probs}
    for lengths in ([256], []):
        same = SimpleNamespace(lengths=lengths, data_collator=list, _prepare_inputs=list, **about)
        assert train_dpo.reference_log_probs(same, examples) == [[0, 0]] * 4
    assert batches == [[1, 3], [2, 4], [4, 3], [2, 1]]


def test_on_a_cpu_every_batch_of_trees_has_the_same_length(training_flags):
    """Its kernels round a row by its padded length, and the reference was computed in other batches."""
    trainer = trainer_of(training_flags, "shared", "base")
    rows = [*trainer.train_dataset, *trainer.eval_dataset]
    assert len({len(row["prompt_ids"] + row["chosen_ids"]) for row in rows}) > 1
    assert len({trainer.data_collator([row])["tree_tokens"].shape[1] for row in rows}) == 1


def test_dpo_with_an_sft_term_is_trls(training_flags):
    settings = settings_of([*training_flags, "--loss_type", "sigmoid+sft", "--sft_weight", "0.5"])
    made = train_dpo.trainer_arguments("dpo", settings, 2)
    assert (made.loss_type, made.loss_weights) == (["sigmoid", "sft"], [1.0, 0.5])
    plain = train_dpo.trainer_arguments("dpo", settings_of(training_flags), 2)
    assert (plain.loss_type, plain.loss_weights) == (["sigmoid"], [1.0])


@pytest.mark.parametrize("one_row", [False, True])
def test_loss_and_gradients_of_sft_are_those_of_the_stock_trainer(training_flags, one_row, monkeypatch):
    monkeypatch.setattr(config, "training_dtype", lambda: torch.float32)
    monkeypatch.setattr(train_dpo, "in_one_row", lambda settings: one_row)
    monkeypatch.setattr(train_dpo, "flat_hidden_states", states_of_a_row)
    stock, shared = (trainer_of(training_flags, kind, "base", "sft") for kind in ("stock", "shared"))
    rows = list(stock.train_dataset)
    for part, count in ((slice(0, 4), None), (slice(4, 5), None), (slice(0, 4), 999)):  # 999 response tokens a step
        one, _, wanted = loss_and_gradients(stock, rows[part], count)
        other, _, found = loss_and_gradients(shared, rows[part], count)
        assert other == pytest.approx(one, rel=1e-5)
        assert wanted.keys() == found.keys()
        for name, gradient in wanted.items():
            assert torch.allclose(found[name], gradient, atol=1e-4 * gradient.abs().max()), name


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_both_trainers_learn_the_same(training_flags, tmp_path, monkeypatch, stage):
    """Micro-batches of unequal response tokens are summed up to a step."""
    monkeypatch.setattr(config, "training_dtype", lambda: torch.float32)
    logs = []
    for kind in ("stock", "shared"):
        flags = [*training_flags, "--outputs", str(tmp_path / kind), "--trainer", kind]
        flags += ["--init", "base", "--stage", stage, "--max_steps", "8", "--bits", "16"]
        train_dpo.main([*flags, "--learning_rate", "0.01", "--sft_learning_rate", "0.01"])
        logs.append(run_of(flags, stage)["log_history"][:-1])  # the last one says how long it took
    assert any("eval_loss" in entry for entry in logs[0]) and logs[0][0]["loss"] != logs[0][-2]["loss"]
    trained = {"loss", "grad_norm"} | ({"entropy", "num_tokens", "rewards/margins"} if stage == "dpo" else set())
    for one, other in zip(*logs, strict=True):
        same = {name for name in one.keys() & other.keys() if "runtime" not in name and "per_second" not in name}
        assert trained <= same or "eval_loss" in same
        one, other = ({name: entry[name] for name in same} for entry in (one, other))
        assert other == pytest.approx(one, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_the_micro_batch_changes_only_rounding(training_flags, tmp_path, monkeypatch, stage):
    """13 rows in steps of 8: the last one is of 5, in micro-batches of 4 and 1, whose rows count alike."""
    monkeypatch.setattr(config, "training_dtype", lambda: torch.float32)
    flags = [*training_flags, "--init", "base", "--stage", stage, "--max_pairs", "13", "--bits", "16"]
    flags += ["--effective_batch", "8", "--max_steps", "-1", "--learning_rate", "0.01", "--sft_learning_rate", "0.01"]
    sizes = {size: [*flags, "--batch_size", size, "--outputs", str(tmp_path / size)] for size in ("4", "8")}
    for one in sizes.values():
        train_dpo.main(one)
    four, eight = (weights_of(one, stage) for one in sizes.values())
    assert max((four[name] - weight).abs().max() for name, weight in eight.items()) < 1e-3
    assert max(weight.abs().max() for name, weight in eight.items() if "lora_B" in name) > 5e-3, "it was trained"


def test_the_last_loss_is_in_the_log_and_a_trackers_log_stays(training_flags, tmp_path):
    flags = [*training_flags, "--stage", "sft", "--max_steps", "4", "--logging_steps", "3", "--eval_steps", "9"]
    train_dpo.main(flags)
    found = [entry["step"] for entry in run_of(flags, "sft")["log_history"] if "loss" in entry]
    assert found == [1, 3, 4] and run_of(flags, "sft")["last_loss"] == losses_of(flags, "sft")[-1]
    assert [entry["step"] for entry in run_of(flags, "sft")["log_history"] if "eval_loss" in entry] == [4]
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(tmp_path / "outputs" / "logs" / "sft")


def test_a_start_of_another_dropout_is_refused_where_sft_goes_on(training_flags, tmp_path):
    train_dpo.main([*training_flags, "--stage", "sft", "--lora_dropout", "0.5"])
    start = ["--sft_adapter", str(folder_of(training_flags, "sft")), "--outputs", str(tmp_path / "more")]
    with pytest.raises(UserError, match="which has --lora_dropout 0.5"):
        train_dpo.main([*training_flags, *start, "--stage", "sft_more"])
    train_dpo.main([*training_flags, *start, "--stage", "dpo", "--max_steps", "1"])


def test_the_reference_is_computed_once_and_for_its_own_adapter_only(training_flags, monkeypatch):
    asked, compute = [], train_dpo.reference_log_probs

    def counted(trainer, examples):
        asked.append(len(examples))
        return compute(trainer, examples)

    monkeypatch.setattr(train_dpo, "reference_log_probs", counted)
    flags = [*training_flags, "--option_order", "both"]
    train_dpo.main([*flags, "--init", "base"])
    others = ["--beta", "0.5", "--learning_rate", "0.1", "--seed", "2", "--restart", "true"]
    train_dpo.main([*flags, "--init", "base", "--stage", "dpo", *others])
    assert asked[0] > 0 and asked[1] > 0 and asked[2:] == [0, 0], "other beta, rate and seed find them there"
    train_dpo.main([*flags, "--init", "sft", "--stage", "dpo", "--restart", "true"])
    assert asked[4:] == asked[:2], "another reference"
    train_dpo.main([*flags, "--init", "sft", "--stage", "dpo", "--max_pairs", "6", "--restart", "true"])
    assert asked[6:] == [12, asked[1]], "rows of another padded length, which rounds them otherwise on a CPU"


def test_the_shared_trainer_is_never_silently_another(training_flags, monkeypatch, capsys):
    train_dpo.main([*training_flags, "--init", "base", "--stage", "dpo"])
    assert "shared trainer" in capsys.readouterr().out
    settings, auto = settings_of([*training_flags, "--trainer", "shared"]), settings_of(training_flags)
    assert train_dpo.shares_prompt(auto)
    monkeypatch.setattr(config, "FSDP", True)
    with pytest.raises(UserError, match="the shared trainer cannot train a model that FSDP shards"):
        train_dpo.shares_prompt(settings)
    assert not train_dpo.shares_prompt(auto), "auto is stock there"


@pytest.mark.parametrize("one_row", [False, True])
def test_a_model_in_which_responses_see_each_other_is_not_trained(training_flags, one_row, monkeypatch):
    """As one whose attention ignores what parts a row: it would train, from a first loss of ln 2, on something else."""

    def causal(ends):
        return torch.ones(ends.shape[0], 1, ends.shape[1], ends.shape[1], dtype=torch.bool).tril()

    monkeypatch.setattr(train_dpo, "ancestor_mask", causal)
    monkeypatch.setattr(train_dpo, "in_one_row", lambda settings: one_row)
    monkeypatch.setattr(train_dpo, "flat_hidden_states", functools.partial(states_of_a_row, leaky=True))
    for seed in "12345":  # chosen or rejected may stand first
        with pytest.raises(UserError, match="sees the responses beside it"):
            train_dpo.main([*training_flags, "--stage", "dpo", "--init", "base", "--seed", seed])
    train_dpo.main([*training_flags, "--stage", "dpo", "--init", "base", "--trainer", "stock"])


def test_only_unsloths_own_models_are_given_all_pairs_in_one_row(monkeypatch):
    """In 8 bits it loads transformers' model, which would take the row for one text."""
    monkeypatch.setattr(config, "backend_of", lambda settings: "unsloth")
    assert [train_dpo.in_one_row(TrainingSettings(bits=bits)) for bits in (4, 8, 16)] == [True, False, True]
    monkeypatch.setattr(config, "backend_of", lambda settings: "hf")
    assert not train_dpo.in_one_row(TrainingSettings())


@pytest.mark.parametrize("in_one_row", [False, True])
def test_each_response_token_is_predicted_at_the_node_before_it(in_one_row):
    examples = [
        {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 9, 9, 9], "rejected_ids": [4, 8, 2]},
        {"prompt_ids": [1, 7], "chosen_ids": [5, 6], "rejected_ids": [6]},
    ]
    stock = DataCollatorForPreference(pad_token_id=0)(examples)
    batch = train_dpo.tree_batch(examples, dict(stock), in_one_row)
    tokens = batch["tree_tokens"].flatten()
    assert batch["tree_targets"].tolist() == [4, 9, 9, 9, 5, 6, 4, 8, 2, 6]
    assert tokens[batch["tree_before"]].tolist() == [3, 4, 9, 9, 7, 5, 3, 4, 8, 7]


# ----------------------------------------------------------------------------------------------- CUDA graphs


def replayed(function, sample, num_warmup_iters, pool):
    """What torch.cuda.make_graphed_callables gives, without a GPU.

    A pass reads what was captured, into which its inputs are copied, and its gradients lie where the last ones lay.
    """
    batch, *weights = sample
    gradients = [torch.zeros_like(weight) for weight in weights]

    class Replayed(torch.autograd.Function):
        @staticmethod
        def forward(context, *given):
            for static, values in zip(batch.values(), given, strict=False):
                static.copy_(values)
            with torch.enable_grad():
                Replayed.found = function(batch, *weights)
            return Replayed.found.detach()

        @staticmethod
        def backward(context, gradient):
            for static, values in zip(gradients, torch.autograd.grad(Replayed.found, weights, gradient), strict=True):
                static.copy_(values)
            return *[None] * len(batch), *(static.detach() for static in gradients)

    return lambda batch, *weights: Replayed.apply(*batch.values(), *weights)


@pytest.fixture
def graphs(monkeypatch) -> list[dict]:
    """Batches that graphs were captured with, of pairs in one row; a fake replays them."""
    captured = []

    def capture(function, sample, **options):
        captured.append(sample[0])
        return replayed(function, sample, **options)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(train_dpo, "in_one_row", lambda settings: True)
    monkeypatch.setattr(train_dpo, "flat_hidden_states", states_of_a_row)
    return captured


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_replayed_passes_train_what_single_kernels_train(training_flags, tmp_path, monkeypatch, graphs, stage):
    """Several micro-batches a step, whose gradients are summed up, lengths that come back, and looks in between."""
    losses = []
    for replays in (False, True):
        monkeypatch.setattr(config, "fitting_batch_size", lambda *given, replays=replays: (1, False, replays))
        flags = [*training_flags, "--outputs", str(tmp_path / str(replays)), "--init", "base", "--stage", stage]
        flags += ["--learning_rate", "0.01", "--effective_batch", "4", "--max_steps", "6", "--logging_steps", "1"]
        train_dpo.main(flags)
        history = run_of(flags, stage)["log_history"]
        losses.append([[entry[name] for entry in history if name in entry] for name in ("loss", "eval_loss")])
    assert losses[0] == losses[1] and all(len(set(found)) > 1 for found in losses[0])
    lengths = [given["tree_tokens"].shape[1] for given in graphs]
    count = run_of(flags, stage)["cuda_graphs"]
    assert 0 < count <= 4 and lengths == sorted(lengths[:count], reverse=True), (
        "one a length, the longest first, for the reference, training and looks at held-out pairs"
    )


def test_what_graphs_read_outlives_its_place_in_the_model(graphs):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.ones(1))
            self.weight, self.tables = torch.nn.Parameter(torch.ones(1)), [None, torch.zeros(2)]

    model, batch = Model(), {"tree_tokens": torch.zeros(1, 128, dtype=torch.long)}
    made = train_dpo.Graphs(lambda model, batch: model.weight * batch["tree_tokens"], [128])
    made(model, batch)
    gone = [weakref.ref(model.scale), weakref.ref(model.tables[1])]
    model.scale, model.tables = torch.ones(9), []
    assert all(reference() is not None for reference in gone)


def test_a_look_without_dropout_replays_no_pass_that_had_it(graphs):
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Dropout(0.5))
    batch = {"tree_tokens": torch.ones(1, 128)}
    made = train_dpo.Graphs(lambda model, batch: model(batch["tree_tokens"][..., None]), [128])
    made(model, batch)
    made.captured[128] = lambda *given: pytest.fail("a recorded pass drops what training dropped")
    seen = made(model.eval(), batch)
    assert len(seen.unique()) == 1


def test_where_cuda_graphs_do_not_fit_the_stage_starts_again_without(training_flags, monkeypatch, graphs, capsys):
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda *given, **options: no_memory())
    monkeypatch.setattr(config, "fitting_batch_size", lambda *given: (2, False, True))
    flags = [*training_flags, "--init", "base", "--stage", "dpo", "--effective_batch", "4", "--max_steps", "6"]
    train_dpo.main(flags)
    assert "dpo: out of memory; starting again without CUDA graphs" in capsys.readouterr().out
    run = run_of(flags, "dpo")
    assert (run["cuda_graphs"], run["batch_size"], run["steps"]) == (0, 2, 6), "the micro-batch stays"


# ---------------------------------------------------------------------------- unfinished runs, and going on

# Runs train_dpo.py and kills its own process, as `kill -9` does, at one moment: in the named stage when the given
# step has been done, in the middle of writing that step's checkpoint, or in the middle of the final save.
DRIVER = """
import os, signal, sys
import config, train_dpo
stage, moment, step, dtype = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
import torch
torch.set_num_threads(1)
if dtype == "float32":
    config.training_dtype = lambda: torch.float32
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
build = train_dpo.build_trainer
def build_trainer(which, *arguments):
    trainer = build(which, *arguments)
    if which == stage:
        if moment == "step":
            done = trainer._clip_grad_norm
            trainer._clip_grad_norm = lambda *a: die() if trainer.state.global_step == step else done(*a)
        if moment == "checkpoint":
            save = trainer._save_rng_state
            trainer._save_rng_state = lambda *a: die() if trainer.state.global_step == step else save(*a)
    return trainer
train_dpo.build_trainer = build_trainer
draw = train_dpo.draw_losses
train_dpo.draw_losses = lambda history, which: die() if (which, moment) == (stage, "save") else draw(history, which)
sys.argv[0] = "train_dpo.py"
config.run_script(lambda: train_dpo.main(sys.argv[5:]))
"""
STEPS = ["--max_steps", "6", "--save_steps", "2", "--logging_steps", "1", "--eval_steps", "3"]


@pytest.fixture
def long_flags(training_flags) -> list[str]:
    """Six steps with dropout, so that the random state matters, and a checkpoint after every second one."""
    return [*training_flags, *STEPS, "--lora_dropout", "0.1"]


def checkpoints_of(flags: list[str], stage: str) -> Path:
    return config.checkpoints_folder(settings_of(flags), stage)


def drive(stage: str, moment: str, step: int, dtype: str, flags: list[str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", DRIVER, stage, moment, str(step), dtype, *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=config.ROOT)


def scores(flags: list[str], stage: str) -> np.ndarray:
    """Decision and response margins of the finished adapter on the held-out pairs, in float32."""
    trained = vars(settings_of(flags))
    settings = EvaluationSettings(**{name: trained[name] for name in ("base_model", "pairs", "test_share", "bits")})
    _, test = config.load_split(settings)
    model, tokenizer = config.load_model(settings, torch.float32)
    model = evaluate_dpo.load_adapter(model, "x", folder_of(flags, stage))
    return np.stack(evaluate_dpo.score(model, [pair_tree(pair, tokenizer) for pair in test], 4, stage))


def test_a_run_killed_again_and_again_ends_as_the_undisturbed_one(long_flags, tmp_path, monkeypatch, capsys):
    """SIGKILL in SFT, in the control while it writes a checkpoint, in DPO, and in its final save; 16-bit weights."""
    flags = [*long_flags, "--bits", "16", "--control", "true", "--outputs", str(tmp_path / "killed")]
    undisturbed = [*flags, "--outputs", str(tmp_path / "undisturbed")]
    monkeypatch.setattr(config, "training_dtype", lambda: torch.float32)
    train_dpo.main(undisturbed)
    for stage, moment, step, goes_on_from in (
        ("sft", "step", 3, None),
        ("sft_more", "checkpoint", 4, "sft_checkpoints/checkpoint-2"),
        ("dpo", "step", 5, "sft_more_checkpoints/checkpoint-2"),
        ("dpo", "save", 0, "dpo_checkpoints/checkpoint-4"),
    ):
        run = drive(stage, moment, step, "float32", flags)
        assert run.returncode == -signal.SIGKILL, run.stderr
        assert goes_on_from is None or goes_on_from in run.stderr
        assert not folder_of(flags, "dpo").exists()
    train_dpo.main(flags)
    assert "dpo_checkpoints/checkpoint-6" in capsys.readouterr().err
    for stage in ("sft", "sft_more", "dpo"):
        assert run_of(flags, stage)["steps"] == 6, "not one more, at a learning rate of 0"
        assert np.abs(scores(flags, stage) - scores(undisturbed, stage)).max() < 1e-6
    left = sorted(path.name for path in (tmp_path / "killed").iterdir() if not path.name.endswith("_reference"))
    finished = sorted(folder_of(flags, stage).name for stage in ("sft", "sft_more", "dpo"))
    assert left == finished, "nothing is left of the killed runs"


class Stopped(Exception):
    pass


def stop_at(monkeypatch, step: int, stage: str = "dpo") -> None:
    """Make the stage end with an exception after this many steps."""
    build = train_dpo.build_trainer

    def build_trainer(which, *arguments):
        trainer = build(which, *arguments)
        clip = trainer._clip_grad_norm

        def clip_or_stop(model):
            if which == stage and trainer.state.global_step == step:
                raise Stopped
            return clip(model)

        trainer._clip_grad_norm = clip_or_stop
        return trainer

    monkeypatch.setattr(train_dpo, "build_trainer", build_trainer)


@pytest.mark.parametrize("init", ["base", "sft"])
def test_in_4_bits_a_resumed_adapter_is_the_undisturbed_one_in_float32(long_flags, monkeypatch, init):
    train_dpo.main([*long_flags, "--stage", "sft"])
    flags = [*long_flags, "--stage", "dpo", "--init", init]
    train_dpo.main(flags)
    undisturbed = weights_of(flags, "dpo")
    shutil.rmtree(folder_of(flags, "dpo"))
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        stop_at(patched, 3)
        train_dpo.main(flags)
    train_dpo.main(flags)
    resumed = weights_of(flags, "dpo")
    assert run_of(flags, "dpo")["resumed_from_step"] == 2
    for name, weight in undisturbed.items():
        assert resumed[name].dtype == torch.float32
        assert (resumed[name] - weight).abs().max() < 1e-6


@pytest.fixture
def unfinished(long_flags, monkeypatch) -> list[str]:
    """Flags of a run of SFT that ended after five steps: checkpoints of steps 2 and 4 are there."""
    flags = [*long_flags, "--stage", "sft"]
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        stop_at(patched, 5, "sft")
        train_dpo.main(flags)
    assert {path.name for path in checkpoints_of(flags, "sft").glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    return flags


@pytest.mark.parametrize(
    "broken", [WEIGHTS, "optimizer.pt", "trainer_state.json", SEAL, "rng_state.pth", "scheduler.pt"]
)
def test_a_truncated_checkpoint_is_skipped_for_the_one_before(unfinished, broken, capsys):
    folder = checkpoints_of(unfinished, "sft")
    path = folder / "checkpoint-4" / broken
    path.write_bytes(path.read_bytes()[:-9])
    shutil.copytree(folder / "checkpoint-2", folder / "checkpoint-2-copy")  # somebody's own
    assert last_whole_checkpoint(folder) == folder / "checkpoint-2"
    assert "checkpoint-4 is not whole and is removed" in capsys.readouterr().err
    (folder / "checkpoint-2" / broken).unlink()
    assert last_whole_checkpoint(folder) is None


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (["--sft_learning_rate", "0.5"], "sft_learning_rate 0.001, not 0.5"),
        (["--seed", "7"], "seed 3407, not 7"),
        (["--max_pairs", "9"], "max_pairs 48, not 9"),
        (["--base_model", "ANOTHER"], "base_model"),
        (["--pairs", "FEWER"], "sha256 of the pairs"),
    ],
)
def test_an_unfinished_run_of_other_settings_is_not_mixed_in(
    unfinished, changed, named, tmp_path, tiny_model, monkeypatch
):
    monkeypatch.setattr(config, "load_model", lambda *_: pytest.fail("the model was loaded"))
    another = tmp_path / "another" / tiny_model.name  # of the same name, and so with the same checkpoints folder
    shutil.copytree(tiny_model, another)
    (another / "config.json").write_text((another / "config.json").read_text() + " ")
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(Path(settings_of(unfinished).pairs).read_text().splitlines(keepends=True)[:-1]))
    changed = [{"ANOTHER": str(another), "FEWER": str(fewer)}.get(flag, flag) for flag in changed]
    monkeypatch.setattr(train_dpo, "train_stage", lambda *_: pytest.fail("hours of other stages and seeds"))
    for asked in ([], ["--stage", "all", "--seeds", "2"]):
        with pytest.raises(UserError, match=f"unfinished run with .*{named}.*\n.*--restart true"):
            train_dpo.main([*unfinished, *changed, *asked])
    assert (checkpoints_of(unfinished, "sft") / "checkpoint-4").is_dir()


def test_settings_that_train_the_same_go_on_and_restart_starts_afresh(unfinished, tiny_model, tmp_path, capsys):
    moved = shutil.copytree(tiny_model, tmp_path / "moved" / tiny_model.name)
    same = ["--batch_size", "1", "--logging_steps", "2", "--beta", "0.5"]
    same += ["--cuda_graphs", "false", "--trainer", "shared"]
    train_dpo.main([*unfinished, *same, "--base_model", str(moved)])
    said, run = capsys.readouterr(), run_of(unfinished, "sft")
    assert "goes on from" in said.err and "s (since step 4), " in said.out
    logged = [entry["step"] for entry in run["log_history"] if "loss" in entry and entry["step"] > 4]
    assert run["resumed_from_step"] == 4 and logged == [step for step in range(5, run["steps"] + 1) if step % 2 == 0]


def test_restart_throws_an_unfinished_run_away(unfinished, capsys):
    train_dpo.main([*unfinished, "--restart", "true", "--seed", "7"])
    assert "goes on from" not in capsys.readouterr().err
    assert run_of(unfinished, "sft")["resumed_from_step"] is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_finishes_its_step_saves_it_and_says_how_to_go_on(long_flags, number, monkeypatch, capsys):
    flags = [*long_flags, "--stage", "sft", "--save_steps", "100", "--eval_steps", "100"]
    keep = train_dpo.keep_adapter_in_float32
    forwards = []  # two a step
    before = signal.getsignal(signal.SIGINT)

    def interrupt_the_fifth(*_):
        forwards.extend([1] * torch.is_grad_enabled())
        if len(forwards) == 5:
            os.kill(os.getpid(), number)

    def interrupt_later(model):
        keep(model)
        model.base_model.model.model.register_forward_pre_hook(interrupt_the_fifth)

    monkeypatch.setattr(train_dpo, "keep_adapter_in_float32", interrupt_later)
    with pytest.raises(SystemExit) as stopped:
        config.run_script(lambda: train_dpo.main(flags))
    assert stopped.value.code == 2
    assert "stopped at step 3 of 6, which is saved\nThe same command goes on from there." in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before
    assert last_whole_checkpoint(checkpoints_of(flags, "sft")).name == "checkpoint-3"
    monkeypatch.undo()
    train_dpo.main(flags)
    assert run_of(flags, "sft")["resumed_from_step"] == 3


HOLDER = """
import pathlib, sys
from data.files import only_run_in
with only_run_in(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("script", [train_dpo, evaluate_dpo], ids=["train", "evaluate"])
def test_a_second_run_into_one_folder_is_refused_until_the_first_is_gone(flags, script, tmp_path, monkeypatch):
    folder = checkpoints_of(flags, "sft") if script is train_dpo else tmp_path / "outputs" / "evaluation"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, folder], cwd=config.ROOT, **pipes)
    try:
        assert holder.stdout.readline() == b"held\n"
        monkeypatch.setattr(config, "load_model", lambda *_: pytest.fail("the model was loaded"))
        with pytest.raises(UserError, match=f"another run is writing to {folder}\n"):
            script.main(flags)
    finally:
        holder.kill()
        holder.wait()
    with only_run_in(folder):
        pass


# -------------------------------------------------------------------------------------- several processes


def launch(script: str, *flags: str, processes: int) -> subprocess.CompletedProcess:
    """As `accelerate launch` starts a script on several GPUs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(config.ROOT)}
    done = subprocess.run([*command, config.ROOT / script, *flags], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_two_processes_train_and_evaluate_as_one(flags, tmp_path):
    extra = ["--max_steps", "2", "--effective_batch", "4", "--batch_size", "2", "--validation_pairs", "4"]
    extra += ["--eval_steps", "1", "--init", "base"]
    found = {}
    for processes in (1, 2):
        outputs = tmp_path / f"by{processes}"
        mine = [*flags, "--outputs", str(outputs)]
        if processes == 1:
            train_dpo.main([*mine, *extra])
            evaluate_dpo.main([*mine])
        else:
            done = launch("train_dpo.py", *mine, *extra, processes=processes)
            assert done.stdout.count("dpo: loss 0.693") == 1, "one process speaks"
            launch("evaluate_dpo.py", *mine, processes=processes)
        found[processes] = run_of(mine, "dpo"), read_predictions(outputs / "evaluation" / "predictions.csv")
    assert [run["processes"] for run, _ in found.values()] == [1, 2]
    assert found[1][0]["rows_seen"] == found[2][0]["rows_seen"] == 8
    epochs = [run["log_history"][-1]["epoch"] for run, _ in found.values()]
    assert epochs[1] == pytest.approx(epochs[0], abs=0.02), "as many rows a step"
    one, two = (predictions for _, predictions in found.values())
    scores = [*MARGINS, *LOG_PROBS]
    assert one.drop(columns=scores).equals(two.drop(columns=scores))
    untrained = one["arm"] == "base"
    assert np.allclose(one.loc[untrained, "response_margin"], two.loc[untrained, "response_margin"], atol=1e-4)
    assert one["response_margin"].notna().sum() == two["response_margin"].notna().sum()
    for arm in ("sft_more", "dpo"):
        by_one, by_two = (part.loc[part["arm"] == arm, "response_margin"].to_numpy() for part in (one, two))
        assert by_two == pytest.approx(by_one, abs=0.05)
