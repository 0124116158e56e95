"""What goes wrong around a run ends in an error of two lines and exit code 2, and nothing that was there is lost."""

import errno
import json
import math
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import error_of
from safetensors.torch import load_file

import config
import evaluate_dpo
import train_dpo
from config import EvaluationSettings, TrainingSettings, parse_settings, preset_settings
from data.errors import UserError
from data.files import seal
from data.predictions import read_predictions
from data.runs import last_whole_checkpoint

# ------------------------------------------------------------------------------------------- disk and memory


LITTLE_DISK = """
import resource, sys
import config, train_dpo
build = train_dpo.build_trainer
def build_trainer(*arguments):
    trainer = build(*arguments)
    # the adapter fits, the optimiser's state does not
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
    return trainer
train_dpo.build_trainer = build_trainer
config.run_script(lambda: train_dpo.main(sys.argv[2:]))
"""


def test_a_disk_that_fills_up_while_a_checkpoint_is_written(training_flags):
    train_dpo.main([*training_flags, "--stage", "sft"])
    folder = config.adapter_folder(parse_settings(TrainingSettings, training_flags), "sft")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    other = ["--seed", "2", "--restart", "true"]
    flags = [*training_flags, "--stage", "sft", "--save_steps", "1", *other]
    command = [sys.executable, "-c", LITTLE_DISK, "190000", *flags]
    run = subprocess.run(command, capture_output=True, text=True, cwd=config.ROOT)
    assert run.returncode == 2 and "Traceback" not in run.stderr, run.stderr
    assert "error: the disk is full" in run.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    train_dpo.main(flags)
    assert json.loads((folder / "run.json").read_text())["steps"] == 3, "with space again, the same command works"


def test_a_disk_that_fills_up_in_the_final_save_leaves_the_earlier_adapter(training_flags, monkeypatch, capsys):
    flags = [*training_flags, "--stage", "sft"]
    train_dpo.main(flags)
    folder = config.adapter_folder(parse_settings(TrainingSettings, flags), "sft")
    before = (folder / "run.json").read_bytes()
    flags = [*flags, "--seed", "2", "--restart", "true"]

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(train_dpo, "draw_losses", full)
        assert "the disk is full" in error_of(lambda: train_dpo.main(flags), capsys)
    assert (folder / "run.json").read_bytes() == before
    assert not list(folder.parent.glob(f".{folder.name}.*"))
    train_dpo.main(flags)
    run = json.loads((folder / "run.json").read_text())
    assert (run["resumed_from_step"], run["steps"]) == (3, 3), "with space again nothing is trained, only saved"


def test_an_output_folder_that_cannot_be_made(training_flags, tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    said = error_of(lambda: train_dpo.main([*training_flags, "--outputs", str(tmp_path / "file")]), capsys)
    assert f"{tmp_path / 'file'} is no folder that you may write to" in said
    assert (tmp_path / "file").read_text() == "kept"


# ------------------------------------------------------------------------------------ training that goes wrong


def train_tampered(monkeypatch, flags, tamper) -> None:
    build = train_dpo.build_trainer

    def build_trainer(*arguments):
        trainer = build(*arguments)
        tamper(trainer)
        return trainer

    monkeypatch.setattr(train_dpo, "build_trainer", build_trainer)
    train_dpo.main(flags)


@pytest.fixture
def sft_flags(training_flags) -> list[str]:
    steps = ("--max_steps", "8", "--save_steps", "1", "--logging_steps", "4", "--eval_steps", "100")
    return [*training_flags, "--stage", "sft", *steps]


def checkpoint_after(flags: list[str], stage: str = "sft") -> Path | None:
    return last_whole_checkpoint(config.checkpoints_folder(parse_settings(TrainingSettings, flags), stage))


def bad_gradient(step, bad=math.nan, seen=None):
    """Makes one number of a step's gradients bad (steps from 0), and notes in `seen` each step that runs."""

    def tamper(trainer):
        real = trainer.training_step

        def training_step(*inputs, **named):
            loss = real(*inputs, **named)
            if seen is not None:
                seen.append(trainer.state.global_step)
            if trainer.state.global_step == step:
                trained = next(weight for weight in trainer.model.parameters() if weight.requires_grad)
                trained.grad.view(-1)[0] = bad
            return loss

        trainer.training_step = training_step

    return tamper


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stops_the_run_before_it_does_harm(sft_flags, monkeypatch, bad):
    with pytest.raises(UserError, match="sft: the gradient of step 3 is not finite\nLower --sft_learning_rate"):
        train_tampered(monkeypatch, sft_flags, bad_gradient(2, bad))  # no step that is logged
    kept = checkpoint_after(sft_flags)
    assert kept.name == "checkpoint-2"
    assert all(weight.isfinite().all() for weight in load_file(kept / "adapter_model.safetensors").values())


def test_a_bad_gradient_is_found_by_the_next_step(sft_flags, monkeypatch):
    """Though nothing is logged or saved before."""
    seen = []
    flags = [*sft_flags, "--save_steps", "100", "--logging_steps", "100"]
    with pytest.raises(UserError, match="the gradient of step 3 is not finite"):
        train_tampered(monkeypatch, flags, bad_gradient(2, seen=seen))
    assert max(seen) == 3, "the fourth"


def test_a_bad_gradient_of_the_last_step_makes_no_adapter(sft_flags, monkeypatch):
    """No step comes after it that could look."""
    with pytest.raises(UserError, match="the gradient of step 8 is not finite"):
        train_tampered(monkeypatch, sft_flags, bad_gradient(7))
    assert not config.adapter_folder(parse_settings(TrainingSettings, sft_flags), "sft").exists()


def tamper_loss(change):
    def tamper(trainer):
        step = trainer.training_step
        trainer.training_step = lambda *inputs, **named: change(step(*inputs, **named), trainer.state.global_step)

    return tamper


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda loss, step: loss * math.nan if step == 2 else loss, "the loss of step 4 is nan"),
        (lambda loss, step: loss + math.inf if step == 2 else loss, "the loss of step 4 is inf"),
        (lambda loss, step: loss * (1 + step), "the loss diverges: .* at step \\d"),
    ],
)
def test_a_loss_that_goes_wrong_stops_the_run(sft_flags, monkeypatch, change, problem, capsys):
    flags = [*sft_flags, "--logging_steps", "1"] if "diverges" in problem else sft_flags
    told = error_of(lambda: train_tampered(monkeypatch, flags, tamper_loss(change)), capsys)
    assert re.search(f"{problem}\nLower --sft_learning_rate", told), "on lines of its own, not beside the progress"
    assert checkpoint_after(flags)


