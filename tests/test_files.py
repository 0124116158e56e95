"""Files that are whole or absent, and files from the package index."""

import resource
import shutil
import sys
import zipfile

import pytest

from data import files
from data.errors import UserError
from data.files import fetch_wheel, file_sha256, is_sealed, read_json, seal, whole_folder, write_json, write_text


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "report.md"
    write_text(path, "before")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            write_text(path, "x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_a_folder_is_whole_or_absent(tmp_path):
    target = tmp_path / "final"
    with pytest.raises(RuntimeError), whole_folder(target) as made:
        (made / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    for content in ("first", "second"):
        with whole_folder(target) as made:
            (made / "file").write_text(content)
        assert (target / "file").read_text() == content
    assert list(tmp_path.iterdir()) == [target]


def test_somebodys_json_is_an_object_or_empty(tmp_path):
    path = tmp_path / "run.json"
    assert read_json(path) == {}, "there is none"
    write_json(path, {"arm": "é", "seeds": [1]})
    assert read_json(path) == {"arm": "é", "seeds": [1]}
    for content in (b"[1]", b"3", b"{", b"\xff", b'{"a":' * 99_999, b""):
        path.write_bytes(content)
        assert read_json(path) == {}
    with pytest.raises(ValueError, match="nan"):
        write_json(path, {"loss": float("nan")})
    assert path.read_bytes() == b"", "and nothing was written"


def test_a_sealed_folder_is_whole_as_long_as_no_file_changes(tmp_path):
    (tmp_path / "part").mkdir()
    for name in ("weights", "part/state"):
        (tmp_path / name).write_text(name)
    assert not is_sealed(tmp_path)
    seal(tmp_path)
    assert is_sealed(tmp_path)
    (tmp_path / "part" / "state").write_text("cut")
    assert not is_sealed(tmp_path)
    (tmp_path / "part" / "state").unlink()
    assert not is_sealed(tmp_path)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index on disk with one wheel."""
    wheel = tmp_path / "index" / "made_up-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("made_up-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: made-up\nVersion: 1.0\n")
        archive.writestr("made_up-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("made_up-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    return wheel


def test_a_fetched_wheel_is_checked(index, tmp_path):
    (tmp_path / "to").mkdir()
    assert fetch_wheel("made-up==1.0", file_sha256(index), tmp_path / "to").name == index.name
    with pytest.raises(UserError, match="not the file that was expected"):
        fetch_wheel("made-up==1.0", "0" * 64, tmp_path / "to")
    with pytest.raises(UserError, match="cannot fetch made-up==2.0"):
        fetch_wheel("made-up==2.0", "0" * 64, tmp_path / "to")


def test_without_pip_the_error_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(UserError, match="cannot fetch"):
        fetch_wheel("made-up==1.0", "0" * 64, tmp_path)


def test_a_folder_is_held_by_one_run_at_a_time(tmp_path):
    with files.only_run_in(tmp_path):
        problem = f"another run is writing to {tmp_path}"
        with pytest.raises(UserError, match=problem), files.only_run_in(tmp_path):
            pass
    with files.only_run_in(tmp_path):
        assert (tmp_path / ".lock").is_file()


def test_a_file_system_without_locks_is_told_and_a_system_without_them_refused(tmp_path, monkeypatch, capsys):
    def flock(file: object, how: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with files.only_run_in(tmp_path / "outputs"):
        assert (tmp_path / "outputs").is_dir()
    assert "cannot be locked" in capsys.readouterr().err
    monkeypatch.setattr(files, "fcntl", None)
    with pytest.raises(UserError, match="no file locks\nOn Windows run it in WSL2"), files.only_run_in(tmp_path):
        pass
