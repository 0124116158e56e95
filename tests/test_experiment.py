"""The study's program: what it would run, without running it; and what benchmarks keep."""

import gzip
import json
import shlex
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from benchmarks import experiment, gpu, study_report
from benchmarks.experiment import Job
from conftest import make_pairs, predictions_of

import config
from data.pairs import load_pairs, split_pairs, write_pairs
from data.predictions import as_csv, read_predictions

TUNED = {
    "sft": {"rate": "1e-3", "epochs": 4},
    "sft_more": {"rate": "2e-3", "epochs": 4},
    "dpo": {"rate": "2e-4", "epochs": 4},
}
SEARCHES = [
    experiment.searching("grid", {"sft": [("1e-3", 4), ("2e-3", 8)]}),
    experiment.searching("step", {"dpo": [("2e-4", 4)], "sft_more": [("0.0014", 4)]}, "sft_1e-3_4"),
]


def settings_of(job: Job):
    script, *flags = shlex.split(job.line)
    kind = config.TrainingSettings if script == "train_dpo.py" else config.EvaluationSettings
    return config.parse_settings(kind, flags)


@pytest.mark.parametrize("jobs", [*SEARCHES, experiment.study(TUNED, 4768)])
def test_every_command_can_be_typed_and_finds_what_it_needs(jobs):
    """Each setting is known, each adapter is one that an earlier command writes, and each job is there once."""
    names = [job.name for job in jobs]
    assert len(names) == len(set(names))
    written = {f"{experiment.WORK}/search/sft_1e-3_4/3407/smollm2_sft_4bit_final"}  # by the search's first grid
    for job in jobs:
        settings = settings_of(job)
        assert set(job.needs) <= set(names[: names.index(job.name)])
        if not job.gives:
            stages = ("sft", "sft_more", "dpo") if settings.stage == "all" else (settings.stage,)
            written |= {f"{settings.outputs}/smollm2_{stage}_{settings.bits}bit_final" for stage in stages}
            assert settings.sft_adapter is None or settings.sft_adapter in written
        else:
            given = dict(text.split("=") for text in settings.adapters)
            assert set(given.values()) <= written
            seeds = {job.name.split("/")[-2]}
            assert {folder.split("/")[-2] for folder in given.values()} == seeds, "of one seed"


def test_the_main_study_has_ten_runs_of_each_arm_in_both_precisions():
    jobs = {job.name: settings_of(job) for job in experiment.study(TUNED, 4768) if not job.gives}
    for bits in (4, 16):
        runs = [settings for name, settings in jobs.items() if name.startswith(f"{bits}bit/")]
        assert [run.seed for run in runs] == list(range(3407, 3417)) and {run.bits for run in runs} == {bits}
        assert {(run.stage, run.control, run.sft_learning_rate) for run in runs} == {("all", True, 1e-3)}
        assert {(run.control_learning_rate, run.learning_rate, run.epochs) for run in runs} == {(2e-3, 2e-4, 4)}
    assert jobs["pairs_128_steps/3416"].epochs == 149 and jobs["pairs_128_passes/3416"].epochs == 4
    assert jobs["dpo_rate_3.2/3416"].learning_rate == pytest.approx(6.4e-4)
    assert jobs["dpo_from_base/3416"].init == "base" and jobs["dpo_from_base/3416"].sft_adapter is None


