"""Parts of the training side that need no Ray: schedules, readers, batches, memory, texts.

Covers: workflows/train/elastic.py, workflows/train/guards.py, workflows/train/metrics.py,
workflows/train/periodic.py, workflows/train/progress_monitor.py, workflows/train/tasks/images.py,
workflows/train/throughput.py.
"""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from smalti import shards
from smalti.errors import ConfigError, DataError
from smalti.schema import (
    LanguageModel,
    Lora,
    Mixture,
    MllmSection,
    MllmStage,
    PartRates,
    Recipe,
    Resources,
    Train,
)
from smalti.workflows.encoder import prompts_of
from smalti.workflows.mllm import check, check_parts, prepare_texts, read_texts, result_config
from smalti.workflows.train.collectives import Collectives
from smalti.workflows.train.data import BatchLoader, ImageRows, ShardRows, TokenRows, shard_index
from smalti.workflows.train.elastic import fitting_workers, left_out
from smalti.workflows.train.engines import accumulation, deepspeed_config, learning_rate
from smalti.workflows.train.guards import SkipCount
from smalti.workflows.train.loop import Loop
from smalti.workflows.train.metrics import MetricMeans
from smalti.workflows.train.order import Order
from smalti.workflows.train.periodic import Periodic
from smalti.workflows.train.progress_monitor import rates
from smalti.workflows.train.task import Row, Task, seed_of
from smalti.workflows.train.tasks.encoder import EncoderTask
from smalti.workflows.train.tasks.images import RowMemory, picture_grid, to_bytes, to_unit
from smalti.workflows.train.tasks.semantic import encodes_in_bf16
from smalti.workflows.train.throughput import Throughput, flops_a_token


def test_learning_rate_warms_up_and_follows_the_cosine() -> None:
    train = Train(steps=100, lr=2.0, warmup=10, min_lr=0.1)
    rates = [learning_rate(train, step) for step in range(100)]
    assert 0 < rates[0] < rates[9] < 2.0 and rates[10] == 2.0
    assert rates[55] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5))))
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] > 0.2
    fraction = Train(steps=100, lr=2.0, warmup=0.1, schedule="constant")
    assert [learning_rate(fraction, step) for step in (10, 50, 99)] == [2.0, 2.0, 2.0]
    assert learning_rate(Train(steps=3, lr=2.0, warmup=0), 0) == 2.0
    assert learning_rate(train, 10, peak=0.5) == 0.5


@pytest.mark.parametrize(
    ("batch", "micro", "world", "expected"),
    [(8, None, 1, (8, 1)), (8, 2, 2, (2, 2)), (8, 99, 2, (4, 1))],
)
def test_batches_are_cut_for_workers_and_accumulation(batch, micro, world, expected) -> None:
    train = Train(batch_size=batch, micro_batch_size=micro)
    assert accumulation(train, world) == expected
    config = deepspeed_config(train, world)
    cut = config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"]
    assert config["train_batch_size"] == cut * world


def test_zeros_bucket_is_no_larger_than_what_is_trained() -> None:
    def bucket(stage: int, trained: int | None) -> int | None:
        config = deepspeed_config(Train(zero_stage=stage), 1, trained=trained)
        return config["zero_optimization"].get("reduce_bucket_size")

    assert [bucket(stage, 1000) for stage in (0, 1, 2, 3)] == [None, 1000, 1000, 1000]
    assert bucket(1, 9_000_000_000) == 500_000_000 and bucket(1, None) is None


@pytest.mark.parametrize(
    ("micro", "world", "told"), [(None, 3, "resources.workers=3"), (3, 2, "micro_batch_size=3")]
)
def test_batches_that_do_not_divide_name_the_keys(micro, world, told) -> None:
    with pytest.raises(ConfigError, match=told):
        accumulation(Train(batch_size=8, micro_batch_size=micro), world)


