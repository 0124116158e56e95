"""Which module may know of which: what needs no model in data/, and above it what both scripts share."""

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import data
from config import ROOT

MODULES = [f"data.{module.name}" for module in pkgutil.iter_modules(data.__path__)]
SCRIPTS = ("train_dpo", "evaluate_dpo")
ORDER = (  # a module imports from those before it alone
    *("errors", "files", "machine", "pairs", "build_pairs", "trees", "tokens", "baselines", "bases", "runs"),
    *("adapters", "predictions", "measures", "verdict", "report", "figures", "display"),
)


def imported(path: Path) -> set[str]:
    """The first names of all that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or ".")
    return {name.partition(".")[0] for name in names}


def test_what_needs_no_model_loads_neither_torch_nor_transformers():
    assert {"data.measures", "data.verdict", "data.report", "data.build_pairs"} <= {*MODULES}
    code = (
        "import importlib, sys\n"
        f"for name in {MODULES}:\n"
        "    importlib.import_module(name)\n"
        "    for heavy in ('torch', 'transformers'):\n"
        "        assert heavy not in sys.modules, f'{name} loads {heavy}'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", MODULES)
def test_what_needs_no_model_knows_nothing_of_what_does(module):
    path = ROOT / f"{module.replace('.', '/')}.py"
    assert not imported(path) & {"config", *SCRIPTS}


def test_imports_within_data_point_one_way():
    assert {f"data.{name}" for name in ORDER} == {*MODULES}
    for place, name in enumerate(ORDER):
        nodes = ast.walk(ast.parse((ROOT / "data" / f"{name}.py").read_text(encoding="utf-8")))
        imports = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
        used = {node.module.removeprefix("data.") for node in imports if node.module.startswith("data.")}
        used |= {alias.name for node in imports if node.module == "data" for alias in node.names}
        assert used <= {*ORDER[:place]}, name


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_imports_the_other_and_config_imports_neither(script):
    assert not imported(ROOT / f"{script}.py") & {*SCRIPTS}
    assert script not in imported(ROOT / "config.py")
