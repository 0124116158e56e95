"""What the documents say is what the programs do.

Their shell blocks are run by bash with stand-ins for the programs, which write down what they were called with. All of
it is parsed by the programs' own parsers, then run with a tiny model, but for the study and a second machine.
"""

import ast
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from benchmarks import documents, simulation, study_report
from huggingface_hub import HfApi, RepoUrl
from huggingface_hub.cli.upload import upload
from safetensors.torch import load_file

import config
import evaluate_dpo
import train_dpo
from config import EvaluationSettings, TrainingSettings
from data import build_pairs
from data.measures import MEASURES, SCHEMA_VERSION, compute_metrics
from data.pairs import load_pairs
from data.predictions import read_predictions
from data.runs import WEIGHTS
from data.verdict import judge

ELSEWHERE = {".venv", "outputs", "node_modules"}
DOCUMENTS = [
    path
    for path in config.ROOT.rglob("*.md")
    if not ELSEWHERE & set(path.relative_to(config.ROOT).parts[:-1]) and path.name != "model_card.md"
]
DOCUMENTS.append(config.ROOT / "outputs" / "README.md")
DOCS = config.ROOT / "docs"
PROGRAMS = ("python", "python3", ".venv/bin/python", "accelerate", "jupyter", "hf", "ssh")


def read(name: str) -> str:
    return (config.ROOT / name).read_text(encoding="utf-8")


def blocks(path: Path) -> list[tuple[str, str]]:
    """(what it needs that is not here, text) of a document's shell blocks."""
    found = re.findall(r"(?:<!-- needs ([\w ]+) -->\n)?```bash\n(.*?)```", path.read_text(encoding="utf-8"), re.S)
    assert {needed for needed, _ in found} <= {"", "a GPU", "a second machine"}
    return found


def python_blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", read(name), re.S)


def mentions() -> list[tuple[str, str]]:
    """Commands between backticks, in docstrings and in settings files: parsed, not run."""
    found = []
    for path in DOCUMENTS:
        lines = re.findall(r"`([^`\n]+\.py [^`\n]+|python -m [^`\n]+)`", path.read_text(encoding="utf-8"))
        found += [(path.name, line) for line in lines]
    for module in (config, train_dpo, evaluate_dpo, build_pairs):
        lines = re.findall(r"^    (python .+?)(?: +#.*)?$", module.__doc__, re.M)
        found += [(Path(module.__file__).name, line) for line in lines]
    [launch] = re.findall("# +(accelerate launch .+)", read("docs/fsdp_qlora.yaml"))
    return [*found, ("fsdp_qlora.yaml", re.sub("<.+?>", "FOLDER", launch))]


