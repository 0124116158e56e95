"""What goes wrong around a run: each fault ends in an error of two lines and exit code 2, and nothing that was there is lost."""

import errno
import json
import math
import pickle
import re
import resource
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import config
import evaluate_dpo
import train_dpo
from config import EvaluationSettings, TrainingSettings, UserError, parse_settings, preset_settings
from conftest import make_pairs
from data import build_pairs
from data import pairs as pairs_module
from data.pairs import Movie, Pair, PairsError, load_pairs, write_pairs


def error_of(run, capsys) -> str:
    """The error that a script's main function ends with: two lines, exit code 2, no traceback."""
    with pytest.raises(SystemExit) as ended:
        config.run_script(run)
    shown = re.split(r"(?m)^error: ", capsys.readouterr().err)[-1]
    assert ended.value.code == 2
    assert len(shown.strip().splitlines()) == 2 and "Traceback" not in shown
    return shown


# ------------------------------------------------------------------------------------------- disk and memory


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EROFS, "Read-only file system", "x"), "cannot read or write: .*Read-only file system: 'x'"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "cannot read or write: .*Permission denied: 'x'"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), "out of memory"),
    ],
)
def test_a_fault_of_the_machine_is_an_error_with_a_remedy(error, said, capsys):
    def run():
        raise error

    assert re.match(said, error_of(run, capsys))


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        config.run_script(lambda: 1 / 0)


LITTLE_DISK = """
import resource, sys
import config, train_dpo
build = train_dpo.build_trainer
def build_trainer(*arguments):
    trainer = build(*arguments)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)  # the adapter fits, the optimiser's state does not
    return trainer
train_dpo.build_trainer = build_trainer
config.run_script(lambda: train_dpo.main(sys.argv[2:]))
"""


def test_a_disk_that_fills_up_while_a_checkpoint_is_written(training_flags):
    train_dpo.main([*training_flags, "--stage", "sft"])
    folder = config.adapter_folder(parse_settings(TrainingSettings, training_flags), "sft")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    flags = [*training_flags, "--stage", "sft", "--save_steps", "1"]
    run = subprocess.run([sys.executable, "-c", LITTLE_DISK, "190000", *flags], capture_output=True, text=True, cwd=config.ROOT)
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

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(train_dpo, "plot_losses", full)
        assert "the disk is full" in error_of(lambda: train_dpo.main(flags), capsys)
    assert (folder / "run.json").read_bytes() == before
    assert not list(folder.parent.glob(f".{folder.name}.*"))
    train_dpo.main(flags)
    run = json.loads((folder / "run.json").read_text())
    assert (run["resumed_from_step"], run["steps"]) == (3, 3), "with space again nothing is trained, only saved"


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "report.md"
    config.write_text(path, "before")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            config.write_text(path, "x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_an_output_folder_that_cannot_be_made(training_flags, tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    said = error_of(lambda: train_dpo.main([*training_flags, "--outputs", str(tmp_path / "file")]), capsys)
    assert said.startswith("cannot read or write: ") and str(tmp_path / "file") in said
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
    return [*training_flags, *"--stage sft --max_steps 8 --save_steps 1 --logging_steps 4 --eval_steps 100".split()]


def checkpoint_after(flags: list[str], stage: str = "sft") -> Path | None:
    return train_dpo.last_whole_checkpoint(config.checkpoints_folder(parse_settings(TrainingSettings, flags), stage))


def bad_gradient(step, bad=math.nan, seen=None):
    """A tampering that makes one number of a step's gradients bad (steps from 0), and notes in `seen` each step that runs."""

    def tamper(trainer):
        real = trainer.training_step

        def training_step(*inputs, **named):
            loss = real(*inputs, **named)
            if seen is not None:
                seen.append(trainer.state.global_step)
            if trainer.state.global_step == step:
                next(weight for weight in trainer.model.parameters() if weight.requires_grad).grad.view(-1)[0] = bad
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
    with pytest.raises(UserError, match="the gradient of step 3 is not finite"):
        train_tampered(monkeypatch, [*sft_flags, "--save_steps", "100", "--logging_steps", "100"], bad_gradient(2, seen=seen))
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
        (lambda loss, step: loss * math.nan if step == 2 else loss, "the loss of step 4 is nan\nLower --sft_learning_rate"),
        (lambda loss, step: loss + math.inf if step == 2 else loss, "the loss of step 4 is inf\nLower --sft_learning_rate"),
        (lambda loss, step: loss * (1 + step), "the loss diverges: .* at step \\d\nLower --sft_learning_rate"),
    ],
)
def test_a_loss_that_goes_wrong_stops_the_run(sft_flags, monkeypatch, change, problem):
    flags = [*sft_flags, "--logging_steps", "1"] if "diverges" in problem else sft_flags
    with pytest.raises(UserError, match=problem):
        train_tampered(monkeypatch, flags, tamper_loss(change))
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
    with pytest.raises(UserError, match="the first loss is 0.7031 .sigmoid: ln 2 = 0.6931.*reference is not the policy"):
        train_tampered(monkeypatch, [*training_flags, "--stage", "dpo", "--init", "base"], tamper_loss(lambda loss, _: loss + 0.005))


