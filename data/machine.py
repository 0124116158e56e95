"""What a machine has: processes, versions, memory, and the commit of this code."""

import contextlib
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
HOME = os.path.expanduser("~")  # "~" where there is none
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or (tempfile.gettempdir() if HOME == "~" else f"{HOME}/.cache"))
CACHE /= "dpo-vs-sft"

# This process among those that `accelerate launch` started; alone without it, whatever a shell left over
LAUNCHED = all(os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))
RANK, LOCAL_RANK = (int(os.environ.get(name) or 0) if LAUNCHED else 0 for name in ("RANK", "LOCAL_RANK"))
PROCESSES = int(os.environ["WORLD_SIZE"]) if LAUNCHED else 1
FSDP = os.environ.get("ACCELERATE_USE_FSDP") == "true"  # one model is sharded over the GPUs

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "unsloth", "datasets", "accelerate")


def machine_facts() -> dict[str, Any]:
    """Versions, processor and git commit, for run.json."""

    def git(*words: str) -> str:
        with contextlib.suppress(OSError):  # there may be no git
            return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True).stdout.strip()
        return ""

    commit = git("rev-parse", "HEAD")
    return {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "git_commit": f"{commit} with changes" if commit and git("status", "--porcelain") else commit or None,
        "device": processor_name(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
    }


def peak_process_memory() -> float:
    """The most memory that this process has had, in GB."""
    import resource  # Windows has none

    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


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
