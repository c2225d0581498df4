"""A LoRA adapter folder as `peft` writes it: checked, read lazily, and written. No torch until it is needed.

An adapter holds, for some modules of a base model, two factors `A` (r x in) and `B` (out x r); the module's
weight (out x in) becomes `W + s*B@A` with `s = alpha/r` (Hu et al., arXiv 2106.09685) or `alpha/sqrt(r)`
(rsLoRA, arXiv 2312.03732). DoRA (arXiv 2402.09353) adds a magnitude for every row of that.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.checkpoints.files import broken, inside, read_json, show
from evomerge.checkpoints.fingerprint import hash_files, sha256_text
from evomerge.checkpoints.header import TensorInfo, read_header
from evomerge.checkpoints.whole import partial_of, remove_stale, sync
from evomerge.errors import UserError
from evomerge.reading import is_folder

if TYPE_CHECKING:
    import torch

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MODELS = ("model.safetensors", "model.safetensors.index.json")
_MOST = 2**20  # largest rank and alpha that are believed
_PREFIX = "base_model.model."
_FLOATS = ("F64", "F32", "F16", "BF16")
_PARTS = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_embedding_A": "down",
    "lora_embedding_B": "up",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_B.bias": "bias",
}
_KEY = re.compile(rf"(.+)\.({'|'.join(re.escape(suffix) for suffix in _PARTS)})")
_INERT = frozenset(
    {
        *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying"),
        *("exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern"),
        *("layers_to_transform", "lora_alpha", "lora_bias", "lora_dropout", "megatron_core"),
        *("modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern"),
        *("revision", "runtime_config", "target_modules", "task_type", "use_dora", "use_rslora"),
        *("corda_config", "eva_config", "loftq_config", "lora_ga_config", "velora_config"),
    }
)
"""Keys of `LoraConfig` that are understood here or bear on training alone; any other must be off."""
_SAME_BASE = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base as it was; PiSSA, OLoRA and the like change it."""


@dataclass(frozen=True, slots=True)
class Target:
    """What an adapter does to the weight of one module.

    Attributes:
        module: The module's name, without peft's prefix.
        rank: Rows of A and columns of B.
        scale: The factor of `B@A`.
        embedding: Whether it is an embedding, whose weight is stored as (in, out).
        shape: The delta's rows and columns: (out, in).
        down: Factor A, (rank, in).
        up: Factor B, (out, rank).
        magnitude: DoRA's length of each row of the weight; None without DoRA.
        bias: Added to the module's bias after scaling by `scale`; None for nearly all adapters.
    """

    module: str
    rank: int
    scale: float
    embedding: bool
    shape: tuple[int, int]
    down: TensorInfo
    up: TensorInfo
    magnitude: TensorInfo | None
    bias: TensorInfo | None


