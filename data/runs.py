"""run.json: what a training run was, and whether several of them can be compared.

A run.json may be somebody else's: what it does not say, or says in another form, is unknown.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.errors import printable
from data.files import file_sha256, read_json
from data.pairs import Pair

RUN = "run.json"
WEIGHTS = "adapter_model.safetensors"  # of an adapter, as PEFT names it
Adapters = dict[str, dict[str, Path]]  # folders by arm and seed

# These don't change what is trained, or are known by their content; a new setting counts.
NOT_TRAINED = {
    *("preset", "outputs", "check", "restart", "stage", "pairs", "sft_adapter", "backend", "batch_size"),
    *("gpu_memory_gb", "gradient_checkpointing", "cuda_graphs", "eval_steps", "save_steps", "logging_steps"),
    *("report_to", "push_to_hub", "merge"),  # the last two are of earlier versions
}
OF_OTHER_STAGE = {
    "sft": {"init", "epochs", "learning_rate", "beta", "loss_type", "trainer"},
    "dpo": {"sft_epochs", "sft_learning_rate"},
}


def read_run(adapter: Path) -> dict[str, Any]:
    """The run.json of an adapter's folder; empty where there is none that can be read."""
    return read_json(adapter / RUN)


def trained_settings(stage: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run that decide what a stage trains."""
    return {name: value for name, value in settings.items() if name not in NOT_TRAINED | OF_OTHER_STAGE[stage]}


def differing(before: dict[str, Any], now: dict[str, Any]) -> str:
    """How two runs differ, in words."""
    others = [name for name, value in now.items() if before.get(name) != value]
    return "; ".join(f"{name} {before.get(name)!r}, not {now[name]!r}" for name in others)


def made_otherwise(run: dict[str, Any], stage: str, settings: dict[str, Any]) -> str:
    """Which of these settings a run was not trained with, in words; a setting newer than the run is no difference."""
    had = settings_of(run)
    asked = trained_settings(stage, settings)
    return differing(asked | had, asked) if had else ""


def settings_of(run: dict[str, Any]) -> dict[str, Any]:
    found = run.get("settings")
    return found if isinstance(found, dict) else {}


def plain(value: Any) -> str:
    """What somebody's file says, without what a reader of Markdown or HTML would obey."""
    return re.sub(r"[^\w .,:;%()'+=-]", "_", str(value))


def model_of(run: dict[str, Any]) -> str:
    """The base model and its precision in words, as a run.json of evaluation has them; "" where it does not say."""
    settings = settings_of(run)
    known = {"base_model", "bits"} <= settings.keys()
    return plain(f"{Path(str(settings['base_model'])).name} in {settings['bits']} bits") if known else ""


def of_another_stage(folder: Path, arm: str) -> str:
    """Why an adapter cannot be what its arm's name says, by the stage that trained it; "" if it can."""
    named = "sft" if arm == "sft" or arm.startswith("sft_") else arm
    stage = read_run(folder).get("stage")
    contrary = (named, stage) in (("sft", "dpo"), ("dpo", "sft"))
    return f"{folder} is an adapter of {stage}, given as the arm {arm}" if contrary else ""


def notes_of(run: dict[str, Any]) -> list[str]:
    """Mismatches and notes of an evaluation's run.json, each with its kind before it."""
    kinds = {"mismatch": run.get("mismatches"), "note": run.get("notes")}
    listed = [(kind, text) for kind, texts in kinds.items() if isinstance(texts, list) for text in texts]
    return [f"{kind}: {printable(str(text))}" for kind, text in listed]


def notes_on(test: Sequence[Pair], adapters: Adapters, bits: int) -> list[str]:
    """What the predictions cannot show and their reader must know."""
    notes = []
    repeated = len(test) - len({pair.history for pair in test})
    if repeated > 0.01 * len(test):
        shared = f"{repeated:,} of {len(test):,} test pairs share their history with another"
        notes.append(f"{shared}: intervals take each for a user of its own")
    return notes + notes_on_rows_seen(adapters) + notes_on_training(adapters, bits)


def notes_on_rows_seen(adapters: Adapters) -> list[str]:
    """Whether DPO and the arms of SFT have seen as many pairs."""
    seen = {arm: max(map(rows_seen, folders.values())) for arm, folders in adapters.items()}
    of_sft = {arm: rows for arm, rows in seen.items() if rows and (arm == "sft" or arm.startswith("sft_"))}
    dpo, notes = seen.get("dpo", 0), []
    if of_sft and dpo > max(of_sft.values()):
        listed = " and ".join(f"{arm} {rows:,}" for arm, rows in of_sft.items())
        longer = "an arm of longer SFT, named sft_long or the like, would tell DPO from more training"
        notes.append(f"dpo has seen {dpo:,} pairs in training, its SFT start included, and {listed}: {longer}")
    for arm, rows in of_sft.items():
        if rows > dpo > 0:
            notes.append(f"{arm} has seen {rows:,} pairs in training, more than dpo with its SFT start ({dpo:,})")
    return notes


def rows_seen(folder: Path) -> int:
    """Pairs seen by an adapter in all its training, with those of the SFT adapter that it began with; 0 if unknown."""
    run = read_run(folder)
    runs = [run, read_run(Path(str(run["initial_adapter"])))] if run.get("initial_adapter") else [run]
    seen = [run.get("rows_seen") for run in runs]
    return sum(seen) if all(isinstance(rows, int) for rows in seen) else 0


def notes_on_training(adapters: Adapters, bits: int) -> list[str]:
    """Unexpected training: runs of an arm not alike, other bits, or DPO from another SFT than the one beside it."""
    notes = []
    for arm, folders in adapters.items():
        runs = [read_run(folder) for folder in folders.values()]
        known = [run for run in runs if settings_of(run) and run.get("stage") in ("sft", "dpo")]
        decisive = [trained_settings(run["stage"], settings_of(run)) for run in known]
        others = sorted({name for one in decisive for name in one if one[name] != decisive[0].get(name)} - {"seed"})
        if others:
            notes.append(f"the training runs of {arm} differ in {', '.join(others)}, not in their seed alone")
        trained = {found for run in runs if isinstance(found := settings_of(run).get("bits"), int)} - {bits}
        read_in = f"is read here on weights in {bits}"
        notes += [f"{arm} was trained on weights in {other} bits and {read_in}" for other in sorted(trained)]
        starts = {run.get("initial_adapter_sha256") for run in runs} - {None}
        beside = {file_sha256(sft / WEIGHTS) for sft in adapters.get("sft", {}).values()} if starts else set()
        if arm == "dpo" and beside and not starts <= beside:
            notes.append("dpo began with another SFT adapter than the arm sft")
    return notes


def training_runs(results: Path) -> dict[str, dict[str, Any]]:
    """run.json of each training run by name, SFT first: of the adapters evaluated, or published beside the results."""
    published = (*results.glob("*.run.json"), *results.glob("runs/main_*.run.json"))
    files = {path.name.removesuffix(".run.json"): path for path in published}
    adapters = {} if files else read_run(results).get("adapters", {})  # published ones are not those in outputs
    for arm, seeds in adapters.items():
        files |= {f"{arm} {seed}".strip(): Path(folder) / RUN for seed, folder in seeds.items()}
    runs = {name: read_json(path) for name, path in sorted(files.items())}
    runs = {name: run for name, run in runs.items() if "stage" in run}  # an evaluation has none
    return dict(sorted(runs.items(), key=lambda run: run[1]["stage"] != "sft"))
