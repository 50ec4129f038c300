"""The command line: `smalti …`, or `python -m smalti …`.

Exit codes: 0 done; 1 the run failed, with one clear message; 2 bad arguments or recipe; 130 interrupted.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence

from smalti.cli.failures import message_of
from smalti.cli.parser import parse
from smalti.errors import ConfigError, SmaltiError

DONE, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where the terminal is not UTF-8, `→` is no reason to fail
    try:
        arguments = parse(argv)
    except SystemExit as stop:  # argparse: 0 after --help and --version, 2 after a complaint
        return int(stop.code or 0)
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        _tell("interrupted; run the same command to go on")
        return INTERRUPTED
    except BrokenPipeError:  # `smalti show … | head`: the reader has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except ConfigError as error:
        _tell(f"error: {error}")
        return WRONG
    except SmaltiError as error:
        _tell(f"error: {message_of(error)}")
        return FAILED
    except Exception as error:
        return _report(error)
    return DONE


def _report(error: Exception) -> int:
    """One clear line for an error raised elsewhere; its traceback goes to a file that the line names."""
    known = message_of(error)
    if known is not None:
        _tell(f"error: {known}")
        return FAILED
    text = "".join(traceback.format_exception(error))
    last = f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else 'no message'}"
    try:
        with tempfile.NamedTemporaryFile("w", prefix="smalti-error-", suffix=".log", delete=False) as file:
            file.write(text)
    except OSError:  # no room even for the log: the traceback itself is better than nothing
        sys.stderr.write(text)
        _tell(f"error: {last}")
        return FAILED
    _tell(f"error: {last}\nThis is no error that smalti knows; the whole traceback is in {file.name}")
    return FAILED


def _tell(message: str) -> None:
    sys.stdout.flush()
    sys.stderr.write(f"smalti: {message}\n")
    sys.stderr.flush()