@pytest.mark.parametrize(
    ("workers", "changes", "fitting", "told"),
    [
        (2, {}, [2], ""),
        ((1, 4), {}, [1, 2, 4], "among 3 workers"),
        ((3, 8), {"batch_size": 24}, [3, 4, 6, 8], "among 5, 7 workers"),
        ((1, 4), {"micro_batch_size": 4}, [1, 2, 4], "among 3 workers"),
        ((1, 4), {"batch_size": 12, "micro_batch_size": 4}, [1, 3, 4], "among 2 workers"),
    ],
)
def test_the_numbers_of_workers_that_divide_a_batch(workers, changes, fitting, told) -> None:
    train, resources = Train(**{"batch_size": 8} | changes), Resources(workers=workers)
    assert fitting_workers(train, resources) == fitting
    assert told in left_out(train, resources) if told else left_out(train, resources) == ""


def test_a_range_of_workers_that_divides_no_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"batch_size=7 .* resources.workers=\[2, 4\] allows"):
        fitting_workers(Train(batch_size=7), Resources(workers=(2, 4)))
    with pytest.raises(ValueError, match="min above max"):
        Resources(workers=(3, 2))


def test_the_frozen_encoder_computes_in_bf16_where_training_does_on_a_gpu() -> None:
    low, full = Train(precision="bf16"), Train()
    assert [
        encodes_in_bf16("auto", train, gpu) for train in (low, full) for gpu in (True, False)
    ] == [
        True,
        False,
        False,
        False,
    ]
    assert encodes_in_bf16("bf16", full, False)
    assert not encodes_in_bf16("fp32", low, True)


def test_meter_weighs_by_counts_and_leaves_out_what_counted_nothing() -> None:
    meter = MetricMeans(torch.device("cpu"))
    meter.add(
        {
            "a": 1.0,
            "b": (torch.tensor(2.0), torch.tensor(3.0)),
            "c": (torch.tensor(9.0), torch.tensor(0.0)),
        }
    )
    meter.add(
        {
            "a": 3.0,
            "b": (torch.tensor(6.0), torch.tensor(1.0)),
            "c": (torch.tensor(9.0), torch.tensor(0.0)),
        }
    )
    assert meter.take(Collectives()) == {"a": 2.0, "b": 3.0}
    assert meter.take(Collectives()) == {}


def test_meter_goes_on_between_two_logs() -> None:
    alone = Collectives()
    whole, first, second = (MetricMeans(torch.device("cpu")) for _ in range(3))
    for value in (1.0, 5.0, 6.0):
        whole.add({"a": value, "b": (torch.tensor(value), torch.tensor(value))})
    first.add({"a": 1.0, "b": (torch.tensor(1.0), torch.tensor(1.0))})
    kept = json.loads(json.dumps(first.totals(alone)))
    second.restore(kept, 0)
    other = MetricMeans(torch.device("cpu"))
    other.restore(kept, 1)
    assert other.totals(alone) == {"a": [0.0, 0.0], "b": [0.0, 0.0]}
    for value in (5.0, 6.0):
        second.add({"a": value, "b": (torch.tensor(value), torch.tensor(value))})
    assert second.take(alone) == whole.take(alone) == {"a": 4.0, "b": 62 / 12}
    assert first.take(alone) == {"a": 1.0, "b": 1.0}, "a checkpoint takes nothing away"


def test_every_step_weighs_the_same_in_a_mean_whatever_the_number_of_parts() -> None:
    """A step of four micro batches, then one of two; what is counted weighs by its count alone."""
    meter = MetricMeans(torch.device("cpu"))
    for value in (1.0, 2.0, 3.0, 6.0):
        meter.add({"a": value, "b": (torch.tensor(value), torch.tensor(1.0))}, parts=4)
    for value in (7.0, 11.0):
        meter.add({"a": value, "b": (torch.tensor(value), torch.tensor(2.0))}, parts=2)
    assert meter.take(Collectives()) == {"a": 6.0, "b": 6.0}


