"""Opening what a recipe's path names: a whole checkpoint, or a base with a LoRA adapter on it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from evomerge.checkpoints.adapters import CONFIG, Adapter, Target, is_adapter
from evomerge.checkpoints.compatible import check_compatible
from evomerge.checkpoints.files import broken, show
from evomerge.checkpoints.fingerprint import sha256_text
from evomerge.checkpoints.header import TensorInfo
from evomerge.checkpoints.layout import layout_of
from evomerge.checkpoints.source import Checkpoint, resolve
from evomerge.errors import SourceError
from evomerge.reading import is_folder

if TYPE_CHECKING:
    import torch

_CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D_MODULES = ("c_attn", "c_proj", "c_fc", "q_attn")
_ROUTERS = ("gate", "router")  # these and the experts are no linear modules in transformers 5
_BLOCK = 1 << 20  # elements worked on at a time in float64: 8 MiB
_HEADS = ("lm_head.weight", "embed_out.weight")


@dataclass(frozen=True, slots=True)
class _Change:
    """What an adapter does to one tensor of its base.

    Attributes:
        target: The low-rank delta; None for a tensor that is only replaced or a bias.
        transposed: Whether the base stores the weight as (in, out).
        replacement: What stands in for the base's tensor, before any delta.
        bias: What is added after scaling by the target's scale, in place of the low-rank delta.
    """

    target: Target | None = None
    transposed: bool = False
    replacement: TensorInfo | None = None
    bias: TensorInfo | None = None

    @property
    def computed(self) -> bool:
        """Whether the tensor is stored nowhere."""
        return self.target is not None


class AdaptedCheckpoint(Checkpoint):
    """A checkpoint whose weights are those of a base with a LoRA or DoRA adapter merged into it.

    `path`, `config`, `files`, the tokenizer, and name, shape and dtype in `tensors` are those of the base.
    A tensor that the adapter changes is computed each time it is asked for, in float64, and given in float32
    whatever dtype the base stores, so that a delta far below the base's precision is not lost; a tensor that
    the adapter brings whole is given as it stores it; all others are the base's own.

    Attributes:
        base: The checkpoint below.
        adapter: What is merged into it.

    Raises:
        SourceError: The adapter was trained on another base: names or shapes do not fit, or it adapts a
            head that the base ties to its embedding.
    """

    def __init__(self, base: Checkpoint, adapter: Adapter) -> None:
        super().__init__(base.path, base.config, base.files, list(base._stored.values()))
        self.base = base
        self.adapter = adapter
        if "quantization_config" in base.text_config:
            problem = f"the base {base.path} is quantised; name the checkpoint it was made from"
            raise broken(adapter.path, f"{problem} as BASE+ADAPTER")
        self._changes: dict[str, _Change] = {}
        for name, info in adapter.replaced.items():
            stored = self._named(name)
            self._check_shape(stored, info.shape, info.name)
            self._changes[stored] = _Change(replacement=info)
        for target in adapter.targets.values():
            self._plan(target)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (64 hex digits) over the fingerprints of the base and the adapter.

        Raises:
            SourceError: A file has gone or cannot be read.
        """
        return sha256_text(f"adapted\n{self.base.fingerprint}\n{self.adapter.fingerprint}")

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor of the adapted model: computed ones in float32, others as they are stored.

        Raises:
            SourceError: There is no such tensor, or a file changed since it was opened.
        """
        change = self._changes.get(name)
        if change is None:
            return self.base.tensor(name)
        replacement = change.replacement
        start = self.base.tensor(name) if replacement is None else self.adapter.tensor(replacement)
        if change.target is None:
            return start
        if change.bias is not None:
            delta = self.adapter.tensor(change.bias).double() * change.target.scale
            return (start.double() + delta.reshape(start.shape)).float()
        return _adapted(start, self.adapter, change.target, change.transposed)

    def is_stored(self, name: str) -> bool:
        """Whether `tensor(name)` is a view of a file; tensors with a delta are computed each time."""
        change = self._changes.get(name)
        return self.base.is_stored(name) if change is None else not change.computed

    def scan_finite(self) -> None:
        """Read all weights once and check them.

        Raises:
            SourceError: A tensor of the base or of the adapted model holds NaN or infinity, or the base's
                config ties the head to the embedding while a stored head differs from it.
        """
        from evomerge.checkpoints.tensors import first_non_finite

        self.base.scan_finite()
        name = first_non_finite(self._changed())
        if name is not None:
            problem = f'with it, tensor "{name}" holds NaN or infinity; the adapter is damaged'
            raise broken(self.adapter.path, problem)

    def _changed(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name in self._changes:
            yield name, self.tensor(name)

    def _plan(self, target: Target) -> None:
        name = self._named(f"{target.module}.weight")
        transposed = target.embedding or is_transposed(self.base, target.module)
        out, into = target.shape
        self._check_shape(name, (into, out) if transposed else (out, into), target.module)
        replaced = self._changes.get(name, _Change()).replacement
        self._changes[name] = _Change(target, transposed, replaced)
        if target.bias is not None:
            bias = self._named(f"{target.module}.bias")
            self._check_shape(bias, (out,), target.module)
            replaced = self._changes.get(bias, _Change()).replacement
            self._changes[bias] = _Change(target, replacement=replaced, bias=target.bias)

    def _named(self, name: str) -> str:
        """Return the base's name of a tensor, which may have more or fewer leading parts than here."""
        tensors = self.base.tensors
        if name in tensors:
            return name
        alike = [stored for stored in tensors if stored.endswith(f".{name}") or name.endswith(f".{stored}")]
        if len(alike) == 1:
            return alike[0]
        if name.endswith(_HEADS):
            raise broken(
                self.adapter.path,
                f'adapts "{name}", but the base {self.base.path} ties its head to the embedding or has none; '
                "store the base with a head of its own (tie_word_embeddings: false)",
            )
        raise broken(self.adapter.path, f'adapts "{name}", {self._other_base("has no tensor of that name")}')

    def _check_shape(self, name: str, expected: tuple[int, ...], what: str) -> None:
        got = self.base.tensors[name].shape
        if got != expected:
            problem = self._other_base(f'has "{name}" of shape {got}')
            raise broken(self.adapter.path, f'adapts "{what}" of shape {expected}, {problem}')

    def _other_base(self, problem: str) -> str:
        trained = show(self.adapter.config.get("base_model_name_or_path"))
        return f"but the base {self.base.path} {problem}; it was trained on {trained}, name that as its base"

    def __repr__(self) -> str:
        return f"AdaptedCheckpoint({self.base!r}, {self.adapter!r})"


