"""Run every benchmark and write bench/results/DATE-MACHINE.json: `python -m bench [number …]
[--option value …]`.

Options, from the first that begins with `--` on, go to each script.

A benchmark is a script `bench/NN_what.py`, NN its goal's number, that measures both sides in one
run and prints one line of JSON last: `{"goal": 10, "ratio": …, "quality": …, "met": …, "machine":
…}`.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def last_json(text: str) -> dict[str, Any] | None:
    """The JSON object of the last line, None when that is something else."""
    lines = text.strip().splitlines()
    try:
        value = json.loads(lines[-1]) if lines else None
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def standing(path: Path) -> list[dict[str, Any]]:
    """What an earlier run of the day wrote, for the results that this one leaves out."""
    return json.loads(path.read_text()) if path.exists() else []


def which(item: dict[str, Any]) -> tuple[int, str]:
    """Key of a result: its goal, and on what vectors."""
    return item["goal"], item.get("vectors", "")


def main() -> int:
    given = sys.argv[1:]
    first = next((place for place, word in enumerate(given) if word.startswith("--")), len(given))
    wanted, options = {int(number) for number in given[:first]}, given[first:]
    scripts = [
        path
        for path in sorted(HERE.glob("[0-9][0-9]_*.py"))
        if not wanted or int(path.name[:2]) in wanted
    ]
    if not scripts:
        print("no such benchmark", file=sys.stderr)
        return 2
    results, failed = [], []
    for script in scripts:
        print(f"== {script.name}", flush=True)
        command = [sys.executable, str(script), *options]
        done = subprocess.run(command, cwd=HERE.parent, stdout=subprocess.PIPE, text=True)
        print(done.stdout, flush=True)
        found = last_json(done.stdout)
        if done.returncode or found is None:
            failed.append(script.name)
        else:
            results.append(found)
    if results:
        machine = re.sub(
            r"[^A-Za-z0-9]+", "-", str(results[0].get("machine", os.uname().machine))
        ).strip("-")
        path = HERE / "results" / f"{datetime.date.today().isoformat()}-{machine}.json"
        path.parent.mkdir(exist_ok=True)
        new = {which(item) for item in results}
        others = [item for item in standing(path) if which(item) not in new]
        path.write_text(json.dumps(sorted(others + results, key=which), indent=2) + "\n")
        print(
            f"{sum(bool(item.get('met')) for item in results)} of {len(results)} goals met; {path.relative_to(HERE.parent)}"
        )
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
