"""An object store in place of the disk: corpus, encoder, features and tokens read from and write to
`s3://` or `gs://`, on this machine.

`python bench/object_store.py` wants `pip install s3fs "moto[server]"`: moto's server is the store.
`python bench/object_store.py gs` wants `pip install gcsfs gcp-storage-emulator`. Tars, a Parquet
file and a folder on the store are the source; the output lies on the local disk, then on the store,
where a second run must skip what exists. Then a whole small chain is run into the store, with two
workers. The last line is JSON: `quality` is 1 when all files are byte for byte those on the disk
and the chain has its report.
"""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.machine import machine
from bench.pictures import save_encoder, save_tokenizer
from smalti import storage
from smalti.schema import Recipe
from smalti.workflows import encoder, tokens
from smalti.workflows.cluster.session import ensure_ray
from smalti.workflows.corpus import stage as corpus
from smalti.workflows.features import stage as features
from smalti.workflows.sources.generated import draw

ROOT = Path(__file__).resolve().parents[1]
NAME = "smalti-bench"
SERVERS = {  # by protocol: the module, its arguments, and the environment that sends clients to it
    "s3": ("moto.server -H 127.0.0.1 -p {port}", "AWS_ENDPOINT_URL"),
    "gs": (
        "gcp_storage_emulator start --host=127.0.0.1 --port={port} --in-memory",
        "STORAGE_EMULATOR_HOST",
    ),
}
ACCOUNT = {
    "AWS_ACCESS_KEY_ID": "bench",
    "AWS_SECRET_ACCESS_KEY": "bench",
    "AWS_DEFAULT_REGION": "us-east-1",
    "GOOGLE_CLOUD_PROJECT": "bench",
}
STAGES: dict[str, Any] = {
    "corpus": corpus,
    "encoder": encoder,
    "features": features,
    "tokens": tokens,
}
RECORDS = ("artifact.json", "artifact.partial.json", "shared.json")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def start_store(protocol: str, port: int) -> subprocess.Popen[bytes]:
    """The store's server on the loopback, when it answers. Errors: RuntimeError after 30 s."""
    module, *arguments = SERVERS[protocol][0].format(port=port).split()
    command = [sys.executable, "-m", module, *arguments]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and server.poll() is None:
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)) == 0:
                return server
        time.sleep(0.1)
    server.kill()
    raise RuntimeError(f"{module} did not start: {__doc__}")


def write_sources(folder: str) -> None:
    """120 pictures: two tars, a Parquet file, and loose files with captions."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    made = [draw(0, "store", number, 32) for number in range(120)]
    for kind in ("tars", "table", "loose"):
        Path(folder, kind).mkdir(parents=True)
    for number in range(2):
        with tarfile.open(Path(folder, "tars", f"{number:05d}.tar"), "w") as tar:
            for index in range(30 * number, 30 * number + 30):
                for suffix, data in (("png", made[index][0]), ("txt", made[index][1].encode())):
                    info = tarfile.TarInfo(f"{index:05d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    rows = {"image": [one[0] for one in made[60:90]], "caption": [one[1] for one in made[60:90]]}
    pq.write_table(pa.table(rows), Path(folder, "table", "x.parquet"))
    for index in range(90, 120):
        Path(folder, "loose", f"{index}.png").write_bytes(made[index][0])
        Path(folder, "loose", f"{index}.txt").write_text(made[index][1])


def recipe(folder: str, bucket: str, out: str) -> Recipe:
    return Recipe.model_validate(
        {
            "out": out,
            "tracking": {"uri": "off"},
            "encoder": {"pretrained": f"{folder}/encoder"},
            "corpus": {
                "source": [f"{bucket}/in/{kind}" for kind in ("tars", "table/x.parquet", "loose")],
                "image_size": 32,
                "shard_images": 20,
                "val_fraction": 0.2,
            },
            "resources": {"actors": 2, "readers": 2},
        }
    )


def files(root: str) -> dict[str, bytes]:
    """Every file below a folder or prefix but records, by relative name."""
    import fsspec

    fs, inside = fsspec.core.url_to_fs(root)
    fs.invalidate_cache()
    names = [name for name in fs.find(inside) if name.rsplit("/", 1)[-1] not in RECORDS]
    found = {name[len(inside.rstrip("/")) + 1 :]: bytes(fs.cat_file(name)) for name in names}
    return {
        name: data for name, data in found.items() if not name.rsplit("/", 1)[-1].startswith(".")
    }


def measure(folder: str, bucket: str) -> dict[str, Any]:
    """All stages on the disk, then on the store, in one Ray session."""
    save_encoder(f"{folder}/encoder", 32, 8, 32, 1)
    seconds: dict[str, float] = {}
    with ensure_ray(recipe(folder, bucket, folder)):
        for where, place in (("disk", f"{folder}/out"), ("store", f"{bucket}/out")):
            save_tokenizer(place, f"{folder}/encoder", 32)
            for name, stage in STAGES.items():
                started = time.monotonic()
                stage.run(recipe(folder, bucket, place))
                seconds[f"{name}/{where}"] = round(time.monotonic() - started, 1)
        made = files(f"{bucket}/out")
        again = [stage.run(recipe(folder, bucket, f"{bucket}/out")) for stage in STAGES.values()]
    here, there = files(f"{folder}/out"), files(f"{bucket}/out")
    differ = sorted(
        name for name in here.keys() | there.keys() if here.get(name) != there.get(name)
    )
    print(f"{len(here)} files, differing: {differ[:10] or 'none'}")
    met = not differ and made == there and len(again) == len(STAGES)
    return {"quality": float(met), "files": len(here), "seconds": seconds, "met": met}


def chain(bucket: str) -> bool:
    """Whether a smoke run with its output on the store ends well: trainings, their checkpoints,
    evaluation and all.
    """
    overrides = [f"out={bucket}/chain", "resources.workers=2", "baselines={}", "tracking.uri=off"]
    command = [sys.executable, "-m", "smalti", "run", "semhitok-quickstart", "--smoke", *overrides]
    done = subprocess.run(
        [*command, "mllm.train.checkpoint_every=1"], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    return done.returncode == 0 and storage.exists(f"{bucket}/chain-smoke/report.json")


def main() -> None:
    protocol = sys.argv[1] if len(sys.argv) > 1 else "s3"
    port, bucket = free_port(), f"{protocol}://{NAME}"
    os.environ |= {SERVERS[protocol][1]: f"http://127.0.0.1:{port}"} | ACCOUNT
    server = start_store(protocol, port)
    try:
        import fsspec

        store = fsspec.filesystem(protocol)
        store.mkdir(bucket)
        with tempfile.TemporaryDirectory() as folder:
            write_sources(f"{folder}/in")
            store.put(f"{folder}/in", f"{bucket}/in", recursive=True)
            result = measure(folder, bucket)
            started = time.monotonic()
            result["met"] = chain(bucket) and result["met"]
            result["quality"] = float(result["met"])
            result["seconds"]["chain/store"] = round(time.monotonic() - started, 1)
    finally:
        server.terminate()
        server.wait()
    print(json.dumps({"what": f"object store, {protocol}://", **result, "machine": machine()}))


if __name__ == "__main__":
    main()