def _adapted(start: torch.Tensor, adapter: Adapter, target: Target, transposed: bool) -> torch.Tensor:
    """Return a weight with its delta, and with the lengths that DoRA gives its rows, in float32.

    Worked out in float64 by blocks of stored rows, so that threads do not change a digit of the result.
    """
    import torch

    up, down = adapter.factors(target)
    left, right = (down.T, up.T) if transposed else (up, down)
    result = torch.empty(start.shape, dtype=torch.float32)
    rows = max(1, _BLOCK // max(1, start.shape[1]))
    parts = [slice(first, first + rows) for first in range(0, start.shape[0], rows)]
    lengths = None
    if target.magnitude is not None:
        lengths = adapter.tensor(target.magnitude).double().reshape(-1)
    factors = None
    if lengths is not None and transposed:
        squares = torch.zeros(start.shape[1], dtype=torch.float64)
        for part in parts:
            squares += torch.addmm(start[part].double(), left[part], right).square().sum(dim=0)
        factors = _ratio(lengths, squares)
    for part in parts:
        block = torch.addmm(start[part].double(), left[part], right)
        if lengths is not None and not transposed:
            block *= _ratio(lengths[part], block.square().sum(dim=1))[:, None]
        elif factors is not None:
            block *= factors
        result[part] = block
    return result


def _ratio(lengths: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """Return wanted length over length; 0 for a row of zeros, which has no direction to be given a length."""
    import torch

    return torch.where(squares > 0, lengths / squares.sqrt(), 0.0)


def open_checkpoint(location: str, revision: str | None = None, base_dir: Path | None = None) -> Checkpoint:
    """Open a checkpoint, or a base with an adapter on it.

    Args:
        location: A folder or hub id of a checkpoint or of an adapter, or `BASE+ADAPTER`. An adapter alone
            stands on the base that its config names; a relative folder there is relative to the adapter's.
            Either part of `BASE+ADAPTER` may end in `@REVISION`.
        revision: Branch, tag or commit on the hub of the checkpoint or of the adapter.
        base_dir: What relative folders in `location` are relative to; default: the working directory.

    Returns:
        A `Checkpoint`, which is an `AdaptedCheckpoint` where there is an adapter.

    Raises:
        SourceError: Something is missing or broken, or the adapter does not fit its base.
    """
    below, above = _split(location, base_dir)
    folder = _resolve(above, revision, base_dir)
    if not is_adapter(folder):
        if below:
            problem = f"expected an adapter after the + ({CONFIG} and its weights), got a folder without one"
            raise broken(above, problem)
        return Checkpoint.open(folder)
    adapter = Adapter.open(folder)
    if below:
        return AdaptedCheckpoint(open_checkpoint(below, base_dir=base_dir), adapter)
    if adapter.base is None:
        raise broken(adapter.path, "its config names no base model; name it as BASE+ADAPTER")
    name, base_revision = adapter.base
    try:
        found = _resolve(name, base_revision, folder)
    except SourceError as error:
        raise SourceError(f"the base of adapter {folder}: {error}; name another as BASE+ADAPTER") from None
    return AdaptedCheckpoint(Checkpoint.open(found), adapter)


def open_adapters(locations: Iterable[tuple[str, str | None]], base_dir: Path) -> list[Adapter]:
    """Open adapters that are to be merged with each other, without their base.

    Args:
        locations: Folder or hub id and revision of each.
        base_dir: What relative folders are relative to.

    Raises:
        SourceError: One is missing, broken, a whole model, or more than low-rank deltas, or two have a module
            of other shapes.
    """
    opened: list[Adapter] = []
    known: dict[str, tuple[Adapter, Target]] = {}
    for location, revision in locations:
        folder = _resolve(location, revision, base_dir)
        if not is_adapter(folder):
            raise broken(
                location, f"expected an adapter ({CONFIG} and its weights), got a folder without one"
            )
        adapter = Adapter.open(folder)
        adapter.check_low_rank()
        for module, target in adapter.targets.items():
            first, expected = known.setdefault(module, (adapter, target))
            if (target.shape, target.embedding) != (expected.shape, expected.embedding):
                problem = f'module "{module}" is {target.shape}, but {expected.shape} in {first.path}'
                raise broken(adapter.path, f"{problem}; merge adapters of one base")
        opened.append(adapter)
    return opened


def shared_base(adapters: Sequence[Adapter]) -> tuple[str, str | None]:
    """Return location and revision of the base that adapters name.

    Raises:
        SourceError: One names none, or two name different ones.
    """
    first = adapters[0].base
    for adapter in adapters:
        if adapter.base is None or first is None:
            raise broken(adapter.path, "its config names no base model; give the key base")
        if adapter.base != first:
            problem = f"is on base {show(adapter.base[0])}, but {adapters[0].path} is on {show(first[0])}"
            raise broken(adapter.path, f"{problem}; where they are the same model, give the key base")
    if first is None:
        raise ValueError("no adapter was given")
    return first


def changed_matrices(
    base: Checkpoint, model: Checkpoint, modules: Sequence[str] | None, left_out: list[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what a fine-tuned model adds to the matrix of each linear module of the layers, if it differs.

    Args:
        base: A whole checkpoint.
        model: One that was fine-tuned from it.
        modules: Last parts of the names of the modules to take; None: all.
        left_out: Receives the names of the other tensors that differ.

    Returns:
        Module name and delta (out, in), float64.

    Raises:
        SourceError: The two do not fit together, or the base is itself an adapter on another.
    """
    if isinstance(base, AdaptedCheckpoint):
        raise broken(
            base.adapter.path, "expected a whole checkpoint as the base of an adapter, got an adapter"
        )
    check_compatible({"base": base, "model": model})
    for name, place in layout_of(base).places.items():
        delta = model.tensor(name).double() - base.tensor(name).double()
        if not bool(delta.any()):
            continue
        module, _, kind = name.rpartition(".")
        leaf = module.rpartition(".")[2]
        linear = ".experts." not in module and leaf not in _ROUTERS
        wanted = modules is None or leaf in modules
        if wanted and linear and place.layer is not None and kind == "weight" and delta.ndim == 2:
            yield module, delta.T if is_transposed(base, module) else delta
        else:
            left_out.append(name)


def is_transposed(base: Checkpoint, module: str) -> bool:
    """Whether a base stores the weight of a linear module as (in, out), as GPT-2's Conv1D does.

    Like peft, this goes by the module and not by `fan_in_fan_out` of an adapter's config.
    """
    return base.config["model_type"] in _CONV1D and module.rpartition(".")[2] in _CONV1D_MODULES


def located(location: str, base_dir: Path) -> str:
    """Return a location with its folders by absolute path; hub ids stay as they are.

    Args:
        location: As `open_checkpoint` takes it.
        base_dir: What relative folders are relative to.
    """
    below, above = _split(location, base_dir)
    folder = base_dir / Path(above).expanduser()
    top = str(folder.resolve()) if is_folder(folder) else above
    return f"{located(below, base_dir)}+{top}" if below else top


def _split(location: str, base_dir: Path | None) -> tuple[str, str]:
    """Return base and adapter of a location; no base where it names one thing.

    A `+` may be part of a folder's name: a folder of the whole name wins, then one behind the first `+`.
    """
    root = base_dir or Path()
    if "+" not in location or "\0" in location or is_folder(root / Path(location).expanduser()):
        return "", location
    cuts = [i for i, letter in enumerate(location) if letter == "+"]
    for cut in cuts:
        behind = location[cut + 1 :]
        if behind and is_folder(root / Path(behind).expanduser()):
            return location[:cut], behind
    return location[: cuts[-1]], location[cuts[-1] + 1 :]


def _resolve(location: str, revision: str | None, base_dir: Path | None) -> Path:
    """Resolve a location that may end in `@REVISION`."""
    name, at, named = location.rpartition("@")
    if at and name and not is_folder((base_dir or Path()) / Path(location).expanduser()):
        return resolve(name, named, base_dir=base_dir)
    return resolve(location, revision, base_dir=base_dir)