def test_a_metric_that_is_not_logged_ends_the_run_at_the_first_log() -> None:
    """One that is not finite, or counted nothing yet, is logged all the same; where every step was
    passed over, it is too early to tell.
    """
    loop = Loop.__new__(Loop)  # as far as a log goes
    loop.collectives, loop.means, loop.skips = (
        Collectives(),
        MetricMeans(torch.device("cpu")),
        SkipCount(1),
    )
    loop.rank, loop.history, loop.throughput = 1, [], Throughput(torch.device("cpu"), 1, None)
    for best in ("loss", "max:psnr", "max:accuracy"):
        loop.train, loop.history, loop.best_checked = Train(best=best), [], False
        loop.means.add(
            {"loss": 2.0, "psnr": float("nan"), "accuracy": (torch.tensor(0.0), torch.tensor(0.0))}
        )
        loop._log(4)
        assert loop.history[0]["loss"] == 2.0
    loop.train, loop.history, loop.best_checked = Train(best="los"), [], False
    loop._log(4)
    loop.means.add({"loss": 2.0})
    with pytest.raises(
        ConfigError, match=r"train.best=los names no metric .* it logs loss, lr, skipped_steps"
    ):
        loop._log(4)


def test_a_loss_that_will_see_other_samples_at_once_is_told_when_the_run_goes_on() -> None:
    state = {
        "history": [],
        "skips": SkipCount(1).state_dict(),
        "meter": {},
        "step": 4,
        "at_once": 4,
    }
    told: list[str] = []
    loop = Loop.__new__(Loop)  # as far as going on goes
    loop.job, loop.engines, loop.rank = SimpleNamespace(resumable=True), {}, 0
    loop.checkpoints = SimpleNamespace(load=lambda engines, task: state)
    loop.means, loop.skips, loop.train, loop._say = (
        MetricMeans(torch.device("cpu")),
        SkipCount(1),
        Train(),
        told.append,
    )
    for task, loop.accumulation in ((Task(), 1), (EncoderTask, 8), (EncoderTask, 4)):
        loop.task, loop.train = task, Train(batch_size=32)
        assert loop._resume() == 4
    assert [line.split(" (")[0] for line in told] == [
        "the contrastive loss saw 4 samples at once before and sees 8 from here on"
    ]


def test_throughput_by_hand(monkeypatch) -> None:
    """Two steps of 8 samples in ten seconds, of which two and a half went by waiting."""
    clock = iter([0.0, 10.0, 10.0])
    monkeypatch.setattr("smalti.workflows.train.throughput.time.monotonic", lambda: next(clock))
    meter = Throughput(torch.device("cpu"), 8, 1e8)
    assert meter.peak is None, "a CPU has no peak here, so no MFU"
    meter.peak = 4e9
    meter.step(1.0, [("tokens", 100.0), None])
    meter.step(1.5, [("tokens", 50.0)])
    found = meter.take(Collectives())
    assert 0 < found.pop("memory_gb") < 100
    assert found == pytest.approx(
        {"samples_per_s": 1.6, "data_wait": 0.25, "tokens_per_s": 15.0, "mfu": 0.375}
    )
    shown = rates(found | {"memory_gb": 1.25})
    assert shown == {
        "samples/s": "2",
        "tokens/s": "15",
        "MFU": "37.5%",
        "waiting": "25%",
        "memory": "1.2 GB",
    }


def write(place: Path, sizes: list[int]) -> tuple[list[str], list[int]]:
    for index, size in enumerate(sizes):
        table = pa.table(
            {"n": [100 * index + row for row in range(size)], "pad": [bytes(1000)] * size}
        )
        shards.write_shard(str(place), shards.shard_key("train", index), table)
    return shard_index(str(place), "train")


def test_rows_are_read_with_bounded_memory(tmp_path) -> None:
    keys, sizes = write(tmp_path, [5, 4, 6])
    assert sizes == [5, 4, 6]
    rows = ShardRows(str(tmp_path), keys, sizes, cache_bytes=9_000)
    for shard, row in [(0, 4), (1, 3), (2, 5), (0, 0)]:
        assert rows.read(shard, row)[1]["n"] == 100 * shard + row
        assert rows._bytes <= 9_000 and rows._bytes == sum(
            size for _, size, _ in rows._tables.values()
        )


