"""The notebook as it is committed, executed afresh on a tiny model, and the functions that it calls."""

import copy
import json
import re

import ipywidgets
import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

import config
import evaluate_dpo
import train_dpo
from config import EvaluationSettings
from conftest import make_pairs
from data.pairs import PairsError, make_pair, preference_row, write_pairs

NOTEBOOK = config.ROOT / "dpo_comparison.ipynb"


def outputs_of(notebook, kind):
    return [output for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == kind]


def complaints(notebook):
    """Errors and whatever was written to stderr."""
    said = [output.text for output in outputs_of(notebook, "stream") if output.name == "stderr"]
    return [error.evalue for error in outputs_of(notebook, "error")] + said


def texts(cell):
    """What a cell printed, and its HTML."""
    return "".join(output.get("text", "") or output.get("data", {}).get("text/html", "") for output in cell.outputs)


def test_the_committed_notebook_was_executed_in_order_without_complaint():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert complaints(notebook) == []
    assert notebook.metadata.kernelspec.name == "python3"
    assert NOTEBOOK.stat().st_size < 1_500_000
    assert sum("image/png" in output.data for output in outputs_of(notebook, "display_data")) >= 5


def test_the_notebook_computes_no_measure():
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if cell.cell_type == "code":
            assert not any(word in cell.source for word in ("numpy", "np.", ".mean(", ".sum(", ".std(", "groupby")), cell.source


def test_the_commands_that_the_notebook_names_are_accepted():
    text = NOTEBOOK.read_text(encoding="utf-8")
    commands = re.findall(r"python (train|evaluate)_dpo\.py((?: --\w+ \w+)*)", text)
    assert {script for script, _ in commands} == {"train", "evaluate"}
    for script, flags in commands:
        kind = {"train": config.TrainingSettings, "evaluate": EvaluationSettings}[script]
        config.parse_settings(kind, flags.split())


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, tiny_model):
    """Settings of a tiny run that was trained and evaluated."""
    folder = tmp_path_factory.mktemp("run")
    write_pairs(folder / "pairs.jsonl", make_pairs(60))
    flags = ["--preset", "small", "--base_model", str(tiny_model), "--pairs", str(folder / "pairs.jsonl"), "--outputs", str(folder / "outputs")]
    train_dpo.main([*flags, *"--max_steps 2 --batch_size 2 --effective_batch 4 --validation_pairs 2".split()])
    evaluate_dpo.main([*flags, "--resamples", "50"])
    return config.parse_settings(EvaluationSettings, flags)


@pytest.fixture(scope="module")
def split(evaluated):
    return config.load_split(evaluated)


@pytest.fixture(scope="module")
def arms(evaluated, split):
    return evaluate_dpo.load_arms(evaluated, split[1])


@pytest.fixture(scope="module")
def predictions(evaluated):
    return evaluate_dpo.read_results(config.evaluation_folder(evaluated))[1]


def test_the_notebook_runs_on_an_evaluation_and_without_one(evaluated, tmp_path, monkeypatch):
    """Both in one kernel: the second time there are neither results nor adapters where it looks."""
    monkeypatch.setenv("DPO_NOTEBOOK_OUTPUTS", evaluated.outputs)
    monkeypatch.setenv("DPO_NOTEBOOK_USERS", "3")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    again = copy.deepcopy(notebook.cells)
    nothing = nbformat.v4.new_code_cell(f"os.environ['DPO_NOTEBOOK_OUTPUTS'] = {str(tmp_path)!r}")
    notebook.cells += [nothing, *again]
    for number, cell in enumerate(notebook.cells):
        cell.id = f"{cell.id}-{number}"
    evaluation = config.evaluation_folder(evaluated)
    before = {path: path.read_bytes() for path in evaluation.rglob("*") if path.is_file()}
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(config.ROOT)}}).execute()
    assert complaints(notebook) == []

    half = len(again)
    first, second = ({cell.id.rpartition("-")[0]: texts(cell) for cell in part if cell.cell_type == "code"} for part in (notebook.cells[:half], notebook.cells[half + 1 :]))
    assert str(evaluation) in first["source"] and "loaded: base, sft, dpo" in first["load"]
    for name in ("show-user", "own-pair"):
        assert first[name].count("as Option A") == first[name].count("as Option B") == 1 and first[name].count("p = ") == 6
    assert "3 users" in first["batch-users"] and "verdict:" in first["summary"] and r"\toprule" in first["latex-table"]
    assert {path: path.read_bytes() for path in evaluation.rglob("*") if path.is_file()} == before
    assert (evaluation.parent / "notebook" / "figures" / "accuracy.pdf").is_file()

    assert "docs/results" in second["source"] and "python evaluate_dpo.py" in second["source"]
    assert "Make it with: python" in second["data-table"] + second["load"]
    assert "No arms are loaded" in second["batch-users"] and "verdict:" in second["summary"]
    assert (tmp_path / "notebook" / "table.tex").is_file()