def calls_of(block: str, folder: Path) -> list[list[str]]:
    """What bash makes of a block: the words of each call of a program, in order."""
    programs, log = folder / "programs", folder / "calls"
    for program in PROGRAMS:
        stand_in = (folder if "/" in program else programs) / program
        stand_in.parent.mkdir(parents=True, exist_ok=True)
        stand_in.write_text(f"#!/bin/bash\nprintf '%s\\x1f' {program} \"$@\" >> '{log}'; printf '\\x1e' >> '{log}'\n")
        stand_in.chmod(0o755)
    (folder / ".venv" / "bin" / "activate").touch()
    log.write_text("")
    bash = ["env", f"PATH={programs}:/usr/bin:/bin", "bash", "-euo", "pipefail", "-c", block]
    done = subprocess.run(bash, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, f"{block}\n{done.stderr}"
    return [call.split("\x1f")[:-1] for call in log.read_text().split("\x1e")[:-1]]


def script_and_flags(words: list[str]) -> tuple[str, list[str]]:
    """The project's script in a call and what is given to it; ("", []) where there is none."""
    place = next((number for number, word in enumerate(words) if word.endswith(".py")), None)
    return ("", []) if place is None else (words[place], words[place + 1 :])


def parse(words: list[str], preset: str, monkeypatch) -> None:
    """Give a call to the parser of its program; an AssertionError or UserError says what is wrong with it."""
    script, flags = script_and_flags(words)
    if flags == ["--help"]:
        return
    if words[0] == "jupyter":
        assert words[1] == "lab" and words[-1] == "dpo_comparison.ipynb"
    elif words[0] == "ssh":
        assert words[1:3] == ["-N", "-L"]
    elif words[0] == "hf":
        assert words[1] == "upload" and len(words) == 4
    elif not script:
        assert words[1] in ("-m", "-c"), words
    else:
        assert (config.ROOT / script).is_file(), words
        assert all((config.ROOT / word).is_file() for word in words if word.endswith(".yaml") and "fsdp" in word)
        if script == "data/build_pairs.py":
            monkeypatch.setattr(build_pairs, "write_pairs", lambda path, pairs: None)
            monkeypatch.setattr(sys, "argv", words[words.index(script) :])
            build_pairs.main()
        elif script in ("train_dpo.py", "evaluate_dpo.py"):
            kind = TrainingSettings if script == "train_dpo.py" else EvaluationSettings
            file = flags[:1] if flags and flags[0].endswith(".yaml") else []
            config.parse_settings(kind, [*file, "--preset", preset, *flags[len(file) :]])
        else:
            assert all(f'"{flag}"' in read(script) for flag in flags if flag.startswith("--")), words


@pytest.fixture
def ratings(monkeypatch):
    """Made-up MovieLens in place of what `data/build_pairs.py` would fetch."""
    titles = [f"Film {film}, The ({1950 + film % 50})" for film in range(60)]
    films = pd.DataFrame({"film": range(60), "title": titles, "genres": [["Comedy"], ["Drama", "War"]] * 30})
    rows = [(user, (user * 7 + k * k) % 60, 4.0, float(k)) for user in range(50) for k in range(12)]
    made = pd.DataFrame(rows, columns=["user", "film", "rating", "time"]), films
    monkeypatch.setattr(build_pairs, "read_ml_100k", lambda: made)
    monkeypatch.setattr(build_pairs, "download_ml_1m", lambda folder: folder)
    monkeypatch.setattr(build_pairs, "read_movielens", lambda source: made)


@pytest.mark.parametrize(("needed", "block"), [block for path in DOCUMENTS for block in blocks(path)])
def test_every_line_of_every_shell_block_is_accepted(needed, block, ratings, tmp_path, monkeypatch):
    calls = calls_of(block, tmp_path)
    assert calls
    for words in calls:
        parse(words, "thesis" if needed else "small", monkeypatch)
    wide = [line for line in block.splitlines() if len(line) > 100]
    assert not wide or block.startswith("python3 -m venv") and "-m pytest" in block  # which .ci/run takes as one line


@pytest.mark.parametrize(("document", "line"), mentions())
def test_every_mentioned_command_is_accepted(document, line, ratings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("beta: 0.2\n")
    parse(shlex.split(line), "small", monkeypatch)


@pytest.fixture
def uploads(monkeypatch):
    """What the Hub's client would upload: (name, folder)."""
    made = []
    monkeypatch.setenv("HF_TOKEN", "hf_made_up")
    repository = "https://huggingface.co/me/{}".format
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: RepoUrl(repository(repo_id)))

    def upload_folder(self, *, repo_id, folder_path, **_):
        made.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))
        return f"https://huggingface.co/{repo_id}"

    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return made


@pytest.fixture
def stand_ins(ratings, uploads, tiny_model, tmp_path, monkeypatch):
    """A folder to run blocks in; both base models are a tiny one, and what is made up comes from nowhere else."""
    monkeypatch.setattr(config, "model_path", lambda name: str(tiny_model))
    monkeypatch.setattr(build_pairs, "HERE", tmp_path / "data")
    monkeypatch.chdir(tmp_path)


def run_block(block: str, folder: Path, monkeypatch, *flags: str) -> None:
    """What a block calls, with more flags for the two programs; `.ci/run` runs what makes and opens the environment."""
    for words in calls_of(block, folder):
        script, given = script_and_flags(words)
        if script:
            more = flags if script in ("train_dpo.py", "evaluate_dpo.py") and "--preset" not in given else ()
            monkeypatch.setattr(sys, "argv", [script, *more, *given])
            importlib.import_module(script.removesuffix(".py").replace("/", ".")).main()
        elif words[0] == "hf":
            upload(*words[2:])
        elif words[1] == "-c":
            at_root = {"capture_output": True, "env": os.environ | {"PYTHONPATH": str(config.ROOT)}}
            print(subprocess.run([sys.executable, *words[1:]], check=True, text=True, **at_root).stdout)


