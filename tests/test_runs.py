"""What run.json of a training run says, and what is noted of runs that are compared."""

import json
import math
import shutil
from pathlib import Path

import pytest
from conftest import adapter_of
from safetensors.numpy import save_file

import config
import evaluate_dpo
import train_dpo
from config import EvaluationSettings, TrainingSettings
from data.files import file_sha256, write_json
from data.runs import (
    WEIGHTS,
    changed_since,
    decisive,
    learning_rate,
    lineage,
    made_otherwise,
    model_of,
    notes_on,
    of_another_stage,
    pairs_seen,
    read_run,
    rows_in,
    training_runs,
    what_is_there,
)


def run_in(folder: Path, **run) -> Path:
    """An adapter's folder of which nothing but its run.json matters."""
    folder.mkdir(exist_ok=True)
    write_json(folder / "run.json", run)
    save_file({}, folder / WEIGHTS)
    return folder


def test_the_model_named_beside_predictions_cannot_steer_the_terminal(tmp_path):
    assert model_of(read_run(tmp_path)) == ""
    for text in ("no JSON", "[]", '{"settings": []}', '{"settings": {"base_model": "x"}}'):
        (tmp_path / "run.json").write_text(text)
        assert model_of(read_run(tmp_path)) == ""
    run_in(tmp_path, settings={"base_model": "somebody/model\x1b[2J<b>", "bits": 4})
    assert model_of(read_run(tmp_path)) == "model__2J_b_ in 4 bits"


def test_an_adapter_of_other_settings_is_not_passed_off_as_this_one():
    def asked(stage: str, pairs: str = "pairs", start: str | None = "start") -> dict:
        settings = TrainingSettings(beta=0.5, sft_epochs=4.0, control_learning_rate=1e-3, outputs="elsewhere")
        return decisive(stage, vars(settings), pairs, start)

    settings = vars(TrainingSettings()) | {"push_to_hub": "films"}  # which an earlier version had
    run = {"settings": settings, "data": {"pairs_sha256": "pairs"}, "initial_adapter_sha256": "start"}
    of = {stage: run | {"stage": stage} for stage in ("sft", "sft_more", "dpo")}
    assert made_otherwise(of["dpo"], "dpo", asked("dpo")) == "beta 0.1, not 0.5"
    assert made_otherwise(of["sft"], "sft", asked("sft")) == "sft_epochs 1.0, not 4.0"
    assert made_otherwise(of["sft_more"], "sft_more", asked("sft_more")) == "control_learning_rate None, not 0.001"
    assert "sha256 of the pairs 'pairs', not 'others'" in made_otherwise(of["dpo"], "dpo", asked("dpo", "others"))
    found = made_otherwise(of["dpo"], "dpo", asked("dpo", start="another"))
    assert "sha256 of the adapter that it starts from 'start', not 'another'" in found
    del settings["beta"]
    assert made_otherwise(of["dpo"] | {"data": {"prompt_digest": "other"}}, "dpo", asked("dpo")).count("not") == 2
    assert made_otherwise(of["dpo"], "dpo", asked("dpo")) == "", "a setting newer than the run is no difference"
    for unknown in ({}, {"settings": None}, {"settings": []}, of["sft"]):
        assert made_otherwise(unknown, "dpo", asked("dpo")) == "no run.json of dpo"


def test_where_a_run_comes_from_is_read_from_it(tmp_path):
    assert str(lineage(tmp_path)) == "Lineage(reference='', beta=nan, pairs_seen=nan)"
    sft = run_in(tmp_path / "sft", stage="sft", pairs_seen=100, settings={"beta": 0.1})
    assert lineage(sft)[::2] == ("", 100)
    run = {"stage": "dpo", "settings": {"beta": 0.1}, "pairs_seen": 50}
    assert lineage(run_in(tmp_path / "dpo", **run, initial_adapter=str(sft))) == ("sft", 0.1, 50)
    assert lineage(run_in(tmp_path / "dpo", **run, initial_adapter=None)) == ("base", 0.1, 50)
    for unknown in ({"beta": "much"}, {"beta": 0.1, "loss_type": "ipo"}):  # IPO defines no probability
        reference, beta, seen = lineage(run_in(tmp_path / "dpo", **run | {"settings": unknown}))
        assert (reference, seen) == ("base", 50) and math.isnan(beta), unknown


@pytest.mark.parametrize(("arm", "stage"), [("sft", "dpo"), ("sft_long", "dpo"), ("dpo", "sft"), ("dpo", "sft_more")])
def test_an_adapter_of_another_stage_than_its_arms_name_is_told(tmp_path, arm, stage):
    told = f"{tmp_path} is an adapter of {stage}, given as the arm {arm}"
    assert of_another_stage(run_in(tmp_path, stage=stage), arm) == told
    assert of_another_stage(tmp_path, "mine") == ""
    assert of_another_stage(run_in(tmp_path, stage="sft" if stage == "dpo" else "dpo"), arm) == ""
    assert of_another_stage(run_in(tmp_path, stage=["dpo"]), arm) == "", "somebody's run.json may say anything"


