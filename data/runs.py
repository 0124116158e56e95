"""run.json: what a training run was, whether it goes on or is done, and whether several can be compared.

A run.json may be somebody else's: what it does not say, or says in another form, is unknown.
"""

import math
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

from data.bases import base_key, damage
from data.errors import UserError, printable
from data.files import file_sha256, is_sealed, read_json, weights_digest, write_json
from data.machine import RANK
from data.pairs import prompt_digest

RUN = "run.json"
WEIGHTS = "adapter_model.safetensors"  # of an adapter, as PEFT names it
STAGES = ("sft", "sft_more", "dpo")
OF_START = "sha256 of the adapter that it starts from"
OF_PROMPT = "hash of the prompt's words"
OF_BASE = "hash of the base model's files"
Adapters = dict[str, dict[str, Path]]  # folders by arm and seed

# These don't change what is trained, or are known by their content; a new setting counts.
NOT_TRAINED = {
    *("preset", "outputs", "check", "restart", "stage", "pairs", "sft_adapter", "backend", "trainer", "batch_size"),
    *("gpu_memory_gb", "gradient_checkpointing", "cuda_graphs", "eval_steps", "save_steps", "logging_steps"),
    *("report_to", "control", "seeds", "push_to_hub", "merge"),  # the last two are of earlier versions
}
OF_DPO = {"learning_rate", "beta", "loss_type", "sft_weight"}
OF_OTHER_STAGE = {
    "sft": {"init", "epochs", "control_learning_rate"} | OF_DPO,
    "sft_more": {"sft_epochs"} | OF_DPO,
    "dpo": {"sft_epochs", "sft_learning_rate", "control_learning_rate"},
}


def read_run(folder: Path) -> dict[str, Any]:
    """The run.json of a folder; empty where there is none that can be read."""
    return read_json(folder / RUN)


def trained_settings(stage: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run that decide what a stage trains."""
    without = NOT_TRAINED | OF_OTHER_STAGE[stage]
    kept = {name: value for name, value in settings.items() if name not in without}
    return kept | {"base_model": base_key(str(settings.get("base_model")))}


def differing(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What of `now` was otherwise before, in words; a base model whose files are the same may have moved."""
    moved = {"base_model"} if now.get(OF_BASE) and before.get(OF_BASE) == now[OF_BASE] else set()
    others = {name: value for name, value in now.items() if before.get(name) != value and name not in moved}
    return "; ".join(f"{name} {before.get(name)!r}, not {value!r}" for name, value in others.items())


def decisive(stage: str, settings: dict[str, Any], pairs_sha256: str, start_sha256: str | None) -> dict[str, Any]:
    """All that decides what a stage trains: its settings, its pairs, and the adapter that it starts from."""
    data = {"sha256 of the pairs": pairs_sha256[:12], OF_START: start_sha256 and start_sha256[:12]}
    data |= {OF_PROMPT: prompt_digest(), OF_BASE: weights_digest(str(settings.get("base_model")))}
    return trained_settings(stage, settings) | data


def made_otherwise(run: dict[str, Any], stage: str, asked: dict[str, Any]) -> str:
    """What a run was not trained with of `asked`, which is `decisive` of another; newer settings make no difference."""
    had, data = settings_of(run), run.get("data")
    if run.get("stage") != stage or not had or not isinstance(data, dict):
        return f"no run.json of {stage}"
    start = run.get("initial_adapter_sha256")
    made_with = decisive(stage, had, str(data.get("pairs_sha256")), start and str(start))
    said = {OF_PROMPT: data.get("prompt_digest"), OF_BASE: run.get("base_weights_digest")}
    unknown = {name for name in said if not said[name] or not asked.get(name)}
    known = {name: value for name, value in asked.items() if name not in unknown}
    return differing(asked | made_with | said, known)


class There(NamedTuple):
    """What lies where a run would write: is it that run's adapter, in words, and what to do where it is another's."""

    done: bool
    said: str
    remedy: str = ""


def what_is_there(
    folder: Path, stage: str, settings: dict[str, Any], pairs_sha256: str, start: Path | None, checkpoints: Path
) -> There:
    """What lies in the folders of a run; what is of other settings is in its way unless these say `restart`."""
    known = start is not None and (start / WEIGHTS).is_file()
    asked = decisive(stage, settings, pairs_sha256, file_sha256(start / WEIGHTS) if known else None)
    if start and not known:  # it is trained first
        del asked[OF_START]
    if not folder.is_dir():
        others = "" if settings["restart"] else unfinished(checkpoints, asked)
        return There(False, others or f"{folder} is not there yet", GO_ON if others else "")
    damaged = "weights that are damaged or cut short" if damage(folder / WEIGHTS) else ""
    others = damaged or made_otherwise(read_run(folder), stage, asked)
    if not others:
        return There(True, f"{folder} is there, trained with these settings: nothing to do")
    if settings["restart"]:
        return There(False, f"{folder} is there, with {others}, and is replaced")
    remedy = "Give --restart true to replace it, or --outputs another folder."
    return There(False, f"{folder} is there, with {others}", remedy)


GO_ON = "Run it with what it had, so that it goes on, or give --restart true to throw it away and start afresh."


def unfinished(checkpoints: Path, asked: dict[str, Any]) -> str:
    """That a folder holds an unfinished run that `asked` is not, in words; "" if it does not."""
    others = differing(read_json(checkpoints / RUN), asked)
    there = others and any(map(is_sealed, checkpoints_in(checkpoints)))
    return f"{checkpoints} holds an unfinished run with {others}" if there else ""


def prepare_checkpoints(folder: Path, identity: dict[str, Any], restart: bool) -> None:
    """Make a checkpoints folder ready for a run; UserError where one of another identity is unfinished in it."""
    if others := unfinished(folder, identity):
        if not restart:
            raise UserError(others, GO_ON)
        for checkpoint in checkpoints_in(folder):
            shutil.rmtree(checkpoint)
    write_json(folder / RUN, identity)


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a folder, whole or not, the newest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=lambda path: -int(path.name.removeprefix("checkpoint-")))


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose files are all there as they were written; broken newer ones are removed."""
    for checkpoint in checkpoints_in(folder):
        if is_sealed(checkpoint):
            return checkpoint
        if RANK == 0:
            print(f"{checkpoint} is not whole and is removed", file=sys.stderr, flush=True)
            shutil.rmtree(checkpoint)
    return None


def settings_of(run: dict[str, Any]) -> dict[str, Any]:
    found = run.get("settings")
    return found if isinstance(found, dict) else {}


def trained_on(run: dict[str, Any]) -> str:
    """sha256 of the pairs file of a run; "" where it is not known."""
    data = run.get("data")
    return str(data.get("pairs_sha256", "")) if isinstance(data, dict) else ""


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
    contrary = {"sft": ["dpo"], "dpo": ["sft", "sft_more"]}.get(named, []) + (["sft_more"] if arm == "sft" else [])
    return f"{folder} is an adapter of {stage}, given as the arm {arm}" if stage in contrary else ""


def notes_of(run: dict[str, Any]) -> list[str]:
    """Mismatches and notes of an evaluation's run.json, each with its kind before it."""
    kinds = {"mismatch": run.get("mismatches"), "note": run.get("notes")}
    listed = [(kind, text) for kind, texts in kinds.items() if isinstance(texts, list) for text in texts]
    return [f"{kind}: {printable(str(text))}" for kind, text in listed]