# ------------------------------------------------------------------------------- wrong things in right places


@pytest.fixture
def adapter(tmp_path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"weight": torch.zeros(64)}, folder / "adapter_model.safetensors")
    return folder


def problem_of(adapter: Path, **settings) -> str:
    return config.adapter_problem(adapter, preset_settings(EvaluationSettings, "small", **settings), "digest")


def test_a_truncated_adapter_is_refused_by_name(adapter):
    assert problem_of(adapter) == ""
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


def test_a_base_model_with_another_tokenizer_is_refused(adapter, tiny_model):
    run = {"settings": {"base_model": str(tiny_model)}, "data": {"test_digest": "digest"}, "vocabulary": 32_000}
    (adapter / "run.json").write_text(json.dumps(run))
    assert "trained with another tokenizer, of 32000 tokens; that of" in problem_of(adapter, base_model=str(tiny_model))


@pytest.mark.parametrize("run", [{}, [], {"settings": {}}, {"settings": {"base_model": "x"}, "data": {}}, {"settings": None}])
def test_a_run_json_of_an_older_version_is_told_so(adapter, run):
    (adapter / "run.json").write_text(json.dumps(run))
    assert "run.json cannot be read, or is of an older version" in problem_of(adapter)


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


def test_a_base_model_that_brings_code_is_refused_and_the_code_not_run(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    code = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.Tokenizer", None]}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": code}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "EvilTokenizer", "auto_map": code}))
    settings = EvaluationSettings(base_model=str(folder))
    for load in (lambda: config.load_tokenizer(settings), lambda: config.parameter_count(str(folder))):
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


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code of a checkpoint was run')",))


def test_a_checkpoint_with_code_is_not_run(training_flags):
    """transformers reads optimiser, schedule and random state with weights_only=True."""
    flags = [*training_flags, *"--stage sft --save_steps 2".split()]
    folder = config.checkpoints_folder(parse_settings(TrainingSettings, flags), "sft")
    keep, train_dpo.save_adapter = train_dpo.save_adapter, lambda *_: (_ for _ in ()).throw(RuntimeError)
    try:
        with pytest.raises(RuntimeError):
            train_dpo.main(flags)
    finally:
        train_dpo.save_adapter = keep
    newest = train_dpo.last_whole_checkpoint(folder)
    torch.save(Evil(), newest / "optimizer.pt")
    whole = json.loads((newest / "whole.json").read_text())
    (newest / "whole.json").write_text(json.dumps(whole | {"optimizer.pt": config.file_sha256(newest / "optimizer.pt")}))
    with pytest.raises(pickle.UnpicklingError):
        train_dpo.main(flags)


ESCAPE = "\x1b[2J"