NEED_A_GPU = [
    (path.stem, block)
    for path in DOCUMENTS
    for needed, block in blocks(path)
    if needed == "a GPU" and path.parent.name != "results"  # the study itself: tests/test_experiment.py
]


@pytest.mark.parametrize(("document", "block"), NEED_A_GPU)
def test_the_blocks_that_need_a_gpu_run_with_a_tiny_model(document, block, stand_ins, tmp_path, monkeypatch, capsys):
    """Word for word, in the preset of a GPU, but for one step a stage and no generated answers."""
    monkeypatch.setitem(config.PRESETS, "thesis", {"max_steps": 1, "validation_pairs": 8, "generate_users": 0})
    before = "python data/build_pairs.py --source ml-1m --download --output data/contrastive_rec_train.jsonl\n"
    before += "python train_dpo.py --stage sft\n" if document == "hyperparameters" else ""
    run_block(before + block, tmp_path, monkeypatch, "--preset", "thesis")
    said = capsys.readouterr().out
    assert said.count("verdict: ") == block.count("evaluate_dpo.py") + 2 * block.count("for rate in"), said[-2000:]


def test_the_blocks_that_need_no_gpu_run_one_after_the_other(
    stand_ins, uploads, tiny_model, tmp_path, monkeypatch, capsys
):
    """README, then quickstart, then the rest, word for word, in one folder; the small model is a tiny one."""
    order = ["README.md", "docs/quickstart.md", "docs/hyperparameters.md", "docs/thesis.md"]
    runs_here = [path for path in DOCUMENTS if any(not needed for needed, _ in blocks(path))]
    assert {path.relative_to(config.ROOT).as_posix() for path in runs_here} == set(order)
    said = []
    for name in order:
        for needed, block in blocks(config.ROOT / name):
            if not needed:
                run_block(block, tmp_path, monkeypatch)
                said.append(capsys.readouterr().out)
    metrics = json.loads(Path("outputs/evaluation/metrics.json").read_text())
    assert said[-1].strip().splitlines() == [metrics["sentence"], *metrics["caveats"]]
    text = "".join(said)
    assert "ready to train" in text and text.count("verdict: ") == 4
    [(name, files)] = uploads
    assert name == "me/my-film-adapter" and {"README.md", "adapter_model.safetensors", "run.json"} <= {*files}
    examples = [example for name in ("docs/quickstart.md", "docs/metrics.md") for example in python_blocks(name)]
    assert len(examples) == 2, "merging, and measures in one's own code"
    for example in examples:
        exec(example, {})  # word for word
    assert capsys.readouterr().out.startswith("{'value': ")
    merged = load_file("outputs/merged/model.safetensors")
    assert {weight.dtype for weight in merged.values()} == {torch.float16}
    base, name = load_file(tiny_model / "model.safetensors"), "model.layers.0.self_attn.q_proj.weight"
    lora = load_file(f"{config.adapter_folder(config.preset_settings(EvaluationSettings, 'small'), 'dpo')}/{WEIGHTS}")
    factors = [lora[f"base_model.model.{name.removesuffix('.weight')}.lora_{part}.weight"] for part in "BA"]
    assert torch.allclose(merged[name].float(), base[name].float() + factors[0] @ factors[1], atol=1e-3)
    assert not torch.equal(merged[name], base[name].half()), "the adapter is in it"


def test_the_folders_of_the_quickstart_are_those_that_the_scripts_use():
    for preset, column in (("thesis", 2), ("small", 3)):
        settings = config.preset_settings(EvaluationSettings, preset)
        places = [config.adapter_folder(settings, stage) for stage in ("sft", "dpo")]
        places.append(Path(settings.outputs) / "evaluation")
        rows = re.findall(r"^\| (?:SFT adapter|DPO adapter|results) \|.*", read("docs/quickstart.md"), re.M)
        assert [row.split("|")[column].strip(" `") for row in rows] == [str(place) for place in places]


def first_lines(paths: Iterable[Path]) -> list[tuple[int, re.Pattern]]:
    """The first line of every text in some scripts: how many letters are constant, and a pattern with what is not."""
    found = []
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [str(part.value) if isinstance(part, ast.Constant) else "\0" for part in parts]
            text = "".join(texts).strip().partition("\n")[0]
            found.append((len(text.replace("\0", "")), re.compile(re.escape(text).replace("\0", "(.*)") + r"\.?")))
    return found