class Lineage(NamedTuple):
    """Where a run comes from, for predictions.csv; empty or nan where it is not known."""

    reference: str = ""  # of DPO, the arm that it is referred to: sft or base
    beta: float = math.nan
    pairs_seen: float = math.nan  # in all of its training, its start's included


def lineage(folder: Path) -> Lineage:
    """Where the adapter in a folder comes from, by its run.json."""
    run, seen = read_run(folder), float(pairs_seen(folder) or math.nan)
    if run.get("stage") != "dpo":
        return Lineage(pairs_seen=seen)
    settings = settings_of(run)
    beta, loss = settings.get("beta"), settings.get("loss_type", "sigmoid")
    known = isinstance(beta, int | float) and loss in ("sigmoid", "sigmoid+sft")  # others define no probability
    return Lineage("sft" if run.get("initial_adapter") else "base", float(beta) if known else math.nan, seen)


def rows_in(steps: int, rows: int, batch: int) -> int:
    """Rows seen in so many steps of `batch` rows; the last step of a pass over the rows has what is left of them."""
    passes, rest = divmod(steps, math.ceil(rows / batch))
    return passes * rows + rest * batch


def pairs_seen(folder: Path) -> int:
    """Pairs seen by an adapter in all its training, with those of the adapter that it began with; 0 if unknown."""
    seen = read_run(folder).get("pairs_seen")
    return seen if isinstance(seen, int) else 0


