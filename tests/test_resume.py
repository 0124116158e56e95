"""Runs that are killed, stopped or started twice: what is finished in the end is what one undisturbed run gives."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import config
import evaluate_dpo
import train_dpo
from config import EvaluationSettings, TrainingSettings, UserError, parse_settings

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
plot = train_dpo.plot_losses
train_dpo.plot_losses = lambda history, which, path: die() if (which, moment) == (stage, "save") else plot(history, which, path)
sys.argv[0] = "train_dpo.py"
config.run_script(lambda: train_dpo.main(sys.argv[5:]))
"""
STEPS = ["--max_steps", "6", "--save_steps", "2", "--logging_steps", "1", "--eval_steps", "3"]


def drive(stage: str, moment: str, step: int, dtype: str, flags: list[str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", DRIVER, stage, moment, str(step), dtype, *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=config.ROOT)


def scores(flags: list[str], stage: str) -> np.ndarray:
    """Decision and response margins of the finished adapter on the held-out pairs, in float32."""
    settings = EvaluationSettings(base_model=value(flags, "base_model"), pairs=value(flags, "pairs"), test_share=0.3, bits=int(value(flags, "bits")))
    _, test = config.load_split(settings)
    model, tokenizer = config.load_model(settings, torch.float32)
    model = evaluate_dpo.load_adapter(model, "x", folder_of(flags, stage))
    return np.stack(evaluate_dpo.score(model, [evaluate_dpo.pair_tree(pair, tokenizer) for pair in test], 4, stage))


def value(flags: list[str], name: str) -> str:
    return flags[len(flags) - 1 - flags[::-1].index(f"--{name}") + 1]


def folder_of(flags: list[str], stage: str) -> Path:
    return config.adapter_folder(parse_settings(TrainingSettings, flags), stage)


def checkpoints_of(flags: list[str], stage: str) -> Path:
    return config.checkpoints_folder(parse_settings(TrainingSettings, flags), stage)


@pytest.fixture
def long_flags(training_flags) -> list[str]:
    """Six steps with dropout, so that the random state matters, and a checkpoint after every second one."""
    return [*training_flags, *STEPS, "--lora_dropout", "0.1"]


def test_a_run_killed_again_and_again_ends_as_the_undisturbed_one(long_flags, tmp_path, monkeypatch, capsys):
    """SIGKILL in SFT, in DPO, while a checkpoint is written, and in the final save; float32 over 16-bit weights."""
    flags = [*long_flags, "--bits", "16", "--outputs", str(tmp_path / "killed")]
    undisturbed = [*flags, "--outputs", str(tmp_path / "undisturbed")]
    monkeypatch.setattr(config, "training_dtype", lambda: torch.float32)
    train_dpo.main(undisturbed)
    for stage, moment, step, goes_on_from in (
        ("sft", "step", 3, None),
        ("dpo", "checkpoint", 4, "sft_checkpoints/checkpoint-2"),
        ("dpo", "step", 5, "dpo_checkpoints/checkpoint-2"),
        ("dpo", "save", 0, "dpo_checkpoints/checkpoint-4"),
    ):
        run = drive(stage, moment, step, "float32", flags)
        assert run.returncode == -signal.SIGKILL, run.stderr
        assert goes_on_from is None or goes_on_from in run.stderr
        assert not folder_of(flags, "dpo").exists()
    train_dpo.main(flags)
    assert "dpo_checkpoints/checkpoint-6" in capsys.readouterr().err
    for stage in ("sft", "dpo"):
        assert np.abs(scores(flags, stage) - scores(undisturbed, stage)).max() < 1e-6
    left = sorted(path.name for path in (tmp_path / "killed").iterdir() if not path.name.endswith("_reference"))
    assert left == sorted(folder_of(flags, stage).name for stage in ("sft", "dpo")), "nothing is left of the killed runs"


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
def test_in_4_bits_a_resumed_adapter_is_the_undisturbed_one_in_float32(long_flags, tmp_path, monkeypatch, init):
    train_dpo.main([*long_flags, "--stage", "sft"])
    flags = [*long_flags, "--stage", "dpo", "--init", init]
    train_dpo.main(flags)
    undisturbed = load_file(folder_of(flags, "dpo") / "adapter_model.safetensors")
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        stop_at(patched, 3)
        train_dpo.main(flags)
    train_dpo.main(flags)
    resumed = load_file(folder_of(flags, "dpo") / "adapter_model.safetensors")
    assert json.loads((folder_of(flags, "dpo") / "run.json").read_text())["resumed_from_step"] == 2
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
    "broken", ["adapter_model.safetensors", "optimizer.pt", "trainer_state.json", "whole.json", "rng_state.pth", "scheduler.pt"]
)
def test_a_truncated_checkpoint_is_skipped_for_the_one_before(unfinished, broken, capsys):
    folder = checkpoints_of(unfinished, "sft")
    path = folder / "checkpoint-4" / broken
    path.write_bytes(path.read_bytes()[:-9])
    assert train_dpo.last_whole_checkpoint(folder) == folder / "checkpoint-2"
    assert "checkpoint-4 is not whole and is removed" in capsys.readouterr().err
    (folder / "checkpoint-2" / broken).unlink()
    assert train_dpo.last_whole_checkpoint(folder) is None


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (["--sft_learning_rate", "0.5"], "sft_learning_rate 0.001, not 0.5"),
        (["--seed", "7"], "seed 3407, not 7"),
        (["--max_pairs", "9"], "max_pairs 96, not 9"),
        (["--base_model", "COPY"], "base_model"),
        (["--pairs", "FEWER"], "sha256 of the pairs"),
    ],
)
def test_an_unfinished_run_of_other_settings_is_not_mixed_in(unfinished, changed, named, tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(config, "load_model", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "copy").mkdir()
    copy = tmp_path / "copy" / tiny_model.name  # of the same name, and so with the same checkpoints folder
    copy.symlink_to(tiny_model)
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(Path(value(unfinished, "pairs")).read_text().splitlines(keepends=True)[:-1]))
    changed = [{"COPY": str(copy), "FEWER": str(fewer)}.get(flag, flag) for flag in changed]
    with pytest.raises(UserError, match=f"unfinished run with .*{named}.*\n.*--restart true"):
        train_dpo.main([*unfinished, *changed])
    assert (checkpoints_of(unfinished, "sft") / "checkpoint-4").is_dir()


