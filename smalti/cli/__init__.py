"""The command line: `smalti …`, or `python -m smalti …`.

Exit codes: 0 success; 1 the run failed, with one message; 2 wrong arguments or recipe; 130
interrupted.
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

DONE = 0
FAILED = 1
WRONG = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # where the terminal is not UTF-8, `→` is not a reason to fail
        sys.stdout.reconfigure(errors="replace")
    try:
        arguments = parse(argv)
    except SystemExit as stop:  # argparse: 0 after --help and --version, 2 after a complaint
        return int(stop.code or 0)
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        _say("interrupted; run the same command again to resume")
        return INTERRUPTED
    except BrokenPipeError:  # `smalti show … | head`: the reader has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except ConfigError as error:
        _say(f"error: {error}")
        return WRONG
    except SmaltiError as error:
        _say(f"error: {message_of(error)}")
        return FAILED
    except Exception as error:
        return _report(error)
    return DONE


def _report(error: Exception) -> int:
    """Report an unexpected error in one line; its traceback goes to a file."""
    known = message_of(error)
    if known is not None:
        _say(f"error: {known}")
        return FAILED
    text = "".join(traceback.format_exception(error))
    last = f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else 'no message'}"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="smalti-error-", suffix=".log", delete=False
        ) as file:
            file.write(text)
    except OSError:  # the disk may be full: print the traceback instead
        sys.stderr.write(text)
        _say(f"error: {last}")
        return FAILED
    _say(f"error: {last}\nThis error is unknown to smalti; the traceback is in {file.name}")
    return FAILED


def _say(message: str) -> None:
    sys.stdout.flush()
    sys.stderr.write(f"smalti: {message}\n")
    sys.stderr.flush()
