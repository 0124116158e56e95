"""The notebook as it is committed, and executed afresh on a tiny model."""

import copy
import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import config
from config import EvaluationSettings, TrainingSettings
from data.figures import CAPTIONS, arm_name
from data.files import read_json, write_json
from data.report import MAIN_MEASURES

NOTEBOOK = config.ROOT / "dpo_comparison.ipynb"


def outputs_of(notebook, kind):
    return [output for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == kind]


def complaints(notebook):
    """Errors and whatever was written to stderr."""
    said = [output.text for output in outputs_of(notebook, "stream") if output.name == "stderr"]
    return [error.evalue for error in outputs_of(notebook, "error")] + said


def texts(cell):
    """What a cell printed, and what it displayed as HTML or Markdown, else as text."""
    shown = [output.get("data", {}) for output in cell.outputs]
    kinds = ("text/html", "text/markdown", "text/plain")
    displayed = [next((data[kind] for kind in kinds if kind in data), "") for data in shown]
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


def numbers_of(text):
    return [float(number.replace("−", "-")) for number in re.findall(r"[-−]?\d+(?:\.\d+)?", text)]


def test_what_the_committed_notebook_shows_is_what_the_results_hold():
    """Every cell of its tables of measures; it is executed again whenever the published results change."""
    shown = {cell.id: texts(cell) for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"}
    folder = config.ROOT / re.search(r"results shown: (\S+?),", shown["source"])[1]
    metrics, generation = read_json(folder / "metrics.json"), read_json(folder / "generation.json")
    columns = table_of(shown["table"])
    for measure, column in zip(MAIN_MEASURES, columns.values(), strict=True):
        assert list(column) == [arm_name(arm) for arm in metrics["arms"]]
        for arm, found in metrics["arms"].items():
            held = [found[measure][name] for name in ("value", "low", "high") if found[measure][name] is not None]
            assert numbers_of(column[arm_name(arm)]) == pytest.approx(held, abs=0.0501), (arm, measure)
    for name, column in table_of(shown["generated"]).items() if generation else ():
        for arm, found in generation.items():
            assert float(column[arm_name(arm)]) == pytest.approx(found[name.replace(" ", "_")], abs=5e-4), name
    for arm in ("sft", metrics["control"]):
        found = metrics["comparisons"][f"dpo - {arm}"]
        name = re.escape(arm_name(arm))
        [told] = re.findall(rf"- \*\*Verdict: (.*?) against {name}(?: \(.*?\))?\*\*\. (.*\])", shown["source"])
        held = [found[name] for name in ("value", "low", "high")]
        numbers = numbers_of(told[1].replace("95% interval", ""))
        assert told[0] == found["verdict"] and numbers == pytest.approx(held, abs=0.0501)


def test_the_committed_notebook_names_no_place_of_a_machine_and_each_picture_says_what_it_shows():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    outputs = json.dumps([cell.get("outputs") for cell in notebook.cells])
    assert not re.search(r"/(tmp|root|home|work|mnt)/", outputs)
    drawn = [cell for cell in notebook.cells if "image/png" in str(cell.get("outputs"))]
    assert len(drawn) >= 10 and all(any(f"*{told}.*" in texts(cell) for told in CAPTIONS.values()) for cell in drawn)


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


@pytest.fixture(scope="module")
def executed(evaluated, tmp_path_factory):
    """Texts by cell of four executions, where the second one wrote, and the files before.

    All in one kernel: on an evaluation; where there are neither results nor adapters; and, up to where adapters are
    loaded, on two evaluations beside which there are none: one of the published folder's, one of some given by name.
    """
    elsewhere, before = tmp_path_factory.mktemp("elsewhere"), files_of(Path(evaluated.outputs) / "evaluation")
    own = tmp_path_factory.mktemp("published")
    for name in ("outputs", "given"):
        shutil.copytree(Path(evaluated.outputs) / "evaluation", own / name / "evaluation")
    for arm in ("sft", "dpo"):
        shutil.copytree(config.adapter_folder(evaluated, arm), own / "adapters" / arm)
    run = read_json(own / "given" / "evaluation" / "run.json")
    run["settings"]["adapters"] = [f"{arm}={config.adapter_folder(evaluated, arm)}" for arm in ("sft", "dpo")]
    write_json(own / "given" / "evaluation" / "run.json", run)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    upto = 1 + next(index for index, cell in enumerate(cells) if cell.id == "load")
    places = {"own": evaluated.outputs, "none": str(elsewhere), "published": str(own / "outputs")}
    places["given"] = str(own / "given")
    notebook.cells = []
    for name, outputs in places.items():
        part = copy.deepcopy(cells[:upto] if name in ("published", "given") else cells)
        part.insert(0, nbformat.v4.new_code_cell(f"import os; os.environ['DPO_NOTEBOOK_OUTPUTS'] = {outputs!r}"))
        there = nbformat.v4.new_code_cell(f"ADAPTERS = Path({str(own / 'adapters')!r})", id="there")
        part[2:2] = [there] if name in ("published", "given") else []
        for cell in part:
            cell.id = f"{cell.id}-{name}"
        notebook.cells += part
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("DPO_NOTEBOOK_USERS", "3")
        patched.setenv("OMP_NUM_THREADS", "1")
        NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(config.ROOT)}}).execute()
    assert complaints(notebook) == []
    told = {name: {} for name in places}
    for cell in notebook.cells:
        name, _, place = cell.id.rpartition("-")
        told[place][name] = texts(cell)
    return told, elsewhere, before


