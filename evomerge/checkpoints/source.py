"""A Hugging Face checkpoint folder: found, checked, and read lazily. No torch until a tensor is asked for."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.checkpoints.files import broken, inside, read_json, show
from evomerge.checkpoints.fingerprint import hash_files, remember, sha256_text
from evomerge.checkpoints.header import TensorInfo, read_header
from evomerge.checkpoints.tokenizer import VOCABULARY_FILES, tokenizer_files, vocabulary
from evomerge.errors import SourceError
from evomerge.reading import is_folder

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "TensorInfo", "resolve"]

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_INDEX = 64 * 2**20
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_HEADS = ("lm_head.weight", "embed_out.weight")
_TIED_BY_DEFAULT = ("gemma", "cohere")  # whose configs often do not say so
_BUFFERS = (".rotary_emb.inv_freq", ".attention.masked_bias", ".attn.masked_bias")
_MASKS = (".attention.bias", ".attn.bias")
_HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "README.md"]


class Checkpoint:
    """One checkpoint folder, opened without reading any weight.

    Instances can be pickled; open files stay behind.

    Attributes:
        path: The folder, absolute and without symlinks.
        config: `config.json`.
        tensors: Name to stored tensor, by file and then name. Left out is what `transformers` ignores:
            buffers that old versions stored, and the head of a model whose head is tied to its embedding.
        ignored: Names of the tensors left out.
        files: The weight files, by name.
    """

    def __init__(
        self, path: Path, config: dict[str, Any], files: tuple[Path, ...], stored: list[TensorInfo]
    ) -> None:
        tied = config.get("tie_word_embeddings", config["model_type"].startswith(_TIED_BY_DEFAULT)) is True
        self.path = path
        self.config = config
        self.files = files
        self.ignored = tuple(info.name for info in stored if _is_ignored(info, tied))
        self.tensors = {info.name: info for info in stored if not _is_ignored(info, tied)}
        self._stored = {info.name: info for info in stored}
        self._states = {file: _state(file) for file in files}
        self._handles: dict[Path, Any] = {}
        self._views: dict[str, torch.Tensor] = {}

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Return the checkpoint in a folder, after checking its config and every header.

        Raises:
            SourceError: The folder is missing or anything in it is broken, unsafe or of a foreign format.
        """
        root = Path(os.path.realpath(path))
        if not is_folder(root):
            raise broken(path, "no such checkpoint folder")
        config = _read_config(root)
        files, stored = _read_weights(root)
        if not stored:
            raise broken(root, "the weight files hold no tensor")
        return cls(root, config, files, stored)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (64 hex digits) over the content of the weight files, `config.json` and tokenizer files.

        Raises:
            SourceError: A file has gone or cannot be read.
        """
        files = [*self.files, self.path / "config.json", *tokenizer_files(self.path)]
        digests = hash_files(files)
        pairs = zip(files, digests, strict=True)
        return sha256_text("\n".join(f"{file.name} {digest}" for file, digest in pairs))

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """SHA-256 (64 hex digits) of the vocabulary; empty if there is no tokenizer.

        It covers token -> id with added tokens, however `tokenizer.json` is formatted; without that file it
        covers the content of the vocabulary files.

        Raises:
            SourceError: The tokenizer is broken.
        """
        files = [file for file in tokenizer_files(self.path) if file.name in VOCABULARY_FILES]
        if any(file.name == "tokenizer.json" for file in files):
            return remember("vocabulary", self.path / "tokenizer.json", self._vocabulary_digest)
        if not files:
            return ""
        return sha256_text("\n".join(hash_files(files)))

    def _vocabulary_digest(self) -> str:
        tokens = sorted((vocabulary(self.path) or {}).items())
        return sha256_text("\n".join(f"{number} {token!r}" for token, number in tokens))

    @property
    def text_config(self) -> dict[str, Any]:
        """The config of the language model: that of a multimodal model lies in its `text_config`."""
        nested = self.config.get("text_config")
        return {**self.config, **nested} if isinstance(nested, dict) else self.config

    @property
    def num_parameters(self) -> int:
        """Number of values in `tensors`; a tied head counts once."""
        return sum(math.prod(info.shape) for info in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the data of `tensors`."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def torch_dtype(self) -> str:
        """Torch's name of the dtype that most bytes are stored in, such as `bfloat16`.

        A dtype that no merge accepts is given as safetensors writes it.
        """
        sizes: Counter[str] = Counter()
        for info in self.tensors.values():
            sizes[info.dtype] += info.nbytes
        dtype = sizes.most_common(1)[0][0]
        return _TORCH_NAMES.get(dtype, dtype)

    def tensor(self, name: str) -> torch.Tensor:
        """Return a stored tensor as a view of the mapped file; `tensors[name]` gives shape and dtype.

        Raises:
            SourceError: There is no such tensor, or its file changed since the checkpoint was opened.
        """
        from evomerge.checkpoints.tensors import load

        view = self._views.get(name)
        if view is None:
            info = self._stored.get(name)
            if info is None:
                raise broken(self.path, f"has no tensor {show(name)}")
            view = self._views[name] = load(self._handle(info.file), info)
        return view

    def is_stored(self, name: str) -> bool:
        """Whether `tensor(name)` is a view of a file, which costs no memory; else it is computed anew."""
        return name in self._stored

    def scan_finite(self) -> None:
        """Read all weights once and check them.

        Raises:
            SourceError: A tensor holds NaN or infinity (the first one is named), or the config ties the head
                to the embedding while a stored head differs from it.
        """
        from evomerge.checkpoints.tensors import first_non_finite

        name = first_non_finite(self._streamed())
        if name is not None:
            raise broken(self.path, f'tensor "{name}" holds NaN or infinity; the checkpoint is damaged')
        self._check_tied_head()

    def _streamed(self) -> Iterator[tuple[str, torch.Tensor]]:
        for info in sorted(self.tensors.values(), key=lambda info: (info.file, info.offset)):
            yield info.name, self.tensor(info.name)

    def _check_tied_head(self) -> None:
        for name in set(self.ignored) & set(_HEADS):
            head = self.tensor(name)
            shape = self._stored[name].shape
            twins = [twin for twin, info in self.tensors.items() if ".embed" in twin and info.shape == shape]
            if twins and not any(head.equal(self.tensor(twin)) for twin in twins):
                problem = f'the config ties the head to the embedding, but "{name}" differs from "{twins[0]}"'
                raise broken(self.path, f"{problem}; set tie_word_embeddings to false or remove the tensor")

    def _handle(self, file: Path) -> Any:
        from evomerge.checkpoints.tensors import open_file

        if file not in self._handles:
            if _state(file) != self._states[file]:
                raise broken(file, "changed or gone since the checkpoint was opened; start again")
            self._handles[file] = open_file(file)
        return self._handles[file]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": {}, "_views": {}}

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {self.num_parameters:,} parameters)"


def resolve(location: str, revision: str | None = None, *, base_dir: Path | None = None) -> Path:
    """Return the local folder of a checkpoint, fetched from the Hugging Face hub if it is a hub id.

    An existing folder wins; `./x`, `../x`, `/x` and `~/x` are never taken for hub ids. The hub's own
    environment variables hold, such as `HF_HUB_OFFLINE`, `HF_HOME` and `HF_TOKEN`.

    Args:
        location: A folder or a hub id (`name` or `owner/name`).
        revision: Branch, tag or commit on the hub; default: the main branch.
        base_dir: What a relative folder is relative to; default: the working directory.

    Raises:
        SourceError: Neither a folder nor a repository of that name can be had, or a folder has a revision.
    """
    if not location or "\0" in location:
        raise SourceError(f"source {show(location)}: expected a folder or a Hugging Face id")
    folder = (base_dir or Path()) / Path(location).expanduser()
    if is_folder(folder):
        if revision is not None:
            raise broken(location, f"is a local folder and has no revision {show(revision)}; leave it out")
        return folder.absolute()
    if location.startswith((".", "/", "~")) or location.count("/") > 1 or "\\" in location:
        raise broken(location, f"no such folder (looked for {folder.absolute()})")
    return _download(location, revision, folder)


def _download(location: str, revision: str | None, folder: Path) -> Path:
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            location, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=["*/*", "consolidated*"]
        )
    except Exception as error:  # the hub raises errors of its own, of requests' and of the file system
        reason = show(" ".join(str(error).split())[:200], 200).strip("'\"")
        raise broken(
            location,
            f"neither a folder (looked for {folder.absolute()}) nor to be had from the Hugging Face hub at "
            f"revision {revision or 'main'} ({type(error).__name__}: {reason})",
        ) from None
    return Path(found)


def _read_config(root: Path) -> dict[str, Any]:
    path = root / "config.json"
    if not path.is_file():
        raise broken(root, "has no config.json, so it is not a Hugging Face checkpoint")
    config = read_json(inside(root, path.name))
    if "auto_map" in config or any(root.glob("*.py")):
        raise broken(root, "brings its own Python code (auto_map or *.py files), which is never run; refused")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise broken(path, f"model_type: expected a name such as llama, got {show(model_type)}")
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and names and isinstance(names[0], str)):
        raise broken(path, f"architectures: expected a list with a class name, got {show(names)}")
    return config


def _read_weights(root: Path) -> tuple[tuple[Path, ...], list[TensorInfo]]:
    if os.path.lexists(root / _SINGLE):
        files: tuple[Path, ...] = (inside(root, _SINGLE),)
        return files, sorted(read_header(files[0]), key=lambda info: info.name)
    if not os.path.lexists(root / _INDEX):
        raise broken(root, _missing_weights(root))
    shards = _read_index(root)
    stored: list[TensorInfo] = []
    for name in sorted(shards):
        if not os.path.lexists(inside(root, name)):
            raise broken(root, f'shard "{name}" named in {_INDEX} is missing; fetch the checkpoint again')
    for name, expected in sorted(shards.items()):
        path = inside(root, name)
        infos = sorted(read_header(path), key=lambda info: info.name)
        for odd in sorted(expected ^ {info.name for info in infos})[:1]:
            problem = "is missing, but" if odd in expected else "is there, but not"
            raise broken(path, f"tensor {show(odd)} {problem} listed for this shard in {_INDEX}")
        stored += infos
    return tuple(inside(root, name) for name in sorted(shards)), stored


def _read_index(root: Path) -> dict[str, set[str]]:
    """Return shard file name -> names of its tensors."""
    path = inside(root, _INDEX)
    weight_map = read_json(path, _MAX_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise broken(path, "weight_map: expected an object of tensor name to file name, none empty")
    shards: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name.endswith(".safetensors"):
            raise broken(path, f"weight_map: {show(tensor)} is in {show(name)}, expected a .safetensors file")
        shards.setdefault(name, set()).add(tensor)
    return shards


def _missing_weights(root: Path) -> str:
    names = sorted(path.name for path in root.iterdir())
    pickles = [name for name in names if name.endswith(_PICKLES) and name != "training_args.bin"]
    if pickles:
        return (
            f"only pickled weights ({pickles[0]}), which can run code and are refused; convert them with "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...) where you trust them"
        )
    if "adapter_config.json" in names:
        return "this is an adapter, not a whole model; merge it into its base first (peft: merge_and_unload)"
    return f"has neither {_SINGLE} nor {_INDEX}"


def _is_ignored(info: TensorInfo, tied: bool) -> bool:
    if info.name.endswith(_MASKS):
        return len(info.shape) == 4
    return info.name.endswith(_BUFFERS) or (tied and info.name.endswith(_HEADS))


def _state(file: Path) -> tuple[int, int, int]:
    try:
        status = os.stat(file)
    except OSError:
        return (-1, -1, -1)
    return status.st_size, status.st_mtime_ns, status.st_ino
