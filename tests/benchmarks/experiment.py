"""The study that this project exists for: a search, the comparison with several seeds, and the ablations.

    python tests/benchmarks/experiment.py search    --pairs data/contrastive_rec_train.jsonl --work outputs/study
    python tests/benchmarks/experiment.py main      --pairs ... --work ...     # with what the search found
    python tests/benchmarks/experiment.py ablations --pairs ... --work ... --small_pairs RANDOM MATCHED
    python tests/benchmarks/experiment.py all       --pairs ... --work ... --small_pairs RANDOM MATCHED   # these three
    python tests/benchmarks/experiment.py collect   --work ...                 # into docs/results, and reports
    python tests/benchmarks/experiment.py report                               # measures and figures from docs/results

The search sees the training users alone: their pairs are a file of their own, split again by the same hash. Every
run is a call of train_dpo.py or evaluate_dpo.py, written into WORK/commands.sh; what is finished is not run again, and
trials of a search.json that lies in WORK, such as docs/results/search.json, count as finished.
Several runs share a GPU (--slots), since a small model leaves most of it idle; NVIDIA's MPS daemon, where it runs, lets
them compute at the same time and not in turns.
"""

import argparse
import heapq
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import pandas as pd  # noqa: E402

import config  # noqa: E402
from data.figures import STYLE, plot_all  # noqa: E402
from data.files import write_json, write_text  # noqa: E402
from data.measures import MEASURES, Measured, compute_metrics, half_width, mean_of, wins  # noqa: E402
from data.pairs import load_pairs, split_pairs, write_pairs  # noqa: E402
from data.predictions import NUMBERS, completed, read_predictions  # noqa: E402
from data.report import cell, summary, table  # noqa: E402
from data.verdict import interval_text, judge  # noqa: E402

SEEDS = (3407, 3408, 3409, 3410, 3411)
GRID = {  # arm: (learning rate, epochs) of each trial; four epochs a stage at most, and as many as both stages for sft_long
    "sft": [*itertools.product(("5e-4", "1e-3", "2e-3"), (1, 2)), *itertools.product(("1e-3", "2e-3", "4e-3"), (4,))],
    "sft_long": [*itertools.product(("1e-3", "2e-3"), (8,))],
    "dpo_base": [*itertools.product(("1e-4", "2e-4", "5e-4"), (1, 2)), *itertools.product(("2e-4", "5e-4"), (4,))],
    "dpo": [*itertools.product(("1e-4", "2e-4", "5e-4"), (2, 4))],
}
STEPS_AN_EPOCH = 75  # 4,768 training pairs in batches of 64
MODEL = f"{config.SMALL_MODEL} in 4 bits"
ARMS = ("sft", "sft_long", "dpo_base", "dpo")
NO_ANSWERS = "--generate_users 0"


@dataclass
class Run:
    """One adapter: its name, what train_dpo.py is told, the run whose SFT adapter DPO starts from, and its pairs."""

    name: str
    stage: str
    flags: str
    after: str | None = None
    pairs: str | None = None
    priority: int = 0  # the smallest goes first


class Slots:
    """What runs at the same time, on which GPU; the waiting job of the smallest priority goes first."""

    def __init__(self, gpus: list[str]):
        self.free, self.waiting, self.ticket, self.changed = list(gpus), [], itertools.count(), threading.Condition()

    @contextmanager
    def take(self, priority: int):
        me = (priority, next(self.ticket))
        with self.changed:
            heapq.heappush(self.waiting, me)
            self.changed.wait_for(lambda: self.free and self.waiting[0] == me)
            heapq.heappop(self.waiting)
            gpu = self.free.pop(0)
            self.changed.notify_all()
        try:
            yield gpu
        finally:
            with self.changed:
                self.free.append(gpu)
                self.changed.notify_all()


