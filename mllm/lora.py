"""Low-rank updates of a language model's linear layers (peft), and their way back into plain
weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from smalti.errors import ConfigError
from smalti.mllm.model import UnifiedModel
from smalti.schema import Lora

ADAPTER = "default"


def require_peft() -> None:
    """ConfigError where peft is not installed."""
    if find_spec("peft") is None:
        raise ConfigError(
            "mllm.lora needs the package peft. Run `pip install -e '.[lora]'`, or leave mllm.lora out."
        )


def add_lora(model: UnifiedModel, lora: Lora) -> None:
    """Give the language model's target layers a low-rank update each, in place, and leave its own
    weights untrained.

    Embedding, head and adapter stay trained. ConfigError: peft is missing, or no layer has one of
    the target names.
    """
    require_peft()
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
    )
    wanted = {name: parameter.requires_grad for name, parameter in model.adapter.named_parameters()}
    try:
        inject_adapter_in_model(config, model.lm, adapter_name=ADAPTER)
    except ValueError as error:
        raise ConfigError(
            f"mllm.lora.targets={list(lora.targets)}: no layer of {type(model.lm).__name__} has such a name ({error}). "
            "Name linear layers of the model, such as q_proj and v_proj."
        ) from error
    for matrix in (model.lm.get_input_embeddings(), model.lm.get_output_embeddings()):
        matrix.requires_grad_(True)
    assert all(
        parameter.requires_grad == wanted[name]
        for name, parameter in model.adapter.named_parameters()
    )


def merge_lora(model: UnifiedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict (whole, by the model's names) with each update added to its layer, W + (alpha /
    rank) · B A, under the plain model's names, as `without_lora` has them.

    The sum is made in float32.
    """
    merged = dict(state)
    for name, layer in _layers(model):
        low, high = (merged.pop(f"{name}.lora_{part}.{ADAPTER}.weight") for part in ("A", "B"))
        own = merged.pop(f"{name}.base_layer.weight")
        delta = high.float() @ low.float() * layer.scaling[ADAPTER]
        merged[f"{name}.weight"] = (own.float() + delta.to(own.device)).to(own.dtype)
        if f"{name}.base_layer.bias" in merged:
            merged[f"{name}.bias"] = merged.pop(f"{name}.base_layer.bias")
    return merged


@contextmanager
def without_lora(model: UnifiedModel) -> Iterator[None]:
    """Within, `model` has its plain layers in place of those with updates."""
    layers = _layers(model)
    for name, layer in layers:
        _put(model, name, layer.base_layer)
    try:
        yield
    finally:
        for name, layer in layers:
            _put(model, name, layer)


def _put(model: UnifiedModel, name: str, layer: Any) -> None:
    above, _, own_name = name.rpartition(".")
    setattr(model.get_submodule(above), own_name, layer)


def _layers(model: UnifiedModel) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")]