def test_an_adapter_of_another_pairs_file_is_noted_once(tmp_path):
    runs = {arm: {"1": run_in(tmp_path / arm, data={"pairs_sha256": arm[:3]})} for arm in ("sft", "sft_more", "dpo")}
    assert notes_on(runs, 4, "sft")[0].startswith("dpo: trained on another pairs file than the one given here")
    assert notes_on(runs, 4, "new")[0].startswith("sft, sft_more, dpo: trained on another")
    assert notes_on({"dpo": {"1": run_in(tmp_path / "dpo", data=["?"])}}, 4, "new") == []


def test_what_a_run_has_seen_is_known_where_its_run_json_says_it(tmp_path):
    assert pairs_seen(run_in(tmp_path / "dpo", pairs_seen=70)) == 70
    for unknown in ({}, {"pairs_seen": None}, {"pairs_seen": "many"}):
        assert pairs_seen(run_in(tmp_path / "dpo", **unknown)) == 0, unknown


def test_an_adapter_is_asked_for_with_the_start_that_is_there_or_is_trained_first(tmp_path):
    settings = vars(TrainingSettings())
    about = {"data": {"pairs_sha256": "pairs"}, "initial_adapter_sha256": "start"}
    dpo, sft = run_in(tmp_path / "dpo", stage="dpo", settings=settings, **about), tmp_path / "sft"
    assert what_is_there(dpo, "dpo", settings, "pairs", sft, tmp_path).done
    sft.mkdir()
    (sft / WEIGHTS).write_bytes(b"trained again")
    there = what_is_there(dpo, "dpo", settings, "pairs", sft, tmp_path)
    assert not there.done and there.remedy and "adapter that it starts from 'start', not " in there.said
    assert "is replaced" in what_is_there(dpo, "dpo", settings | {"restart": True}, "pairs", sft, tmp_path).said


@pytest.mark.parametrize(("steps", "seen"), [(0, 0), (1, 4), (2, 8), (3, 10), (4, 14), (6, 20)])
def test_the_last_step_of_a_pass_sees_what_is_left_of_the_rows(steps, seen):
    assert rows_in(steps, rows=10, batch=4) == seen


def test_adapters_that_are_not_those_of_the_evaluation_are_told(tmp_path):
    x, y, results = tmp_path / "x", tmp_path / "y", tmp_path / "evaluation"
    x.mkdir()
    (x / WEIGHTS).write_bytes(b"evaluated")
    write_json(results / "run.json", {"adapters_sha256": {str(x): file_sha256(x / WEIGHTS), str(y): "0"}})
    gone = f"{y} was evaluated and is gone"
    assert changed_since(results) == [gone]
    (x / WEIGHTS).write_bytes(b"trained again")
    assert changed_since(results) == [f"{x} holds other weights than those that were evaluated", gone]
    for anything in ({}, {"adapters_sha256": ["x"]}):
        write_json(results / "run.json", anything)
        assert changed_since(results) == []


def test_adapters_that_moved_with_their_results_are_those_that_were_evaluated(tmp_path):
    outputs = tmp_path / "outputs"
    (outputs / "seed2").mkdir(parents=True)
    places = {"1": outputs / "dpo_final", "2": outputs / "seed2" / "dpo_final"}
    folders = {seed: run_in(place, stage="dpo", seed=seed) for seed, place in places.items()}
    for seed, folder in folders.items():
        (folder / WEIGHTS).write_text(seed)
    adapters = {"dpo": {seed: str(folder) for seed, folder in folders.items()}}
    evaluated = {str(folder): file_sha256(folder / WEIGHTS) for folder in folders.values()}
    about = {"settings": {"outputs": str(outputs)}, "adapters": adapters, "adapters_sha256": evaluated}
    write_json(outputs / "evaluation" / "run.json", about)
    moved = outputs.rename(tmp_path / "kept") / "evaluation"
    outputs.mkdir()
    for there in ("nothing", "the next study"):
        assert changed_since(moved) == [], there
        assert training_runs(moved) == {f"dpo {seed}": {"stage": "dpo", "seed": seed} for seed in "12"}, there
        (run_in(folders["1"], stage="sft") / WEIGHTS).write_bytes(b"of the next study")


def test_the_learning_rate_of_a_run_is_its_stages():
    settings = {"sft_learning_rate": 2e-4, "learning_rate": 5e-5, "control_learning_rate": None}
    rates = [learning_rate({"stage": stage, "settings": settings}) for stage in ("sft", "sft_more", "dpo")]
    assert rates == [2e-4, 2e-4, 5e-5]
    assert learning_rate({"stage": "sft_more", "settings": settings | {"control_learning_rate": 1e-4}}) == 1e-4


