"""The study's program: what it would run, without running it; and what benchmarks keep."""

import json
import shlex
import shutil
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from benchmarks import experiment, gpu
from conftest import make_pairs

from data.pairs import load_pairs, split_pairs, write_pairs


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Calls experiment.py in a folder of its own, with 60 made-up pairs."""
    write_pairs(tmp_path / "pairs.jsonl", make_pairs(60))

    def call(part: str, *flags: str) -> list[dict[str, str]]:
        words = ["experiment.py", part, "--pairs", str(tmp_path / "pairs.jsonl"), "--work", str(tmp_path / "work"), "--dry_run", *flags]
        monkeypatch.setattr(sys, "argv", words)
        experiment.main()
        lines = (tmp_path / "work" / "dry_run.sh").read_text().splitlines()
        (tmp_path / "work" / "dry_run.sh").unlink()
        return [flags_of(line) for line in lines]

    return call


def flags_of(line: str) -> dict[str, str]:
    """{flag: its last value} of a command, and "script"."""
    words = shlex.split(line)[1:]
    return {"script": words[0]} | {word: value for word, value in zip(words, words[1:], strict=False) if word.startswith("--")}


def test_the_search_never_sees_a_test_user(study, tmp_path):
    commands = study("search")
    assert {Path(command["--pairs"]).name for command in commands} == {"search.jsonl"}
    _, test = split_pairs(load_pairs(tmp_path / "pairs.jsonl"), 0.2)
    searched = {pair.pair_id for pair in load_pairs(tmp_path / "work" / "search.jsonl")}
    assert searched and not searched & {pair.pair_id for pair in test}
    training = [command for command in commands if command["script"] == "train_dpo.py"]
    assert len(training) == sum(len(trials) for trials in experiment.GRID.values())


def test_each_seed_trains_every_arm_and_dpo_starts_from_its_own_sft(study):
    study("search")
    commands = study("main", "--seeds", "3")
    training = [command for command in commands if command["script"] == "train_dpo.py"]
    assert sorted(Path(command["--outputs"]).name for command in training) == sorted(
        f"{arm}_{seed}" for arm in experiment.ARMS for seed in experiment.SEEDS[:3]
    )
    for command in training:
        name, _, seed = Path(command["--outputs"]).name.rpartition("_")
        assert command["--seed"] == seed
        if name == "dpo":
            assert f"/main/sft_{seed}/" in command["--sft_adapter"]
    scored = [command for command in commands if command["script"] == "evaluate_dpo.py"]
    assert [command["--strangers"] for command in scored].count("true") == 3


def test_trials_that_are_there_are_not_repeated_unless_their_start_has_changed(study, tmp_path):
    study("search")
    found = json.loads((tmp_path / "work" / "dry_run.json").read_text())
    trials = {
        arm: [
            {"run": f"search/{arm}_{rate}_{epochs}", "rate": rate, "epochs": epochs, "ranking_accuracy": 50 + number, "order_free_accuracy": 50}
            for number, (rate, epochs) in enumerate(experiment.GRID[arm])
        ]
        for arm in found
    }
    start = trials["sft"][-1]["run"]

    def command(self, script, flags, log, *rest):
        ran.append(flags)
        (tmp_path / "work" / log / "x_final").mkdir(parents=True, exist_ok=True)
        return False  # nothing is measured

    for name, trained in ((start, 0), ("search/sft_other", 1 + len(experiment.GRID["dpo"]))):  # and the SFT that DPO starts from
        for trial in trials["dpo"]:
            trial["after"] = name
        known = {arm: max(given, key=lambda trial: trial["ranking_accuracy"]) | {"trials": given} for arm, given in trials.items()}
        (tmp_path / "work" / "search.json").write_text(json.dumps(known))
        (tmp_path / "work" / "dry_run.json").unlink(missing_ok=True)
        options = ["experiment.py", "search", "--pairs", str(tmp_path / "pairs.jsonl"), "--work", str(tmp_path / "work")]
        ran = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", options)
            patch.setattr(experiment.Study, "command", command)
            try:
                experiment.main()
            except SystemExit as error:  # the DPO trials that are to be made anew were not
                assert trained and "trials" in str(error.code)
        assert len([flags for flags in ran if "--stage" in flags]) == trained
        assert trained or json.loads((tmp_path / "work" / "search.json").read_text())["sft"]["run"] == start


def test_the_whole_study_starts_each_run_once_and_after_what_it_needs(study, tmp_path, monkeypatch):
    """With scripts that only leave files: every DPO finds its SFT adapter, every evaluation its arms, and none is missing."""
    started, scored, lacking = [], [], []

    def command(self, script, flags, log, slots, priority=0):
        with slots.take(priority):
            told, folder = flags_of(f"python {script} {flags}"), tmp_path / "work" / log
            started.append(log)
            time.sleep(0.2 if log.startswith("main/sft_") else 0.002)  # so that what waits for it would come too early
            if script == "train_dpo.py":
                needs = [told["--sft_adapter"]] if "--sft_adapter" in told else []
                (folder / "x_final").mkdir(parents=True)
            else:
                arms, _, needs = zip(*(word.partition("=") for word in shlex.split(flags.partition("--adapters ")[2])), strict=True)
                scored.extend(str(Path(need).parent.relative_to(tmp_path / "work")) for need in needs)
                measures = dict.fromkeys(("ranking_accuracy", "order_free_accuracy", "response_accuracy"), {"value": 50.0})
                (folder / "evaluation").mkdir(parents=True)
                (folder / "evaluation" / "metrics.json").write_text(json.dumps({"arms": dict.fromkeys(arms, measures)}))
            lacking.extend((log, need) for need in needs if not Path(need).is_dir())
            return True

    monkeypatch.setattr(experiment.Study, "command", command)
    pairs = str(tmp_path / "pairs.jsonl")
    words = ["all", "--pairs", pairs, "--work", str(tmp_path / "work"), "--small_pairs", pairs, pairs, "--seeds", "2", "--slots", "3"]
    monkeypatch.setattr(sys, "argv", ["experiment.py", *words])
    experiment.main()
    assert not lacking
    assert len(started) == len(set(started))
    trained = [name for name in started if "/eval_" not in name]
    assert set(scored) == set(trained), "whatever is trained is scored"
    assert {f"main/{arm}_{seed}" for arm in experiment.ARMS for seed in experiment.SEEDS[:2]} <= set(trained)
    changed = {name.removeprefix("ablations/").partition("_")[2] for name in trained if name.startswith("ablations/")}
    assert changed == {name for points in experiment.PANELS.values() for _, name in points}


def test_a_run_that_lasts_long_keeps_no_other_from_being_scored(tmp_path, monkeypatch):
    others_scored, waited = threading.Event(), []

    def command(self, script, flags, log, slots, priority=0):
        if log == "ablations/sft_sft_x3":
            waited.append(others_scored.wait(120))
        if "/eval_" in log and "dpo_sft_x2=" in flags:
            others_scored.set()
        (tmp_path / "work" / log / ("evaluation" if "/eval_" in log else "x_final")).mkdir(parents=True)
        return True

    write_pairs(tmp_path / "pairs.jsonl", make_pairs(60))
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "search.json").write_text(json.dumps(dict.fromkeys(experiment.GRID, {"run": "search/any", "rate": "1e-3", "epochs": 4})))
    words = ["ablations", "--pairs", str(tmp_path / "pairs.jsonl"), "--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", ["experiment.py", *words, "--studies", "sft_x3", "sft_x2", "sft_x1"])
    monkeypatch.setattr(experiment.Study, "command", command)
    experiment.main()
    assert waited == [True]
    monkeypatch.setattr(sys, "argv", ["experiment.py", *words, "--studies", "sft_x4"])
    with pytest.raises(SystemExit, match="there is no sft_x4; there are 8bit, same"):
        experiment.main()


def test_what_was_not_run_again_stays_published(tmp_path):
    def predictions(arm: str, margin: float) -> pd.DataFrame:
        row = {"arm": arm, "kind": "model", "seed": "3407", "pair_id": "p", "order": "A", "decision_margin": margin, "history": "own"}
        return pd.DataFrame([row])

    def scored(arm: str, margin: float) -> None:
        folder = tmp_path / "work" / "ablations" / f"eval_{arm}_first" / "evaluation"
        folder.mkdir(parents=True)
        predictions(arm, margin).to_csv(folder / "predictions.csv", index=False)
        (folder / "run.json").write_text(json.dumps({"adapters": {arm: {"3407": "x"}}}))

    results = tmp_path / "results"
    (results / "runs").mkdir(parents=True)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "search.json").write_text("{}")
    for commit, arms in (("first", ("dpo_ipo", "dpo_beta_0.2")), ("second", ("dpo_ipo",))):
        for number, arm in enumerate(arms):
            scored(arm, number + len(arms))
        for arm in ("dpo_ipo", "dpo_beta_0.2"):  # in the second call one is trained and not scored
            (tmp_path / "work" / "ablations" / arm / "x_final").mkdir(parents=True)
            (tmp_path / "work" / "ablations" / arm / "x_final" / "run.json").write_text(json.dumps({"git_commit": commit}))
        names = [f"eval_{arms[0]}_first", "eval_of_an_earlier_call"]
        commands = [f"python evaluate_dpo.py --outputs /any/outputs/study/ablations/{name} {commit}\n" for name in names]
        (tmp_path / "work" / "commands.sh").write_text("".join(commands))
        experiment.collect(tmp_path / "work", results, [])
        shutil.rmtree(tmp_path / "work" / "ablations")
    kept = pd.read_csv(results / "ablations.csv.gz")
    assert dict(zip(kept["study"], kept["decision_margin"], strict=True)) == {"ipo": 1, "beta_0.2": 3}
    commits = {arm: json.loads((results / "runs" / f"ablations_dpo_{arm}.run.json").read_text())["git_commit"] for arm in ("ipo", "beta_0.2")}
    assert commits == {"ipo": "second", "beta_0.2": "first"}
    commands = (results / "commands.sh").read_text()
    assert commands == "python evaluate_dpo.py --outputs outputs/study/ablations/eval_dpo_ipo_first second\n", "of each run its last command"


@pytest.mark.parametrize("fault", ["search/sft_", "main/sft_", "ablations/sft_same", "raise"])
def test_a_study_with_a_run_that_fails_ends_and_says_so(tmp_path, monkeypatch, fault):
    """Whatever waits for it ends, too: no thread is left waiting on a machine that is paid by the second."""

    def command(self, script, flags, log, *rest):
        if fault == "raise" and log == "ablations/sft_same":
            sys.exit("it was trained with other flags")
        if log.startswith(fault):
            self.failed.append(log)
            return False
        folder = tmp_path / "work" / log
        (folder / ("x_final" if script == "train_dpo.py" else "evaluation")).mkdir(parents=True)
        if script == "evaluate_dpo.py":
            arms = [word.partition("=")[0] for word in shlex.split(flags.partition("--adapters ")[2])]
            measures = dict.fromkeys(("ranking_accuracy", "order_free_accuracy", "response_accuracy"), {"value": 50.0})
            (folder / "evaluation" / "metrics.json").write_text(json.dumps({"arms": dict.fromkeys(arms, measures)}))
        return True

    write_pairs(tmp_path / "pairs.jsonl", make_pairs(60))
    words = ["all", "--pairs", str(tmp_path / "pairs.jsonl"), "--work", str(tmp_path / "work"), "--seeds", "1"]
    monkeypatch.setattr(sys, "argv", ["experiment.py", *words])
    monkeypatch.setattr(experiment.Study, "command", command)
    ended = []

    def run() -> None:
        try:
            experiment.main()
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive() and ended


def test_when_time_is_up_nothing_is_trained_and_what_is_there_is_scored(tmp_path, monkeypatch):
    write_pairs(tmp_path / "pairs.jsonl", make_pairs(60))
    work = tmp_path / "work"
    (work / "ablations" / "dpo_ipo" / "x_final").mkdir(parents=True)
    trial = {"run": "search/any", "rate": "1e-3", "epochs": 4}
    (work / "search.json").write_text(json.dumps(dict.fromkeys(experiment.GRID, trial)))
    started = []

    def run(line, **how):
        started.append(line)
        return SimpleNamespace(returncode=0)

    words = ["ablations", "--pairs", str(tmp_path / "pairs.jsonl"), "--work", str(work), "--minutes", "0"]
    monkeypatch.setattr(sys, "argv", ["experiment.py", *words])
    monkeypatch.setattr(experiment.subprocess, "run", run)
    with pytest.raises(SystemExit, match="no time was left"):
        experiment.main()
    [scored] = started
    assert Path(scored[1]).name == "evaluate_dpo.py" and scored[-1].startswith("dpo_ipo=")


def test_what_waits_for_a_slot_goes_by_priority():
    slots, order = experiment.Slots(["0"]), []

    def work(name: str, priority: int) -> None:
        with slots.take(priority):
            order.append(name)

    with slots.take(0):
        threads = [threading.Thread(target=work, args=job) for job in (("late", 2), ("first", 0), ("middle", 1))]
        for thread in threads:
            thread.start()
        while len(slots.waiting) < 3:
            time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert order == ["first", "middle", "late"]


def test_the_smallest_tables_name_no_machine():
    assert experiment.without_machine('"/home/somebody/repo/outputs/study/main/x"') == '"outputs/study/main/x"'
    assert experiment.without_machine("--outputs /root/repo/outputs/study/a --seed 1") == "--outputs outputs/study/a --seed 1"


def test_a_measurement_takes_the_place_of_its_own_case_alone(tmp_path):
    path = tmp_path / "gpu.json"
    one, other = ({"device": device, "micro_batch": 8, "pairs_per_second": 1.0} for device in ("H100", "H200"))
    gpu.save(path, [one, other], ("device", "micro_batch"))
    gpu.save(path, [other | {"pairs_per_second": 2.0}], ("device", "micro_batch"))
    assert [(record["device"], record["pairs_per_second"]) for record in json.loads(path.read_text())] == [("H100", 1.0), ("H200", 2.0)]
