"""What the documents say is what the programs do."""

import json
import re
import shlex
from pathlib import Path

import pytest

import config
import evaluate_dpo
from config import EvaluationSettings, TrainingSettings

DOCUMENTS = [path for path in config.ROOT.rglob("*.md") if not {".venv", "outputs", "node_modules"} & set(path.relative_to(config.ROOT).parts[:-1])]
DOCUMENTS.append(config.ROOT / "outputs" / "README.md")


def shell_lines() -> list[tuple[str, str]]:
    """Every command of a project script that a document shows, in blocks and between backticks."""
    found = []
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        pieces = [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()]
        pieces += re.findall(r"`([^`\n]+\.py [^`\n]+)`", text)
        for piece in pieces:
            found += [(path.name, part.split(" # ")[0].strip()) for part in piece.split("&&") if ".py" in part.split("#")[0]]
    return found


@pytest.mark.parametrize(("document", "line"), shell_lines())
def test_every_documented_command_is_accepted(document, line):
    words = shlex.split(line)
    script = next(word for word in words if word.endswith(".py"))
    flags = words[words.index(script) + 1 :]
    assert (config.ROOT / script).is_file(), f"{document}: {line}"
    if script == "train_dpo.py":
        config.parse_settings(TrainingSettings, flags)
    elif script == "evaluate_dpo.py":
        config.parse_settings(EvaluationSettings, flags)
    else:
        known = (config.ROOT / script).read_text(encoding="utf-8")
        assert all(f'"{flag}"' in known for flag in flags if flag.startswith("--")), f"{document}: {line}"


def test_the_table_of_the_readme_is_that_of_the_committed_results():
    readme = (config.ROOT / "README.md").read_text(encoding="utf-8")
    source, shown = re.search(r"<!-- table: (\S+) -->\n```text\n(.*?)```", readme, re.S).groups()
    metrics = json.loads((config.ROOT / source).read_text())
    assert shown == evaluate_dpo.table(metrics) + "\n\n" + evaluate_dpo.summary(metrics) + "\n"


def test_every_link_of_the_documents_leads_somewhere():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", path.read_text(encoding="utf-8")):
            assert (Path(path).parent / target).exists(), f"{path.name}: {target}"


def test_no_data_or_weights_are_committed():
    import subprocess

    tracked = subprocess.run(["git", "-C", config.ROOT, "ls-files"], capture_output=True, text=True).stdout.splitlines()
    assert not [name for name in tracked if re.search(r"\.(jsonl|safetensors|gguf|bin|pt|whl|zip)$", name)]


def test_the_schema_of_metrics_json_is_the_documented_one():
    text = (config.ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    metrics = json.loads((config.ROOT / "docs" / "results" / "small" / "metrics.json").read_text(encoding="utf-8"))
    comparison = metrics["comparisons"]["dpo - sft"]
    for key in [*metrics, *metrics["arms"]["dpo"], *comparison]:
        assert f"`{key}`" in text, f"docs/metrics.md lacks {key}"
    assert f"version {evaluate_dpo.SCHEMA_VERSION}" in text and metrics["schema_version"] == evaluate_dpo.SCHEMA_VERSION
    assert set(evaluate_dpo.MEASURES) <= set(metrics["arms"]["dpo"]), "the committed results are of an older version"


def test_every_fault_that_is_documented_is_shown_by_a_test():
    text = (config.ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    tests = "".join(path.read_text(encoding="utf-8") for path in (config.ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in tests, name