class Counted(ShardRows):
    """Keeps which shards were read."""

    def prepare(self, table: pa.Table) -> None:
        self.count[int(table.column("n")[0].as_py()) // 100] += 1


def an_epoch(
    place: Path, rank: int, world_size: int, window: int = 4, **memory: float
) -> tuple[Counted, list[int], list[str]]:
    """The source after a worker's epoch (12 shards of 20 rows), the rows that it
    took in the epoch, and lines said."""
    keys, sizes = shards.list_shards(str(place), "train"), [20] * 12
    rows, told = Counted(str(place), keys, sizes, cache_bytes=memory.get("cache_bytes", 0)), []
    rows.count = Counter()
    rows.choose_window(Train(data_gb=memory.get("data_gb", 1)), told.append)
    order = Order(sizes, 0, window)
    taken: list[int] = []
    feed = BatchLoader(rows, order, lambda found: {"n": [row.values["n"] for row in found]}, batch_size=20, micro=20, rank=rank,
                world_size=world_size, threads=2)  # fmt: skip
    for step, batches in feed.steps(0, 12):
        taken += batches[0]["n"]
        assert len(rows._tables) <= 2 * window, step
    assert rows._ahead is not None
    rows._ahead.shutdown()
    return rows, taken, told


def test_each_shard_is_read_once_an_epoch_and_the_next_window_before_its_first_step(
    tmp_path,
) -> None:
    write(tmp_path, [20] * 12)
    rows, taken, told = an_epoch(tmp_path, 0, 1)
    following = (
        Order([20] * 12, 0, 4).near(12, 20, 0, 1).own
    )  # of the next epoch, which is looked ahead to
    assert Counter(range(12)) <= rows.count <= Counter([*range(12), *following])
    assert set(following) <= set(rows._tables) and len(following) == 4
    assert (
        sorted(taken) == [100 * shard + row for shard in range(12) for row in range(20)]
        and not told
    )
    for rank in range(2):
        half, _, _ = an_epoch(tmp_path, rank, 2)
        assert half.count.total() <= 12, (
            "about half of the shards, and those at the border, and two ahead"
        )
        assert max(half.count.values()) <= 2


def test_a_window_that_does_not_fit_is_told_once_and_part_of_it_stays(tmp_path) -> None:
    """Room for eight of the window's twelve shards: the rows are right, about four are not read
    again in a step (the least recently used, let go first, would all be), and a line says why.
    """
    write(tmp_path, [20] * 12)
    rows, taken, told = an_epoch(tmp_path, 0, 1, window=12, data_gb=1.7e-4)
    assert sorted(taken) == [100 * shard + row for shard in range(12) for row in range(20)]
    assert 12 < rows.count.total() < 100, "120 shards are touched"
    assert len(told) == 1 and "take more than train.data_gb=0.00017" in told[0]


def test_a_shard_that_changed_meanwhile_is_an_error(tmp_path) -> None:
    keys, sizes = write(tmp_path, [5])
    shards.write_shard(str(tmp_path), keys[0], pa.table({"n": [1]}))
    with pytest.raises(DataError, match=r"holds 1 rows .* but 5"):
        ShardRows(str(tmp_path), keys, sizes).read(0, 0)


def test_an_empty_split_is_an_error(tmp_path) -> None:
    with pytest.raises(DataError, match="no rows in its 'train' split"):
        shard_index(str(tmp_path), "train")


def png(colour: tuple[int, int, int]) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (9, 7), colour).save(data, "png")
    return data.getvalue()


def test_image_rows_decode_once_and_name_what_is_damaged(tmp_path, monkeypatch) -> None:
    table = pa.table(
        {"image_id": ["good", "bad"], "image": [png((255, 0, 10)), png((1, 2, 3))[:40]]}
    )
    shards.write_shard(str(tmp_path), "train/00000", table)
    rows = ImageRows(str(tmp_path), ["train/00000"], [2], 4, max_pixels=100, text=())
    _, values = rows.read(0, 0)
    assert values["pixels"].shape == (4, 4, 3) and tuple(values["pixels"][0, 0]) == (255, 0, 10)
    monkeypatch.setattr("smalti.images.to_pixels", lambda *a, **k: pytest.fail("decoded twice"))
    assert rows.read(0, 0)[1] is values
    monkeypatch.undo()
    with pytest.raises(DataError, match="image bad in shard train/00000"):
        rows.read(0, 1)


