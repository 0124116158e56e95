"""The notebook as it is committed, and executed afresh on a tiny model."""

import copy
import json
import re
from collections import Counter

import nbformat
import pytest
from nbclient import NotebookClient

import config
from config import EvaluationSettings, TrainingSettings

NOTEBOOK = config.ROOT / "dpo_comparison.ipynb"


def outputs_of(notebook, kind):
    return [output for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == kind]


def complaints(notebook):
    """Errors and whatever was written to stderr."""
    said = [output.text for output in outputs_of(notebook, "stream") if output.name == "stderr"]
    return [error.evalue for error in outputs_of(notebook, "error")] + said


def texts(cell):
    """What a cell printed, and what it displayed as HTML, else as text."""
    shown = [output.get("data", {}) for output in cell.outputs]
    displayed = [data.get("text/html", data.get("text/plain", "")) for data in shown]
    return "".join(output.get("text", "") + text for output, text in zip(cell.outputs, displayed, strict=True))


def table_of(html):
    """A table's columns: its cells by row, by head."""
    head, body = html.split("<tbody>")
    named = re.findall(r"<tr>\s*<th>(.*?)</th>(.*?)</tr>", body, re.DOTALL)
    rows = {name: re.findall("<td>(.*?)</td>", row) for name, row in named}
    heads = re.findall("<th>(.+?)</th>", head)
    return {column: {name: cells[number] for name, cells in rows.items()} for number, column in enumerate(heads)}


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
    """Its first two sections describe data and runs; from the third on it only shows."""
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    third = next(index for index, cell in enumerate(cells) if cell.source.startswith("## 3. "))
    code = [cell.source for cell in cells[third:] if cell.cell_type == "code"]
    assert len(code) > 10
    for source in code:
        assert not any(word in source for word in ("numpy", "np.", ".mean(", ".sum(", ".std(", "groupby")), source


def test_the_commands_that_the_notebook_names_are_accepted():
    text = NOTEBOOK.read_text(encoding="utf-8")
    commands = re.findall(r"python (train|evaluate)_dpo\.py((?: --\w+ \w+)*)", text)
    assert {script for script, _ in commands} == {"train", "evaluate"}
    for script, flags in commands:
        kind = {"train": TrainingSettings, "evaluate": EvaluationSettings}[script]
        config.parse_settings(kind, flags.split())


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


LOOK = "print(json.dumps([shares.to_dict(), len(axis.lines), len(axis.containers)]))"  # what a figure shows


@pytest.fixture(scope="module")
def executed(evaluated, tmp_path_factory):
    """Texts by cell of two executions, on an evaluation and without one; where the second wrote; the files before.

    Both in one kernel: the second time there are neither results nor adapters where it looks.
    """
    elsewhere, before = tmp_path_factory.mktemp("elsewhere"), files_of(config.evaluation_folder(evaluated))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for name in ("data-genres", "data-popularity"):
        after = 1 + next(index for index, cell in enumerate(notebook.cells) if cell.id == name)
        notebook.cells.insert(after, nbformat.v4.new_code_cell(LOOK, id=f"{name}-look"))
    half = len(notebook.cells)
    nothing = nbformat.v4.new_code_cell(f"os.environ['DPO_NOTEBOOK_OUTPUTS'] = {str(elsewhere)!r}")
    notebook.cells += [nothing, *copy.deepcopy(notebook.cells)]
    for number, cell in enumerate(notebook.cells):
        cell.id = f"{cell.id}-{number}"
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("DPO_NOTEBOOK_OUTPUTS", evaluated.outputs)
        patched.setenv("DPO_NOTEBOOK_USERS", "3")
        patched.setenv("OMP_NUM_THREADS", "1")
        NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(config.ROOT)}}).execute()
    assert complaints(notebook) == []
    parts = (notebook.cells[:half], notebook.cells[half + 1 :])
    code = [[cell for cell in part if cell.cell_type == "code"] for part in parts]
    first, second = ({cell.id.rpartition("-")[0]: texts(cell) for cell in part} for part in code)
    return first, second, elsewhere, before


