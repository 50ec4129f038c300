"""Settings of engines, and parameters and moments that are set, under every ZeRO stage."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from smalti.errors import ConfigError
from smalti.schema import Train
from smalti.workflows.train.engines import accumulation, deepspeed_config, learning_rate

PLACES = ("before the first step", "after steps", "after a checkpoint")


def set_and_step(folder: Path) -> dict[str, dict[int, torch.Tensor]]:
    """place → ZeRO stage → the parameters after a step that follows `set_parameter`."""
    from smalti.schema import Train
    from smalti.workflows.train import engines

    inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))

    def engine(stage: int):
        torch.manual_seed(1)
        train = Train(steps=9, batch_size=4, lr=0.1, zero_stage=stage)
        module = torch.nn.Linear(3, 2)
        return engines.build_engine(
            module, train, lr=0.1, zero_stage=stage, world_size=1, device=torch.device("cpu")
        )

    def step(one, count: int = 1):
        for _ in range(count):
            one.backward(one(inputs).square().mean())
            one.step()

    found: dict[str, dict[int, torch.Tensor]] = {place: {} for place in PLACES}
    for stage in range(4):
        for place in PLACES:
            one = engine(stage)
            if place != PLACES[0]:
                step(one, 3)
            if place == PLACES[2]:
                one.save_checkpoint(str(folder / str(stage)), tag="x")
                one = engine(stage)
                one.load_checkpoint(str(folder / str(stage)), tag="x")
            engines.set_parameter(one, one.module.weight, torch.arange(6.0).view(2, 3))
            step(one)
            weights = engines.full_weights(one, on_this_rank=True)
            found[place][stage] = torch.cat([weights["weight"].flatten(), weights["bias"]])
    return found


@dataclass(frozen=True)
class Codes:
    """The language model's view of a visual tokenizer: random vectors of one part."""

    num_codes: int = 12
    code_shape: tuple[int, ...] = ()
    embed_splits: tuple[int, ...] = (6,)

    def code_vectors(self) -> torch.Tensor:
        return torch.randn(self.num_codes, 6, generator=torch.Generator().manual_seed(0))