class Adapter:
    """One LoRA adapter folder, opened without reading any weight; instances can be pickled.

    Attributes:
        path: The folder, absolute and without symlinks.
        config: `adapter_config.json`.
        targets: Module name to what the adapter adds to it.
        replaced: Name of each tensor of the model that the adapter brings whole (`modules_to_save`, trained
            biases, embeddings) to that tensor.
    """

    def __init__(
        self, path: Path, config: dict[str, Any], targets: dict[str, Target], replaced: dict[str, TensorInfo]
    ) -> None:
        self.path = path
        self.config = config
        self.targets = targets
        self.replaced = replaced
        self._state = _state(path / WEIGHTS)
        self._handle: Any = None

    @classmethod
    def open(cls, path: Path) -> Adapter:
        """Return the adapter in a folder, after checking its config and header.

        Raises:
            SourceError: Something in it is broken, or it is of a kind that is not supported.
        """
        root = Path(os.path.realpath(path))
        config = read_json(inside(root, CONFIG))
        _check_config(root, config)
        if not os.path.lexists(root / WEIGHTS):
            raise broken(root, f"has no {WEIGHTS}; pickled adapters are refused, save it with safetensors")
        parts: dict[str, dict[str, TensorInfo]] = {}
        replaced: dict[str, TensorInfo] = {}
        for info in sorted(read_header(inside(root, WEIGHTS)), key=lambda info: info.name):
            name = info.name.removeprefix(_PREFIX)
            if info.dtype not in _FLOATS:
                raise broken(
                    root, f'tensor "{info.name}" is stored as {info.dtype}, expected {", ".join(_FLOATS)}'
                )
            if match := _KEY.fullmatch(name):
                kind = "embedding" if "embedding" in match[2] else ""
                parts.setdefault(match[1], {})[_PARTS[match[2]] + kind] = info
            elif "lora_" in name:
                raise broken(root, f'tensor "{info.name}": no part of a LoRA or DoRA adapter; not supported')
            else:
                replaced[name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = info
        targets = {module: _target(root, config, module, found) for module, found in parts.items()}
        if not targets and not replaced:
            raise broken(root, f"{WEIGHTS} holds no tensor")
        return cls(root, config, targets, replaced)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (64 hex digits) over the content of the adapter's config and weights.

        Raises:
            SourceError: A file has gone or cannot be read.
        """
        return sha256_text("\n".join(hash_files([self.path / CONFIG, self.path / WEIGHTS])))

    @property
    def base(self) -> tuple[str, str | None] | None:
        """Location and revision of the base by the adapter's config; None if it names none.

        A folder beside or below the adapter's is given by its absolute path and has no revision.
        """
        location = self.config.get("base_model_name_or_path")
        if not location:
            return None
        folder = self.path / location
        return (str(folder.resolve()), None) if is_folder(folder) else (location, self.config.get("revision"))

    def check_low_rank(self) -> None:
        """Check that all it does is to add low-rank deltas, which is what merging adapters keeps.

        Raises:
            SourceError: It has DoRA's magnitudes, biases, or whole tensors.
        """
        for target in self.targets.values():
            if target.magnitude is not None or target.bias is not None:
                what = "DoRA's magnitude" if target.magnitude is not None else "a bias"
                raise broken(
                    self.path, f'module "{target.module}" has {what}, which no merge of low-rank deltas keeps'
                )
        for info in self.replaced.values():
            # peft writes the frozen weight of an adapted embedding along with its delta.
            module, frozen, _ = info.name.removeprefix(_PREFIX).partition(".base_layer.weight")
            if not frozen or module not in self.targets:
                problem = f'brings "{info.name}" whole (modules_to_save or bias)'
                raise broken(self.path, f"{problem}, which no merge of low-rank deltas keeps")

    def tensor(self, info: TensorInfo) -> torch.Tensor:
        """Return a tensor of the adapter as a view of the mapped file.

        Raises:
            SourceError: The file has changed or gone since the adapter was opened.
        """
        from evomerge.checkpoints.tensors import load, open_file

        if self._handle is None:
            if _state(info.file) != self._state:
                raise broken(info.file, "changed or gone since the adapter was opened; start again")
            self._handle = open_file(info.file)
        return load(self._handle, info)

    def factors(self, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `(s*B, A)` of a target in float64, of shapes (out, rank) and (rank, in)."""
        return self.tensor(target.up).double() * target.scale, self.tensor(target.down).double()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}

    def __repr__(self) -> str:
        return f"Adapter({str(self.path)!r}, {len(self.targets)} modules)"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no whole model."""
    return (folder / CONFIG).is_file() and not any(os.path.lexists(folder / name) for name in _MODELS)


def peft_config(
    ranks: Mapping[str, int], base: str, revision: str | None, *, transposed: bool = False
) -> dict[str, Any]:
    """Return the `adapter_config.json` of a plain LoRA adapter of scale 1 (alpha = r).

    Args:
        ranks: Full name of each module to its rank.
        base: Folder or hub id of the base.
        revision: The base's revision on the hub.
        transposed: Whether the base stores the weights of its linear layers as (in, out).
    """
    usual = max(ranks.values(), default=1)
    others = {f"^{re.escape(module)}": rank for module, rank in sorted(ranks.items()) if rank != usual}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "target_modules": sorted(ranks),
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
    }


def factor_names(module: str, embedding: bool) -> tuple[str, str]:
    """Return the names that factors A and B of a module have in an adapter, without peft's prefix."""
    if embedding:
        return f"{module}.lora_embedding_A", f"{module}.lora_embedding_B"
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def write_adapter(target: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Path:
    """Write an adapter folder that `peft` loads: there as a whole or not at all.

    Args:
        target: The folder to be made; it must not exist, its parent must.
        config: `adapter_config.json`.
        tensors: Tensor name, without peft's prefix, to tensor.

    Returns:
        `target`, absolute.

    Raises:
        UserError: The target exists or cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from evomerge.checkpoints.writer import check_target

    check_target(target)
    final = target.absolute()
    partial = partial_of(final)
    stored = {_PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        remove_stale(final)
        partial.mkdir()
        # safetensors reports a full disk in an error of its own, and not the reason.
        if sum(tensor.nbytes for tensor in stored.values()) > shutil.disk_usage(partial).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(stored, partial / WEIGHTS, metadata={"format": "pt"})
        (partial / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
        for path in (partial / WEIGHTS, partial / CONFIG, partial):
            sync(path)
        check_target(target)
        os.rename(partial, final)
        sync(final.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{final}: cannot be written ({reason}); choose another folder") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def _state(file: Path) -> tuple[int, int, int]:
    try:
        status = os.stat(file)
    except OSError:
        return (-1, -1, -1)
    return status.st_size, status.st_mtime_ns, status.st_ino


def _check_config(root: Path, config: Mapping[str, Any]) -> None:
    where = root / CONFIG
    kind = config.get("peft_type")
    if kind != "LORA":
        raise broken(where, f"peft_type: expected LORA, got {show(kind)}; merge it into its base with peft")
    for key, value in config.items():
        if key not in _INERT and value:
            problem = f"{show(key)} is set ({show(value, 40)}), a variant of LoRA that is not supported"
            raise broken(where, f"{problem}; merge it into its base with peft")
    start = config.get("init_lora_weights")
    if start not in _SAME_BASE:
        raise broken(
            where,
            f"init_lora_weights: {show(start)} changes the base's weights, so this is no delta to the base; "
            "save it with peft's path_initial_model_for_weight_conversion",
        )
    for key in ("base_model_name_or_path", "revision"):
        if not isinstance(config.get(key), str | None):
            raise broken(where, f"{key}: expected a text, got {show(config[key])}")


def _target(root: Path, config: Mapping[str, Any], module: str, found: Mapping[str, TensorInfo]) -> Target:
    embedding = "downembedding" in found or "upembedding" in found
    kind = "embedding" if embedding else ""
    down, up = found.get("down" + kind), found.get("up" + kind)
    if down is None or up is None:
        raise broken(root, f'module "{module}": factor {"A" if down is None else "B"} is missing')
    if embedding and {"down", "up"} & set(found):
        raise broken(root, f'module "{module}": has factors of an embedding and of a linear layer')
    where = f'module "{module}"'
    if len(down.shape) != 2 or len(up.shape) != 2 or down.shape[0] != up.shape[1]:
        shapes = f"got A {down.shape} and B {up.shape}"
        raise broken(root, f"{where}: expected matrices A (r, in) and B (out, r), {shapes}")
    rank, scale = _scaling(root / CONFIG, config, module)
    if rank != down.shape[0]:
        raise broken(root, f"{where}: {CONFIG} gives rank {rank}, its factors have {down.shape[0]}")
    magnitude, bias = found.get("magnitude"), found.get("bias")
    for name, vector in (("DoRA's magnitude", magnitude), ("the bias", bias)):
        if vector is not None and math.prod(vector.shape) != up.shape[0]:
            raise broken(root, f"{where}: {name}: expected {up.shape[0]} values, got {vector.shape}")
    if (magnitude is not None) != bool(config.get("use_dora")):
        odd = "lacks" if magnitude is None else "has"
        raise broken(root, f"{where} {odd} DoRA's magnitude, use_dora is {show(config.get('use_dora'))}")
    return Target(module, rank, scale, embedding, (up.shape[0], down.shape[1]), down, up, magnitude, bias)


def _scaling(where: Path, config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Return rank and factor of a module by the config and its patterns."""
    rank = _patterned(where, config, "rank_pattern", module, config.get("r"))
    alpha = _patterned(where, config, "alpha_pattern", module, config.get("lora_alpha"))
    if type(rank) is not int or not 1 <= rank <= _MOST:
        raise broken(where, f'r of module "{module}": expected a positive integer, got {show(rank)}')
    if type(alpha) not in (int, float) or not abs(alpha) <= _MOST:
        raise broken(where, f'lora_alpha of module "{module}": expected a number, got {show(alpha)}')
    return rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _patterned(where: Path, config: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the end of a module's name, else the default."""
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise broken(where, f"{key}: expected an object of pattern to number, got {show(patterns)}")
    for pattern, value in patterns.items():
        try:
            # The file is not trusted, and an expression with loops in loops can take for ever.
            if len(pattern) > 512 or len(re.findall(r"[*+{]", pattern)) > 2 or re.search(r"\)[*+{]", pattern):
                raise re.error("too involved")
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                return value
        except re.error as error:
            raise broken(where, f"{key}: pattern {show(pattern)}: {error}") from None
    return default