@pytest.mark.parametrize("title", [f"X{ESCAPE} (1990)", "X\u202e (1990)", "X" * 400 + " (1990)", "X" * 1_000_000 + " (1990)"])
def test_a_title_that_would_steer_a_terminal_or_fill_it_is_refused(tmp_path, title):
    [pair] = make_pairs(1)
    with pytest.raises(PairsError):
        write_pairs(tmp_path / "p.jsonl", [Pair(pair.history, Movie(title, ("War",)), pair.other)])
    text = json.dumps({"instruction": "", "input": "INPUT", "output": "better recommendation is Option A"})
    films = f"History: {', '.join(pair.history)}. Option A: {title} (War). Option B: {pair.other}."
    (tmp_path / "p.jsonl").write_text(text.replace('"INPUT"', json.dumps(films)) + "\n")
    with pytest.raises(PairsError, match="control characters|title is longer than|longer than 10,000 bytes"):
        load_pairs(tmp_path / "p.jsonl")


def test_a_pairs_file_of_a_gigabyte_is_refused_unread(tmp_path):
    with open(tmp_path / "p.jsonl", "wb") as file:
        file.truncate(10**9)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="1.0 GB, more than"):
        config.load_split(EvaluationSettings(pairs=str(tmp_path / "p.jsonl")))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_a_line_made_to_keep_the_parser_busy_is_refused_at_once(tmp_path):
    line = {"instruction": "", "input": "History: " + ". Option A: . Option B: " * 500, "output": ""}  # unguarded: seconds
    (tmp_path / "p.jsonl").write_text(json.dumps(line))
    with pytest.raises(PairsError, match=f"longer than {pairs_module.LONGEST_LINE:,} bytes"):
        load_pairs(tmp_path / "p.jsonl")


@pytest.mark.parametrize("name", ["<b>", "a|b", "$x$", "\\input", ESCAPE, "[x](y)", "`", "x" * 61, "*", "&", ""])
def test_an_arm_whose_name_means_something_to_a_reader_of_tables_is_refused(name, tmp_path):
    with pytest.raises(UserError, match="with a name of its own"):
        evaluate_dpo.find_adapters(preset_settings(EvaluationSettings, "small", adapters=[f"{name}=x"]), "digest")
    path = tmp_path / "p.csv"
    rows = [{"arm": name, "kind": "model", "seed": "", "pair_id": user, "order": order, "history": "own"} for user in "ab" for order in "AB"]
    margins = {"decision_margin": 1.0, "response_margin": 1.0, "preferred_more_popular": "tie"}
    pd.DataFrame([row | margins for row in rows]).to_csv(path, index=False)
    with pytest.raises(UserError, match="has an arm whose name"):
        evaluate_dpo.read_predictions(path)


def test_what_an_adapter_says_of_itself_cannot_steer_terminal_or_report(adapter):
    hostile = f"{ESCAPE}<script>"
    (adapter / "run.json").write_text(json.dumps({"settings": {"base_model": hostile}, "data": {"test_digest": ""}}))
    assert "\x1b" not in problem_of(adapter)
    metrics = json.loads((config.ROOT / "docs" / "results" / "small" / "metrics.json").read_text())
    assert "<script>" not in evaluate_dpo.report(metrics, notes=[f"mismatch: {problem_of(adapter)}"])


def test_an_error_message_cannot_steer_the_terminal(capsys):
    def run():
        raise UserError(f"no such file {ESCAPE}", "Give another.")

    assert "\x1b" not in error_of(run, capsys)


def test_a_downloaded_archive_is_checked_before_it_is_opened(tmp_path, monkeypatch, capsys):
    source = tmp_path / "source.zip"
    source.write_bytes(b"PK another file")
    monkeypatch.setattr(build_pairs, "ML_1M_URL", source.as_uri())
    with pytest.raises(UserError, match="not the file that was expected"):
        build_pairs.download_ml_1m(tmp_path)
    monkeypatch.setattr(build_pairs, "ML_1M_SHA256", config.file_sha256(source))
    assert build_pairs.download_ml_1m(tmp_path).read_bytes() == source.read_bytes()