def test_training_runs_of_an_arm_that_are_not_alike_are_noted(trained, tmp_path):
    dpo = read_run(adapter_of(trained[1]))
    runs = {}
    earlier = {"seed": 2, "outputs": "elsewhere", "push_to_hub": "films", "merge": "merged"}  # two that are no more
    for seed, changes in {"1": {}, "2": earlier, "3": {"beta": 0.5}}.items():
        own = {"settings": dpo["settings"] | changes, "initial_adapter_sha256": seed}
        runs[seed] = run_in(tmp_path / seed, **dpo | own)
    assert notes_on({"dpo": runs}, 4) == ["the training runs of dpo differ in beta, not in their seed alone"]
    one = {seed: run_in(runs[seed], **read_run(runs[seed]) | {"initial_adapter_sha256": "one"}) for seed in "12"}
    assert notes_on({"dpo": one}, 4) == [
        "all runs of dpo began with one SFT adapter: intervals leave out how runs of SFT differ"
    ]
    runs |= {seed: run_in(one[seed], **read_run(one[seed]) | {"initial_adapter_sha256": seed}) for seed in "12"}
    strange = run_in(runs.pop("3"), stage=["dpo"], settings={"beta": 1})
    assert notes_on({"dpo": {"3": strange}}, 4) == [], "somebody's run.json may say anything"
    assert notes_on({"dpo": runs}, 4) == []


def test_a_control_that_is_none_of_this_dpo_is_noted(trained, tmp_path):
    dpo, sft = (read_run(adapter_of(trained[1], stage)) for stage in ("dpo", "sft"))
    more = dpo | {"stage": "sft_more"}
    folders = {arm: {"1": run_in(tmp_path / arm, **run)} for arm, run in (("dpo", dpo), ("sft_more", more))}
    folders = {"sft": {"1": adapter_of(trained[1], "sft")}} | folders
    assert notes_on(folders, 4) == [] and sft["stage"] == "sft"
    run_in(tmp_path / "sft_more", **more | {"initial_adapter_sha256": "another"})
    told = "sft_more began with another SFT adapter than the run of sft that it is compared with"
    assert notes_on(folders, 4) == [told]
    run_in(tmp_path / "sft_more", **more | {"settings": dpo["settings"] | {"effective_batch": 2, "learning_rate": 1}})
    assert notes_on(folders, 4) == ["the control sft_more was trained otherwise than dpo, in effective_batch"]


def test_what_dpo_began_with_is_noted(mine):
    training, flags = mine
    sft, dpo = (adapter_of(flags, stage) for stage in ("sft", "dpo"))
    adapters = {"sft": {"1": sft}, "dpo": {"1": dpo}}
    assert notes_on(adapters, 4) == []
    told = [note.partition(" was trained on weights in 4 bits")[0] for note in notes_on(adapters, 16)]
    assert told == ["sft", "dpo"] and notes_on(adapters, 16)[-2:] == notes_on(adapters, 16)
    (sft / "run.json").unlink()
    elsewhere = [*training, "--outputs", str(sft.parent / "again")]
    train_dpo.main([*elsewhere, "--stage", "dpo", "--sft_adapter", str(sft)])
    dpo = sft.parent / "again" / dpo.name
    flags = [*flags, "--adapters", f"dpo={dpo}"]
    adapters["dpo"] = {"1": dpo}
    settings = config.parse_settings(EvaluationSettings, flags)
    _, test = config.load_split(settings)
    _, mismatches = evaluate_dpo.find_adapters(settings, test)
    assert len(mismatches) == 2 and "dpo_4bit_final began with an adapter without run.json" in mismatches[1]
    assert json.loads((dpo / "run.json").read_text())["initial_adapter_known"] is False
    train_dpo.main([*training, "--stage", "sft", "--seed", "8", "--restart", "true"])
    assert notes_on(adapters, 4) == ["dpo began with another SFT adapter than the run of sft that it is compared with"]
    assert notes_on({"dpo": {"1": dpo}}, 4) == []
    started = json.loads((dpo / "run.json").read_text())["initial_adapter_sha256"]
    run = json.loads((sft / "run.json").read_text())
    other = shutil.copytree(sft, sft.parent / "again" / sft.name)
    (sft / "run.json").write_text(json.dumps(run | {"copy_of_sha256": started}))  # as of the published adapters
    assert notes_on(adapters, 4) == []
    assert notes_on(adapters | {"sft": {"1": sft, "2": other}}, 4) == []
    assert len(notes_on(adapters | {"sft": {"1": other, "2": sft}}, 4)) == 1, "dpo is referred to the SFT of its seed"