def test_the_notebook_runs_on_an_evaluation_and_without_one(executed, evaluated):
    told, elsewhere, before = executed
    first, second = told["own"], told["none"]
    evaluation = Path(evaluated.outputs) / "evaluation"
    assert str(evaluation) in first["source"] and "loaded: base model; SFT; DPO" in first["load"]
    for name in ("show-user", "own-pair"):
        assert first[name].count("as Option A") == first[name].count("as Option B") == 1
        assert first[name].count("p = ") == 6
    assert "3 test users" in first["batch-users"] and "to quote" not in first["batch-users"]
    verdict = read_json(evaluation / "metrics.json")["verdict"]
    assert f"- **Verdict: {verdict} against an SFT that saw half as many pairs**" in first["source"]
    assert verdict.partition(" (")[0] in first["summary"]
    assert r"\toprule" in first["latex-table"]
    assert files_of(evaluation) == before
    assert (evaluation.parent / "notebook" / "figures" / "accuracy.pdf").is_file()

    assert "docs/results" in second["source"] and "python evaluate_dpo.py" in second["source"]
    assert "Make it with: python" in second["data-table"] + second["load"]
    assert "No arms are loaded" in second["batch-users"] and "95%" in second["summary"]
    assert (elsewhere / "notebook" / "table.tex").is_file()


def test_the_published_adapters_are_opened_where_there_are_none_of_ones_own(executed):
    told, _, _ = executed
    loaded = told["published"]["load"]
    assert "holds no adapters" in loaded and "The published ones are opened" in loaded
    assert "loaded: base model; SFT; DPO" in loaded
    assert "published" not in told["own"]["load"] + told["none"]["load"] + told["given"]["load"]
    assert told["given"]["load"].startswith("loaded: base model; SFT; DPO"), "whatever lies in OUTPUTS"


def test_the_data_are_shown_as_table_and_pictures(executed):
    own = executed[0]["own"]
    found = table_of(own["data-table"])
    assert found["training"]["pairs"] == "42" and found["test"]["pairs"] == "18"
    assert "<Figure" in own["data-genres"] and "<Figure" in own["data-popularity"]
    assert "rejected:\nThe better recommendation is Option B" in own["data-pair"]


def test_each_training_run_is_one_row(executed, evaluated):
    found = table_of(executed[0]["own"]["runs"])
    assert found["stage"] == {"sft 3407": "sft", "dpo 3407": "dpo"}
    assert list(found["steps"].values()) == ["3", "3"] and list(found["seed"].values()) == ["3407"] * 2
    rates = [float(rate) for rate in found["learning rate"].values()]
    assert rates == [1e-3, 0.05], "each stage's own"
    assert float(found["first loss"]["dpo 3407"]) == pytest.approx(0.6931, abs=1e-3)
    assert set(found) == {
        *("stage", "seed", "rows", "steps", "learning rate"),
        *("first loss", "last loss", "minutes", "device"),
    }
