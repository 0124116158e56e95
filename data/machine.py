"""What a machine has: versions, processor, and the commit of this code."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "unsloth", "datasets", "accelerate")


def machine_facts() -> dict[str, Any]:
    """Versions, processor and git commit, for run.json."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True).stdout.strip()

    commit = git("rev-parse", "HEAD")
    return {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "git_commit": f"{commit} with changes" if commit and git("status", "--porcelain") else commit or None,
        "device": processor_name(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
    }


def processor_name() -> str:
    with contextlib.suppress(OSError):
        if names := re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()):
            return names[0]
    return platform.processor() or platform.machine()


def version(package: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def unmet_requirements(packages: Iterable[str]) -> dict[str, str | None]:
    """What requirements.txt asks of these packages and is not installed: {requirement line: installed version}."""
    from packaging.requirements import Requirement

    lines = [line.split("#")[0] for line in (ROOT / "requirements.txt").read_text().splitlines()]
    unmet = {}
    for wanted in (Requirement(line) for line in lines if line.strip()):
        found = version(wanted.name)
        if wanted.name in packages and (found is None or not wanted.specifier.contains(found, prereleases=True)):
            unmet[f"{wanted.name}{wanted.specifier}"] = found
    return unmet