class Study:
    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.work = Path(options.work).absolute()
        self.work.mkdir(parents=True, exist_ok=True)
        self.failed: list[str] = []
        self.end = time.monotonic() + 60 * options.minutes
        self.chosen = {arm: Future() for arm in GRID}  # what the search finds
        self.coming: dict[str, threading.Event] = {}  # runs of this call, set when they have ended
        self.training, self.scoring = (
            Slots([options.gpus[slot % len(options.gpus)] for slot in range(count)]) for count in (options.slots, options.evaluations)
        )

    def adapter(self, name: str) -> Path:
        """The folder of a run's adapter; a run trains one stage, so it has one."""
        found = list((self.work / name).glob("*_final"))
        return found[0] if found else self.work / name / "none"

    def command(self, script: str, flags: str, log: str, slots: Slots, priority: int = 0) -> bool:
        """Run one script in a free slot; True if it ended well."""
        line = [sys.executable, str(ROOT / script), *shlex.split(flags)]
        output = self.work / f"{log}.log"
        output.parent.mkdir(parents=True, exist_ok=True)
        with slots.take(priority) as gpu, open(output, "w") as to:
            began, code = time.monotonic(), 0
            if slots is self.training and began > self.end:
                self.failed.append(f"{log}, for which no time was left")
                return False
            environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
            environment["CUDA_MPS_CLIENT_PRIORITY"] = str(int(priority > 2))  # 0: what others wait for, and what lasts longest
            environment["UNSLOTH_COMPILE_LOCATION"] = str(self.work / "compiled" / log)  # runs side by side would mix theirs
            for _ in range(0 if self.options.dry_run else 2):  # runs that share a card can take memory from each other
                code = subprocess.run(line, check=False, stdout=to, stderr=to, env=environment, cwd=ROOT).returncode
                if not code:
                    break
        if code:
            self.failed.append(log)
        else:
            name = "dry_run.sh" if self.options.dry_run else "commands.sh"
            with open(self.work / name, "a") as commands:
                commands.write(f"python {script} {flags}\n")
        print(f"{time.strftime('%H:%M:%S')} {log}: exit code {code}, {time.monotonic() - began:.0f} s", flush=True)
        return code == 0

    def train(self, runs: list[Run]) -> None:
        def one(run: Run) -> None:
            if run.after in self.coming:
                self.coming[run.after].wait()
            if run.after and not self.adapter(run.after).is_dir() and not self.options.dry_run:
                self.failed.append(f"{run.name}, which needs {run.after}")
                return
            batch = getattr(self.options, f"{run.stage}_batch")
            flags = f"{self.options.model} {self.options.training} --batch_size {batch} --pairs {run.pairs or self.options.pairs} --outputs {self.work / run.name}"
            start = (
                f" --init sft --sft_adapter {self.adapter(run.after)}"
                if run.after
                else " --init base"
                if run.stage == "dpo"
                else ""
            )
            flags = f"{flags} --stage {run.stage}{start} {run.flags}"
            told = self.work / run.name / "flags.txt"
            if self.adapter(run.name).is_dir() and told.is_file():
                if told.read_text() == flags:
                    return
                sys.exit(f"{run.name} was trained with other flags; remove {self.work / run.name} to train it anew")
            if self.command("train_dpo.py", flags, run.name, self.training, run.priority) and not self.options.dry_run:
                told.write_text(flags)

        self.side_by_side(one, runs)

    def train_in_turn(self, runs: list[Run]) -> None:
        """One after the other; what waits for one of them goes on when it has ended, well or not."""
        try:
            for run in runs:
                self.train([run])
                self.coming[run.name].set()
        finally:
            for run in runs:
                self.coming[run.name].set()

    def announce(self, names) -> None:
        for name in names:
            self.coming.setdefault(name, threading.Event())

    def evaluate(self, name: str, arms: dict[str, str], flags: str = "", pairs: str | None = None) -> bool:
        """Score arms, {arm: run}, into WORK/name/evaluation, once they are there; those whose training failed are left out."""
        for run in arms.values():
            if run in self.coming:
                self.coming[run].wait()
        before = self.work / name / "evaluation" / "run.json"
        if before.exists() and json.loads(before.read_text())["adapters"].keys() == arms.keys():
            return True
        there = {arm: self.adapter(run) for arm, run in arms.items() if self.adapter(run).is_dir() or self.options.dry_run}
        if not there:
            self.failed.append(f"{name}, none of whose arms is there")
            return False
        adapters = " ".join(f"'{arm}={folder}'" for arm, folder in there.items())
        where = f"--pairs {pairs or self.options.pairs} --outputs {self.work / name}"
        return self.command("evaluate_dpo.py", f"{self.options.model} {where} {flags} --adapters {adapters}", name, self.scoring)

    def evaluate_as_they_come(self, arms: dict[str, str], flags: str) -> None:
        """Score arms, {arm: run}, three to six a call (each scores the base model once), so that none waits for the slowest."""
        waiting, lock = dict(arms), threading.Lock()
        for path in (self.work / "ablations").glob("eval_*/evaluation/run.json"):
            for arm in json.loads(path.read_text())["adapters"]:
                waiting.pop(arm, None)

        def take() -> dict[str, str]:
            with lock:
                ended = [arm for arm, run in waiting.items() if run not in self.coming or self.coming[run].is_set()]
                if len(ended) < min(3, len(waiting)):
                    return {}
                found = {arm: waiting.pop(arm) for arm in ended[:6]}
            return {arm: run for arm, run in found.items() if self.adapter(run).is_dir() or self.options.dry_run}

        def score(_) -> None:
            while waiting:
                if part := take():
                    self.evaluate(f"ablations/eval_{next(iter(part))}_first", part, flags)
                else:
                    time.sleep(0.2)

        self.side_by_side(score, range(self.options.evaluations))

    def side_by_side(self, function, jobs) -> None:
        with ThreadPoolExecutor(len(jobs) or 1) as pool:
            list(pool.map(function, jobs))

    # ------------------------------------------------------------------------------------------------ search

    def search(self) -> None:
        """Learning rate and epochs of each arm, by ranking accuracy (ties by order-free) on training users held back.

        Trials that search.json has are not repeated, unless DPO started from an SFT that is no longer the best.
        """
        pairs = str(self.work / "search.jsonl")
        write_pairs(pairs, split_pairs(load_pairs(self.options.pairs), 0.2)[0])
        path = self.work / "search.json"
        before = json.loads(path.read_text()) if path.exists() else {}

        def choose(arm: str) -> None:
            stage, after = arm.partition("_")[0], self.chosen["sft"].result()["run"] if arm == "dpo" else None
            earlier = before.get(arm, {"trials": []})
            known = [trial for trial in earlier["trials"] if trial.get("after") == after]
            there = {(trial["rate"], trial["epochs"]) for trial in known}
            runs = [
                Run(f"search/{arm}_{rate}_{epochs}", stage, f"{self.schedule(stage, rate, epochs)} --validation_pairs 0", after, pairs)
                for rate, epochs in GRID[arm]
                if (rate, epochs) not in there
            ]
            for run in runs:
                run.priority = arm == "dpo_base"  # the others wait for SFT
            found = {trial["run"] for trial in before.get("sft", {"trials": []})["trials"]}
            if runs and after in found and not self.adapter(after).is_dir():  # by an earlier search, whose adapters are gone
                schedule = self.schedule_of("sft")
                self.train([Run(after, "sft", f"{schedule} --validation_pairs 0", None, pairs)])
            self.train(runs)
            if runs:
                self.evaluate(f"search/eval_{arm}", {run.name[7:]: run.name for run in runs}, f"--strangers false {NO_ANSWERS}", pairs)
            superseded = [trial for trial in earlier["trials"] + earlier.get("superseded", []) if trial not in known]
            self.chosen[arm].set_result(self.best(arm, known, after) | ({"superseded": superseded} if superseded else {}))
            print(arm, self.chosen[arm].result(), flush=True)

        def choose_or_end(arm: str) -> None:
            try:
                choose(arm)
            finally:
                self.chosen[arm].cancel()  # where no choice was made, what waits for it ends too

        self.side_by_side(choose_or_end, list(GRID))
        name = "dry_run.json" if self.options.dry_run else "search.json"
        write_json(self.work / name, {arm: self.chosen[arm].result() for arm in GRID})

    def take_search(self) -> None:
        """What an earlier search found."""
        dry = self.work / "dry_run.json"
        path = dry if self.options.dry_run and dry.exists() else self.work / "search.json"
        for arm, found in json.loads(path.read_text()).items():
            self.chosen[arm].set_result(found)

    def schedule_of(self, arm: str) -> str:
        """Learning rate and epochs of an arm, once the search has chosen them."""
        found = self.chosen[arm].result()
        return self.schedule(arm.partition("_")[0], found["rate"], found["epochs"])

    def schedule(self, stage: str, rate: str, epochs: float) -> str:
        prefix = "sft_" if stage == "sft" else ""
        return f"--{prefix}learning_rate {rate} --{prefix}epochs {epochs}"

    def best(self, arm: str, known: list[dict], after: str | None) -> dict:
        """The best trial of an arm, with all of them: those known before, and those scored now."""
        found = list(known)
        path = self.work / f"search/eval_{arm}/evaluation/metrics.json"
        measured = json.loads(path.read_text())["arms"] if path.exists() else {}
        for name, measures in measured.items():
            if name.startswith(f"{arm}_"):
                rate, epochs = name.removeprefix(f"{arm}_").split("_")
                values = {key: measures[key]["value"] for key in ("ranking_accuracy", "order_free_accuracy", "response_accuracy")}
                found.append({"run": f"search/{name}", "rate": rate, "epochs": int(epochs), **values, **({"after": after} if after else {})})
        if self.options.dry_run:
            rate, epochs = GRID[arm][1 % len(GRID[arm])]
            found = [{"run": f"search/{arm}_{rate}_{epochs}", "rate": rate, "epochs": epochs, "ranking_accuracy": 0}]
        elif missing := set(GRID[arm]) - {(trial["rate"], trial["epochs"]) for trial in found}:
            sys.exit(f"search: of {arm} the trials {missing} did not come through: {self.failed}")
        found.sort(key=lambda trial: (-trial["ranking_accuracy"], -trial.get("order_free_accuracy", 0)))
        return found[0] | {"trials": found}

    # ------------------------------------------------------------------------------------------ main comparison

    def main(self) -> None:
        self.take_search()
        self.compare()

    def all(self) -> None:
        """The search, and whatever can start as soon as it has chosen."""
        self.side_by_side(lambda part: part(), [self.search, self.compare, self.change_one_thing])

    def compare(self) -> None:
        """Each seed's arms, then their scores, with strangers' histories too."""
        seeds = SEEDS[: self.options.seeds]
        self.announce(f"main/{arm}_{seed}" for arm in ARMS for seed in seeds)

        def train(job: tuple[int, str]) -> None:
            seed, arm = job
            after = f"main/sft_{seed}" if arm == "dpo" else None
            try:
                flags = f"{self.schedule_of(arm)} --seed {seed}"
                self.train([Run(f"main/{arm}_{seed}", arm.partition("_")[0], flags, after, None, 2 + SEEDS.index(seed))])
            finally:
                self.coming[f"main/{arm}_{seed}"].set()

        def score(seed: int) -> None:
            self.evaluate(f"main/eval_{seed}", {arm: f"main/{arm}_{seed}" for arm in ARMS}, f"--strangers true {NO_ANSWERS}")

        jobs = [(train, (seed, arm)) for seed in seeds for arm in ARMS] + [(score, seed) for seed in seeds]
        self.side_by_side(lambda job: job[0](job[1]), jobs)

    # ---------------------------------------------------------------------------------------------- ablations

    def ablations(self) -> None:
        self.take_search()
        self.change_one_thing()

    def change_one_thing(self) -> None:
        """Ablations: each changes one thing of the first seed, SFT and DPO both where it concerns both; `sft_x...` the learning
        rate of SFT and then its epochs.

        The first seed is trained again here (`same`), so that the ablations need no run of the main comparison and all of
        them stand on one machine; its adapters also generate answers and are read on 16-bit weights, which costs most.
        """
        chosen = {arm: self.chosen[arm].result() for arm in ("sft", "sft_long", "dpo")}
        sft, dpo = (self.schedule_of(stage) for stage in ("sft", "dpo"))
        steps = {stage: STEPS_AN_EPOCH * chosen[stage]["epochs"] for stage in ("sft", "dpo")}

        def both(name: str, flags: str = "", pairs: str | None = None, schedule: str = sft) -> list[Run]:
            return [
                Run(f"ablations/sft_{name}", "sft", f"{schedule} {flags}".strip(), None, pairs),
                Run(f"ablations/dpo_{name}", "dpo", f"{dpo} {flags}".strip(), f"ablations/sft_{name}", pairs),
            ]

        def dpo_only(name: str, flags: str, schedule: str = dpo) -> list[Run]:
            return [Run(f"ablations/dpo_{name}", "dpo", f"{schedule} {flags}".strip(), "ablations/sft_same")]

        def at_rate(stage: str, times: float) -> list[Run]:
            schedule = self.schedule(stage, f"{float(chosen[stage]['rate']) * times:.2g}", chosen[stage]["epochs"])
            if stage == "dpo":
                return dpo_only(f"rate_x{times}", "", schedule)
            return [Run(f"ablations/sft_rate_x{times}_sft", "sft", schedule)]

        def after_sft(times: int) -> list[Run]:
            """DPO from an SFT of that many times the epochs, at the learning rate that the search found for longer SFT."""
            return both(f"sft_x{times}", schedule=self.schedule("sft", chosen["sft_long"]["rate"], times * chosen["sft"]["epochs"]))

        def as_long(count: float) -> str:
            """As many steps as with all pairs, but each pair at most 20 times."""
            epochs = {stage: min(20, steps[stage] * 64 / count) for stage in ("sft", "dpo")}
            return f"--sft_epochs {epochs['sft']:.4g} --epochs {epochs['dpo']:.4g}"

        def from_base(name: str, flags: str = "") -> list[Run]:
            return [Run(f"ablations/dpo_{name}", "dpo", f"{self.schedule_of('dpo_base')} {flags}".strip())]

        studies = {
            "8bit": both("8bit", "--bits 8 --backend hf"),  # Unsloth's DPO in 8 bits was not tried
            "same": both("same"),
            **{f"sft_x{times}": after_sft(times) for times in (3, 2, 1)},
            "original_order": both("original_order", "--option_order original"),
            **{f"{count}_pairs": both(f"{count}_pairs", f"--max_pairs {count} {as_long(count)}") for count in (128, 1024)},
            "16bit": both("16bit", "--bits 16"),
            **{f"beta_{beta}": dpo_only(f"beta_{beta}", f"--beta {beta}") for beta in ("0.05", "0.2", "0.5")},
            **{f"rate_x{times}": at_rate("dpo", times) for times in (0.32, 3.2)},
            **{f"rate_x{times}_sft": at_rate("sft", times) for times in (0.32, 3.2)},
            **{f"rank_{rank}": both(f"rank_{rank}", f"--lora_rank {rank} --lora_alpha {rank}") for rank in (8, 64)},
            **{loss: dpo_only(loss, f"--loss_type {loss}") for loss in ("ipo", "apo_zero")},
            "both_orders": both(
                "both_orders",
                f"--option_order both --sft_epochs {chosen['sft']['epochs'] / 2:g} --epochs {chosen['dpo']['epochs'] / 2:g}",
            ),
            "hf": both("hf", "--backend hf"),
            "from_base": from_base("from_base"),
            "from_base_hf": from_base("from_base_hf", "--backend hf"),
        }
        of_small_pairs = {}
        for kind, pairs in zip(("random", "matched"), self.options.small_pairs, strict=False):
            flags = f"--validation_pairs 0 {as_long(0.8 * len(load_pairs(pairs)))}"
            of_small_pairs[f"negatives_{kind}"] = both(f"negatives_{kind}", flags, pairs)
        everything = studies | of_small_pairs
        if unknown := set(self.options.studies) - everything.keys():
            sys.exit(f"--studies: there is no {', '.join(sorted(unknown))}; there are {', '.join(everything)}")
        everything = {name: everything[name] for name in everything if not self.options.studies or name in self.options.studies}
        for place, (name, runs) in enumerate(everything.items()):
            self.announce(run.name for run in runs)
            for run in runs:  # a study's DPO before the next one's SFT, and what takes longest early
                run.priority = 2 if name in ("8bit", "same") else 2 + len(SEEDS) + place
                run.flags += " --eval_steps 100000"  # held-out loss at the end alone: the curves are the comparison's

        def arms_of(*names: str) -> dict[str, str]:
            return {run.name.removeprefix("ablations/"): run.name for name in names for run in everything[name]}

        without = f"--strangers false {NO_ANSWERS}"
        again = {"sft": "ablations/sft_same", "dpo": "ablations/dpo_same", "sft_long": "ablations/sft_sft_x2"}
        scores = {"same": (again, "--strangers false --second_bits 16 --generate_users 100")}
        scores |= {f"{bits}bit": (arms_of(f"{bits}bit"), f"{without} --bits {bits}") for bits in (8, 16) if f"{bits}bit" in everything}
        for name in of_small_pairs.keys() & everything.keys():
            scores[name] = arms_of(name), f"--strangers true {NO_ANSWERS}", everything[name][0].pairs
        scores = {name: what for name, what in scores.items() if name in everything}
        others = arms_of(*(name for name in studies if name in everything and name not in scores))
        jobs = [(self.train_in_turn, (runs,)) for runs in everything.values()]
        jobs += [(self.evaluate, (f"ablations/eval_{name}", *what)) for name, what in scores.items()]
        jobs.append((self.evaluate_as_they_come, (others, without)))
        self.side_by_side(lambda job: job[0](*job[1]), jobs)


