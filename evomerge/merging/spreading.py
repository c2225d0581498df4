"""A model over several devices, layer after layer: each module runs where its weights are.

Inputs are moved to a module's device when it is called. What all layers are given, such as masks and rotary
embeddings, is moved once to each device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evomerge.records import Place


class Spread:
    """Which tensor goes to which device: layers in equal parts, the head with the last of them.

    Args:
        devices: In the order of the layers; at least one.
    """

    def __init__(self, devices: Sequence[torch.device | str]) -> None:
        self.devices = tuple(torch.device(device) for device in devices)

    def device_of(self, place: Place, layers: int) -> torch.device:
        """Return the device of a tensor in a model of so many layers."""
        if place.layer is not None:
            return self.devices[place.layer * len(self.devices) // layers]
        return self.devices[-1 if place.role in ("norm", "head") else 0]

    def settle(self, model: Any, layers: str, places: Mapping[str, Place]) -> None:
        """Move a model's modules to their devices, and let them run there; no device ever holds all of it.

        Args:
            model: A causal language model of transformers.
            layers: Name of a layer's tensors up to the layer's own part, with `{i}` for the index.
            places: The place of tensors of the model by name; modules without one go to the first device.
        """
        first = self.devices[0]
        if len(self.devices) == 1:
            model.to(first)
            return
        count = len(model.get_submodule(_stack(layers)))
        settled: set[nn.Module] = set()
        for name, module in _parts(model, layers):
            names = (f"{name}.{parameter}" for parameter, _ in module.named_parameters())
            place = next((places[full] for full in names if full in places), None)
            module.to(first if place is None else self.device_of(place, count))
            settled.update(module.modules())
        for module in model.modules():
            if module not in settled:  # what has no weights, such as rotary embeddings
                for key, buffer in module._buffers.items():
                    module._buffers[key] = None if buffer is None else buffer.to(first)
        run_where_weights_are(model, [module for _, module in _parts(model, layers)])


def layers_of(model: Any, layers: str) -> list[nn.Module]:
    """Return a model's layers; `layers` as in `Spread.settle`."""
    return list(model.get_submodule(_stack(layers)).children())


def run_where_weights_are(model: Any, parts: Sequence[nn.Module]) -> None:
    """Let parts of a model move their inputs to their own weights, and the model its logits to its inputs.

    Args:
        model: A causal language model of transformers.
        parts: Modules with weights that do not do so yet.
    """
    moved: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def shared(value: Any, device: torch.device) -> Any:
        if not isinstance(value, Tensor):
            return _mapped(value, lambda part: shared(part, device))
        if value.device == device:
            return value
        key = id(value), device
        if key not in moved:
            moved[key] = value, value.to(device)  # the first is kept so that its id is not used again
        return moved[key][1]

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        device = next(module.parameters()).device
        own = tuple(arg.to(device) if isinstance(arg, Tensor) else arg for arg in args)
        return own, {name: shared(value, device) for name, value in kwargs.items()}

    def leave(module: Any, args: Any, output: Any) -> None:
        moved.clear()
        output.logits = output.logits.to(module.device)

    for part in parts:
        part.register_forward_pre_hook(enter, with_kwargs=True)
    model.register_forward_hook(leave)


def _stack(layers: str) -> str:
    return layers.partition(".{i}")[0]


def _parts(model: nn.Module, layers: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers, and what else stands beside or above their stack and has weights."""
    stack = _stack(layers)
    for number, layer in model.get_submodule(stack).named_children():
        yield f"{stack}.{number}", layer
    holders = stack.split(".")
    for depth, own in enumerate(holders):
        prefix = ".".join(holders[:depth])
        for name, module in model.get_submodule(prefix).named_children():
            if name != own and next(module.parameters(), None) is not None:
                yield f"{prefix}.{name}".removeprefix("."), module


def _mapped(value: Any, change: Any) -> Any:
    if isinstance(value, dict):
        return {key: change(part) for key, part in value.items()}
    if type(value) in (tuple, list):
        return type(value)(map(change, value))
    return value