def is_told(message: str, known: list[tuple[int, re.Pattern]], letters: int) -> bool:
    """Do scripts say this? What is filled in is one word, or is told in its turn; so many letters must be constant."""
    for constant, pattern in known:
        match = pattern.fullmatch(message) if constant >= min(letters, len(message)) else None
        if match and all(" " not in filled or is_told(filled.strip(), known, 6) for filled in match.groups()):
            return True
    return False


def test_every_message_that_is_quoted_is_one_of_the_programs():
    ours = first_lines([*config.ROOT.glob("*.py"), *(config.ROOT / "data").glob("*.py")])
    hub = first_lines([Path(importlib.util.find_spec("transformers").origin).parent / "utils" / "hub.py"])
    rows = re.findall(r"^\| (`.*) \|.*\|$", read("docs/reliability.md"), re.M)
    messages = [message for row in rows for message in re.findall("`([^`]+)`", row.partition(" | ")[0])]
    assert len(messages) > 30
    for message in messages:
        before = r"^(error: |note: )?(starts from: |dpo: (?=… is there))?|^preset \w+ |^(ok|!!)  [\w ]+?  "
        said = re.sub(before, "", message)
        if said.startswith("cannot load the base model"):
            said, reason = said.split(": ", 1)
            assert is_told(reason, hub, 12), f"transformers does not say: {reason}"
            said += ": …"
        assert is_told(said, ours, 12), f"no program says: {message}"


def documented_settings() -> dict[str, list[str]]:
    """{setting: cells} of the tables in docs/hyperparameters.md."""
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", read("docs/hyperparameters.md"), re.M)
    assert len(rows) == len({name for name, _ in rows}), "a setting is there twice"
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}


@pytest.mark.parametrize("kind", [TrainingSettings, EvaluationSettings])
def test_every_setting_is_documented_with_its_defaults(kind):
    documented = documented_settings()
    for column, preset in enumerate(config.PRESETS):
        for name, default in vars(config.preset_settings(kind, preset)).items():
            shown, number = documented[name][column], isinstance(default, int | float) and not isinstance(default, bool)
            text = "none" if default in (None, []) else str(default).lower() if default in (True, False) else default
            assert float(shown) == default if number else shown == text, name


def test_no_setting_is_documented_that_is_not_there():
    kinds = (TrainingSettings, EvaluationSettings)
    settings = {name for kind in kinds for name in vars(config.preset_settings(kind, "small"))}
    assert set(documented_settings()) == settings
    choices = documented_settings()["loss_type"][2].split(", ")
    assert choices == list(config.LossType.__args__)
    documents = "".join(path.read_text(encoding="utf-8") for path in DOCS.glob("*.md"))
    for name in re.findall(r"(?<![\w-])--(\w[\w-]*)", documents):
        others = ("source", "download", "output", "negatives", "learning_rat", "no-browser", "port")
        assert name in settings or name in others, f"--{name} is no setting"


def test_the_table_of_simulated_studies_is_that_of_the_committed_results():
    records = json.loads(read("docs/results/simulation.json"))
    assert read("docs/results/simulation.md") == simulation.page(records)
    of_method = [record for record in records if record["on the method"]]
    assert len(of_method) > 20 and all(record["on the method"] == (min(record["runs"]) >= 3) for record in records)
    for record in of_method:
        assert record["coverage"] >= 0.94, record["case"]
        for verdict in ("SUPPORTED", "NOT SUPPORTED", "comparable"):
            assert record[f"false {verdict}"] <= 0.025, record["case"]