# ------------------------------------------------------------------------------------ what comes out, in docs/results

PANELS = {  # title: [(label, study of the ablations; "same" changes nothing)]
    "epochs of SFT, at the rate of sft_long": [("x 1", "sft_x1"), ("x 2", "sft_x2"), ("x 3", "sft_x3")],
    "beta": [("0.05", "beta_0.05"), ("0.1", "same"), ("0.2", "beta_0.2"), ("0.5", "beta_0.5")],
    "learning rate of DPO": [("x 0.32", "rate_x0.32"), ("x 1", "same"), ("x 3.2", "rate_x3.2")],
    "learning rate of SFT": [("x 0.32", "rate_x0.32_sft"), ("x 1", "same"), ("x 3.2", "rate_x3.2_sft")],
    "bits, trained and read": [("4", "same"), ("8", "8bit"), ("16", "16bit")],
    "training pairs": [("128", "128_pairs"), ("1,024", "1024_pairs"), ("4,768", "same")],
    "LoRA rank": [("8", "rank_8"), ("16", "same"), ("64", "rank_64")],
    "loss": [("sigmoid", "same"), ("ipo", "ipo"), ("apo_zero", "apo_zero")],
    "option order in training": [("balanced", "same"), ("both", "both_orders"), ("as in the file", "original_order")],
    "backend": [("unsloth", "same"), ("hf", "hf")],
    "backend, DPO from the base": [("unsloth", "from_base"), ("hf", "from_base_hf")],
    "negatives, MovieLens-100K": [("random", "negatives_random"), ("by popularity", "negatives_matched")],
}
AS_LONG = {  # DPO of the one and SFT of the other have as many epochs in all
    **dict.fromkeys(("sft_x1", "same", "rate_x0.32", "rate_x3.2", "beta_0.05", "beta_0.2", "beta_0.5", "ipo", "apo_zero"), "sft_x2"),
    "sft_x2": "sft_x3",
    "rank_64": "sft_x2",  # whose rank is 16
}
SHOWN = ("accuracy", "margins", "seeds")  # of evaluate_dpo.py's figures