def test_users_side_by_side_are_those_of_the_evaluation(evaluated, split, arms, predictions):
    train, test = split
    scored = evaluate_dpo.predict_with(arms, train, test[:4], 2)
    keys = ["arm", "pair_id", "order"]
    both = scored.merge(predictions, on=keys, suffixes=("", "_recorded"))
    assert len(both) == len(scored) == 7 * 4 * 2
    for name in evaluate_dpo.MARGINS:
        assert np.allclose(both[name], both[f"{name}_recorded"], atol=2e-4, equal_nan=True)
    steps = evaluate_dpo.side_by_side(arms, test[2])
    assert not next(steps)["answer"].any(), "the choices come first"
    live = list(steps)[-1]
    recorded = evaluate_dpo.recorded_choices(predictions, test[2])
    assert list(live["arm"]) == list(recorded["arm"]) == ["base", "base", "sft", "sft", "dpo", "dpo"]
    assert list(live["letter"]) == list(recorded["letter"]) and list(live["film"]) == list(recorded["film"])
    assert np.allclose(live["probability"], recorded["probability"], atol=1e-4) and (live["probability"] >= 0.5).all()
    assert live["answer"].str.len().gt(0).all() and live["probability"].round(6).nunique() > 2
    for row in live.itertuples():
        option = preference_row(test[2], row.order)["prompt"].partition(f"Option {row.letter}: ")[2]
        assert option.startswith(row.film), "the film is the one under the letter"


def test_one_user_is_shown_escaped_with_the_cited_genres_marked():
    pair = make_pair(["<b>One</b> (1990)", "A (1991)", "B (1992)", "C (1993)", "D (1994)"], ("X & Y (1995)", "War|Sci-Fi"), ("Z (1996)", "Drama"))
    answers = ["The better recommendation is Option A. Reasoning: <i> War, not Drama <script>", "I like Drama."]
    rows = evaluate_dpo.choices("dpo", pair, np.array([1.0, 2.0]), answers)
    assert list(rows["letter"]) == ["A", "B"] and set(rows["film"]) == {"X & Y (1995)"}
    shown = evaluate_dpo.choices_html(pair, rows, evaluate_dpo.genre_pattern([pair]))
    assert "&lt;b&gt;One&lt;/b&gt; (1990)" in shown and "X &amp; Y (1995) (p = 0.73), <b>right</b>" in shown and "&lt;script&gt;" in shown
    assert "&lt;i&gt; <b>War</b>, not <u>Drama</u>" in shown and "I like <u>Drama</u>." in shown
    assert "<b>right" not in evaluate_dpo.choices_html(pair, rows, evaluate_dpo.genre_pattern([pair]), known=False)
    torn = evaluate_dpo.choices("sft", pair, np.array([-1.0, 0.5]), ["", ""])
    assert list(torn["letter"]) == ["B", "B"] and list(torn["film"]) == ["Z (1996)", "X & Y (1995)"]
    assert evaluate_dpo.choices_html(pair, torn, evaluate_dpo.genre_pattern([pair])).rpartition("<td")[2].count("Z (1996), <b>wrong</b>") == 1


def test_the_users_whom_one_arm_gets_right_and_the_other_wrong_the_clearest_first():
    from test_evaluate import predictions_of

    sft = np.array([[3.0, -1], [1, 1], [-2, 1], [4, 4]])
    dpo = np.array([[-1.0, -1], [2, 2], [3, 1], [-1, -1]])
    rows = predictions_of(sft=sft, dpo=dpo)
    test = make_pairs(4)
    users = [pair.pair_id for pair in test]
    groups = evaluate_dpo.user_groups(test, rows, live=False)
    assert groups == {
        "all test users": users,
        "SFT right, DPO wrong": [users[3], users[0]],
        "DPO right, SFT wrong": [users[2]],
    }
    assert evaluate_dpo.user_groups(test, rows[rows["pair_id"] != users[3]], live=False)["SFT right, DPO wrong"] == [users[0]]
    assert evaluate_dpo.user_groups(test, None, live=True)["all test users"] == users
    assert not any(evaluate_dpo.user_groups(test, None, live=False).values())


def test_picking_a_user_shows_that_user():
    shown = []
    picker = evaluate_dpo.user_picker(shown.append, {"all": ["u1", "u2", "u3"], "none": [], "some": ["u3", "u2"]})
    group, user = picker.children[0].children
    assert [label for label, _ in group.options] == ["all (3)", "some (2)"] and shown == ["u1"]
    user.value = "u2"
    group.index = 1
    assert shown == ["u1", "u2", "u3"] and list(user.options) == ["u3", "u2"]