def test_gradients_of_zero_stop_the_run(sft_flags, monkeypatch):
    def tamper(trainer):
        step = trainer.training_step

        def training_step(*inputs, **named):
            loss = step(*inputs, **named)
            for weight in trainer.model.parameters():
                if weight.grad is not None:
                    weight.grad.zero_()
            return loss

        trainer.training_step = training_step

    with pytest.raises(UserError, match="every gradient is zero"):
        train_tampered(monkeypatch, sft_flags, tamper)


def test_a_first_dpo_loss_that_is_not_ln_2_stops_the_run(training_flags, monkeypatch):
    """The mean reward margin is 0, and the loss is not: as where rows are mixed up with others' references."""
    flags = [*training_flags, "--stage", "dpo", "--init", "base"]
    problem = "the first loss is 0.7031 .sigmoid: ln 2 = 0.6931.*reference is not the policy"
    with pytest.raises(UserError, match=problem):
        train_tampered(monkeypatch, flags, tamper_loss(lambda loss, _: loss + 0.005))


# ------------------------------------------------------------------------------- wrong things in right places


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--bits", "3"], "--bits: invalid choice"),
        (["--beta", "-1"], "beta is -1.0"),
        (["--gpu_memory_gb", "nan"], "gpu_memory_gb is nan"),
        (["--learning_rate", "inf"], "learning_rate is inf"),
        (["--preset", "huge"], "--preset: invalid choice"),
        (["--backend", "unsloth"], "the unsloth backend needs CUDA"),
        (["--pairs", "README.md"], "README.md: .* problem"),
    ],
)
def test_a_wrong_setting_ends_before_any_work(training_flags, flags, said, monkeypatch, capsys):
    monkeypatch.setattr(config, "load_model", lambda *_: pytest.fail("the model was loaded"))
    flags = [str(config.ROOT / flag) if flag == "README.md" else flag for flag in flags]
    with pytest.raises(UserError, match=said):
        train_dpo.main([*training_flags, *flags])


# ---------------------------------------------------------------------------------------------- hostile input


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code of a checkpoint was run')",))


def test_a_checkpoint_with_code_is_not_run(training_flags, monkeypatch):
    """transformers reads optimiser, schedule and random state with weights_only=True."""
    flags = [*training_flags, "--stage", "sft", "--save_steps", "2"]

    def killed(*_):
        raise RuntimeError

    with monkeypatch.context() as patched, pytest.raises(RuntimeError):
        patched.setattr(train_dpo, "save_adapter", killed)
        train_dpo.main(flags)
    newest = checkpoint_after(flags)
    torch.save(Evil(), newest / "optimizer.pt")
    seal(newest)
    with pytest.raises(pickle.UnpicklingError):
        train_dpo.main(flags)


NAMES = ["<b>", "a|b", "$x$", "\\input", "\x1b[2J", "[x](y)", "`", "x" * 61, "*", "&", ""]


@pytest.mark.parametrize("name", NAMES)
def test_an_arm_whose_name_means_something_to_a_reader_of_tables_is_refused(name, pairs, tmp_path):
    with pytest.raises(UserError, match="with a name of its own"):
        evaluate_dpo.find_adapters(preset_settings(EvaluationSettings, "small", adapters=[f"{name}=x"]), pairs)
    path = tmp_path / "p.csv"
    arm = {"arm": name, "kind": "model", "seed": "", "history": "own", "preferred_more_popular": "tie"}
    margins = {"decision_margin": 1.0, "response_margin": 1.0}
    rows = [arm | margins | {"pair_id": user, "order": order} for user in "ab" for order in "AB"]
    pd.DataFrame(rows).to_csv(path, index=False)
    with pytest.raises(UserError, match="has an arm or a seed whose name"):
        read_predictions(path)
