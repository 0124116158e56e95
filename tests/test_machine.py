"""What a machine has, for run.json and for the checks before a run."""

import subprocess
import sys
from importlib import metadata

import pytest

from data import machine


def test_the_facts_of_a_machine_hold_versions_hardware_and_commit():
    facts = machine.machine_facts()
    assert set(facts["packages"]) == {*machine.PACKAGES} and facts["packages"]["trl"] == metadata.version("trl")
    assert facts["device"] and facts["cores"] >= 1 and facts["memory_gb"] > 0
    asked = subprocess.run(["git", "-C", machine.ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
    head = asked.stdout.strip()
    assert facts["git_commit"] in (head or None, f"{head} with changes")


def test_a_requirement_is_unmet_where_the_package_is_missing_or_of_another_version(tmp_path, monkeypatch):
    (tmp_path / "requirements.txt").write_text("# tools\nnumpy>=1 # any\npandas==0.1\nno-such-package>=2\ntrl<1\n")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    asked = ["numpy", "pandas", "no-such-package"]
    assert machine.unmet_requirements(asked) == {"pandas==0.1": metadata.version("pandas"), "no-such-package>=2": None}


def test_without_git_the_commit_is_not_known(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert machine.machine_facts()["git_commit"] is None


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"RANK": "", "WORLD_SIZE": ""}, "0 1"),
        ({"RANK": "3", "WORLD_SIZE": "4"}, "0 1"),  # left over by a shell
        ({"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost"}, "3 4"),
    ],
)
def test_only_a_launcher_makes_several_processes(changes, wanted):
    code = "from data.machine import PROCESSES, RANK; print(RANK, PROCESSES)"
    done = subprocess.run([sys.executable, "-c", code], env=changes, cwd=machine.ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == wanted, done.stderr


def test_without_a_home_folder_the_cache_is_a_temporary_one():
    code = (
        "import os, tempfile; os.path.expanduser = lambda path: path; from data.machine import CACHE;"
        "assert CACHE.parent == __import__('pathlib').Path(tempfile.gettempdir())"
    )
    assert subprocess.run([sys.executable, "-c", code], env={}, cwd=machine.ROOT).returncode == 0
