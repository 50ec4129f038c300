"""Fetch Tux Paint's stamps as a small captioned corpus in .data/stamps: `python
scripts/fetch_stamps.py`.

About 800 photographs and drawings on transparent ground with an English line each, from Debian's
package (161 MB, sha256 pinned), in class folders with a .txt beside each image:
`corpus.source=.data/stamps`. Needs apt-get and dpkg-deb; exit code 1, with a line that says why,
when they cannot be had. Nothing in the repository depends on them.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TARGET = Path(__file__).resolve().parents[1] / ".data" / "stamps"
PACKAGE, VERSION = "tuxpaint-stamps-default", "2022.06.04-1"
SHA256 = "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34"
INSIDE = "usr/share/tuxpaint/stamps"
LICENCE = f"usr/share/doc/{PACKAGE}/copyright"


class NotToBeHadError(Exception):
    """Why the stamps cannot be fetched here."""


def fetch(folder: Path) -> Path:
    """The package's file in `folder`, its bytes checked."""
    missing = [name for name in ("apt-get", "dpkg-deb") if shutil.which(name) is None]
    if missing:
        raise NotToBeHadError(f"{' and '.join(missing)} not found: this needs Debian or Ubuntu")
    done = subprocess.run(
        ["apt-get", "download", f"{PACKAGE}={VERSION}"], cwd=folder, capture_output=True, text=True
    )
    files = sorted(folder.glob("*.deb"))
    if done.returncode or not files:
        raise NotToBeHadError((done.stderr.strip().splitlines() or ["apt-get gave no reason"])[-1])
    with open(files[0], "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise NotToBeHadError(f"{files[0].name} has sha256 {digest}, expected {SHA256}")
    return files[0]


def convert(stamps: Path, out: Path) -> int:
    """Copy each PNG that has an English line to out/<class>/, the line beside it; how many there
    were.
    """
    count = 0
    for image in sorted(stamps.rglob("*.png")):
        text = image.with_suffix(".txt")
        lines = text.read_text(encoding="utf-8").splitlines() if text.exists() else []
        if not lines or not lines[0].strip():
            continue
        parts = image.relative_to(stamps).with_suffix("").parts
        folder = out / parts[0]
        folder.mkdir(parents=True, exist_ok=True)
        name = "-".join(parts[1:]) or parts[0]
        shutil.copyfile(image, folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(lines[0].strip() + "\n", encoding="utf-8")
        count += 1
    return count


def main() -> int:
    if TARGET.exists():
        print(f"{TARGET} is here already")
        return 0
    TARGET.parent.mkdir(exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=TARGET.parent) as name:
            folder = Path(name)
            folder.chmod(0o755)
            package = fetch(folder)
            subprocess.run(["dpkg-deb", "-x", str(package), str(folder / "all")], check=True)
            made = folder / "stamps"
            count = convert(folder / "all" / INSIDE, made)
            shutil.copyfile(folder / "all" / LICENCE, made / "LICENCE")
            made.rename(TARGET)
    except (NotToBeHadError, OSError, subprocess.CalledProcessError) as error:
        print(f"stamps could not be fetched ({error}); nothing depends on them", file=sys.stderr)
        return 1
    print(f"stamps: {count} images in {TARGET}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
