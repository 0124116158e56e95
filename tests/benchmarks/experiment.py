"""The study: a list of commands that anybody can type, run side by side on a GPU, and what they give.

    python tests/benchmarks/experiment.py search     # tune each arm, on training users held back for it
    python tests/benchmarks/experiment.py run        # the commands whose results docs/results lacks, then report
    python tests/benchmarks/experiment.py list       # print all commands
    python tests/benchmarks/experiment.py report     # measures, tables, figures and model cards from docs/results

What is scored is kept in docs/results (ids and margins, no titles), so a study that was cut off goes on on another
machine. `--only 4bit/3407` runs single jobs and what they need. Several jobs share a GPU (--slots), since a small
model leaves most of it idle. Start NVIDIA's MPS daemon first (`nvidia-cuda-mps-control -d`): else they take turns.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import product
from operator import itemgetter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import pandas as pd
from benchmarks import study_report
from benchmarks.study_report import ABLATIONS, MAIN

from data.files import file_sha256, read_json, write_json, write_text
from data.measures import compute_metrics
from data.pairs import load_pairs, split_pairs, write_pairs
from data.predictions import COLUMNS, KEY, read_predictions
from data.report import write_card
from data.runs import read_run, settings_of
from data.verdict import judge

RESULTS = ROOT / "docs" / "results"
WORK = "outputs/study"
PAIRS = "data/contrastive_rec_train.jsonl"
NEGATIVES = {  # of MovieLens-100K: build_pairs.py --source ml-100k [--negatives popularity --output ...]
    "random": "data/pairs_ml-100k.jsonl",
    "matched": "data/pairs_ml-100k_matched.jsonl",
}
MODEL = "--preset thesis --base_model SmolLM2-135M-Instruct-Q4_1"
BATCH = "--effective_batch 64 --batch_size 64 --gradient_checkpointing false"
TRAINING = f"{MODEL} {BATCH} --warmup_steps 10 --optim adamw_8bit"
SEEDS = range(3407, 3417)
EPOCHS = (4, 8)
RATES = {  # peak learning rates that the search tries, each with all EPOCHS; then it goes one step on
    "sft": ("5e-4", "1e-3", "2e-3", "4e-3"),
    "sft_more": ("5e-4", "1e-3", "2e-3", "4e-3"),
    "dpo": ("1e-4", "2e-4", "5e-4", "1e-3"),
}
SCHEDULE = {
    "sft": "--sft_learning_rate {rate} --sft_epochs {epochs}",
    "sft_more": "--control_learning_rate {rate} --epochs {epochs}",
    "dpo": "--learning_rate {rate} --epochs {epochs}",
}
SEARCHED = study_report.ACCURACIES  # the first decides
OF_DPO = {  # name: flags of a DPO that starts from the SFT of the main study, and how many runs it has
    "dpo_from_base": ("--init base", 5),
    "dpo_with_sft_loss": ("--loss_type sigmoid+sft", 5),
    "dpo_rate_3.2": ("", 5),
    **{f"beta_{beta}": (f"--beta {beta}", 3) for beta in ("0.05", "0.2", "0.5")},
    **{f"loss_{loss}": (f"--loss_type {loss}", 3) for loss in ("ipo", "apo_zero")},
}


@dataclass(frozen=True)
class Job:
    """A command, the jobs that come before it, and the studies whose rows it gives: none where it trains."""

    name: str
    line: str
    needs: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()


def adapter(study: str, seed: int, stage: str) -> str:
    return f"{WORK}/{study}/{seed}/smollm2_{stage}_{16 if study == '16bit' else 4}bit_final"


def train(study: str, seed: int, flags: str, start: str = "") -> Job:
    """A training; start: the study whose SFT it starts from, where it trains none of its own."""
    line = f"train_dpo.py {TRAINING} --seed {seed} --outputs {WORK}/{study}/{seed} {flags}"
    if not start:
        return Job(f"{study}/{seed}", line)
    return Job(f"{study}/{seed}", f"{line} --sft_adapter {adapter(start, seed, 'sft')}", (f"{start}/{seed}",))


def score(study: str, seed: int, arms: dict[str, tuple[str, str]], flags: str = "", gives: Sequence[str] = ()) -> Job:
    """An evaluation of arms {name: (study, stage)}; flags win over the defaults, which leave out what costs most."""
    name = f"{study}/{seed}/scores"
    given = " ".join(f"{arm}={adapter(of, seed, stage)}" for arm, (of, stage) in arms.items())
    line = f"evaluate_dpo.py {MODEL} --outputs {WORK}/{name} --strangers false --generate_users 0 {flags}".rstrip()
    needs = dict.fromkeys(f"{of}/{seed}" for of, _ in arms.values())
    return Job(name, f"{line} --adapters {given}", tuple(needs), tuple(gives or [study]))


def stages_of(study: str, *stages: str) -> dict[str, tuple[str, str]]:
    return {stage: (study, stage) for stage in stages}


def searching(name: str, trials: dict[str, list[tuple[str, int]]], best_sft: str = "") -> list[Job]:
    """A training for each trial (rate, epochs) of an arm, and their evaluation; all but SFT start from its best."""
    jobs, seed = [], SEEDS[0]
    on = f"--pairs {WORK}/search.jsonl"
    for stage, tried in trials.items():
        start = "" if stage == "sft" else f"--sft_adapter {adapter(f'search/{best_sft}', seed, 'sft')}"
        names = {f"{stage}_{rate}_{epochs}": SCHEDULE[stage].format(rate=rate, epochs=epochs) for rate, epochs in tried}
        for trial, schedule in names.items():
            jobs.append(train(f"search/{trial}", seed, f"{on} --stage {stage} {start} {schedule} --validation_pairs 0"))
        arms = {trial: (f"search/{trial}", stage) for trial in names}
        jobs.append(score(f"search/{stage}_{name}", seed, arms, on))
    return jobs


def further(best: dict) -> str:
    """The learning rate to try next: beyond the best where that is the lowest or highest, else to its better side."""
    as_long = [trial for trial in best["trials"] if trial["epochs"] == best["epochs"]]
    row = sorted(as_long, key=lambda trial: float(trial["rate"]))
    at, rate = [trial["name"] for trial in row].index(best["name"]), float(best["rate"])
    if at in (0, len(row) - 1):
        return f"{rate * (2 if at else 0.5):.2g}"
    return f"{(rate * float(max(row[at - 1], row[at + 1], key=itemgetter(*SEARCHED))['rate'])) ** 0.5:.2g}"


def study(tuned: dict[str, dict], training_pairs: int) -> list[Job]:
    """Every command of the study; tuned: the best trial of each arm; training_pairs: how many all are."""
    sft, dpo = (SCHEDULE[arm].format(**tuned[arm]) for arm in ("sft", "dpo"))
    control = f"--control_learning_rate {tuned['sft_more']['rate']}"  # it takes as many steps as DPO
    jobs = []
    for seed, bits in product(SEEDS, (4, 16)):
        jobs.append(train(f"{bits}bit", seed, f"{sft} {control} {dpo} --bits {bits}"))
        answers = 100 if (seed, bits) == (SEEDS[0], 4) else 0
        asked = f"--bits {bits} --strangers true --generate_users {answers}"
        jobs.append(score(f"{bits}bit", seed, stages_of(f"{bits}bit", "sft", "sft_more", "dpo"), asked))
    faster = dpo.replace(tuned["dpo"]["rate"], f"{3.2 * float(tuned['dpo']['rate']):g}")
    for seed in SEEDS[-max(runs for _, runs in OF_DPO.values()) :]:
        names = [name for name, (_, runs) in OF_DPO.items() if seed > SEEDS[-1] - runs]
        for name in names:
            schedule = faster if name == "dpo_rate_3.2" else dpo
            start = "" if name == "dpo_from_base" else "4bit"
            jobs.append(train(name, seed, f"--stage dpo {schedule} {OF_DPO[name][0]}", start))
        jobs.append(score("of_dpo", seed, {name: (name, "dpo") for name in names}, gives=names))

    changed = {f"rank_{rank}": f"--lora_rank {rank} --lora_alpha {rank}" for rank in (8, 64)}
    changed |= {f"order_{order}": f"--option_order {order}" for order in ("both", "original")}
    changed["sft_x2"] = f"--sft_epochs {2 * tuned['sft']['epochs']}"
    for count in (128, 1024):
        few = changed[f"pairs_{count}_passes"] = f"--max_pairs {count}"
        epochs = [f"{tuned[arm]['epochs'] * training_pairs / count:.4g}" for arm in ("sft", "dpo")]
        changed[f"pairs_{count}_steps"] = f"{few} --sft_epochs {epochs[0]} --epochs {epochs[1]}"
    changed |= {f"negatives_{kind}": f"--pairs {pairs} --validation_pairs 0" for kind, pairs in NEGATIVES.items()}
    read_again = {"read_in_16": "--second_bits 16"}
    read_again["transfer"] = f"--pairs {NEGATIVES['random']} --test_share 0.999 --allow_mismatch true"
    for seed in SEEDS[-3:]:
        for name, flags in changed.items():
            jobs.append(train(name, seed, f"{sft} {dpo} --control false {flags}"))
            tests = {name: ""}
            if name.startswith("negatives"):
                tests = {f"{name}_on_{on}": f"--pairs {pairs} --allow_mismatch true" for on, pairs in NEGATIVES.items()}
            jobs += [score(test, seed, stages_of(name, "sft", "dpo"), flags) for test, flags in tests.items()]
        main = stages_of("4bit", "sft", "sft_more", "dpo")
        jobs += [score(test, seed, main, flags) for test, flags in read_again.items()]
    return jobs


# ------------------------------------------------------------------------------------------------- running jobs


def wanted(jobs: list[Job], scored: set[str], work: Path, only: Sequence[str] = ()) -> list[Job]:
    """The evaluations whose rows are not known, each after the trainings that it needs and that are not there."""
    needed, found = set(), []
    for job in reversed(jobs):
        lacks = not set(rows_of(job)) <= scored and job.name.startswith(tuple(only or [""]))
        if (lacks or job.name in needed) and not (work / f"{job.name}.done").exists():
            needed.update(job.needs)
            found.append(job)
    return found[::-1]


def rows_of(job: Job) -> list[str]:
    """STUDY/SEED of each study that an evaluation gives rows of."""
    return [f"{study}/{job.name.split('/')[-2]}" for study in job.gives]


def run_all(jobs: list[Job], run: Callable[[Job], bool], slots: int) -> list[str]:
    """Run jobs side by side, each after those that it needs; returns what did not end well, or could not begin."""
    waiting, running, lacking = sorted(jobs, key=lambda job: not job.gives), {}, {job.name for job in jobs}
    with ThreadPoolExecutor(slots) as pool:
        while True:
            ready = [job for job in waiting if lacking.isdisjoint(job.needs)]  # first what is scored
            for job in ready[: slots - len(running)]:
                running[pool.submit(run, job)] = job.name
                waiting.remove(job)
            if not running:
                return [job.name for job in jobs if job.name in lacking]
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name = running.pop(future)
                if future.exception() is None and future.result():
                    lacking.remove(name)


def runner(options: argparse.Namespace) -> Callable[[Job], bool]:
    """A function that runs one job on a free GPU; no training begins after options.minutes."""
    free = [options.gpus[slot % len(options.gpus)] for slot in range(options.slots)]
    end = time.monotonic() + 60 * options.minutes

    def run(job: Job) -> bool:
        if not job.gives and time.monotonic() > end:
            return False
        mark, began, gpu = ROOT / WORK / f"{job.name}.done", time.monotonic(), free.pop(0)
        mark.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
        environment["UNSLOTH_COMPILE_LOCATION"] = str(mark.with_suffix(".compiled"))  # jobs would mix theirs
        for _ in range(2):  # jobs that share a card can take memory from each other
            with open(mark.with_suffix(".log"), "w") as log:
                line = [sys.executable, *shlex.split(job.line)]
                code = subprocess.run(line, stdout=log, stderr=log, env=environment, cwd=ROOT).returncode
            if not code:
                mark.touch()
                break
        free.append(gpu)
        print(f"{time.strftime('%H:%M:%S')} {job.name}: exit code {code}, {time.monotonic() - began:.0f} s", flush=True)
        return code == 0

    return run


# --------------------------------------------------------------------------------------------- what is published


def search(options: argparse.Namespace) -> list[str]:
    """Choose learning rate and epochs of each arm by ranking accuracy, on training users held back for it."""
    work = ROOT / WORK
    write_pairs(work / "search.jsonl", split_pairs(load_pairs(ROOT / PAIRS), 0.2)[0])
    found: dict[str, Any] = {}
    for stages, name in product((("sft",), ("dpo", "sft_more")), ("grid", "step")):
        trials = {stage: list(product(RATES[stage], EPOCHS)) for stage in stages}
        if name == "step":
            trials = {stage: [(further(found[stage]), found[stage]["epochs"])] for stage in stages}
        jobs = searching(name, trials, found.get("sft", {}).get("name", ""))
        if failed := run_all(wanted(jobs, set(), work), runner(options), options.slots):
            return failed
        for stage, tried in trials.items():
            measured = read_json(work / f"search/{stage}_{name}/{SEEDS[0]}/scores/evaluation/metrics.json")["arms"]
            known = found.get(stage, {}).get("trials", [])
            for rate, epochs in tried:
                trial = f"{stage}_{rate}_{epochs}"
                values = {measure: measured[trial][measure]["value"] for measure in SEARCHED}
                known.append({"name": trial, "rate": rate, "epochs": epochs, **values})
            allowed = [found["dpo"]["epochs"]] if stage == "sft_more" else EPOCHS  # the control: as many steps as DPO
            best = max((trial for trial in known if trial["epochs"] in allowed), key=itemgetter(*SEARCHED))
            found[stage] = best | {"trials": known}
    write_json(RESULTS / "search.json", found)
    return []


def collect(jobs: list[Job], work: Path, results: Path) -> None:
    """Add to the results what the jobs that have ended gave: rows of predictions, and what each run was."""
    runs = read_json(results / "runs.json")
    for job in jobs:
        folder = work / job.name
        for path in sorted(folder.glob("evaluation/run.json" if job.gives else "*_final/run.json")):
            run = read_json(path)
            seconds = run.get("wall_seconds") or sum(run["seconds"].values())
            about = {name: run.get(name) for name in ("git_commit", "device", "first_loss", "stage")}
            name = job.name if job.gives else f"{job.name}/{run['stage']}"
            runs[name] = {"line": job.line, "seconds": round(seconds, 1), **about}
            if job.name == f"4bit/{SEEDS[0]}":
                publish_adapter(path.parent, run, results)
        if job.gives and (path := folder / "evaluation" / "predictions.csv").exists():
            add_rows(path, job, results)
    if (answers := work / f"4bit/{SEEDS[0]}/scores/evaluation/generation.json").exists():
        write_json(results / "generation.json", read_json(answers))
    write_json(results / "runs.json", dict(sorted(runs.items())))


def add_rows(predictions: Path, job: Job, results: Path) -> None:
    """Put an evaluation's rows into the file of its study, in place of earlier rows of the same runs.

    Of the main study all columns are kept, of the others margins to 3 decimals.
    """
    study, key = job.gives[0], KEY
    if study in MAIN:
        rows = pd.read_csv(predictions, dtype=str, keep_default_na=False)
    else:
        rows, key = read_predictions(predictions).round(3), ["study", *KEY]
        rows = rows[(rows["history"] == "own") & (rows["arm"] != "base")]
        rows = rows[(rows["kind"] == "model") | ("negatives" in study)]
        several = {"study": rows["arm"], "arm": "dpo"} if len(job.gives) > 1 else {"study": study}
        rows = rows.assign(**several)[["study", *COLUMNS[1]]]
    path = results / MAIN.get(study, ABLATIONS)
    if path.exists():
        rows = pd.concat([rows, pd.read_csv(path, dtype=str, keep_default_na=False)])
    rows = rows.drop_duplicates(key).sort_values(key, kind="stable")
    rows.to_csv(path, index=False, lineterminator="\n", compression={"method": "gzip", "mtime": 0})


def scored_in(results: Path) -> set[str]:
    """STUDY/SEED of all rows that the results hold."""
    found: set[str] = set()
    for study, name in [*MAIN.items(), ("", ABLATIONS)]:
        if (results / name).exists():
            rows = pd.read_csv(results / name, dtype=str).dropna(subset="seed")  # baselines have none
            found |= {*(rows.get("study", study) + "/" + rows["seed"])}
    return found


def publish_adapter(folder: Path, run: dict[str, Any], results: Path) -> None:
    """An adapter of the main study's first run, in bfloat16: for anybody without a GPU; `write_cards` adds its card."""
    from safetensors.torch import load_file, save_file

    target, weights = results / "adapters" / run["stage"], folder / "adapter_model.safetensors"
    write_json(target / "run.json", run | {"copy_of_sha256": file_sha256(weights)})
    write_text(target / "adapter_config.json", (folder / "adapter_config.json").read_text(encoding="utf-8"))
    halved = {name: tensor.bfloat16() for name, tensor in load_file(weights).items()}
    save_file(halved, target / weights.name, metadata={"format": "pt"})