def test_every_key_that_the_thesis_names_is_in_the_committed_results():
    table = read("docs/thesis.md").partition("### Where each number is\n")[2]
    rows = [line.split("|")[2] for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 10
    for row in rows:
        found = json.loads(read(f"docs/results/small/{'dpo.run.json' if 'run.json' in row else 'metrics.json'}"))
        parent: list[str] = []
        for key in re.findall("`([^`]+)`", row):
            if key == "table.tex" or key.startswith("figures/"):
                continue
            path = [*parent, key[1:]] if key.startswith(".") else key.split(".")
            parent, value = path[:-1], found
            for name in path:
                assert name in value, key
                value = value[name]


def test_formulas_are_shown_as_they_are_written():
    """GitHub reads a formula within a line as Markdown first, and takes backslashes and asterisks."""
    for path in DOCS.glob("*.md"):
        text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(encoding="utf-8"), flags=re.S)
        formulas = re.findall(r"\$([^$\n]+)\$", text)
        assert text.count("$") == 2 * len(formulas), path.name
        for formula in formulas + re.findall(r"```math\n(.*?)```", path.read_text(encoding="utf-8"), re.S):
            assert formula.count("{") - formula.count(r"\{") == formula.count("}") - formula.count(r"\}"), formula
            assert "\n" in formula or not re.search(r"\\[!-/:-@\[-`{-~]|\*", formula), formula


@pytest.mark.parametrize("path", documents.PAGES)
def test_what_is_filled_in_is_what_the_results_have(path):
    page = path.read_text(encoding="utf-8")
    assert documents.filled(page) == page, "python tests/benchmarks/documents.py"
    assert "<!-- filled: " in page


def test_the_line_of_a_pairs_file_that_is_shown_is_a_pair(tmp_path):
    [shown] = re.findall(r"```json\n(.*?)```", read("data/README.md"), re.S)
    (tmp_path / "pairs.jsonl").write_text(shown.replace("\n", " "))
    [pair] = load_pairs(tmp_path / "pairs.jsonl")
    assert str(pair.preferred) == "Alien (1979) (Horror|Sci-Fi)" and pair.user == "42"


def test_licence_citation_and_workflow_are_there():
    assert "Apache License" in read("LICENSE") and "END OF TERMS AND CONDITIONS" in read("LICENSE")
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["cff-version"] == "1.2.0" and citation["license"] == "Apache-2.0" and citation["title"]
    assert citation["message"] and citation["authors"] and citation["version"] and citation["date-released"]
    job = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"]["test"]
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"] and job["timeout-minutes"] == 90
    assert os.access(config.ROOT / ".ci/run", os.X_OK)


def test_every_link_of_the_documents_leads_somewhere():
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text)
        for target, anchor in [*links, *((image, "") for image in re.findall('src="([^"]+)"', text))]:
            place = path.parent / target if target else path
            assert place.exists(), f"{path.name}: {target}"
            headings = re.findall(r"^#+ (.*)", place.read_text(encoding="utf-8"), re.M) if anchor else []
            anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
            assert not anchor or anchor in anchors, f"{path.name}: #{anchor}"


def test_no_data_or_weights_are_committed():
    tracked = subprocess.run(["git", "-C", config.ROOT, "ls-files"], capture_output=True, text=True).stdout.splitlines()
    found = [name for name in tracked if re.search(r"\.(jsonl|safetensors|gguf|bin|pt|whl|zip)$", name)]
    assert not [name for name in found if not name.startswith("docs/results/adapters/")], "but the study's adapters"


def test_the_schema_of_metrics_json_is_the_documented_one():
    text = read("docs/metrics.md")
    metrics = json.loads(read("docs/results/small/metrics.json"))
    comparison = metrics["comparisons"]["dpo - sft"]
    for key in [*metrics, *metrics["arms"]["dpo"], *comparison]:
        assert f"`{key}`" in text, f"docs/metrics.md lacks {key}"
    assert f"version {SCHEMA_VERSION}" in text and metrics["schema_version"] == SCHEMA_VERSION
    assert set(MEASURES) <= set(metrics["arms"]["dpo"]), "the committed results are of an older version"


def test_the_tables_of_the_study_are_those_of_its_files():
    results = config.ROOT / "docs" / "results"
    if not (results / "predictions.csv.gz").exists():
        pytest.skip("the study has not been run")
    page = (results / "README.md").read_text(encoding="utf-8")
    made = study_report.tables(results)
    assert study_report.filled(page, made) == page
    assert (results / "tables.md").read_text(encoding="utf-8") == study_report.all_tables(made)
    metrics = json.loads((results / "metrics.json").read_text(encoding="utf-8"))
    rows = read_predictions(results / "predictions.csv.gz")
    assert judge(compute_metrics(rows)) == metrics, "predictions.csv.gz gives metrics.json"