def test_settings_that_train_the_same_go_on_and_restart_starts_afresh(unfinished, capsys):
    same = ["--batch_size", "1", "--logging_steps", "2", "--beta", "0.5", "--cuda_graphs", "false"]
    train_dpo.main([*unfinished, *same])
    assert "goes on from" in capsys.readouterr().err
    assert json.loads((folder_of(unfinished, "sft") / "run.json").read_text())["resumed_from_step"] == 4


def test_restart_throws_an_unfinished_run_away(unfinished, capsys):
    train_dpo.main([*unfinished, "--restart", "true", "--seed", "7"])
    assert "goes on from" not in capsys.readouterr().err
    assert json.loads((folder_of(unfinished, "sft") / "run.json").read_text())["resumed_from_step"] is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_finishes_its_step_saves_it_and_says_how_to_go_on(long_flags, number, monkeypatch, capsys):
    flags = [*long_flags, "--stage", "sft", "--save_steps", "100", "--eval_steps", "100"]
    keep = train_dpo.keep_adapter_in_float32
    forwards = []  # two a step
    before = signal.getsignal(signal.SIGINT)

    def interrupt_the_fifth(*_):
        forwards.append(1)
        if len(forwards) == 5:
            os.kill(os.getpid(), number)

    def interrupt_later(model):
        keep(model)
        model.register_forward_pre_hook(interrupt_the_fifth)

    monkeypatch.setattr(train_dpo, "keep_adapter_in_float32", interrupt_later)
    with pytest.raises(SystemExit) as stopped:
        config.run_script(lambda: train_dpo.main(flags))
    assert stopped.value.code == 2
    assert "stopped at step 3 of 6, which is saved\nThe same command goes on from there." in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before
    assert train_dpo.last_whole_checkpoint(checkpoints_of(flags, "sft")).name == "checkpoint-3"
    monkeypatch.undo()
    train_dpo.main(flags)
    assert json.loads((folder_of(flags, "sft") / "run.json").read_text())["resumed_from_step"] == 3


def test_out_of_memory_late_in_a_run_goes_on_from_the_checkpoint(long_flags, monkeypatch, capsys):
    flags = [*long_flags, "--stage", "sft"]
    build = train_dpo.build_trainer

    def short_of_memory(*arguments):
        trainer = build(*arguments)
        step = trainer.training_step

        def training_step(*inputs, **named):
            if arguments[-1] > 1 and trainer.state.global_step == 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return step(*inputs, **named)

        trainer.training_step = training_step
        return trainer

    monkeypatch.setattr(train_dpo, "build_trainer", short_of_memory)
    train_dpo.main(flags)
    assert "goes on from" in capsys.readouterr().err
    run = json.loads((folder_of(flags, "sft") / "run.json").read_text())
    assert (run["resumed_from_step"], run["batch_size"], run["steps"]) == (2, 1, 6)


LOCK = "import sys, config, pathlib\nwith config.only_run_in(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()"


@pytest.mark.parametrize("script", ["train", "evaluate"])
def test_a_second_run_into_one_folder_is_refused_until_the_first_is_gone(long_flags, script, tmp_path, monkeypatch):
    folder = checkpoints_of(long_flags, "sft") if script == "train" else tmp_path / "outputs" / "evaluation"
    holder = subprocess.Popen([sys.executable, "-c", LOCK, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=config.ROOT)
    try:
        assert holder.stdout.readline() == b"held\n"
        monkeypatch.setattr(config, "load_model", lambda *_: pytest.fail("the model was loaded"))
        with pytest.raises(UserError, match=f"another run is writing to {folder}\n"):
            train_dpo.main(long_flags) if script == "train" else evaluate_dpo.main(long_flags[:10])
    finally:
        holder.kill()
        holder.wait()
    with config.only_run_in(folder):
        pass