def collect(work: Path, results: Path, arms: list[str]) -> None:
    """Copy what the runs wrote: predictions (ids and margins alone), run.json of each run, the search, the commands.

    Where a part, or a study of the ablations, was not run in this work folder, what was published of it stays.
    """
    parts = [
        pd.read_csv(path, dtype=str, keep_default_na=False) for path in sorted(work.glob("main/eval_*/evaluation/predictions.csv"))
    ]
    for part in parts:
        if not set(arms) <= set(part["arm"]):
            sys.exit(f"collect: a seed lacks {set(arms) - set(part['arm'])}")
    key = ["arm", "seed", "pair_id", "order", "history"]
    if parts:
        write_predictions(pd.concat(parts).drop_duplicates(key), results / "predictions.csv.gz")
    parts = []
    for path in sorted(work.glob("ablations/eval_*/evaluation/predictions.csv")):
        rows = pd.read_csv(path, dtype=str, keep_default_na=False)
        name = path.parent.parent.name.removeprefix("eval_")
        if name != "same" and "negatives" not in name:  # several studies in one call, whose base and baselines are those of `same`
            rows = rows[(rows["kind"] == "model") & (rows["arm"] != "base")]
            parts.append(rows.assign(study=rows["arm"].str.partition("_")[2]))
        else:
            parts.append(rows.assign(study=name))
    kept: set[str] = set()
    if parts:
        found = pd.concat(parts).drop_duplicates(["study", *key])
        if (results / "ablations.csv.gz").exists():
            earlier = pd.read_csv(results / "ablations.csv.gz", dtype=str, keep_default_na=False)
            earlier = earlier[~earlier["study"].isin(found["study"])]
            found, kept = pd.concat([found, earlier]), set(earlier["arm"].mask(earlier["study"] == "same", earlier["arm"] + "_same"))
        write_predictions(found, results / "ablations.csv.gz")
    answers = work / "ablations/eval_same/evaluation/generation.json"
    if answers.exists():
        write_text(results / "generation.json", without_machine(answers.read_text()))
    (results / "runs").mkdir(exist_ok=True)
    written = [*sorted(work.glob("*/*/*_final/run.json")), *sorted(work.glob("*/*/evaluation/run.json"))]
    if any(path.parts[-4] == "main" for path in written):  # the comparison is published as a whole
        for old in (results / "runs").glob("main_*.run.json"):
            old.unlink()
    scored = {arm for path in work.glob("ablations/eval_*/evaluation/run.json") for arm in json.loads(path.read_text())["adapters"]}
    for old in (results / "runs").glob("ablations_eval_*.run.json"):
        if json.loads(old.read_text())["adapters"].keys() <= scored:
            old.unlink()
    for path in written:
        run = json.loads(without_machine(path.read_text()))
        part, name = path.parts[-4:-2]
        if part == "ablations" and name in kept:  # trained again and not scored: what is published is of the earlier run
            continue
        if name.rpartition("_")[2] != str(SEEDS[0]):
            run["log_history"] = []  # of the other runs, what they cost is enough
        write_json(results / "runs" / f"{part}_{name}.run.json", run)
    write_json(results / "search.json", json.loads((work / "search.json").read_text()))
    earlier = results / "commands.sh"  # a study may be run in parts, on several machines
    lines = (earlier.read_text() if earlier.exists() else "").splitlines()
    lines += without_machine((work / "commands.sh").read_text()).splitlines()
    published = {}  # by run, the last command of it
    for line in lines:
        if named := re.search(r"--outputs outputs/study/(\w+)/(\S+)", line):
            run = f"{named[1]}_{named[2]}.run.json"
            if (results / "runs" / run).exists():
                published[run] = line
    write_text(earlier, "\n".join(published.values()) + "\n")