def test_the_search_tries_each_arm_as_often_and_never_sees_a_test_user(tmp_path, monkeypatch):
    pairs = make_pairs(60)
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    monkeypatch.setattr(experiment, "ROOT", tmp_path)
    monkeypatch.setattr(experiment, "RESULTS", tmp_path)
    monkeypatch.setattr(experiment, "PAIRS", "pairs.jsonl")
    tried = []

    def run(job: Job) -> bool:
        """DPO is best at the lowest rate and fewest epochs; the control at the most, which it may not have."""
        tried.append(job)
        if job.gives:
            arms = [text.partition("=")[0] for text in settings_of(job).adapters]
            values = {arm: 60.0 + (arm == "sft_2e-3_4") + ("sft_more" in arm) * int(arm[-1]) for arm in arms}
            values = {arm: value - int(arm[-1]) * arm.startswith("dpo") for arm, value in values.items()}
            measured = {arm: dict.fromkeys(experiment.SEARCHED, {"value": value}) for arm, value in values.items()}
            folder = tmp_path / experiment.WORK / job.name / "evaluation"
            folder.mkdir(parents=True)
            (folder / "metrics.json").write_text(json.dumps({"arms": measured}))
        return True

    monkeypatch.setattr(experiment, "runner", lambda options: run)
    assert experiment.search(SimpleNamespace(slots=2)) == []
    found = json.loads((tmp_path / "search.json").read_text())
    chosen = {arm: (best["rate"], best["epochs"], len(best["trials"])) for arm, best in found.items()}
    assert chosen == {"sft": ("2e-3", 4, 9), "sft_more": ("5e-4", 4, 9), "dpo": ("1e-4", 4, 9)}
    steps = [found[arm]["trials"][-1]["name"] for arm in found]
    assert steps == ["sft_0.0014_4", "dpo_5e-05_4", "sft_more_0.00025_4"], "between two rates, or beyond the last"
    trained = [settings_of(job) for job in tried if not job.gives]
    starts = {settings.sft_adapter for settings in trained if settings.stage != "sft"}
    assert starts == {f"{experiment.WORK}/search/sft_2e-3_4/3407/smollm2_sft_4bit_final"}
    searched = {pair.pair_id for pair in load_pairs(tmp_path / experiment.WORK / "search.jsonl")}
    assert searched and not searched & {pair.pair_id for pair in split_pairs(pairs, 0.2)[1]}


@pytest.mark.parametrize(("best", "rate"), [("1e-4", "5e-05"), ("2e-4", "0.00028"), ("4e-4", "0.0008")])
def test_the_search_goes_a_step_beyond_a_grid_or_between_two_rates(best, rate):
    trials = [{"name": rate, "rate": rate, "epochs": 4} for rate in ("1e-4", "2e-4", "4e-4")]
    trials = [trial | dict.fromkeys(experiment.SEARCHED, float(trial["rate"])) for trial in trials]
    chosen = next(trial for trial in trials if trial["rate"] == best)
    assert experiment.further(chosen | {"trials": trials}) == rate


def test_an_ablation_shows_every_value_with_its_interval_and_marks_the_study_s_own():
    accuracy = {"value": 60.0, "low": 55.0, "high": 66.0}
    points = {"8": {"sft": accuracy}, "16": {"sft": accuracy | {"value": 62.0}, "dpo": accuracy}, "64": {}}
    figure = study_report.draw_ablation(points, "16", "LoRA rank", caption="60 users")
    [axis] = figure.axes
    assert [label.get_text() for label in axis.get_xticklabels()] == ["8", "16\n(study)", "64"]
    [shaded] = axis.patches
    assert shaded.get_x() < 1 < shaded.get_x() + shaded.get_width() and figure.get_supxlabel() == "60 users; 95% intervals"
    sft, dpo = axis.containers
    assert (sft.get_label(), dpo.get_label()) == ("SFT", "DPO")
    places, values = sft.lines[0].get_data()
    assert [round(place) for place in places] == [0, 1] and list(values) == [60, 62]
    assert [list(bar[:, 1]) for bar in sft.lines[2][0].get_segments()] == [[55, 66]] * 2
    assert [round(place) for place in dpo.lines[0].get_xdata()] == [1]


def test_an_arm_that_is_one_result_at_all_values_is_a_band_and_chance_is_drawn_where_it_is_near():
    sft, dpo = {"value": 80.0, "low": 78.0, "high": 82.0}, {"value": 60.0, "low": 54.0, "high": 66.0}
    points = {"0.1": {"sft": sft, "dpo": sft}, "0.2": {"sft": sft, "dpo": dpo}}
    [axis] = study_report.draw_ablation(points, None, "beta", "").axes
    [band], [bars] = axis.patches, axis.containers
    assert (band.get_y(), band.get_height(), bars.get_label()) == (78, 4, "DPO")
    assert {line.get_label(): line.get_ydata()[0] for line in axis.lines[:2]} == {"chance": 50, "SFT": 80}
    points["0.2"]["dpo"] = dpo | {"low": 55.0}
    [axis] = study_report.draw_ablation(points, None, "beta", "").axes
    assert "chance" not in {line.get_label() for line in axis.lines}