def test_the_notebook_runs_on_an_evaluation_and_without_one(executed, evaluated):
    first, second, elsewhere, before = executed
    evaluation = config.evaluation_folder(evaluated)
    assert str(evaluation) in first["source"] and "loaded: base, sft, dpo" in first["load"]
    for name in ("show-user", "own-pair"):
        assert first[name].count("as Option A") == first[name].count("as Option B") == 1
        assert first[name].count("p = ") == 6
    assert "3 users" in first["batch-users"] and "verdict:" in first["batch-users"]
    assert "verdict:" in first["summary"] and r"\toprule" in first["latex-table"]
    assert files_of(evaluation) == before
    assert (evaluation.parent / "notebook" / "figures" / "accuracy.pdf").is_file()

    assert "docs/results" in second["source"] and "python evaluate_dpo.py" in second["source"]
    assert "Make it with: python" in second["data-table"] + second["load"]
    assert "No arms are loaded" in second["batch-users"] and "verdict:" in second["summary"]
    assert (elsewhere / "notebook" / "table.tex").is_file()


def test_the_data_are_described_as_they_are(executed, evaluated):
    train, test = config.load_split(evaluated)
    found = table_of(executed[0]["data-table"])
    assert found["training"] == {
        "pairs": "42",
        "users": "42",
        "different films as options": str(len({film.title for pair in train for film in (pair.preferred, pair.other)})),
        "genres a film, mean": "1.50",
        "preferred film is Option A in the file, %": f"{100 * sum(pair.order == 'A' for pair in train) / 42:.1f}",
        "preferred film is Option A as models see it, %": "50.0",
        "preferred film is the more popular one, %": "100.0",
    }
    assert found["test"]["pairs"] == "18"
    assert found["test"]["preferred film is Option A as models see it, %"] == "50.0"


def test_genres_and_popularity_are_drawn_as_they_are(executed, evaluated):
    pairs = [pair for part in config.load_split(evaluated) for pair in part]
    assert "<Figure" in executed[0]["data-genres"] and "<Figure" in executed[0]["data-popularity"]
    shares, _, bars = json.loads(executed[0]["data-genres-look"])
    for kind, films in {"preferred film": [p.preferred for p in pairs], "other film": [p.other for p in pairs]}.items():
        counts = Counter(genre for film in films for genre in film.genres)
        assert shares[kind] == pytest.approx({genre: 100 * counts[genre] / 60 for genre in shares[kind]})
    totals = [shares["preferred film"][genre] + shares["other film"][genre] for genre in shares["other film"]]
    assert totals == sorted(totals) and len(totals) == 8 and bars == 2, "the most frequent genre is drawn on top"
    shares, lines, _ = json.loads(executed[0]["data-popularity-look"])
    assert lines == 2 and set(shares["other film"].values()) == {1.0}, "other films are never watched here"
    reached = list(shares["preferred film"].values())
    assert reached[0] == 0 and reached[-1] == 1 and reached == sorted(reached)


def test_each_training_run_is_one_row(executed, evaluated):
    found = table_of(executed[0]["runs"])
    assert found["stage"] == {"sft 3407": "sft", "dpo 3407": "dpo"}
    assert list(found["steps"].values()) == ["3", "3"] and list(found["seed"].values()) == ["3407"] * 2
    rates = [float(rate) for rate in found["learning rate"].values()]
    assert rates == [1e-3, 0.05], "each stage's own"
    assert float(found["first loss"]["dpo 3407"]) == pytest.approx(0.6931, abs=1e-3)
    assert set(found) == {
        *("stage", "base model", "seed", "rows", "steps", "learning rate"),
        *("first loss", "last loss", "minutes", "device"),
    }
