"""What the documents say is what the programs do.

Their shell blocks are run by bash with stand-ins for the programs, which write down what they were called with. All of
it is parsed by the programs' own parsers; what is not marked `<!-- needs a GPU -->` is then run, with a tiny model.
"""

import ast
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import pytest

import config
import evaluate_dpo
import train_dpo
from benchmarks import experiment
from config import EvaluationSettings, TrainingSettings
from data import build_pairs

ELSEWHERE = {".venv", "outputs", "node_modules"}
DOCUMENTS = [path for path in config.ROOT.rglob("*.md") if not ELSEWHERE & set(path.relative_to(config.ROOT).parts[:-1])]
DOCUMENTS.append(config.ROOT / "outputs" / "README.md")
DOCS = config.ROOT / "docs"
NEEDS_GPU = "<!-- needs a GPU -->"
PROGRAMS = ("python", "python3", ".venv/bin/python", "accelerate", "jupyter")


def read(name: str) -> str:
    return (config.ROOT / name).read_text(encoding="utf-8")


def blocks(path: Path) -> list[tuple[bool, str]]:
    """(needs a GPU, text) of a document's shell blocks."""
    found = re.findall(rf"({NEEDS_GPU}\n)?```bash\n(.*?)```", path.read_text(encoding="utf-8"), re.S)
    return [(bool(marked), text) for marked, text in found]


def mentions() -> list[tuple[str, str]]:
    """Commands between backticks, in docstrings and in settings files: parsed, not run."""
    found = []
    for path in DOCUMENTS:
        found += [(path.name, line) for line in re.findall(r"`([^`\n]+\.py [^`\n]+)`", path.read_text(encoding="utf-8"))]
    for module in (config, train_dpo, evaluate_dpo, build_pairs):
        found += [(Path(module.__file__).name, line) for line in re.findall(r"^    (python .+?)(?: +#.*)?$", module.__doc__, re.M)]
    [launch] = re.findall("# +(accelerate launch .+)", read("docs/fsdp_qlora.yaml"))
    return [*found, ("fsdp_qlora.yaml", re.sub("<.+?>", "FOLDER", launch))]