def test_what_the_report_says_of_bits_is_4_minus_16(tmp_path, monkeypatch):
    for name in ("draw_ablations", "draw_all"):
        monkeypatch.setattr(study_report, name, lambda *_: {})
    monkeypatch.setattr(study_report, "ablations", lambda *_: {})
    for name in ("README.md", "search.json", "generation.json", "runs.json"):
        (tmp_path / name).write_bytes((experiment.RESULTS / name).read_bytes())
    good, bad = np.ones((200, 2)), -np.ones((200, 2))
    for name, dpo in (("predictions.csv.gz", good), ("predictions_16bit.csv.gz", bad)):
        (tmp_path / name).write_bytes(gzip.compress(as_csv(predictions_of(sft=bad, dpo=dpo)).encode()))
    study_report.report(tmp_path)
    assert json.loads((tmp_path / "interaction.json").read_text())["dpo - sft"]["value"] == 100
    assert "| 4 bits minus 16 bits |" in study_report.tables(tmp_path)["bits"]


def test_jobs_run_after_what_they_need_and_what_fails_keeps_only_its_own_from_running():
    jobs = [Job("a", ""), Job("b", "", ("a",)), Job("c", "", ("b",)), Job("d", ""), Job("e", "", ("d", "not of this call"))]
    ran = []

    def run(job: Job) -> bool:
        ran.append(job.name)
        if job.name == "b":
            raise OSError("no such script")
        return True

    assert sorted(experiment.run_all(jobs, run, 3)) == ["b", "c"]
    assert sorted(ran) == ["a", "b", "d", "e"] and ran.index("a") < ran.index("b") and ran.index("d") < ran.index("e")


def test_what_is_trained_is_scored_before_more_is_trained():
    jobs = [Job("a/1", ""), Job("b/1", ""), Job("b/1/scores", "", ("b/1",), ("b",)), Job("a/1/scores", "", ("a/1",), ("a",))]
    ran = []
    assert experiment.run_all(jobs, lambda job: ran.append(job.name) is None, 1) == []
    assert ran == ["a/1", "a/1/scores", "b/1", "b/1/scores"]


def test_when_time_is_up_nothing_is_trained_and_what_is_there_is_scored(monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr(experiment, "ROOT", tmp_path)
    monkeypatch.setattr(
        experiment.subprocess, "run", lambda line, **how: started.append(line) or SimpleNamespace(returncode=0)
    )
    run = experiment.runner(SimpleNamespace(slots=1, gpus=["0"], minutes=0))
    jobs = [Job("x/1", "train_dpo.py --seed 1"), Job("y/1/scores", "evaluate_dpo.py", (), ("y",))]
    assert experiment.run_all(jobs, run, 1) == ["x/1"]
    assert [line[1:] for line in started] == [["evaluate_dpo.py"]]


def test_only_what_lacks_is_run_with_what_it_needs(tmp_path):
    jobs = experiment.study(TUNED, 4768)

    def names(scored: set[str], *only: str) -> list[str]:
        return [job.name for job in experiment.wanted(jobs, scored, tmp_path, only)]

    everything = {name for job in jobs if job.gives for name in experiment.rows_of(job)}
    assert names(everything) == []
    assert names(everything - {"read_in_16/3416"}) == ["4bit/3416", "read_in_16/3416/scores"]
    assert names(set(), "rank_8/3416") == ["rank_8/3416", "rank_8/3416/scores"]
    (tmp_path / "4bit").mkdir()
    (tmp_path / "4bit" / "3416.done").touch()
    assert names(everything - {"read_in_16/3416"}) == ["read_in_16/3416/scores"]


def evaluated(work, job: Job, arms: dict[str, np.ndarray], seed: str) -> None:
    """Leave what an evaluation of these decision margins leaves."""
    rows = predictions_of(**arms)
    rows["seed"] = seed
    about = {"arm": "popularity", "kind": "baseline", "seed": "", "chosen_log_prob": np.nan, "rejected_log_prob": np.nan}
    rows = pd.concat([rows, rows[rows["arm"] == next(iter(arms))].assign(**about)])
    folder = work / job.name / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "predictions.csv").write_text(as_csv(rows))
    (folder / "run.json").write_text(json.dumps({"seconds": {"scoring": 1.0}}))