def without_machine(text: str) -> str:
    """A text whose paths begin at the project's folder."""
    return re.sub(r"""[^"'\s=]*/outputs/study/""", "outputs/study/", text)


def write_predictions(rows: pd.DataFrame, path: Path) -> None:
    rows.to_csv(path, index=False, lineterminator="\n", compression={"method": "gzip", "mtime": 0})


def report(results: Path) -> None:
    """metrics.json, ablations.json and the figures, from the predictions that lie in docs/results."""
    metrics = published_metrics(results)
    write_json(results / "metrics.json", metrics)
    predictions = read_predictions(results / "predictions.csv.gz")
    with tempfile.TemporaryDirectory() as work:
        plot_all(predictions, metrics, Path(work) / "figures")
        for name in SHOWN:
            if (Path(work) / "figures" / f"{name}.png").exists():
                shutil.copy(Path(work) / "figures" / f"{name}.png", results / f"{name}.png")
    found = ablations_of(results)
    write_json(results / "ablations.json", found)
    draw_ablations(found, results / "ablations.png")
    draw_shortcut(found["usual protocol"], results / "shortcut.png")
    page = results / "README.md"
    if page.exists():
        write_text(page, filled(page.read_text(encoding="utf-8"), results))


def filled(page: str, results: Path) -> str:
    """A page with each table between `<!-- study: NAME -->` and `<!-- end -->` as the files of the results have it."""
    made = tables(results)
    return re.sub(
        r"(<!-- study: (\w+) -->\n).*?(<!-- end -->)",
        lambda found: found[1] + made[found[2]] + "\n" + found[3],
        page,
        flags=re.DOTALL,
    )


