"""Planned tasks over images and codes: the bridge, against a real step.

The phases of tokenizers are in `test_trial.py`, `test_dual.py` and `test_models.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from smalti.config import load_recipe
from smalti.workflows.plan.image_tasks import bridge_model
from smalti.workflows.plan.models import encoder_of
from smalti.workflows.plan.trial import Setting, Trial
from smalti.workflows.smoke import _tiny_diffuser
from tests.workflows.plan.small_plans import BATCH, ROOT


def test_a_bridge_beside_its_frozen_text_encoder(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT))
    from bench.real_steps import fill, peak_of, real_step

    decoder = _tiny_diffuser(str(tmp_path / "sd"))
    encoder = "{patch_size: 8, hidden_size: 16, layers: 1, heads: 2, text_layers: 1}"
    section = f"bridge={{decoder: {decoder}, width: 16, layers: 1, heads: 2}}"
    own = [f"encoder.train={encoder}", "corpus.image_size=32", "codebook.size=64", section]
    recipe = load_recipe(None, ["system=unicode2", *own])
    real, model = (bridge_model(recipe, encoder_of(recipe)[0]) for _ in range(2))
    text = model.modules["text"]
    assert list(model.engines) == ["model"]
    assert model.frozen == sum(t.numel() for t in (*text.parameters(), *text.buffers()))
    planned = Trial(model).memory(Setting(1, BATCH, 0))
    assert planned["states"] == 16 * model.parameters("model")
    fill(real)
    step = real_step(real, BATCH)
    step()
    assert planned["activations"] == pytest.approx(peak_of(step), rel=0.15)