@pytest.mark.parametrize("shape", [(6,), (1, 2, 3)])
def test_token_rows_give_codes(tmp_path, shape) -> None:
    """Of one axis, or of those that DualToken gives."""
    codes = np.arange(12, dtype=np.int32).reshape(2, *shape)
    columns = [["a", "b"], shards.list_column(codes), [None, "c"], [None, None], [[], []]]
    schema = shards.token_schema(shape)
    by_name = dict(zip(["image_id", "codes", "caption", "label", "qa"], columns, strict=True))
    shards.write_shard(
        str(tmp_path), "train/00000", pa.table([by_name[n] for n in schema.names], schema)
    )
    _, values = TokenRows(str(tmp_path), ["train/00000"], [2]).read(0, 1)
    assert values["codes"].tolist() == codes[1].tolist() and values["caption"] == "c"


class Numbers:
    sizes = (6, 6)

    def read(self, shard: int, row: int):
        if (shard, row) == (1, 3):
            raise DataError("row 1/3 is broken")
        return f"train/{shard:05d}", {"n": shard * 10 + row}


def feed(source, **changes) -> BatchLoader:
    settings = {"batch_size": 4, "micro": 2, "rank": 0, "world_size": 1, "threads": 2} | changes
    return BatchLoader(
        source, Order([6, 6], 0), lambda rows: {"n": [row.values["n"] for row in rows]}, **settings
    )


def test_the_feed_gives_every_step_in_order_cut_into_micro_batches() -> None:
    class Whole(Numbers):
        def read(self, shard, row):
            return f"train/{shard:05d}", {"n": shard * 10 + row}

    ours = feed(Whole())
    steps = list(ours.steps(0, 3))
    assert [step for step, _ in steps] == [0, 1, 2]
    assert all([len(b["n"]) for b in batches] == [2, 2] for _, batches in steps)
    assert sorted(n for _, batches in steps for b in batches for n in b["n"]) == [
        *range(6),
        *range(10, 16),
    ]
    assert ours.at(1) == steps[1][1]
    halves = [feed(Whole(), rank=rank, world_size=2, threads=1).at(2) for rank in range(2)]
    assert [n for half in halves for b in half for n in b["n"]] == [
        n for b in steps[2][1] for n in b["n"]
    ]


def test_an_error_while_reading_reaches_the_loop() -> None:
    with pytest.raises(DataError, match="row 1/3 is broken"):
        list(feed(Numbers()).steps(0, 3))


def test_a_sample_draws_the_same_numbers_wherever_it_is_read() -> None:
    row = Row(17, 0, "train/00003", 4, {})
    assert row.random(1).random() == Row(17, 5, "other", 0, {}).random(1).random()
    assert row.random(1).random() != row.random(2).random()
    assert seed_of(1, 2, 3) == seed_of(1, 2, 3) != seed_of(1, 3, 2)
    assert seed_of(-5, 2) >= 0


def test_row_memory_computes_once_and_keeps_nothing_that_does_not_fit() -> None:
    asked: list[list[int]] = []

    def compute(missing: list[int]) -> torch.Tensor:
        asked.append(missing)
        return torch.tensor([[float(i)] for i in missing])

    memory = RowMemory(10)
    places = [("a", 0), ("a", 1)]
    assert memory.get(places, compute).tolist() == [[0.0], [1.0]]
    assert memory.get([("a", 1), ("b", 0), ("a", 0)], compute).tolist() == [[1.0], [1.0], [0.0]]
    assert asked == [[0, 1], [1]]
    small = RowMemory(10, limit_bytes=39)
    for _ in range(2):
        assert small.get(places, compute).tolist() == [[0.0], [1.0]]
    assert asked[2:] == [[0, 1], [0, 1]] and not small._kept


def test_pixels_pass_both_ways_and_grids_stand_side_by_side() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    assert np.array_equal(to_bytes(to_unit(pixels)), pixels.permute(0, 2, 3, 1).numpy())
    grid = picture_grid([to_unit(pixels), to_unit(pixels)])
    assert (
        grid.shape == (34, 34, 3)
        and (grid[16:18] == 255).all()
        and np.array_equal(grid[:16, :16], grid[18:, 18:])
    )


def test_prompts_are_the_commonest_text_of_each_label() -> None:
    texts = Counter(
        {("a red ball", "ball"): 2, ("a ball", "ball"): 3, ("a cat", "cat"): 1, ("nothing", ""): 9}
    )
    assert prompts_of(texts) == {"ball": "a ball", "cat": "a cat"}