def tables(results: Path) -> dict[str, str]:
    """The tables of docs/results/README.md, by name."""
    metrics, found, search = (json.loads((results / f"{name}.json").read_text()) for name in ("metrics", "ablations", "search"))
    trials = [(arm, trial) for arm, best in search.items() for trial in best["trials"] + best.get("superseded", [])]
    shown = ("ranking_accuracy", "order_free_accuracy", "response_accuracy")
    tried = [[arm, trial.get("after", "base").removeprefix("search/"), trial["rate"], trial["epochs"], *(f"{trial[name]:.1f}" for name in shown)] for arm, trial in trials]
    usual = [[arm, *(f"{value:.1f}" for value in values.values())] for arm, values in found["usual protocol"].items()]
    ablated, beneath = [], []
    for title, points in panels_of(found).items():
        for label, study in points:
            arms = found[study]["arms"]
            differences = [found[study].get(name) for name in ("sft - same", "dpo - same", "dpo - sft")]
            order_free = [difference and difference["order_free_accuracy"] for difference in differences]
            for rows, names, about in (
                (ablated, ("ranking_accuracy", "response_accuracy"), differences),
                (beneath, ("order_free_accuracy", "position_bias"), order_free),
            ):
                wanted = [(name, arm) for name in names for arm in ("sft", "dpo")]
                cells = [cell(arms[arm][name], MEASURES[name][1]) if arm in arms else "" for name, arm in wanted]
                rows.append([title, label, *cells, *(interval_text(value) if value else "" for value in about)])
    longer = []
    for study in AS_LONG:
        if difference := found.get(study, {}).get("dpo - longer sft"):
            cells = [cell(found[name]["arms"][arm]["ranking_accuracy"], "%") for name, arm in ((study, "dpo"), (AS_LONG[study], "sft"))]
            also = [interval_text(part) for part in (difference, difference["order_free_accuracy"])]
            labels = [f"{title}: {label}" for title, points in PANELS.items() for label, of in points if of == study]
            longer.append(["nothing" if study == "same" else labels[0], *cells, *also])
    same = found["same"]["arms"]
    precise = [
        [
            *(arm, cell(same[arm]["ranking_accuracy"], "%")),
            *(cell(same[f"{arm}@16bit"][name], "%") for name in ("ranking_accuracy", "order_free_accuracy", "position_bias")),
            cell(same[f"{arm}@16bit"]["precision_consistency"], "%"),
        ]
        for arm in same
        if f"{arm}@16bit" in same
    ]
    generation = results / "generation.json"
    answers = json.loads(generation.read_text()) if generation.exists() else {}
    shares = ("parsed", "right", "repeat_consistency", "cites_own_genre", "cites_foreign_genre")
    written = [[arm, values["answers"], *(f"{100 * values[name]:.1f}" for name in shares)] for arm, values in answers.items()]
    seconds: dict[tuple[str, str], list[float]] = {}
    for path in (results / "runs").glob("*.run.json"):
        run = json.loads(path.read_text())
        kind = "training" if "wall_seconds" in run else "evaluation"
        seconds.setdefault((path.name.partition("_")[0], kind), []).append(run.get("wall_seconds") or sum(run["seconds"].values()))
    cost = [[*key, len(spent), f"{sum(spent) / 60:.0f}"] for key, spent in sorted(seconds.items())]
    more = ("accuracy_with_popularity", "accuracy_against_popularity", "personalisation_gap", "calibration_error")
    more_of_arms = [
        [arm, *(cell(values[name], MEASURES[name][1]) for name in more)]
        for arm, values in metrics["arms"].items()
        if values["kind"] == "model" and "@" not in arm
    ]
    heads = [f"{label} ({unit})" if unit else label for label, unit in (MEASURES[name] for name in more)]
    return {
        "also": markdown(["arm", *heads], more_of_arms),
        "differing": markdown(["arms", "answers that differ, %"], [[names, f"{share:.1f}"] for names, share in found["differing answers"].items()]),
        "main": f"```text\n{table(metrics)}\n\n{summary(metrics, MODEL)}\n```",
        "search": markdown(["arm", "from", "learning rate", "epochs", "ranking %", "order-free %", "response %"], tried),
        "usual": markdown(["arm", "usual protocol: A is always right, %", "both orders, %"], usual),
        "ablations": markdown(["what", "value", "SFT ranking %", "DPO ranking %", "SFT response %", "DPO response %", "SFT, change", "DPO, change", "DPO - SFT"], ablated),
        "beneath": markdown(
            ["what", "value", "SFT order-free %", "DPO order-free %", "SFT position bias", "DPO position bias", "SFT, change", "DPO, change", "DPO - SFT"], beneath
        ),
        "longer": markdown(["changed", "SFT, then DPO: ranking %", "SFT of as many epochs in all: ranking %", "DPO - SFT", "order-free"], longer),
        "precision": markdown(
            ["arm, trained in 4 bits", "ranking %, in 4", "ranking %, in 16", "order-free %, in 16", "position bias, in 16", "decisions that stay, %"], precise
        ),
        "answers": markdown(["arm", "answers", *(f"{name.replace('_', ' ')}, %" for name in shares)], written),
        "cost": markdown(["part", "what", "runs", "minutes, summed over runs"], cost),
    }