def test_results_of_several_machines_add_up_and_are_known_by_study_and_seed(tmp_path):
    jobs = [job for job in experiment.study(TUNED, 4768) if job.name.split("/")[-2] in ("3415", "3416")]
    by_name = {job.name: job for job in jobs}
    margins = np.random.default_rng(0).normal(size=(2, 60, 2))
    for machine, seed in (("one", "3415"), ("two", "3416")):
        for study in ("4bit", "rank_8"):
            arms = {"sft": margins[0], "dpo": margins[1]}
            evaluated(tmp_path / machine, by_name[f"{study}/{seed}/scores"], arms, seed)
        of_dpo = dict.fromkeys(by_name[f"of_dpo/{seed}/scores"].gives, margins[1])
        evaluated(tmp_path / machine, by_name[f"of_dpo/{seed}/scores"], of_dpo, seed)
        experiment.collect(jobs, tmp_path / machine, tmp_path)
    known = {f"{study}/{seed}" for study in ("4bit", "rank_8", *experiment.OF_DPO) for seed in ("3415", "3416")}
    assert experiment.scored_in(tmp_path) == known
    rows = read_predictions(tmp_path / "predictions.csv.gz")
    assert len(rows) == (2 * 2 + 1) * 60 * 2, "of two runs two arms each, and a baseline once"
    assert rows["chosen_log_prob"].notna().equals(rows["kind"] == "model")
    again = (tmp_path / "predictions.csv.gz").read_bytes()
    experiment.collect(jobs, tmp_path / "two", tmp_path)
    assert (tmp_path / "predictions.csv.gz").read_bytes() == again, "nothing is added twice"
    found = study_report.ablations(tmp_path, rows)
    assert found["beta_0.5"]["arms"]["dpo"]["seeds"] == 2
    assert found["beta_0.5"]["comparisons"]["dpo - unchanged"]["value"] == 0
    default, panel = study_report.panels(found)["beta"]
    assert default == "0.1" and set(panel) == {"0.05", "0.1", "0.2", "0.5"}
    assert {one["arms"]["dpo"]["seeds"] for one in panel.values()} == {2}, "the unchanged arm has the same runs"
    assert found["beta_0.5"]["comparisons"]["dpo - sft"]["value"] == found["rank_8"]["comparisons"]["dpo - sft"]["value"]


def test_published_cards_are_what_their_template_and_the_study_give(tmp_path):
    for name in ("predictions.csv.gz", "generation.json"):
        shutil.copy(experiment.RESULTS / name, tmp_path)
    shutil.copytree(experiment.RESULTS / "adapters", tmp_path / "adapters")
    cards = {path: path.read_text() for path in sorted(tmp_path.glob("adapters/*/README.md"))}
    for path in cards:
        path.unlink()
    experiment.write_cards(tmp_path)
    assert [*cards] == sorted(tmp_path.glob("adapters/*/README.md")) and len(cards) == 3
    for path, card in cards.items():
        assert path.read_text() == card, "python tests/benchmarks/experiment.py report"
        assert "- is one of 10 training runs; " in card and "with sha256 `" in card and "bfloat16 copy of" in card
    assert ["generated answers, 65.6% recommend" in card for card in cards.values()] == [True, False, False]


def test_a_measurement_takes_the_place_of_its_own_case_alone(tmp_path):
    path = tmp_path / "gpu.json"
    one, other = ({"device": device, "micro_batch": 8, "pairs_per_second": 1.0} for device in ("H100", "H200"))
    gpu.save(path, [one, other], ("device", "micro_batch"))
    gpu.save(path, [other | {"pairs_per_second": 2.0}], ("device", "micro_batch"))
    assert [(record["device"], record["pairs_per_second"]) for record in json.loads(path.read_text())] == [("H100", 1.0), ("H200", 2.0)]
