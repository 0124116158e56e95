"""What a machine has, for run.json and for the checks before a run."""

import subprocess
from importlib import metadata

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