def markdown(columns: list[str], rows: list[list]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (columns, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:]])


def published_metrics(results: Path) -> dict:
    predictions = read_predictions(results / "predictions.csv.gz")
    return judge(compute_metrics(predictions))


def ablations_of(results: Path) -> dict:
    """Measures of each ablation's arms, and of all arms under the usual protocol: one order, that of the file."""
    rows = completed(pd.read_csv(results / "ablations.csv.gz", dtype={"seed": str, "preferred_more_popular": str}, keep_default_na=False,
                                 na_values={name: [""] for name in NUMBERS}))  # fmt: skip
    main_rows = read_predictions(results / "predictions.csv.gz")
    first = main_rows[main_rows["seed"].isin(("", str(SEEDS[0]))) & ~main_rows["arm"].str.contains("@") & (main_rows["history"] == "own")]
    same = rows[rows["study"] == "same"].drop(columns="study")
    first = first if same.empty else same  # each ablation changes one thing of this
    first_sft = first[first["arm"] == "sft"]
    found = {"same": arms_and_difference(first)}
    studies = {}
    for study, part in rows.groupby("study", sort=False):
        own = part.drop(columns="study").replace({"arm": {f"{stage}_{study}": stage for stage in ("sft", "dpo")}})
        studies[study] = own
        found[study] = arms_and_difference(own if (own["arm"] == "sft").any() else pd.concat([own, first_sft]), "negatives" in study)
        if study != "same" and "negatives" not in study:
            for stage in sorted({"sft", "dpo"} & set(own["arm"])):
                found[study][f"{stage} - same"] = paired(own, stage, first, stage)
    for study, control in AS_LONG.items():
        if study in studies and control in studies:
            found[study]["dpo - longer sft"] = paired(studies[study], "dpo", studies[control], "sft")
    usual = pd.concat([main_rows, rows[rows["study"] == "original_order"].drop(columns="study")])
    usual = usual[(usual["history"] == "own") & (usual["kind"] == "model") & ~usual["arm"].str.contains("@")]
    usual = usual.drop_duplicates(["arm", "seed", "pair_id", "order"])
    right = pd.Series(wins(usual["decision_margin"].to_numpy()) * 100, index=usual.index)
    table = right.groupby([usual["arm"], usual["order"]], sort=False).mean().unstack()
    found["usual protocol"] = {
        arm: {"always A is right": round(row["A"], 6), "both orders": round((row["A"] + row["B"]) / 2, 6)}
        for arm, row in table.iterrows()
    }
    found["differing answers"] = differing_answers(main_rows)
    own = main_rows[(main_rows["history"] == "own") & main_rows["arm"].isin(("sft", "dpo", "sft_long"))]
    for name, more in (("more", "true"), ("less", "false")):
        part = judge(compute_metrics(own[own["preferred_more_popular"] == more]))
        about = {"users": part["users"], **{pair: part["comparisons"][pair] for pair in ("dpo - sft", "dpo - sft_long")}}
        found.setdefault("where the preferred film is", {})[f"{name} popular"] = about
    found["change of DPO's lead"] = {
        f"{bits} bits, less 4": change_of_lead(studies[f"{bits}bit"], first) for bits in (8, 16) if f"{bits}bit" in studies
    }
    return found


def differing_answers(rows: pd.DataFrame) -> dict[str, float]:
    """Of all answers to held-out users, in %, those that two arms of one seed, or two seeds of one arm, give differently."""
    rows = rows[(rows["history"] == "own") & (rows["kind"] == "model") & (rows["arm"] != "base") & ~rows["arm"].str.contains("@")]
    right = (rows["decision_margin"] > 0).to_numpy()
    answers = pd.Series(right, pd.MultiIndex.from_frame(rows[["arm", "seed", "pair_id", "order"]])).unstack(["arm", "seed"])
    shares: dict[str, list[float]] = {}
    for (one, first), (other, second) in itertools.combinations(answers.columns, 2):
        if one == other or (first == second and "dpo" in (one, other)):
            names = f"{one}, {other} of another seed" if one == other else ", ".join(sorted((one, other)))
            shares.setdefault(names, []).append(100 * float((answers[one, first] != answers[other, second]).mean()))
    return {names: round(sum(values) / len(values), 6) for names, values in shares.items()}


def arms_and_difference(rows: pd.DataFrame, with_baselines: bool = False) -> dict:
    measured = judge(compute_metrics(rows))
    arms = {arm: values for arm, values in measured["arms"].items() if values["kind"] == "model" or with_baselines}
    return {"arms": arms, "dpo - sft": measured["comparisons"].get("dpo - sft")}


def paired(rows: pd.DataFrame, arm: str, others: pd.DataFrame, other: str) -> dict:
    """The difference of two arms of different studies, over the same users."""
    both = [rows[rows["arm"] == arm].assign(arm="dpo"), others[others["arm"] == other].assign(arm="sft")]
    found = judge(compute_metrics(pd.concat(both)))["comparisons"]["dpo - sft"]
    return {name: value for name, value in found.items() if name not in ("p_holm", "verdict")}