def write_cards(results: Path) -> None:
    """The model card of each published adapter, with the measures of its own run."""
    from config import EvaluationSettings, base_facts, preset_settings  # they need PyTorch

    rows, answers = read_predictions(results / MAIN["4bit"]), read_json(results / "generation.json")
    count = len({*rows["seed"]} - {""})
    for folder in sorted((results / "adapters").glob("*")):
        run = settings_of(read_run(folder))
        settings = preset_settings(EvaluationSettings, run["preset"], base_model=run["base_model"], bits=run["bits"])
        metrics = judge(compute_metrics(rows[rows["seed"].isin(["", str(run["seed"])])]))
        others = f"{folder} is one of {count} training runs; README.md in the project's folder of results has all"
        print(write_card(folder, base_facts(settings), folder.name, metrics, [others], answers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["search", "run", "list", "report"])
    parser.add_argument("--only", nargs="+", metavar="JOB", help="jobs whose names begin so, with what they need")
    parser.add_argument("--slots", type=int, default=8, help="jobs at a time")
    parser.add_argument("--gpus", nargs="+", default=["0"])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no training begins later")
    options = parser.parse_args()
    failed = search(options) if options.part == "search" else []
    if options.part in ("run", "list"):
        training = split_pairs(load_pairs(ROOT / PAIRS), 0.2)[0]
        jobs = study(read_json(RESULTS / "search.json"), len(training) - 64)
        if options.part == "list":
            print("\n".join(f"python {job.line}" for job in jobs))
            return
        failed = run_all(wanted(jobs, scored_in(RESULTS), ROOT / WORK, options.only), runner(options), options.slots)
        collect(jobs, ROOT / WORK, RESULTS)
    if options.part in ("run", "report"):
        study_report.report(RESULTS)
        write_cards(RESULTS)
    if failed:
        sys.exit(f"did not end well, or did not begin for want of time: {', '.join(failed)}")


if __name__ == "__main__":
    main()
