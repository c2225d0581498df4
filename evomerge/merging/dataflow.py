"""A layer path as a live model: the very layers of resident models in another order, without a copy.

Modules are copied as shells that share their parameters, so that a layer that occurs twice has its weights
once and its own place in the key-value cache. Building takes time for Python objects only. The result is an
ordinary model of transformers: masks, caches, generation and saving see nothing special.

Scales are not applied to the hidden state but to what is added to it, as `checkpoints.flows` explains, so
that the live model computes what the exported plain checkpoint computes.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from evomerge.checkpoints.flows import Flow
from evomerge.merging.folding import check_scales
from evomerge.merging.outline import path_config
from evomerge.paths import LayerPath


class Scaled(nn.Module):
    """A module whose output is multiplied by a number."""

    def __init__(self, inner: nn.Module, factor: float) -> None:
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the scaled output."""
        output: Tensor = self.inner(*args, **kwargs)
        return output * self.factor


class Mirrored(nn.Module):
    """A norm that sees its input negated."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the norm of the negated input."""
        output: Tensor = self.inner(-hidden)
        return output


def assemble(models: Mapping[str, Any], path: LayerPath, flow: Flow, layers: str) -> Any:
    """Return the model of a layer path.

    Args:
        models: Source name to resident model; all of one class and width. They are left as they are.
        path: The path.
        flow: How the family's layers work.
        layers: Name of a layer's tensors up to the layer's own part, with `{i}` for the index.

    Returns:
        A model of the class of the ends' model that shares every parameter with the sources.

    Raises:
        RecipeError: The path has scales that the family cannot have.
    """
    check_scales(path, flow)
    stem = layers.partition(".{i}")[0]
    stacks = {name: model.get_submodule(stem) for name, model in models.items()}
    config = copy.copy(models[path.end].config)
    configs = {name: model.config.to_dict() for name, model in models.items()}
    counts = {name: len(stack) for name, stack in stacks.items()}
    for key, value in path_config(configs, path, counts).items():
        setattr(config, key, value)
    shells = []
    for number, (step, factor) in enumerate(zip(path.layers, path.factors, strict=True)):
        layer = _shell(stacks[step.source][step.layer], config, number)
        _scale(layer, flow, factor)
        shells.append(layer)
    model = _opened(models[path.end], stem, config)
    holder, _, leaf = stem.rpartition(".")
    setattr(model.get_submodule(holder), leaf, nn.ModuleList(shells))
    if path.factors[-1] < 0:
        _replace(model, flow.final, Mirrored(model.get_submodule(flow.final)))
    return model


_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
)


def _copied(module: nn.Module) -> nn.Module:
    """Return a module object with the same parameters, buffers and submodules, and without hooks."""
    made = module.__class__.__new__(module.__class__)
    made.__dict__.update(module.__dict__)
    for name in ("_parameters", "_buffers", "_modules"):
        made.__dict__[name] = dict(module.__dict__[name])
    for name in _HOOKS:
        made.__dict__[name] = OrderedDict()
    made.__dict__.pop("_output_capturing_hooks_installed", None)
    return made


def _shell(module: nn.Module, config: Any, number: int) -> nn.Module:
    """Return a layer that shares its parameters with another and stands at a place of its own."""
    made = _copied(module)
    for key, value in (("config", config), ("layer_idx", number)):
        if key in made.__dict__:
            made.__dict__[key] = value
    for name, below in made._modules.items():
        if below is not None:
            made._modules[name] = _shell(below, config, number)
    return made


def _opened(model: nn.Module, stem: str, config: Any) -> Any:
    """Return a model object whose modules down to the stack of layers are its own."""
    top = made = _copied(model)
    made.__dict__["config"] = config
    for name in stem.split(".")[:-1]:
        below = _copied(made.get_submodule(name))
        below.__dict__["config"] = config
        if "has_sliding_layers" in below.__dict__:
            below.__dict__["has_sliding_layers"] = "sliding_attention" in config.layer_types
        made._modules[name] = below
        made = below
    return top


def _scale(layer: nn.Module, flow: Flow, factor: float) -> None:
    """Divide what a layer adds to the hidden state by the product of the scales up to it."""
    if factor != 1.0:
        for name in flow.writes:
            _replace(layer, name, Scaled(layer.get_submodule(name), 1.0 / factor))
    if factor < 0:
        for name in flow.reads:
            _replace(layer, name, Mirrored(layer.get_submodule(name)))


def _replace(module: nn.Module, name: str, by: nn.Module) -> None:
    holder, _, leaf = name.rpartition(".")
    module.get_submodule(holder)._modules[leaf] = by.eval()