@pytest.mark.parametrize("ending", ["txt", "jsonl", "parquet"])
def test_texts_are_read_from_every_format(tmp_path, ending) -> None:
    texts = ["one line", "", "Größe ×2"]
    file = tmp_path / f"texts.{ending}"
    if ending == "txt":
        file.write_text("\n".join(texts))
    elif ending == "jsonl":
        file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    else:
        pq.write_table(pa.table({"text": texts}), file)
    assert list(read_texts(str(file))) == ["one line", "Größe ×2"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.csv", "x", "expected a .txt"),
        ("a.jsonl", '{"text": "x"}\nnope', "line 2 is no JSON"),
        ("a.jsonl", '{"txt": "x"}', 'no string field "text"'),
    ],
)
def test_texts_that_cannot_be_read_say_where(tmp_path, name, content, told) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=told):
        list(read_texts(str(tmp_path / name)))


def test_a_run_that_goes_on_keeps_the_texts_that_it_began_with(tmp_path) -> None:
    """Also the tokenizer that was made of them, whose ids the checkpoint's rows stand for."""
    source, tokens, here = tmp_path / "texts.txt", str(tmp_path / "tokens"), tmp_path / "stage"
    source.write_text("one line\nanother")
    write(Path(tokens), [1])
    columns = {"caption": ["a red ball"], "label": [None], "qa": [[]]}
    table = pa.table(
        {"image_id": ["a"], "codes": shards.list_column(np.zeros((1, 4), np.int32)), **columns}
    )
    shards.write_shard(tokens, "train/00000", table.cast(shards.token_schema((4,))))
    section = MllmSection(
        config=LanguageModel(text_vocab_size=280), mixture=Mixture(text=1), text_source=str(source)
    )
    run = SimpleNamespace(path=str(here), recipe=Recipe(mllm=section))
    assert prepare_texts(run, tokens) == (["train/00000"], [2])
    before = {file: file.read_bytes() for file in here.rglob("*") if file.is_file()}
    source.write_text("quite another text\n" * 7)
    assert prepare_texts(run, tokens) == (["train/00000"], [2])
    assert {file: file.read_bytes() for file in here.rglob("*") if file.is_file()} == before


def test_workers_ask_in_the_same_steps_about_once_in_so_many_seconds(monkeypatch) -> None:
    now = 0.0
    monkeypatch.setattr("smalti.workflows.train.periodic.time.monotonic", lambda: now)
    pace = Periodic(1.0, Collectives(), torch.device("cpu"))
    due = []
    for step, took_s in enumerate([0.125] * 40 + [3.0] * 3 + [1e-5] * 10, 1):
        now += took_s
        due += [step] if pace.due(step) else []
    assert due == [1, 9, 17, 25, 33, 41, 43, 44], "every eighth of quick steps, then each slow one"


def test_stages_of_the_language_model_name_their_steps() -> None:
    mixture, train = Mixture(qa=3), Train(steps=10)
    section = MllmSection(
        answer_loss_weight=5,
        train=train,
        stages=[
            MllmStage(from_step=2, answer_loss_weight=0),
            MllmStage(from_step=6, mixture=mixture),
        ],
    )
    found = [section.stage_at(step) for step in (0, 1, 2, 5, 6, 9)]
    assert [stage.answer_loss_weight for stage in found] == [5, 5, 0, 0, 5, 5], (
        "what is not named is the section's"
    )
    assert [stage.mixture for stage in found] == [Mixture()] * 4 + [mixture] * 2
    assert section.whole_mixture == mixture
    for steps in ([6, 2], [2, 2], [10]):
        with pytest.raises(ValueError, match=r"rising steps below train\.steps=10"):
            MllmSection(train=train, stages=[MllmStage(from_step=step) for step in steps])