def frozen_and_trained() -> dict[int, list[dict[str, set[str]]]]:
    """ZeRO stage → for each of four steps by the rates of a staged schedule, how far each part
    moved: "still", "moved".

    The last entry is a step after a checkpoint was loaded.
    """
    import tempfile

    from smalti.mllm.bpe import train_bpe
    from smalti.mllm.build import build_unified
    from smalti.schema import LanguageModel, MllmSection, MllmStage, PartRates, Train
    from smalti.workflows.train import engines

    size = LanguageModel(
        hidden_size=16, layers=1, heads=2, kv_heads=2, intermediate_size=32, text_vocab_size=270
    )
    first = MllmStage(from_step=0, freeze=["backbone", "new_rows"])
    section = MllmSection(
        config=size,
        adapter="cascade",
        lr=PartRates(adapter=2.0, backbone=0.5),
        stages=[first, MllmStage(from_step=2)],
        train=Train(steps=9, batch_size=2, lr=0.01, weight_decay=0.1),
    )
    moves: dict[int, list[dict[str, set[str]]]] = {}

    def step(number: int, model, engine) -> dict[str, set[str]]:
        before = engines.full_weights(engine, on_this_rank=True)
        rates = section.rates_at(number)
        engines.set_factors(engine, rates)
        model.set_frozen([part for part, rate in rates.items() if not rate])
        engines.set_learning_rate(engine, 0.01)
        v = model.vocabulary
        ids = torch.tensor([[v.boi, v.first_visual, v.first_visual + 3, v.eoi, 40, 41]] * 2)
        engine.backward(
            engine({"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)})[0]
        )
        engine.step()
        after, part_of = engines.full_weights(engine, on_this_rank=True), model.parts()
        found: dict[str, set[str]] = {}
        for name, parameter in model.named_parameters():
            moved = "still" if torch.equal(before[name], after[name]) else "moved"
            if not name.endswith("k_proj.bias"):  # whose gradient is 0 but for rounding
                found.setdefault(part_of[id(parameter)], set()).add(moved)
        return found

    def make(stage: int):
        model = build_unified(section, train_bpe(["a b"], 270), Codes())
        model.split_rates()
        train = section.train.model_copy(update={"zero_stage": stage})
        return model, engines.build_engine(
            model, train, lr=0.01, zero_stage=stage, world_size=1, device=torch.device("cpu")
        )

    for stage in range(4):
        model, engine = make(stage)
        moves[stage] = [step(number, model, engine) for number in range(4)]
        with tempfile.TemporaryDirectory() as folder:
            engine.save_checkpoint(folder, tag="x")
            model, engine = make(stage)
            engine.load_checkpoint(folder, tag="x")
        moves[stage].append(step(4, model, engine))
    return moves


def steps_after_freezing() -> dict[int, list[float]]:
    """ZeRO stage → how far a part with the rate 0.01 moves in each of four steps after it was
    frozen for thirty.
    """
    from smalti.schema import Train
    from smalti.workflows.train import engines

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 2)

        def forward(self, x):
            return self.second(self.first(x))

        def rate_parts(self):
            return {
                id(p): name
                for name in ("first", "second")
                for p in getattr(self, name).parameters()
            }

    found: dict[int, list[float]] = {}
    for stage in range(4):
        torch.manual_seed(0)
        train = Train(
            steps=9, batch_size=4, lr=0.01, zero_stage=stage, weight_decay=0, betas=(0.9, 0.999)
        )
        engine = engines.build_engine(
            Net(), train, lr=0.01, zero_stage=stage, world_size=1, device=torch.device("cpu")
        )
        found[stage] = []
        for step in range(34):
            frozen = step < 30
            engines.set_factors(engine, {"first": 0.0 if frozen else 1.0, "second": 1.0})
            engines.set_learning_rate(engine, 0.01)
            if step == 30:
                engines.forget_moments(engine, ["first"])
            before = (
                None if frozen else engines.full_weights(engine, on_this_rank=True)["first.weight"]
            )
            inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
            loss = engine(0 * inputs if frozen else inputs).square().mean()
            engine.backward(loss)
            engine.step()
            if before is not None:
                moved = engines.full_weights(engine, on_this_rank=True)["first.weight"] - before
                found[stage].append(float(moved.abs().max()))
    return found


def slow_rows() -> dict[int, list[float]]:
    """ZeRO stage → how far text rows and new rows of the head moved in a step with `mllm.old_rows`,
    plain rows compared.
    """
    from smalti.mllm.bpe import train_bpe
    from smalti.mllm.build import build_unified
    from smalti.mllm.row_lr_scaling import plain_rows
    from smalti.schema import LanguageModel, MllmSection, Train
    from smalti.workflows.train import engines

    size = LanguageModel(
        hidden_size=16, layers=1, heads=2, kv_heads=2, intermediate_size=32, text_vocab_size=270
    )
    found = {}
    for stage in range(4):
        train = Train(steps=9, batch_size=1, lr=0.01, zero_stage=stage)
        model = build_unified(
            MllmSection(config=size, adapter="single", old_rows=0.125, train=train),
            train_bpe(["a b"], 270),
            Codes(),
        )
        engine = engines.build_engine(
            model, train, lr=0.01, zero_stage=stage, world_size=1, device=torch.device("cpu")
        )
        before, v = (
            plain_rows(model, engines.full_weights(engine, on_this_rank=True)),
            model.vocabulary,
        )
        ids = torch.tensor([[v.boi, v.first_visual, v.first_visual + 3, v.eoi, 40, 41]])
        engine.backward(
            engine({"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)})[0]
        )
        engine.step()
        after = plain_rows(model, engines.full_weights(engine, on_this_rank=True))
        moved = (after["lm.lm_head.weight"] - before["lm.lm_head.weight"]).abs()
        found[stage] = [float(moved[[40, 41]].median()), float(moved[v.num_text :].median())]
    return found


@pytest.fixture(scope="module")
def found(ranks, tmp_path_factory) -> dict[str, dict[int, torch.Tensor]]:
    return ranks(set_and_step, 1, tmp_path_factory.mktemp("engines"))[0]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("place", PLACES)
def test_a_set_parameter_trains_equally_under_every_zero_stage(
    found, place: str, stage: int
) -> None:
    torch.testing.assert_close(found[place][stage], found[place][0], rtol=1e-5, atol=1e-6)


def test_a_set_parameter_has_its_value_and_no_moments(found) -> None:
    """Adam's first step is of the full rate in every coordinate with a gradient; with old moments
    it is another.
    """
    moved = (found[PLACES[0]][0][:6] - torch.arange(6.0)).abs()
    torch.testing.assert_close(moved, torch.full((6,), 0.1), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[PLACES[1]][0], found[PLACES[2]][0])


def test_parts_are_frozen_and_trained_by_the_schedule_under_every_zero_stage(ranks) -> None:
    """Two steps of the adapter alone, then all; a frozen part does not even decay, and a
    checkpoint keeps the groups.
    """
    still, moved = {"still"}, {"moved"}
    for stage, steps in ranks(frozen_and_trained, 1)[0].items():
        for number, parts in enumerate(steps):
            expected = moved if number >= 2 else still
            assert parts == {"adapter": moved, "backbone": expected, "new_rows": expected}, (
                stage,
                number,
            )


def test_a_part_that_was_frozen_starts_with_steps_of_the_rate_under_every_zero_stage(ranks) -> None:
    """Its count of steps is not that of the run: with moments of 0 and a count of 30 Adam's steps
    are up to several times the rate.
    """
    for stage, moved in ranks(steps_after_freezing, 1)[0].items():
        assert moved[0] == pytest.approx(0.01, rel=1e-2), stage
        assert max(moved) < 0.0101, stage


def test_old_rows_move_less_under_every_zero_stage(ranks) -> None:
    for stage, (old, new) in ranks(slow_rows, 1)[0].items():
        assert old == pytest.approx(0.125 * 0.01, rel=0.05), stage
        assert new == pytest.approx(0.01, rel=0.05), stage


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
    ("micro", "world", "named"), [(None, 3, "resources.workers=3"), (3, 2, "micro_batch_size=3")]
)
def test_batches_that_do_not_divide_name_the_keys(micro, world, named) -> None:
    with pytest.raises(ConfigError, match=named):
        accumulation(Train(batch_size=8, micro_batch_size=micro), world)
