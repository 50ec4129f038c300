"""Low-rank updates of a language model's linear layers (peft), and merging them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec

from torch import Tensor, nn

from smalti.errors import ConfigError
from smalti.mllm.model import UnifiedModel
from smalti.schema import Lora

ADAPTER = "default"


def require_peft() -> None:
    """Raise ConfigError unless peft is installed."""
    if find_spec("peft") is None:
        raise ConfigError(
            "mllm.lora needs the package peft, which is not installed. Run `pip install -e "
            "'.[lora]'`, or remove mllm.lora."
        )


def add_lora(model: UnifiedModel, lora: Lora) -> None:
    """Add a low-rank update to each target layer of the language model, in place.

    The layers' own weights are frozen; embedding, head and adapter are still trained.

    Raises:
        ConfigError: if peft is missing, or if no layer has one of the target names.
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
            f"mllm.lora.targets={list(lora.targets)}: no layer of {type(model.lm).__name__} has "
            f"such a name ({error}). Name linear layers of the model, such as q_proj and v_proj."
        ) from error
    model.embedding.requires_grad_(True)
    model.head.requires_grad_(True)
    assert all(
        parameter.requires_grad == wanted[name]
        for name, parameter in model.adapter.named_parameters()
    )


def merge_lora(model: UnifiedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Merge each update into its layer: W + (alpha / rank) · B A, summed in float32.

    Args:
        model: has the updates.
        state: the model's whole state dict.

    Returns:
        A state dict with the names of the plain model, as within `without_lora`.
    """
    merged = dict(state)
    for name, layer in _layers(model):
        low = merged.pop(f"{name}.lora_A.{ADAPTER}.weight")
        high = merged.pop(f"{name}.lora_B.{ADAPTER}.weight")
        own = merged.pop(f"{name}.base_layer.weight")
        delta = high.float() @ low.float() * vars(layer)["scaling"][ADAPTER]
        merged[f"{name}.weight"] = (own.float() + delta.to(own.device)).to(own.dtype)
        if f"{name}.base_layer.bias" in merged:
            merged[f"{name}.bias"] = merged.pop(f"{name}.base_layer.bias")
    return merged


@contextmanager
def without_lora(model: UnifiedModel) -> Iterator[None]:
    """Context in which `model` has its plain layers instead of those with updates."""
    layers = _layers(model)
    for name, layer in layers:
        _put(model, name, layer.get_submodule("base_layer"))
    try:
        yield
    finally:
        for name, layer in layers:
            _put(model, name, layer)


def _put(model: UnifiedModel, name: str, layer: nn.Module) -> None:
    above, _, own_name = name.rpartition(".")
    setattr(model.get_submodule(above), own_name, layer)


def _layers(model: UnifiedModel) -> list[tuple[str, nn.Module]]:
    """The layers that have updates, by name."""
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")]