def change_of_lead(rows: pd.DataFrame, others: pd.DataFrame) -> dict[str, float]:
    """How much more DPO leads SFT in ranking accuracy in these rows than in others, over the same users."""
    leads = []
    for part in (rows, others):
        right = pd.Series(wins(part["decision_margin"].to_numpy()), index=part.index)
        by_user = right.groupby([part["pair_id"], part["arm"]]).mean().unstack()
        leads.append(100 * (by_user["dpo"] - by_user["sft"]))
    value, influence, _ = mean_of((leads[0] - leads[1]).to_numpy())
    half = half_width([Measured(("",), value, influence[None], 0.0, trained=False)])
    return {"value": round(value, 6), "low": round(value - half, 6), "high": round(value + half, 6)}


def panels_of(found: dict) -> dict[str, list[tuple[str, str]]]:
    """The panels of which two values or more were run."""
    panels = {title: [(label, study) for label, study in points if study in found] for title, points in PANELS.items()}
    return {title: points for title, points in panels.items() if len(points) > 1}


def draw_ablations(found: dict, path: Path) -> None:
    """One panel an ablation of two values or more: ranking accuracy (filled) and response accuracy (hollow) of SFT and DPO,
    with 95% intervals over users."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        panels = panels_of(found)
        columns = min(3, len(panels))
        rows = -(-len(panels) // columns)
        size = (3 * columns + (2 if columns == 1 else 0), 2.2 * rows + (0.6 if rows == 1 else 0))
        figure, axes = plt.subplots(rows, columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
        for unused in axes.flat[len(panels) :]:
            unused.set_axis_off()
        for axis, (title, points) in zip(axes.flat, panels.items(), strict=False):
            for shift, (stage, style) in enumerate((("sft", "s"), ("dpo", "o"))):
                for measure, fill, color in (("ranking_accuracy", "full", "black"), ("response_accuracy", "none", "0.5")):
                    for place, (_, study) in enumerate(points):
                        arms = found[study]["arms"]
                        values = arms.get(stage)
                        if values is None or values[measure]["value"] is None:
                            continue
                        x = place + 0.24 * shift + (0.1 if fill == "none" else 0) - 0.17
                        value, low, high = (values[measure][name] for name in ("value", "low", "high"))
                        label = f"{stage.upper()}, {measure.partition('_')[0]}"
                        axis.errorbar(
                            x,
                            value,
                            [[value - low], [high - value]],
                            fmt=style,
                            fillstyle=fill,
                            color=color,
                            capsize=2,
                            markersize=4,
                            label=label,
                        )
            axis.axhline(50, color="0.85", linewidth=0.8, zorder=0)
            axis.set(
                title=title, xticks=range(len(points)), xticklabels=[label for label, _ in points], xlim=(-0.6, len(points) - 0.4)
            )
        for axis in axes[:, 0]:
            axis.set_ylabel("accuracy, %")
        figure.legend(*unique_handles(figure), loc="outside upper center", ncols=2 if columns == 1 else 4)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def unique_handles(figure) -> tuple[list, list]:
    found = {label: handle for axis in figure.axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    return list(found.values()), list(found)


def draw_shortcut(found: dict, path: Path) -> None:
    """The same adapters under the usual protocol, whose right answer is always A, and in both orders."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(3.8, 0.3 * len(found) + 0.9), layout="constrained")
        for row, values in enumerate(found.values()):
            axis.plot(list(values.values()), [row, row], color="0.8", linewidth=1, zorder=0)
        for name, style in (("always A is right", {"facecolors": "none", "marker": "s"}), ("both orders", {"facecolors": "black"})):
            axis.scatter(
                [values[name] for values in found.values()], range(len(found)), s=18, edgecolors="black", label=name, **style
            )
        axis.set(yticks=range(len(found)), yticklabels=list(found), xlabel="ranking accuracy, %", xlim=(-3, 103))
        axis.invert_yaxis()
        figure.legend(loc="outside upper center", ncols=2)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["search", "main", "ablations", "all", "collect", "report"])
    parser.add_argument("--pairs", default="data/contrastive_rec_train.jsonl")
    parser.add_argument(
        "--small_pairs", nargs=2, default=(), metavar=("RANDOM", "MATCHED"), help="MovieLens-100K's with both negatives"
    )
    parser.add_argument("--work", default="outputs/study")
    parser.add_argument("--model", default=f"--preset thesis --base_model {config.SMALL_MODEL}", help="flags of every script")
    parser.add_argument(
        "--training",
        default="--effective_batch 64 --gradient_checkpointing false --warmup_steps 10"
        " --eval_steps 25 --save_steps 100000 --logging_steps 1",
        help="flags of every training",
    )
    parser.add_argument("--sft_batch", type=int, default=64, help="micro-batch of SFT")
    parser.add_argument("--dpo_batch", type=int, default=64, help="micro-batch of DPO")
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--slots", type=int, default=6, help="training runs at a time")
    parser.add_argument("--evaluations", type=int, default=3, help="evaluations at a time")
    parser.add_argument("--gpus", nargs="+", default=["0"])
    parser.add_argument("--studies", nargs="+", default=[], metavar="NAME", help="ablations: these alone, such as 8bit or ipo")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), help="collect: what each seed must have")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no training starts later; what is trained by then is scored")
    parser.add_argument("--dry_run", action="store_true", help="write the commands alone")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results")
    options = parser.parse_args()
    if options.part not in ("collect", "report"):
        study = Study(options)
        getattr(study, options.part)()
        if study.failed:
            sys.exit(f"failed: {study.failed}")
        return
    if options.part == "collect":
        collect(Path(options.work), options.results, options.arms)
    report(options.results)


if __name__ == "__main__":
    main()
