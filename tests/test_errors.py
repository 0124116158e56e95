"""Errors that a user can fix: two lines and exit code 2."""

import errno
import os
import re
import subprocess
import sys

import pytest
from conftest import error_of
from safetensors import SafetensorError

from config import ROOT
from data.errors import UserError, run_script


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EROFS, "Read-only file system", "x"), "cannot read or write: .*Read-only file system: 'x'"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "cannot read or write: .*Permission denied: 'x'"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), "out of memory"),
    ],
)
def test_a_fault_of_the_machine_is_an_error_with_a_remedy(error, said, capsys):
    def run():
        raise error

    assert re.match(said, error_of(run, capsys))


def test_a_terminal_of_ascii_alone_shows_what_it_can():
    script = "from data.errors import run_script; run_script(lambda: print('50.0 \\u00b10.0'))"
    ascii_alone = os.environ | {"PYTHONIOENCODING": "ascii"}
    told = subprocess.run([sys.executable, "-c", script], env=ascii_alone, cwd=ROOT, capture_output=True, check=True)
    assert told.stdout == b"50.0 ?0.0\n"


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 / 0)


def test_an_error_message_cannot_steer_the_terminal(capsys):
    def run():
        raise UserError("no such file \x1b[2J", "Give another.")

    assert "\x1b" not in error_of(run, capsys)
