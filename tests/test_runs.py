"""What run.json of a training run says, and what is noted of runs that are compared."""

import json
from pathlib import Path

import pytest
from conftest import adapter_of, make_pairs

import config
import evaluate_dpo
import train_dpo
from config import EvaluationSettings, TrainingSettings
from data.files import write_json
from data.runs import (
    made_otherwise,
    model_of,
    notes_on,
    notes_on_rows_seen,
    notes_on_training,
    of_another_stage,
    read_run,
    rows_seen,
)


def run_in(folder: Path, **run) -> Path:
    """An adapter's folder of which nothing but its run.json matters."""
    folder.mkdir(exist_ok=True)
    write_json(folder / "run.json", run)
    return folder


def test_the_model_named_beside_predictions_cannot_steer_the_terminal(tmp_path):
    assert model_of(read_run(tmp_path)) == ""
    for text in ("no JSON", "[]", '{"settings": []}', '{"settings": {"base_model": "x"}}'):
        (tmp_path / "run.json").write_text(text)
        assert model_of(read_run(tmp_path)) == ""
    run_in(tmp_path, settings={"base_model": "somebody/model\x1b[2J<b>", "bits": 4})
    assert model_of(read_run(tmp_path)) == "model__2J_b_ in 4 bits"


def test_an_adapter_of_other_settings_is_not_passed_off_as_this_one():
    asked = vars(TrainingSettings(beta=0.5, sft_epochs=4.0, outputs="elsewhere"))
    run = {"settings": vars(TrainingSettings()) | {"push_to_hub": "films"}}  # which an earlier version had
    assert made_otherwise(run, "dpo", asked) == "beta 0.1, not 0.5"
    assert made_otherwise(run, "sft", asked) == "sft_epochs 1.0, not 4.0"
    del run["settings"]["beta"]
    assert made_otherwise(run, "dpo", asked) == "", "a setting newer than the run is no difference"
    for unknown in ({}, {"settings": None}, {"settings": []}):
        assert made_otherwise(unknown, "dpo", asked) == ""


@pytest.mark.parametrize(("arm", "stage"), [("sft", "dpo"), ("sft_long", "dpo"), ("dpo", "sft")])
def test_an_adapter_of_another_stage_than_its_arms_name_is_told(tmp_path, arm, stage):
    told = f"{tmp_path} is an adapter of {stage}, given as the arm {arm}"
    assert of_another_stage(run_in(tmp_path, stage=stage), arm) == told
    assert of_another_stage(tmp_path, "mine") == ""
    assert of_another_stage(run_in(tmp_path, stage="sft" if stage == "dpo" else "dpo"), arm) == ""
    assert of_another_stage(run_in(tmp_path, stage=["dpo"]), arm) == "", "somebody's run.json may say anything"


def test_unequal_training_and_repeated_histories_are_noted(tmp_path):
    for name, seen, start in (("sft", 100, None), ("dpo", 50, "sft"), ("sft_long", 150, None)):
        run_in(tmp_path / name, rows_seen=seen, initial_adapter=str(tmp_path / start) if start else None)
    adapters = {name: {"1": tmp_path / name} for name in ("sft", "dpo", "sft_long")}
    pairs = make_pairs(30)
    assert rows_seen(tmp_path / "dpo") == 150 and notes_on(pairs, adapters, 4) == []
    del adapters["sft_long"]
    [note] = notes_on(pairs, adapters, 4)
    assert "dpo has seen 150 pairs" in note and "sft 100" in note
    adapters["sft_long"] = {"1": tmp_path / "sft"}
    [note] = notes_on(pairs, adapters, 4)
    assert "sft 100 and sft_long 100" in note, "an arm is longer SFT by what it has seen, not by its name"
    adapters["sft_long"] = {"1": run_in(tmp_path / "more", rows_seen=400)}
    [note] = notes_on(pairs, adapters, 4)
    assert note.startswith("sft_long has seen 400 pairs in training, more than dpo")
    assert notes_on_rows_seen(adapters) == [note]
    del adapters["sft_long"]
    (tmp_path / "sft" / "run.json").write_text("no JSON")
    assert notes_on(pairs, adapters, 4) == [], "what is not known is not compared"
    assert "10 of 40 test pairs share their history" in notes_on([*pairs, *pairs[:10]], {}, 4)[0]


def test_training_runs_of_an_arm_that_are_not_alike_are_noted(trained, tmp_path):
    dpo = read_run(adapter_of(trained[1]))
    runs = {}
    earlier = {"seed": 2, "outputs": "elsewhere", "push_to_hub": "films", "merge": "merged"}  # two that are no more
    for seed, changes in {"1": {}, "2": earlier, "3": {"beta": 0.5}}.items():
        runs[seed] = run_in(tmp_path / seed, **dpo | {"settings": dpo["settings"] | changes})
    assert notes_on_training({"dpo": runs}, 4) == ["the training runs of dpo differ in beta, not in their seed alone"]
    strange = run_in(runs.pop("3"), stage=["dpo"], settings={"beta": 1})
    assert notes_on_training({"dpo": {"3": strange}}, 4) == [], "somebody's run.json may say anything"
    assert notes_on_training({"dpo": runs}, 4) == []


def test_what_dpo_began_with_is_noted(mine):
    training, flags = mine
    sft, dpo = (adapter_of(flags, stage) for stage in ("sft", "dpo"))
    adapters = {"sft": {"1": sft}, "dpo": {"1": dpo}}
    assert notes_on_training(adapters, 4) == []
    told = [note.partition(" was trained on weights in 4 bits")[0] for note in notes_on_training(adapters, 16)]
    assert told == ["sft", "dpo"] and notes_on(make_pairs(30), adapters, 16)[-2:] == notes_on_training(adapters, 16)
    (sft / "run.json").unlink()
    train_dpo.main([*training, "--stage", "dpo", "--sft_adapter", str(sft)])
    settings = config.parse_settings(EvaluationSettings, flags)
    _, test = config.load_split(settings)
    _, mismatches = evaluate_dpo.find_adapters(settings, test)
    assert len(mismatches) == 2 and "dpo_4bit_final began with an adapter without run.json" in mismatches[1]
    assert json.loads((dpo / "run.json").read_text())["initial_adapter_known"] is False
    train_dpo.main([*training, "--stage", "sft", "--seed", "8"])
    assert notes_on_training(adapters, 4) == ["dpo began with another SFT adapter than the arm sft"]
    assert notes_on_training({"dpo": {"1": dpo}}, 4) == []