def calls_of(block: str, folder: Path) -> list[list[str]]:
    """What bash makes of a block: the words of each call of a program, in order."""
    programs, log = folder / "programs", folder / "calls"
    for program in PROGRAMS:
        stand_in = (folder if "/" in program else programs) / program
        stand_in.parent.mkdir(parents=True, exist_ok=True)
        stand_in.write_text(f"#!/bin/bash\nprintf '%s\\x1f' {program} \"$@\" >> '{log}'; echo >> '{log}'\n")
        stand_in.chmod(0o755)
    (folder / ".venv" / "bin" / "activate").touch()
    log.write_text("")
    bash = ["env", f"PATH={programs}:/usr/bin:/bin", "bash", "-euo", "pipefail", "-c", block]
    done = subprocess.run(bash, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, f"{block}\n{done.stderr}"
    return [line.split("\x1f")[:-1] for line in log.read_text().splitlines()]


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
        assert words[1] == "lab" and words[2:] == ["dpo_comparison.ipynb"]
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
    monkeypatch.setattr(build_pairs, "read_ml_1m", lambda source: made)


@pytest.mark.parametrize(("gpu", "block"), [block for path in DOCUMENTS for block in blocks(path)])
def test_every_line_of_every_shell_block_is_accepted(gpu, block, ratings, tmp_path, monkeypatch):
    calls = calls_of(block, tmp_path)
    assert calls
    for words in calls:
        parse(words, "thesis" if gpu else "small", monkeypatch)


@pytest.mark.parametrize(("document", "line"), mentions())
def test_every_mentioned_command_is_accepted(document, line, ratings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("beta: 0.2\n")
    parse(shlex.split(line), "small", monkeypatch)


def test_the_blocks_that_need_no_gpu_run_one_after_the_other(ratings, tiny_model, tmp_path, monkeypatch, capsys):
    """README, then quickstart, then the rest, word for word, in one folder; the small model is a tiny one.

    What makes the environment and what opens it (venv, pip, pytest, jupyter) is left to `.ci/run`.
    """
    monkeypatch.setattr(config, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(build_pairs, "ROOT", tmp_path)
    shutil.copytree(tiny_model, config.CACHE / config.SMALL_MODEL)
    monkeypatch.chdir(tmp_path)
    order = ["README.md", "docs/quickstart.md", "docs/hyperparameters.md", "docs/thesis.md"]
    assert {path.relative_to(config.ROOT).as_posix() for path in DOCUMENTS if any(not gpu for gpu, _ in blocks(path))} == set(order)
    said = []
    for name in order:
        for gpu, block in blocks(config.ROOT / name):
            for words in [] if gpu else calls_of(block, tmp_path):
                script, flags = script_and_flags(words)
                if script:
                    monkeypatch.setattr(sys, "argv", [script, *flags])
                    importlib.import_module(script.removesuffix(".py").replace("/", ".")).main()
                elif words[1] == "-c":
                    at_root = os.environ | {"PYTHONPATH": str(config.ROOT)}
                    print(subprocess.run([sys.executable, *words[1:]], check=True, capture_output=True, text=True, env=at_root).stdout)
                said.append(capsys.readouterr().out)
    metrics = json.loads(Path("outputs/evaluation/metrics.json").read_text())
    assert said[-1].strip().splitlines() == [metrics["sentence"], *metrics["caveats"]]
    text = "".join(said)
    assert "ready to train" in text and text.count("verdict: ") == 4
    checklist = [line[4:].split("  ")[0] for line in text.splitlines() if re.match("(ok|!!)  ", line)]
    table = re.search(r"## The checklist\n.*?\n\|---\|---\|\n(.*?)\n\n", read("docs/quickstart.md"), re.S)[1]
    assert checklist == re.findall("`([^`]+)`", "\n".join(re.match(r"\| (.*?) \|", line)[1] for line in table.splitlines()))


def test_the_folders_of_the_quickstart_are_those_that_the_scripts_use():
    for preset, column in (("thesis", 2), ("small", 3)):
        settings = config.preset_settings(EvaluationSettings, preset)
        places = [config.adapter_folder(settings, stage) for stage in ("sft", "dpo")] + [config.evaluation_folder(settings)]
        rows = re.findall(r"^\| (?:SFT adapter|DPO adapter|results) \|.*", read("docs/quickstart.md"), re.M)
        assert [row.split("|")[column].strip(" `") for row in rows] == [str(place) for place in places]


def first_lines(paths: Iterable[Path]) -> list[tuple[int, re.Pattern]]:
    """The first line of every text in some scripts: how many letters of it are constant, and a pattern with what is filled in."""
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


def test_every_message_that_the_quickstart_quotes_is_one_of_the_programs():
    ours = first_lines([*config.ROOT.glob("*.py"), *(config.ROOT / "data").glob("*.py")])
    hub = first_lines([Path(importlib.util.find_spec("transformers").origin).parent / "utils" / "hub.py"])
    lines = [line for block in re.findall(r"```text\n(.*?)```", read("docs/quickstart.md"), re.S) for line in block.splitlines()]
    assert len(lines) > 40
    for line in lines:
        message = re.sub(r"^(error|caveat|verdict): (DPO starts from: )?|^preset \w+ |^(ok|!!)  [\w ]+?  ", "", line)
        if message.startswith("cannot load the base model"):
            message, reason = message.split(": ", 1)
            assert is_told(reason, hub, 12), f"transformers does not say: {reason}"
            message += ": …"
        assert is_told(message, ours, 12), f"no program says: {line}"


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
            shown = documented[name][column]
            if default is None or default == []:
                assert shown == "none", name
            elif isinstance(default, bool):
                assert shown == str(default).lower(), name
            elif isinstance(default, (int, float)):
                assert float(shown) == default, name
            else:
                assert shown == default, name


def test_no_setting_is_documented_that_is_not_there():
    settings = {name for kind in (TrainingSettings, EvaluationSettings) for name in vars(config.preset_settings(kind, "small"))}
    assert set(documented_settings()) == settings
    choices = documented_settings()["loss_type"][2].split(", ")
    assert choices == list(config.LossType.__args__)
    for name in re.findall(r"(?<![\w-])--(\w+)", "".join(path.read_text(encoding="utf-8") for path in DOCS.glob("*.md"))):
        others = ("config_file", "source", "download", "output", "negatives", "help", "learning_rat")
        assert name in settings or name in others, f"--{name} is no setting"


def simulation_table(records: list[dict]) -> str:
    verdicts = ["SUPPORTED", "NOT SUPPORTED", "PARTIAL: comparable", "PARTIAL: small gain", "INCONCLUSIVE"]
    heads = ["users", "true difference", "seeds", "spread", "covers", *verdicts]
    rows = [heads, ["---"] * len(heads)]
    for record in records:
        rows.append([f"{record['users']:,}", *(str(record[key]) for key in ("true_difference", "seeds", "spread_of_seeds"))])
        rows[-1] += [f"{100 * record[key]:.1f}" for key in ("coverage", *verdicts)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def test_the_table_of_simulated_studies_is_that_of_the_committed_results():
    source, shown = re.search(r"<!-- table: (\S+) -->\n(.*?)\n\n", read("docs/thesis.md"), re.S).groups()
    assert shown + "\n" == simulation_table(json.loads(read(source)))


def test_every_key_that_the_thesis_names_is_in_the_committed_results():
    table = re.search(r"## Writing methods and results\n(.*)", read("docs/thesis.md"), re.S)[1]
    rows = [line.split("|")[3] for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 12
    for row in rows:
        found = json.loads(read(f"docs/results/small/{'dpo.run.json' if 'run.json' in row else 'metrics.json'}"))
        parent: list[str] = []
        for key in re.findall("`([^`]+)`", row):
            if key in ("table.tex", "dpo@16bit") or key.startswith("figures/"):
                continue
            path = [*parent, key[1:]] if key.startswith(".") else key.split(".")
            parent, value = path[:-1], found
            for name in path:
                assert name in value, key
                value = value[name]


def test_formulas_are_shown_as_they_are_written():
    """GitHub reads a formula within a line as Markdown first: backslashes before punctuation and asterisks would be lost."""
    for path in DOCS.glob("*.md"):
        text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(encoding="utf-8"), flags=re.S)
        formulas = re.findall(r"\$([^$\n]+)\$", text)
        assert text.count("$") == 2 * len(formulas), path.name
        for formula in formulas + re.findall(r"```math\n(.*?)```", path.read_text(encoding="utf-8"), re.S):
            assert formula.count("{") - formula.count(r"\{") == formula.count("}") - formula.count(r"\}"), formula
            assert "\n" in formula or not re.search(r"\\[!-/:-@\[-`{-~]|\*", formula), formula


def test_the_table_of_the_readme_is_that_of_the_committed_results():
    readme = read("README.md")
    source, shown = re.search(r"<!-- table: (\S+) -->\n```text\n(.*?)```", readme, re.S).groups()
    metrics = json.loads(read(source))
    model = evaluate_dpo.model_of((config.ROOT / source).with_name("run.json"))
    assert shown == evaluate_dpo.table(metrics) + "\n\n" + evaluate_dpo.summary(metrics, model) + "\n"


def test_every_link_of_the_documents_leads_somewhere():
    for path in DOCUMENTS:
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", path.read_text(encoding="utf-8")):
            place = path.parent / target if target else path
            assert place.exists(), f"{path.name}: {target}"
            headings = re.findall(r"^#+ (.*)", place.read_text(encoding="utf-8"), re.M) if anchor else []
            anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
            assert not anchor or anchor in anchors, f"{path.name}: #{anchor}"


def test_no_document_is_longer_than_the_code_that_it_explains():
    explained = {"thesis": "evaluate_dpo", "metrics": "evaluate_dpo", "quickstart": "train_dpo", "hyperparameters": "config"}
    for document, script in explained.items():
        assert len(read(f"docs/{document}.md")) < len(read(f"{script}.py")), document


def test_no_data_or_weights_are_committed():
    tracked = subprocess.run(["git", "-C", config.ROOT, "ls-files"], capture_output=True, text=True).stdout.splitlines()
    assert not [name for name in tracked if re.search(r"\.(jsonl|safetensors|gguf|bin|pt|whl|zip)$", name)]


def test_the_schema_of_metrics_json_is_the_documented_one():
    text = read("docs/metrics.md")
    metrics = json.loads(read("docs/results/small/metrics.json"))
    comparison = metrics["comparisons"]["dpo - sft"]
    for key in [*metrics, *metrics["arms"]["dpo"], *comparison]:
        assert f"`{key}`" in text, f"docs/metrics.md lacks {key}"
    assert f"version {evaluate_dpo.SCHEMA_VERSION}" in text and metrics["schema_version"] == evaluate_dpo.SCHEMA_VERSION
    assert set(evaluate_dpo.MEASURES) <= set(metrics["arms"]["dpo"]), "the committed results are of an older version"


def test_every_fault_that_is_documented_is_shown_by_a_test():
    text = read("docs/reliability.md")
    tests = "".join(path.read_text(encoding="utf-8") for path in (config.ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in tests, name


SHAPES = "Llama-3-8B, random weights", "SmolLM2-135M"


def test_the_speeds_of_the_readme_are_those_that_were_measured():
    speed = json.loads(read("docs/results/speed.json"))
    large, small = ({record["trainer"]: record for record in speed if record["shape"] == shape and "H100" in record["device"]} for shape in SHAPES)
    with_reference = large["stock"]["pairs_per_second"] * large["shared"]["ratio_to_stock_with_reference_pass"]
    assert large["unsloth"]["checkpointing"] and large["stock"]["checkpointing"] and not large["shared"]["checkpointing"]
    assert small["shared"]["cuda_graphs"] and {record["peak_memory_gb"] < 24 for record in large.values()} == {True}
    gpu = [record for record in json.loads(read("docs/results/gpu.json")) if record["effective_batch"] == 8 and "losses" in record]
    memory = {record["checkpointing"]: record["peak_memory_gb"] for record in gpu if record["trainer"] == "shared"}
    assert f"takes {memory[True]:.1f} GB with checkpointing and {memory[False]:.1f} GB without" in " ".join(read("docs/quickstart.md").split())
    ours, stock = (max(r["pairs_per_second"] for r in gpu if (r["backend"], r["trainer"]) == ("unsloth", kind)) for kind in ("shared", "stock"))
    assert f"does {ours:.0f} pairs a second with the preset's batch of 8, Unsloth's stock trainer {stock:.0f}." in " ".join(read("README.md").split())
    said = "does {:.0f} pairs a second ({:.0f} in the epoch that computes the reference, too); with checkpointing, which they need there,"
    said += " Unsloth's stock trainer does {:.0f} and TRL's with transformers {:.1f}. On the small model, whose passes are CUDA graphs, it"
    said += " does {:.0f}, {:.1f} times as many as TRL's trainer ({:.1f} times in the epoch that computes the reference)"
    rates = [large["shared"]["pairs_per_second"], with_reference, *(large[kind]["pairs_per_second"] for kind in ("unsloth", "stock"))]
    rates += [small["shared"][name] for name in ("pairs_per_second", "ratio_to_stock", "ratio_to_stock_with_reference_pass")]
    assert said.format(*rates) in " ".join(read("README.md").split())


def test_the_speeds_of_the_results_are_those_that_were_measured():
    page = " ".join(read("docs/results/README.md").split())
    speed, scoring, two = (json.loads(read(f"docs/results/{name}.json")) for name in ("speed", "evaluation_speed", "two_gpus"))
    rates = {record["trainer"]: record["pairs_per_second"] for record in speed if record["shape"].startswith("Llama-3-8B")}
    said = "{:.1f} pairs a second shared (micro-batch 16), {:.1f} by Unsloth's stock trainer and {:.1f} by TRL's"
    assert said.format(rates["shared"], rates["unsloth"], rates["stock"]) in page
    gpu = [record for record in json.loads(read("docs/results/gpu.json")) if "failed" not in record]
    by_trl = [record["pairs_per_second"] for record in gpu if (record["backend"], record["trainer"]) == ("hf", "stock")] + [rates["stock"]]
    assert f"over all calls and hosts TRL's did {min(by_trl):.1f} to {max(by_trl):.1f}" in page
    again = [record for record in gpu if (record["backend"], record["trainer"], record["micro_batch"]) == ("unsloth", "shared", 16)]
    again = [record["pairs_per_second"] for record in again if not record["checkpointing"] and not record.get("cuda_graphs")]
    assert len(again) == 2 and max(again) > rates["shared"]
    assert f"three measurements at 16, here and in `gpu.json`, lie between {rates['shared']:.1f} and {max(again):.1f}" in page
    spent = json.loads(read("docs/results/profile.json"))
    said = "Of a micro-batch's {:.0f} ms matrix products take {:.0f}, attention {:.0f}, Unsloth's kernels for norm, rotary embedding and"
    said += " activation {:.0f}, unpacking weights {:.0f}, and for {:.0f} the GPU is idle"
    parts = ("seconds", "matrix products", "attention", "norm, rotary, activation (Unsloth)", "dequantising", "idle")
    assert said.format(*(1000 * spent[part] for part in parts)) in page
    eight = {(record["trainer"], record["checkpointing"]): record for record in gpu if (record["backend"], record["effective_batch"]) == ("unsloth", 8)}
    plain, kept, stock = (eight[case] for case in (("shared", False), ("shared", True), ("stock", True)))
    said = "does {:.1f} pairs a second in {:.1f} GB, or {:.1f} in {:.1f} GB with checkpointing; Unsloth's stock trainer did {:.1f} in {:.1f} GB"
    assert said.format(*(record[name] for record in (plain, kept, stock) for name in ("pairs_per_second", "peak_memory_gb"))) in page
    minutes = 3 * 6040 / kept["pairs_per_second"] / 60, 6040 * kept["reference_seconds_per_pair"] / 60
    assert "take {:.0f} minutes at {:.1f}, and the reference {:.1f} minutes more".format(minutes[0], kept["pairs_per_second"], minutes[1]) in page
    [whole] = [record["seconds"] for record in scoring if record["users"] == 1208]
    assert f"All 1,208 users are scored in {whole:.1f} s" in page and whole < 60
    small = {record["trainer"]: record for record in speed if (record["shape"], record["micro_batch"]) == ("SmolLM2-135M", 64)}
    said = "does {:.1f} pairs a second, Unsloth's stock trainer {:.1f} and TRL's {:.1f}: {:.2f} times as many as TRL's, in two turns of {:.2f} and {:.2f}, and {:.2f}"
    said += " times in a single epoch with the reference counted in"
    by_turn = [ours / stock for ours, stock in zip(small["shared"]["turns"], small["stock"]["turns"], strict=True)]
    rates = [small[trainer]["pairs_per_second"] for trainer in ("shared", "unsloth", "stock")]
    assert said.format(*rates, small["shared"]["ratio_to_stock"], *by_turn, small["shared"]["ratio_to_stock_with_reference_pass"]) in page
    cpu = [record for record in speed if record["backend"] == "hf" and "H100" not in record["device"]]
    ours, stock = (max((r for r in cpu if r["trainer"] == kind), key=lambda r: r["pairs_per_second"]) for kind in ("shared", "stock"))
    said = "does {:.2f} pairs a second at its best (micro-batch {}) and TRL's {:.2f} (micro-batch {}): {:.2f} times as many, in two turns of {:.2f} and {:.2f}, and {:.2f} times"
    by_turn = [one / other for one, other in zip(ours["turns"], stock["turns"], strict=True)]
    ratios = ours["ratio_to_stock"], *by_turn, ours["ratio_to_stock_with_reference_pass"]
    assert said.format(*(r[name] for r in (ours, stock) for name in ("pairs_per_second", "micro_batch")), *ratios) in page
    compared = {(record["shape"], record["backend"], bool(record.get("cuda_graphs"))): record for record in gpu if not record["memory_cap_gb"]}
    assert len(compared) == 6, "each with CUDA graphs and without"
    cases = ("SmolLM2-135M", "unsloth"), ("Llama-3-8B, random weights", "unsloth"), ("SmolLM2-135M", "hf")
    ours, large, other = ((compared[*case, True], compared[*case, False]) for case in cases)
    assert ours[0]["losses"] == ours[1]["losses"] and large[0]["losses"] == large[1]["losses"]
    one, two_of = (record["pairs_per_second"] for record in ours)
    assert f"{one:.1f} pairs a second in place of {two_of:.1f}, with the same losses to the last digit" in page
    assert "{:.1f} pairs a second against {:.1f} without, with the same losses".format(*(record["pairs_per_second"] for record in large)) in page
    assert large[0]["shapes_captured"] == 3 and "Three shapes of a batch were captured within the eight steps" in page
    said = "{:.1f} pairs a second on the small model, against {:.1f} without, but the mean losses of steps 2 to 5 were {:.4f} and {:.4f}"
    assert said.format(*(record["pairs_per_second"] for record in other), *(record["losses"][1] for record in other)) in page
    spent = json.loads(read("docs/results/profile_small.json"))
    said = "Of a micro-batch's {:.0f} ms forward and back the GPU is then idle for {:.0f}, and attention takes {:.0f}, more than all matrix products"
    assert said.format(*(1000 * spent[name] for name in ("seconds", "idle", "attention"))) in page and spent["attention"] > spent["matrix products"]
    records = [record for record in gpu if record["micro_batch"] == 16 and record["checkpointing"] is True]
    rates = {(record["backend"], record.get("kernels")): record["pairs_per_second"] for record in records}
    said = "from {:.1f} to {:.1f} pairs a second at micro-batch 16 with checkpointing, measured one after the other; Unsloth's reached {:.1f}"
    assert said.format(rates["hf", None], rates["hf", "liger"], rates["unsloth", None]) in page
    differences = json.loads(read("docs/results/equality.json"))

    def of(name, kind):
        return [value for record in differences for key, value in record.items() if name in key and key.endswith(kind)]

    assert max(of("backends", "float32")) < 0.0002 and max(of("shared_prompt", "nats_float32")) < 0.0005
    backends, shared = of("backends", "bfloat16"), of("shared_prompt", "bfloat16")
    assert f"the backends by {min(backends):.1f} to {max(backends):.1f} nats a response" in page
    assert f"a shared prompt from plain passes by {min(shared):.2f} to {max(shared):.1f}" in page
    assert "itself off its float32 by {:.1f} to {:.1f}".format(*sorted(of("hf_bfloat16_float32", "nats"))) in page
    runs = {name: json.loads(read(f"docs/results/runs/ablations_dpo_{name}.run.json"))["first_loss"] for name in ("same", "from_base", "hf", "from_base_hf")}
    assert "unchanged runs it is {same:.4f} from SFT and {from_base:.4f} from the base model".format(**runs) in page
    all_runs = [json.loads(path.read_text(encoding="utf-8")) for path in (config.ROOT / "docs/results/runs").glob("*.run.json")]
    firsts = [run["first_loss"] for run in all_runs if run.get("stage") == "dpo" and run["settings"]["loss_type"] == "sigmoid"]
    assert 0.689 < min(firsts) < 0.69 and 0.698 < max(firsts) < 0.699, "between 0.689 and 0.699"
    firsts = [record["losses"][0] for record in gpu if record["memory_cap_gb"] and "losses" in record] + two["training"]["1"]["loss"][:1]
    assert firsts == pytest.approx([0.693147] * 5, abs=1e-6), "both trainers, the shape of 8B, within 24 GB"
    assert runs["hf"] == pytest.approx(0.693147, abs=1e-6) and runs["from_base_hf"] == pytest.approx(0.693147, abs=1e-6)
    curves = json.loads(read("docs/results/curves.json"))
    assert curves["steps"] == len(curves["loss"]["stock"]) == 50 and curves["largest_difference"] < 1e-5
    assert "differ between TRL's trainer and the shared one by no more than 0.00001" in page
    training, evaluation, sharded = (two[name] for name in ("training", "evaluation", "sharded"))
    assert f"train Llama 3 8B's shape {training['speed_up']:.2f} times and score it {evaluation['speed_up']:.2f} times as fast as one" in page
    assert f"the same losses of {len(training['1']['loss'])} steps" in page
    assert training["largest_difference_of_a_loss"] == evaluation["largest_difference_of_a_response_margin"] == 0
    assert sharded["loss"][0] == pytest.approx(0.693147, abs=1e-6) and len(sharded["loss"]) == 10 and max(sharded["loss"]) < 1
    assert f"the stock trainer does that, at {sharded['pairs_per_second']:.1f} pairs a second" in page


def test_what_is_said_of_the_study_is_what_its_files_hold():
    results = config.ROOT / "docs" / "results"
    metrics, ablations, search = (json.loads(read(f"docs/results/{name}.json")) for name in ("metrics", "ablations", "search"))
    page, settings = (" ".join(read(name).split()) for name in ("docs/results/README.md", "docs/hyperparameters.md"))
    arms = {arm: values["ranking_accuracy"]["value"] for arm, values in metrics["arms"].items()}
    off = [metrics["arms"][arm]["calibration_error"]["value"] for arm in ("sft", "dpo", "sft_long")]
    said = "SFT's decisions are off by {:.2f} in the mean (expected calibration error), DPO's by {:.2f} and those of longer SFT by {:.2f}"
    assert said.format(*off) in page
    lead, lag = (metrics["comparisons"][f"dpo - {arm}"]["value"] for arm in ("sft", "sft_long"))
    assert f"better by {lead:.0f} points" in page and f"ranks better than DPO by {-lag:.0f} points" in page
    assert f"DPO's lead is {lead:+.1f} points of ranking accuracy, and an SFT of eight, at 2e-3, leads DPO by {-lag:.1f}" in settings
    assert f"DPO is worse than that by {arms['popularity'] - arms['dpo']:.0f} points" in page
    for arm in ("dpo", "sft_long"):
        assert metrics["comparisons"][f"{arm} - popularity"]["low"] < 0 and metrics["arms"][arm]["accuracy_against_popularity"]["low"] < 50
    usual = ablations["usual protocol"]["sft_long"]["always A is right"]
    assert f"longer SFT ({usual:.1f}%) above popularity ({arms['popularity']:.1f}%), which both orders do not ({arms['sft_long']:.1f}%)" in page
    assert f"by {-metrics['comparisons']['dpo - dpo_base']['response_accuracy']['value']:.1f} points, with half the pairs seen" in page
    needless = arms["dpo"] - metrics["arms"]["dpo"]["personalisation_gap"]["value"]
    said = "scores {:.1f}%: of its {:.0f} points above chance, {:.0f} need no history"
    assert said.format(needless, arms["dpo"] - 50, needless - 50) in page
    genres = metrics["arms"]["genre overlap"]["accuracy_against_popularity"]
    assert f"more like the history's scores {genres['value']:.1f}%" in page and genres["low"] > 50
    same = ablations["same"]["arms"]
    kept = {arm: same[f"{arm}@16bit"]["precision_consistency"]["value"] for arm in ("sft", "dpo", "sft_long")}
    assert "keep {sft:.1f}% and {dpo:.1f}% of their decisions".format(**kept) in page and f"Longer SFT keeps {kept['sft_long']:.1f}%" in page
    assert "SFT's keeps {sft:.1f}% of its decisions, DPO's {dpo:.1f}%, that of longer SFT {sft_long:.1f}%".format(**kept) in settings
    assert abs(100 - ablations["differing answers"]["sft_long, sft_long of another seed"] - kept["sft_long"]) < 1, "about as two seeds"
    answers = {arm: values["repeat_consistency"] for arm, values in json.loads(read("docs/results/generation.json")).items()}
    assert "SFT departs from its own majority in more than a fifth" in page and answers["sft"] < 0.8 and answers["dpo"] > 0.98
    order_free = [same[arm]["order_free_accuracy"]["value"] - same[f"{arm}@16bit"]["order_free_accuracy"]["value"] for arm in ("sft", "dpo")]
    assert f"order-free accuracy falls by {max(order_free):.1f} points at most" in page

    def found(arm, rate, epochs):
        return next(trial for trial in search[arm]["trials"] if (trial["rate"], trial["epochs"]) == (rate, epochs))

    values = [found(*trial)["ranking_accuracy"] for trial in (("sft_long", search["sft"]["rate"], 8), ("dpo", search["dpo"]["rate"], 4))]
    assert "not ahead of DPO in the search ({:.1f}% against {:.1f}%, one run each)".format(*values) in page
    earlier = {trial["epochs"]: trial["ranking_accuracy"] for trial in search["dpo"]["superseded"] if trial["rate"] == "5e-4"}
    assert f"a second epoch of DPO cost {earlier[1] - earlier[2]:.0f} points" in page
    for arm, trials in experiment.GRID.items():
        assert search[arm]["epochs"] == max(epochs for _, epochs in trials), "the best trial has the most epochs"
    assert f"up to {max(trial['response_accuracy'] for trial in search['dpo_base']['trials']):.1f}% of its whole responses" in settings
    assert {trial["ranking_accuracy"] for trial in search["dpo_base"]["trials"]} == {50.0}
    for measure, more in (("ranking_accuracy", False), ("response_accuracy", True)):
        assert (found("dpo", "5e-4", 4)[measure] > found("dpo", "2e-4", 4)[measure]) == more
    simulated = json.loads(read("docs/results/simulation.json"))
    assert {(record["studies"], record["resamples"]) for record in simulated} == {(4000, 2000)}, "as the thesis page says"
    covered = [
        record["coverage"] for spread in (0.5, 2) for record in simulated
        if (record["seeds"], record["true_difference"], record["spread_of_seeds"]) == (3, 0, spread)
    ]  # fmt: skip
    assert "cover the truth in {:.0%} of simulated".format(covered[0]) in page and "in {:.0%} where by two".format(covered[1]) in page
    rows = evaluate_dpo.read_predictions(results / "predictions.csv.gz").query("history == 'own' and kind == 'model'")
    by_order = rows.assign(right=100.0 * (rows["decision_margin"] > 0)).groupby(["arm", "seed", "order"])["right"].mean().unstack()
    spread = by_order.mean(axis=1).groupby("arm").std()
    assert f"those of SFT differ by {spread['sft']:.1f}, of DPO by {spread['dpo']:.1f}" in page
    lean = (by_order["A"] - by_order["B"]).abs().loc[["sft", "dpo", "sft_long"]].max()
    assert f"single runs by {lean:.0f} points at most" in page
    assert float(search["sft_long"]["rate"]) == 2 * float(search["sft"]["rate"]), "at twice the learning rate"
    apart = ablations["differing answers"]
    for arm in ("sft", "dpo", "sft_long"):
        assert 0.4 < apart[f"{arm}, {arm} of another seed"] / apart["dpo, sft"] < 0.65

    pilot, changed = (json.loads((results / "pilot" / f"{name}.json").read_text(encoding="utf-8")) for name in ("metrics", "ablations"))
    values = [pilot["arms"][arm]["ranking_accuracy"]["value"] for arm in ("dpo", "sft")]
    assert "SFT: {:.1f}% against {:.1f}%".format(*values) in page
    values = [changed["usual protocol"][arm]["always A is right"] for arm in ("dpo", "sft")]
    assert "its adapters had {:.1f}% and {:.1f}%".format(*values) in page
    assert f"SFT had reached {changed['1024_pairs']['arms']['sft']['ranking_accuracy']['value']:.1f}%" in page


def test_what_is_said_of_the_ablations_is_what_their_file_holds():
    ablations = json.loads(read("docs/results/ablations.json"))
    readme, page, settings = (" ".join(read(name).replace("\n> ", " ").split()) for name in ("README.md", "docs/results/README.md", "docs/hyperparameters.md"))

    def change(study, stage):
        return ablations[study][f"{stage} - same"]

    def with_interval(found, form="{value:+.1f} ({low:+.1f} to {high:+.1f})"):
        return form.format(**found).replace("-", "−")

    def undecided(found):
        return found["low"] < 0 < found["high"]

    def signed(*values):
        return [f"{value:+.1f}".replace("-", "−") for value in values]

    def value(study, arm, measure="ranking_accuracy"):
        return ablations[study]["arms"][arm][measure]["value"]

    leads = {study: found["dpo - sft"] for study, found in ablations.items() if "dpo - sft" in found}
    by_epochs = [leads[f"sft_x{times}"] for times in (1, 2, 3)]
    assert undecided(by_epochs[1]) and undecided(by_epochs[2])
    assert "(#ablations) ({} and {} points, one run each".format(*map(with_interval, by_epochs[1:])) in page
    plain = "{value:+.1f}, {low:+.1f} to {high:+.1f}"
    assert f"no gain of DPO is shown ({with_interval(by_epochs[1], plain)})" in readme
    after = signed(*(lead["value"] for lead in by_epochs))
    assert "is {} points after four epochs, {} after eight and {} after twelve".format(*after) in page
    assert "DPO from there adds {}, {} and {}".format(*after) in settings
    assert "ranks {:.1f}, {:.1f} and {:.1f}% right after four".format(*(value(f"sft_x{times}", "sft") for times in (1, 2, 3))) in settings
    assert undecided(change("sft_x1", "sft")), "at 2e-3 no gain is shown"
    longer = {study: ablations[study]["dpo - longer sft"] for study in experiment.AS_LONG}
    level = {study: found for study, found in longer.items() if found["high"] > 0}
    assert len(longer) == 11 and level.keys() == {"rate_x3.2", "rank_64"} and all(map(undecided, level.values()))
    said = "in nine rows of eleven. Level with it are DPO at 3.2 times its rate, {}, and at LoRA rank 64, {},"
    assert said.format(*(with_interval(level[study]) for study in ("rate_x3.2", "rank_64"))) in page
    assert f"DPO drew level with eight epochs of SFT ({with_interval(level['rate_x3.2'])}, one run, and an SFT of 78.7%, the least of four such" in page
    assert f"drew level with such an SFT ({with_interval(level['rate_x3.2'], '{value:+.1f} points, {low:+.1f} to {high:+.1f}')})" in readme
    rows = evaluate_dpo.read_predictions(config.ROOT / "docs" / "results" / "predictions.csv.gz")
    ties = (rows.loc[rows["arm"] == "co-occurrence", "decision_margin"] == 0).mean()
    assert f"counts ties on many users (co-occurrence: {ties:.0%})" in " ".join(read("docs/thesis.md").split())
    of_seed = []
    for name, (column, wanted) in {"ablations": ("study", "same"), "predictions": ("seed", 3407)}.items():
        rows = pd.read_csv(config.ROOT / "docs" / "results" / f"{name}.csv.gz")
        rows = rows[(rows["history"] == "own") & (rows[column] == wanted)]
        of_seed += [100 * (rows.loc[rows["arm"] == arm, "decision_margin"] > 0).mean() for arm in ("sft", "dpo", "sft_long")]
    said = "rank {:.1f}, {:.1f} and {:.1f}% right here, where the study's runs of that seed have {:.1f}, {:.1f} and {:.1f}%"
    assert said.format(*of_seed) in page
    more, less = (ablations["where the preferred film is"][f"{which} popular"]["dpo - sft"] for which in ("more", "less"))
    assert undecided(less) and f"DPO gains {with_interval(more, '{value:.1f} points ({low:+.1f} to {high:+.1f})')} over the SFT" in page
    assert f"no gain is shown ({with_interval(less, plain)})" in page
    betas = [change(f"beta_{beta}", "dpo") for beta in ("0.05", "0.2", "0.5")]
    assert all(map(undecided, betas)) and max(abs(found["value"]) for found in betas) == -betas[2]["value"]
    assert f"From 0.05 to 0.5 ranking accuracy changes by no more than {-betas[2]['value']:.1f}" in settings
    free = betas[2]["order_free_accuracy"]
    assert f"At 0.5 order-free accuracy is at {with_interval(free)}" in page and f"(order-free {signed(free['value'])[0]})" in settings
    errors = [value(study, "dpo", "calibration_error") for study in ("beta_0.5", "same")]
    assert "(expected calibration error {:.2f} against {:.2f})".format(*errors) in page
    less, more = (change(f"rate_x{times}", "dpo") for times in ("0.32", "3.2"))
    points = "{value:.1f} points ({low:+.1f} to {high:+.1f})"
    bare = "{value:.1f} ({low:+.1f} to {high:+.1f})"
    said = "DPO is better by {}, order-free by {}; at a third of it, worse by {:.1f}"
    assert said.format(with_interval(more, points), with_interval(more["order_free_accuracy"], bare), -less["value"]) in page
    fewer, higher = (change(f"rate_x{times}_sft", "sft") for times in ("0.32", "3.2"))
    said = "SFT is better by {}, of which order-free accuracy shows nothing: {}."
    assert said.format(with_interval(higher, points), with_interval(higher["order_free_accuracy"])) in page
    assert undecided(higher["order_free_accuracy"]) and f"At a third it is worse by {-fewer['value']:.1f}" in page
    assert f"a third of 1e-3 loses {-fewer['value']:.1f}, at 3.2 times it gains {higher['value']:.1f}, at 2e-3 nothing" in settings
    assert f"DPO at 3.2 times 2e-4 gains {more['value']:.1f}, at a third it loses {-less['value']:.1f}" in settings
    bits = [leads[study]["value"] for study in ("same", "8bit", "16bit")]
    assert "leads SFT by {:.1f}, {:.1f} and {:.1f} points in 4, 8 and 16 bits".format(*bits) in page
    changes = [ablations["change of DPO's lead"][f"{count} bits, less 4"] for count in (8, 16)]
    assert all(map(undecided, changes)) and "8 bits less 4 are {}, 16 less 4 {}.".format(*map(with_interval, changes)) in page
    assert f"depends on the bits (16 less 4: {with_interval(changes[1], plain)})" in readme
    alone = [with_interval(change(f"{count}bit", stage)) for stage in ("dpo", "sft") for count in (8, 16)]
    assert "DPO itself is at {} in 8 and {} in 16, SFT at {} and {}.".format(*alone) in page
    most = max(change(f"{count}bit", "dpo")["value"] for count in (8, 16))
    assert f"DPO is within {most:.1f} points of what it is in 4" in settings
    few, fewest = leads["1024_pairs"], leads["128_pairs"]
    assert undecided(few) and undecided(change("1024_pairs", "sft"))
    assert f"no worse than with all ({with_interval(change('1024_pairs', 'sft'), plain)})" in page
    assert f"over it is {with_interval(few)}, order-free {with_interval(few['order_free_accuracy'])}: smaller" in page
    assert f"(order-free {with_interval(fewest['order_free_accuracy'], plain)})" in page
    assert f"(position bias {value('128_pairs', 'dpo', 'position_bias'):.0f})".replace("-", "−") in page
    steps = [json.loads(read(f"docs/results/runs/ablations_dpo_{name}.run.json"))["steps"] for name in ("same", "1024_pairs", "128_pairs")]
    assert steps == [300, 300, 40] and round(300 * 64 / 1024) == 19
    assert "DPO's lead over SFT is {}, {} and {};".format(*signed(*(leads[name]["value"] for name in ("128_pairs", "1024_pairs", "same")))) in settings
    changes = [[change(f"rank_{rank}", stage)["value"] for stage in ("sft", "dpo")] for rank in (64, 8)]
    said = "SFT ranks {:.1f} and DPO {:.1f} points better, at 8 they rank {:.1f} and {:.1f} worse"
    assert said.format(*changes[0], *(-found for found in changes[1])) in page
    assert "64 gains {:.1f} (SFT) and {:.1f} (DPO), 8 loses {:.1f} and {:.1f}".format(*changes[0], *(-found for found in changes[1])) in settings
    losses = [-change(loss, "dpo")["value"] for loss in ("ipo", "apo_zero")]
    ipo, apo = (change(loss, "dpo")["order_free_accuracy"] for loss in ("ipo", "apo_zero"))
    said = f"IPO ranks {losses[0]:.1f} points lower, for which its lean to B may be enough (position bias {value('ipo', 'dpo', 'position_bias'):.0f};"
    assert said.replace("-", "−") in page and undecided(ipo) and value("apo_zero", "dpo", "position_bias") < -10
    assert f"order-free {with_interval(ipo, plain)}), and APO-zero {losses[1]:.1f} lower, order-free, too ({with_interval(apo, plain)})" in page
    assert "`ipo` loses {:.1f} and `apo_zero` {:.1f}".format(*losses) in settings
    both = [change("both_orders", stage) for stage in ("sft", "dpo")]
    assert all(map(undecided, both)) and "({} and {} points, intervals hold 0)".format(*signed(*(found["value"] for found in both))) in page
    for arm in ("sft", "dpo"):
        assert ablations["usual protocol"][f"{arm}_original_order"] == {"always A is right": 100.0, "both orders": 50.0}
    backends = [change("hf", stage) for stage in ("sft", "dpo")]
    assert all(map(undecided, backends)) and "as through Unsloth: {} and {};".format(*map(with_interval, backends)) in page
    assert "what Unsloth trains: {} (SFT) and {} (DPO)".format(*signed(*(found["value"] for found in backends))) in settings
    responses = [value(study, "dpo", "response_accuracy") for study in ("hf", "same", "from_base_hf", "from_base")]
    assert "DPO has {:.1f}% and {:.1f}% right, and from the base model {:.1f}% and {:.1f}%".format(*responses) in page
    assert abs(responses[0] - responses[1]) < 3 and abs(responses[2] - responses[3]) < 3
    assert {value(study, "dpo") for study in ("from_base", "from_base_hf")} == {50.0}
    assert undecided(leads["negatives_random"]) and undecided(leads["negatives_matched"])
    random, matched = ([value(f"negatives_{kind}", arm) for arm in ("sft", "dpo")] for kind in ("random", "matched"))
    told = [ablations["negatives_matched"]["arms"][arm]["ranking_accuracy"] for arm in ("sft", "dpo")]
    assert all(found["low"] < 50 < found["high"] for found in told) and f"({value('negatives_random', 'popularity'):.1f}%) beats both" in page
    assert "not told from SFT ({:.1f}% and {:.1f}%)".format(*reversed(random)) in page
    assert "(SFT {:.1f}%, DPO {:.1f}%), where co-occurrence has {:.1f}%".format(*matched, value("negatives_matched", "co-occurrence")) in page
    assert "SFT has {:.1f}% and DPO {:.1f}%; against films as popular as the preferred one neither is shown above chance, {:.1f}% and {:.1f}%".format(*random, *matched) in settings
    unchanged = [value("same", arm) for arm in ("sft", "dpo")]
    assert "beside {:.1f}% of SFT and {:.1f}% of DPO unchanged".format(*unchanged) in settings


def test_the_tables_of_the_study_are_those_of_its_files():
    results = config.ROOT / "docs" / "results"
    if not (results / "predictions.csv.gz").exists():
        pytest.skip("the study has not been run")
    page = (results / "README.md").read_text(encoding="utf-8")
    assert experiment.filled(page, results) == page
    metrics = json.loads((results / "metrics.json").read_text(encoding="utf-8"))
    assert experiment.published_metrics(results) == metrics, "predictions.csv.gz gives metrics.json"
    said = " ".join(read("README.md").replace("\n> ", " ").split())
    assert evaluate_dpo.sentence(metrics, experiment.MODEL) in said, "the finding on the first screen is that of the results"
