"""The plan of a whole recipe: data stages, codebook, training, and storage."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from smalti.artifact import Artifact
from smalti.errors import ConfigError
from smalti.schema import Recipe
from smalti.workflows.pipeline.stage import stage_path
from smalti.workflows.plan.base import Plan, Rates, size_text, time_text
from smalti.workflows.plan.codebook import plan_codebook
from smalti.workflows.plan.devices import shared_among
from smalti.workflows.plan.inference_cost import InferenceCost
from smalti.workflows.plan.measured import measurements
from smalti.workflows.plan.models import Model, encoder_of
from smalti.workflows.plan.table import lines
from smalti.workflows.plan.training import TrainPlan
from smalti.workflows.plan.trial import Trial
from smalti.workflows.systems.registry import system_of

ASSUMED_IMAGE_BYTES = 100_000  # an encoded image of the corpus
ASSUMED_TEXT = 64  # tokens of text per image
CODE_BYTES, HALF, SINGLE = 4, 2, 4


@dataclass
class RecipePlan:
    """What a recipe costs on `given` devices at these rates.

    Attributes:
        given: number of devices; default: as many as `resources.workers` allows to train.
        vectors, width: of the codebook, if features do not follow from the recipe.
        length: mean tokens per sequence of the language model.
        refusals: what cannot fit; filled by `lines`.

    Raises:
        ConfigError: for a batch that the devices cannot share.
    """

    recipe: Recipe
    rates: Rates
    given: int | None = None
    vectors: int | None = None
    width: int | None = None
    length: int | None = None
    images: int = 0
    refusals: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        recipe = self.recipe
        if not recipe.encoder.pretrained and recipe.encoder.train is None:
            raise ConfigError(
                "No encoder is set, and every size follows from it. Set encoder.pretrained or "
                "encoder.train."
            )
        self.encoder, self.origin = encoder_of(recipe)
        self.system = system_of(recipe)
        self.models = list(self.system.planned_models(recipe, gpu=bool(self.rates.peaks)))
        self.num = shared_among(self.models, recipe.resources, self.given)
        self.corpus = Artifact.find(stage_path(recipe, "corpus"))
        self.images = self.images or self._images()

    def _images(self) -> int:
        """Images of the corpus, if it exists.

        Otherwise as many as the longest stage over images sees once (over tokens if there is none).
        """
        if self.corpus is not None and self.corpus.counts.get("images"):
            return self.corpus.counts["images"]
        seen = [m for m in self.models if m.pixels] or self.models
        return max((m.train.steps * m.train.batch_size for m in seen), default=1)

    @property
    def featured(self) -> int:
        """Images whose features are computed; with a source, as many as `vectors` gives."""
        given = self.vectors if self.recipe.features.source else None
        return max(1, given // self.kept) if given else self.images

    @property
    def patches(self) -> int:
        """Patches per image, and tokens."""
        return math.prod(self.encoder.grid)

    @property
    def codes_a_token(self) -> int:
        """Codes per token."""
        return self.system.codes_per_token(self.recipe)

    @property
    def kept(self) -> int:
        """Patches per image among the features."""
        patches = self.recipe.features.patches
        return self.patches if patches == "all" else min(patches, self.patches)

    @cached_property
    def trained(self) -> list[TrainPlan]:
        fill = self.mean_length / self.recipe.mllm.max_length
        return [
            TrainPlan(
                Trial(m, fill if m.head else 1.0),
                self.rates,
                self.num,
                [o for o in self.models if o is not m],
            )
            for m in self.models
        ]

    @property
    def mean_length(self) -> int:
        """Tokens per sequence, as given or assumed.

        Assumed: packed ones are an image and a short text, others as long as allowed.
        """
        longest = self.recipe.mllm.max_length
        likely = self.patches + ASSUMED_TEXT if self.recipe.mllm.packing else longest
        return min(longest, self.length or likely)

    @cached_property
    def codebook(self) -> Plan | None:
        """k-means over the features; None if the system has none."""
        if not self.recipe.clusters:
            return None
        features = Artifact.find(stage_path(self.recipe, "features"))
        counts = features.counts if features else {}
        vectors = int(self.vectors or counts.get("train") or self.featured * self.kept)
        width = self.width or counts.get("dim") or self.encoder.dim
        return plan_codebook(self.recipe.codebook, vectors, width, self.rates, self.num)

    def lines(self) -> Iterator[str]:
        """The plan as text, stage by stage; `refusals` names what cannot fit."""
        yield (
            f"{self.recipe.name} on {self.num} x {self.rates.device}: "
            f"{self.images:,} images of {self.patches} patches"
        )
        yield f"  {self.rates.origin}{self._training_rates()}"
        if self.rates.note:
            yield f"  {self.rates.note}"
        yield from (
            f"  {origin}"
            for origin in dict.fromkeys([self.origin, *(m.origin for m in self.models)])
            if origin
        )
        yield from ["", *self._data_lines()]
        if self.codebook is not None:
            yield from ["", *self.codebook.lines()]
            self._refuse(self.codebook.refusal())
        known = measurements()
        for plan in self.trained:
            name = plan.model.name
            yield from ["", *lines(plan, [known[name]] if name in known else [])]
            if plan.model.head:
                yield f"  {'':<16} {self._length_line()}"
                yield from (f"  {'':<16} {line}" for line in self._part_lines(plan.model))
            self._refuse(plan.refusal())
        yield from ["", *self._storage_lines(), "", self._total()]

    def _length_line(self) -> str:
        mean = self.mean_length
        longest = self.recipe.mllm.max_length
        if mean == longest:
            return (
                f"hours are an upper bound: every sequence counted as {longest:,} tokens (--length)"
            )
        assumed = "" if self.length else ", ASSUMED (--length)"
        packed = "packed into rows of" if self.recipe.mllm.packing else "for hours; memory at"
        return f"sequences of {mean:,} tokens on average{assumed}, {packed} {longest:,}"

    def _part_lines(self, model: Model) -> Iterator[str]:
        """Lines on which parts train when, if a stage freezes some.

        Frozen parts keep their optimizer states, and a step costs the same.
        """
        section = self.recipe.mllm
        modules = model.modules["model"]
        part_of: dict[int, str] = modules.parts()  # type: ignore[operator]
        trained_from: dict[int, tuple[str, ...]] = {}
        for start in sorted({0, *(stage.from_step for stage in section.stages)}):
            parts: tuple[str, ...] = tuple(
                part for part, rate in section.rates_at(start).items() if rate
            )
            if parts not in list(trained_from.values())[-1:]:
                trained_from[start] = parts
        if len(trained_from) == 1:
            return
        for (start, parts), stop in zip(
            trained_from.items(), [*list(trained_from)[1:], section.train.steps], strict=True
        ):
            count = sum(p.numel() for p in modules.parameters() if part_of[id(p)] in parts)
            yield (
                f"steps {start:,} to {stop:,}: {count / 1e9:.3g}B parameters train "
                f"({', '.join(parts)})"
            )

    def _refuse(self, refusal: str | None) -> None:
        if refusal is not None:
            self.refusals.append(refusal)

    def _training_rates(self) -> str:
        if not self.rates.peaks:
            return ""
        rates = ", ".join(
            f"{name} {self.rates.training(name) / 1e12:.3g}" for name in ("bf16", "tf32", "fp32")
        )
        return (
            f"\n  ASSUMED in training, TFLOP/s per GPU: {rates}; between GPUs "
            f"{size_text(self.rates.inside)}/s within a node, {size_text(self.rates.network)}/s "
            "per node between nodes"
        )

    def _data_lines(self) -> list[str]:
        found = ["features and tokens: every image once, without decoding"]
        for name, cost in self.inference.items():
            hours = self.data_hours[name]
            found.append(
                f"  {name:<16} {time_text(hours)}, {hours * self.num:.3g} GPU-hours; "
                f"{size_text(cost.memory)} per GPU for {cost.batch} images (4·F and what the pass "
                "holds)"
            )
            self._refuse(cost.refusal(name, self.rates))
        return found

    @cached_property
    def inference(self) -> dict[str, InferenceCost]:
        """Cost per image of the stages `features` and `tokens`, which train nothing."""
        trained = {model.name: model for model in self.models}
        return self.system.inference_costs(self.recipe, self.encoder, trained)

    @cached_property
    def data_hours(self) -> dict[str, float]:
        """Hours of these stages."""
        seconds = {
            name: sum(
                count / self.rates.training(precision) for precision, count in cost.flops.items()
            )
            for name, cost in self.inference.items()
        }
        images = {"features": self.featured, "tokens": self.images}
        return {name: value * images[name] / self.num / 3600 for name, value in seconds.items()}

    @cached_property
    def stored(self) -> list[tuple[str, float, str]]:
        """(what, bytes, formula)."""
        recipe = self.recipe
        images = self.images
        found = [
            (
                "corpus",
                float(images * ASSUMED_IMAGE_BYTES),
                f"{ASSUMED_IMAGE_BYTES:,} bytes per image, ASSUMED",
            )
        ]
        if recipe.clusters:
            size = float(HALF * self.featured * self.kept * self.encoder.dim)
            found.append(
                ("features", size, f"2·{self.kept} patches·{self.encoder.dim:,} per image")
            )
            cells = size if recipe.codebook.coarse > 1 else 0.0
            found.append(
                (
                    "codebook",
                    cells + SINGLE * recipe.codebook.size * self.encoder.dim,
                    "4·K·C, and the sorted features",
                )
            )
        codes = self.patches * self.codes_a_token
        found.append(("tokens", float(CODE_BYTES * images * codes), f"4·{codes} per image"))
        for plan in self.trained:
            keep = plan.model.train.keep + 1
            name = plan.model.name
            found.append(
                (
                    f"{name}: checkpoints",
                    keep * plan.checkpoint,
                    f"train.keep + 1 = {keep} while one is written",
                )
            )
        return [*found, ("models", sum(map(_weights, self.models)), "4·P each")]

    def _storage_lines(self) -> list[str]:
        total = sum(size for _, size, _ in self.stored)
        found = [f"storage: {size_text(total)}"]
        return found + [
            f"  {name:<23} {size_text(size):>9}  {formula}" for name, size, formula in self.stored
        ]

    def _total(self) -> str:
        hours = sum(plan.hours for plan in self.trained) + sum(self.data_hours.values())
        hours += self.codebook.seconds / 3600 if self.codebook else 0.0
        return (
            f"total: {time_text(hours)}, {hours * self.num:.4g} GPU-hours (corpus, export and "
            "evaluation not counted)"
        )


def _weights(model: Model) -> float:
    """Bytes of the weights of a stage's final model."""
    return float(SINGLE * (model.parameters("model") + model.frozen_in("model")))
