"""Errors that a user can fix, which end a script with exit code 2, and the checks that find them early."""

import errno
import re
import sys
from collections.abc import Callable
from typing import Any


class UserError(Exception):
    """Something that the user can fix: one line of what is wrong, one of how to fix it."""

    def __init__(self, problem: object, remedy: str):
        super().__init__(f"{problem}\n{remedy}")


def run_script(main: Callable[[], Any]) -> None:
    """Run a script's main function; an error that the user can fix ends it with exit code 2 and no traceback."""
    sys.stdout.reconfigure(errors="replace")  # a terminal may know ASCII alone
    try:
        main()
    except KeyboardInterrupt as stopped:
        message = str(stopped) or "stopped"
    except Exception as error:
        known = error if isinstance(error, UserError) else fault_of_the_machine(error)
        if known is None:
            raise
        message = f"error: {known}"
    else:
        return
    print(printable(message), file=sys.stderr)
    sys.exit(2)


def fault_of_the_machine(error: Exception) -> UserError | None:
    """A full disk, a folder without permission or too little memory, with a remedy; None for anything else."""
    text = printable(str(error).strip().partition("\n")[0])
    number = getattr(error, "errno", None)
    if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", text):
        remedy = "Close other programs, or lower --batch_size (in evaluation --batch_users)."
        return UserError(f"out of memory: {text}", remedy)
    # safetensors and torch hide the number in their message, or say only that they could not write
    full = re.search(r"os error (28|122|27)\b|inline_container|iostream error", text)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or full:
        remedy = "Free some space, or give --outputs elsewhere; what was finished is still there."
        return UserError(f"the disk is full: {text}", remedy)
    refused = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EIO)
    if number in refused or re.search(r"os error (13|1|30)\b", text):
        remedy = "Fix its permissions, or give --outputs a folder that you may write to."
        return UserError(f"cannot read or write: {text}", remedy)
    return None


FAILED_KERNEL = (  # errors of torch's and Triton's compilers, by name: they are not imported where they are not needed
    *("OutOfResources", "CompilationError", "PTXASError", "NoTritonConfigsError"),
    *("InductorError", "BackendCompilerFailed"),
)


def failed_kernel(error: BaseException | None) -> str:
    """What is wrong with a kernel that torch or Triton could not make or run on this card; empty for other errors."""
    while error:
        if type(error).__name__ in FAILED_KERNEL:
            lines = str(error).strip().splitlines()  # the first may say "backend='inductor' raised:"
            told = next((line for line in lines if not line.endswith(" raised:")), "")
            return f"a kernel does not run on this card ({printable(told)})"
        error = error.__cause__ or error.__context__
    return ""


Check = tuple[str, str, str]  # what, what was found, how to fix it ("" where all is well)


def refuse(checks: list[Check]) -> None:
    """Raise UserError for the first check that found something to fix; print what is only to be known (`note`)."""
    for what, found, remedy in checks:
        if remedy:
            raise UserError(f"{what}: {found}", remedy)
        if what == "note":
            print(f"note: {found}", file=sys.stderr)


def print_checks(checks: list[Check]) -> None:
    """Print all checks; exit code 2 where something is to be fixed."""
    width = max(len(what) for what, _, _ in checks)
    for what, found, remedy in checks:
        mark = "!!" if remedy else "--" if what == "note" else "ok"
        print(f"{mark}  {what:<{width}}  {found}" + f"\n    {'':<{width}}  {remedy}" * bool(remedy))
    problems = sum(bool(remedy) for _, _, remedy in checks)
    print("ready to train" if not problems else f"{problems} thing(s) to fix before training")
    if problems:
        raise SystemExit(2)


def printable(text: str) -> str:
    """Text without what would steer a terminal, such as an escape sequence in a file's name."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)