def notes_on(adapters: Adapters, bits: int, pairs_sha256: str = "") -> list[str]:
    """What predictions cannot show: runs of an arm not alike, other bits or pairs, or DPO from another SFT."""
    notes, unlike, elsewhere = [], list[str](), list[str]()
    for arm, folders in adapters.items():
        runs = [read_run(folder) for folder in folders.values()]
        known = [run for run in runs if settings_of(run) and run.get("stage") in STAGES]
        kept = [trained_settings(run["stage"], settings_of(run)) for run in known]
        others = sorted({name for one in kept for name in one if one[name] != kept[0].get(name)} - {"seed"})
        if others:
            notes.append(f"the training runs of {arm} differ in {', '.join(others)}, not in their seed alone")
        trained = {found for run in runs if isinstance(found := settings_of(run).get("bits"), int)} - {bits}
        read_in = f"is read here on weights in {bits}"
        notes += [f"{arm} was trained on weights in {other} bits and {read_in}" for other in sorted(trained)]
        elsewhere += [arm] if pairs_sha256 and any(trained_on(run) not in ("", pairs_sha256) for run in runs) else []
        starts = {seed: run.get("initial_adapter_sha256") for seed, run in zip(folders, runs, strict=True)}
        sfts = adapters.get("sft", {}) if arm in ("sft_more", "dpo") and any(starts.values()) else {}
        sfts = {seed: read_run(sft).get("copy_of_sha256") or file_sha256(sft / WEIGHTS) for seed, sft in sfts.items()}
        only = next(iter(sfts.values())) if len(sfts) == 1 else None
        if sfts and any(start and start != sfts.get(seed, only) for seed, start in starts.items()):
            notes.append(f"{arm} began with another SFT adapter than the run of sft that it is compared with")
        if len(starts) > 1 and len({*starts.values()}) == 1 and all(starts.values()):
            notes.append(f"all runs of {arm} began with one SFT adapter: intervals leave out how runs of SFT differ")
    if elsewhere:
        learn = "baselines, and how often a film was watched, are from the training pairs of this one"
        notes.append(f"{', '.join(elsewhere)}: trained on another pairs file than the one given here; {learn}")
    more, dpo = (adapters.get(arm, {}) for arm in ("sft_more", "dpo"))
    for seed in more.keys() & dpo.keys():
        both = [(arm, settings_of(read_run(of[seed]))) for arm, of in (("sft_more", more), ("dpo", dpo))]
        one, other = (trained_settings(stage, had) if had else {} for stage, had in both)
        unlike += [name for name in one.keys() & other.keys() if one[name] != other[name]]
    if unlike:
        notes.append(f"the control sft_more was trained otherwise than dpo, in {', '.join(sorted({*unlike}))}")
    return notes


def evaluated_adapters(results: Path) -> dict[str, tuple[Path, bool]]:
    """Where each adapter of an evaluation lies, by the folder in its run.json, and whether it is what was evaluated.

    They may have moved together, or the folder is as seen from another working directory.
    """
    run, found = read_run(results), {}
    evaluated, outputs = run.get("adapters_sha256"), str(settings_of(run).get("outputs") or ".")
    for folder, sha256 in evaluated.items() if isinstance(evaluated, dict) else ():
        beside = results.parent / os.path.relpath(folder or ".", outputs)
        places = [path for path in (Path(folder), beside) if (path / WEIGHTS).is_file()]
        same = [path for path in places if file_sha256(path / WEIGHTS) == sha256]
        found[folder] = [*same, *places, Path(folder)][0], bool(same)
    return found


def changed_since(results: Path) -> list[str]:
    """Adapters of an evaluation that are gone, or are not what was evaluated, each in words."""
    others = "holds other weights than those that were evaluated"
    return [
        f"{printable(str(path))} {others if (path / WEIGHTS).is_file() else 'was evaluated and is gone'}"
        for path, same in evaluated_adapters(results).values()
        if not same
    ]


def learning_rate(run: dict[str, Any]) -> float | None:
    """The peak learning rate of a training run."""
    settings, stage = settings_of(run), run.get("stage")
    of_control = settings.get("control_learning_rate") if stage == "sft_more" else None
    return settings.get("learning_rate") if stage == "dpo" else of_control or settings.get("sft_learning_rate")


def training_runs(results: Path) -> dict[str, dict[str, Any]]:
    """run.json of training runs by name, by stage: of the adapters evaluated, or published beside the results."""
    files = {path.name.removesuffix(f".{RUN}"): path for path in results.glob(f"*.{RUN}")}
    files |= {path.parent.name: path for path in results.glob(f"adapters/*/{RUN}")}
    adapters = {} if files else read_run(results).get("adapters")  # published ones are not those in outputs
    moved = {folder: path for folder, (path, _) in evaluated_adapters(results).items()}
    for arm, seeds in adapters.items() if isinstance(adapters, dict) else ():
        seeds = seeds if isinstance(seeds, dict) else {}
        files |= {f"{arm} {seed}".strip(): moved.get(folder, Path(folder)) / RUN for seed, folder in seeds.items()}
    runs = {name: read_json(path) for name, path in sorted(files.items())}
    runs = {name: run for name, run in runs.items() if "stage" in run}  # an evaluation has none
    return dict(sorted(runs.items(), key=lambda run: (*STAGES, run[1]["stage"]).index(run[1]["stage"])))