def test_rates_of_the_parts_follow_the_stages() -> None:
    section = MllmSection(
        lr=PartRates(adapter=50, backbone=0.5),
        freeze=["new_rows"],
        stages=[
            MllmStage(from_step=0, freeze=["backbone"]),
            MllmStage(from_step=4, freeze=[], lr=PartRates()),
            MllmStage(from_step=6, answer_loss_weight=2),
        ],
        train=Train(steps=10),
    )
    found = [section.rates_at(step) for step in (0, 3, 4, 6)]
    assert found == [
        {"new_rows": 0.0, "adapter": 50.0, "backbone": 0.0},
        {"new_rows": 0.0, "adapter": 50.0, "backbone": 0.0},
        {"new_rows": 0.0, "adapter": 1.0, "backbone": 1.0},
        {"new_rows": 0.0, "adapter": 50.0, "backbone": 0.5},
    ]
    assert section.has_part_rates
    assert not MllmSection(freeze=["backbone"]).has_part_rates and not MllmSection().has_part_rates


def test_parts_that_leave_nothing_to_train_are_refused() -> None:
    train = Train(steps=10)
    with pytest.raises(ConfigError, match="leaves nothing to train"):
        check_parts(MllmSection(freeze=["new_rows", "adapter", "backbone"]))
    with pytest.raises(ConfigError, match=r"which mllm\.freeze names"):
        check_parts(MllmSection(lora=Lora(), freeze=["backbone"]))
    asleep = MllmStage(from_step=4, freeze=["new_rows", "adapter"])
    with pytest.raises(ConfigError, match="From step 4 on"):
        check_parts(MllmSection(freeze=["backbone"], stages=[asleep], train=train))
    check_parts(
        MllmSection(lora=Lora(), freeze=["new_rows"], stages=[MllmStage(from_step=1)], train=train)
    )


def test_settings_that_change_no_result_are_not_in_the_fingerprint() -> None:
    plain = MllmSection()
    assert result_config(plain) == result_config(plain.model_copy(update={"packing": True}))
    spared = Train(
        zero_stage=3, offload="cpu", activation_checkpointing=True, compile=True, micro_batch_size=4
    )
    assert result_config(plain) == result_config(plain.model_copy(update={"train": spared}))
    assert {"lr", "freeze", "lora", "packing"}.isdisjoint(result_config(plain))
    assert result_config(MllmSection(freeze=["adapter"]))["freeze"] == ["adapter"]


def test_memory_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="zero_stage is 0"):
        Train(offload="cpu")
    with pytest.raises(ValueError, match="offload_path"):
        Train(offload="nvme", zero_stage=3)
    train = Train(offload="nvme", zero_stage=3, offload_path="/nvme")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"train\.offload=nvme: no CUDA device"):
            deepspeed_config(train, 1)
    found = deepspeed_config(Train(offload="cpu", zero_stage=3), 1)["zero_optimization"]
    assert found["offload_optimizer"]["device"] == found["offload_param"]["device"] == "cpu"
    assert (
        "offload_param"
        not in deepspeed_config(Train(offload="cpu", zero_stage=2), 1)["zero_optimization"]
    )


def test_a_mixture_that_cannot_be_trained_is_refused_at_once() -> None:
    from smalti.schema import LanguageModel, MllmSection, Recipe

    def recipe(**settings) -> Recipe:
        return Recipe(mllm=MllmSection(**settings))

    with pytest.raises(ConfigError, match=r"neither mllm.pretrained nor mllm.config"):
        check(recipe())
    with pytest.raises(ConfigError, match=r"mllm.text_source is not set"):
        check(recipe(config=LanguageModel(), mixture=Mixture(text=1.0)))
    with pytest.raises(ConfigError, match="no kind with images"):
        check(
            recipe(
                config=LanguageModel(),
                mixture=Mixture(caption_to_image=0, image_to_caption=0, qa=0, text=1),
            )
        )
    check(recipe(config=LanguageModel()))


def test_flops_of_a_token_are_those_of_the_matrices_it_passes() -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.Embedding(5, 8), torch.nn.Linear(16, 4, bias=False)
    )
    model[2].requires_grad_(False)
    assert flops_a_token(model, without=model[1]) == 6 * 8 * 16 + 4 * 16 * 4
    assert flops_a_token(model, without=model[1], backward=False) == 2 * (8 * 16 + 16 * 4)
    of_samples = Throughput(torch.device("cpu"), 4, flops_per_unit=1e3, peak=1e6)
    of_samples.step(0.0, [None])
    told = of_samples.take(Collectives())
    assert told["mfu"] == pytest.approx(told["samples_per_s"] * 1e3 / 1e6)