def test_the_form_for_ones_own_pair_hands_over_what_is_written_in_it():
    shown = []
    box = evaluate_dpo.own_pair_box(lambda *given: shown.append(given), ["A (1990)", "B (1991)"], ("C (1992)", "War"), ("D (1993)", "Drama"))
    titles, one, genres, *_ = box.children
    titles.value, one.value, genres.value = "E (1990)\nF (1991)", "G (1992)", "Comedy|War"
    next(child for child in box.children if isinstance(child, ipywidgets.Button)).click()
    assert shown == [(["E (1990)", "F (1991)"], ("G (1992)", "Comedy|War"), ("D (1993)", "Drama"))]


def test_a_pair_of_ones_own_is_checked_as_a_line_of_a_file():
    history = [f"Film {number} (1990)" for number in range(5)]
    pair = make_pair([*history, " "], (" X (1991) ", "War | Drama"), ("Y (1992)", "Comedy"))
    assert (pair.preferred.title, pair.preferred.genres) == ("X (1991)", ("War", "Drama"))
    for wrong, problem in [
        ((history[:4], ("X (1991)", "War"), ("Y (1992)", "War")), "the history has 4 film"),
        ((["no year", *history[1:]], ("X (1991)", "War"), ("Y (1992)", "War")), "a title ends in its"),
        ((history, ("X (1991)", "War"), ("X (1991)", "Drama")), "are the same film"),
        ((history, ("X (1991)", ""), ("Y (1992)", "Drama")), "the input is not"),
    ]:
        with pytest.raises(PairsError, match=problem):
            make_pair(*wrong)


def test_results_are_found_with_their_settings_and_runs(evaluated, tmp_path, monkeypatch):
    evaluation = config.evaluation_folder(evaluated)
    assert evaluate_dpo.results_folder(evaluation) == evaluation
    runs = evaluate_dpo.training_runs(evaluation)
    assert list(runs) == ["sft 3407", "dpo 3407"]
    assert list(evaluate_dpo.runs_table(runs)["steps"]) == [2, 2]
    found = evaluate_dpo.settings_of(evaluation, runs, evaluated.outputs)
    assert (found.base_model, found.pairs, found.outputs) == (evaluated.base_model, evaluated.pairs, evaluated.outputs)

    monkeypatch.chdir(config.ROOT)
    folder = evaluate_dpo.results_folder(tmp_path)
    assert folder in evaluate_dpo.PUBLISHED
    assert len(evaluate_dpo.training_runs(config.ROOT / "docs" / "results" / "small")) == 2

    published = tmp_path / "results"
    (published / "runs").mkdir(parents=True)
    (published / "metrics.json").write_bytes((evaluation / "metrics.json").read_bytes())
    for name in ("main_seed1", "search_seed1"):  # of a study, the main comparison's runs are shown
        (published / "runs" / f"{name}.run.json").write_text(json.dumps(runs["dpo 3407"]))
    (published / "runs" / "main_eval.run.json").write_text(json.dumps({"seconds": {}}))
    metrics, rows = evaluate_dpo.read_results(published)
    assert rows is None and set(evaluate_dpo.draw_all(rows, metrics)) == {"accuracy", "popularity", "position_bias"}
    evaluate_dpo.read_predictions(evaluation / "predictions.csv").to_csv(published / "predictions.csv.gz", index=False)
    assert len(evaluate_dpo.read_results(published)[1]) == 7 * 12 * 2
    runs = evaluate_dpo.training_runs(published)
    assert list(runs) == ["main_seed1"] and evaluate_dpo.settings_of(published, runs, "o").base_model == evaluated.base_model
    monkeypatch.chdir(tmp_path)
    write_pairs("data/elsewhere.jsonl", make_pairs(2))
    runs["main_seed1"]["settings"]["pairs"] = "/another/machine/elsewhere.jsonl"
    assert evaluate_dpo.settings_of(published, runs, "o").pairs == "data/elsewhere.jsonl"


def test_the_data_are_described_as_they_are():
    train, test = make_pairs(60)[:40], make_pairs(60)[40:]
    found = evaluate_dpo.describe_pairs(train, test, 3407)
    assert dict(found["training"]) == {
        "pairs": "40",
        "users": "40",
        "different films as options": str(len({film.title for pair in train for film in (pair.preferred, pair.other)})),
        "genres a film, mean": "1.50",
        "preferred film is Option A in the file, %": "80.0",
        "preferred film is Option A as models see it, %": "50.0",
        "preferred film is the more popular one, %": "100.0",
    }
    assert found["test"]["preferred film is Option A as models see it, %"] == "50.0"
    assert evaluate_dpo.draw_genres(train).axes[0].get_yticklabels()
    assert len(evaluate_dpo.draw_popularity(train).axes[0].lines) == 2
