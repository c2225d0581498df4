"""What a file for `merge-adapters` may say: a method, the adapters, and the method's own keys. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from evomerge.errors import RecipeError, nearest
from evomerge.strict import StrictModel, read_yaml, validated


class ModelRef(StrictModel):
    """Names a checkpoint or adapter; may be written as its path alone.

    Attributes:
        path: Local directory, relative to the file, or hub id.
        revision: Branch, tag or commit of a hub id.
    """

    path: str = Field(min_length=1)
    revision: str | None = None


class AdapterRef(ModelRef):
    """Names an adapter that is merged.

    Attributes:
        weight: For `sum` and `lego` the factor of its delta; for `rmm` how much of its deviation from the
            mean of all is taken.
    """

    weight: float = 1.0


class AdapterSettings(StrictModel):
    """What all methods take.

    Attributes:
        dtype: Of the factors written.
    """

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    @field_validator("base", "model", "adapters", mode="before", check_fields=False)
    @classmethod
    def _long_form(cls, data: Any) -> Any:
        if isinstance(data, list | tuple):
            return [{"path": item} if isinstance(item, str) else item for item in data]
        return {"path": data} if isinstance(data, str) else data


class _Merging(AdapterSettings):
    """What methods that merge adapters take.

    Attributes:
        adapters: LoRA adapters of one base; a module that one of them lacks counts as a zero delta there.
        base: The base that the result names; default: the one that all adapters name.
    """

    adapters: tuple[AdapterRef, ...] = Field(min_length=1)
    base: ModelRef | None = None


class SumSettings(_Merging):
    """The weighted sum of the deltas, cut to a rank; see `evomerge.merging.adapters.weighted_delta`.

    Attributes:
        rank: Largest rank of the result; default: what makes it exact.
    """

    method: Literal["sum"]
    rank: int | None = Field(default=None, ge=1)


class LegoSettings(_Merging):
    """LoRA-LEGO; see `evomerge.merging.adapters.lego`.

    Attributes:
        rank: Number of clusters, and so the rank of the result.
        seed: Of K-means.
        reweight: Give each centroid the mean norm of its units (not verified against the paper).
    """

    method: Literal["lego"]
    rank: int = Field(ge=1)
    seed: int = Field(default=0, ge=0)
    reweight: bool = False


class RmmSettings(_Merging):
    """A point of reversible model merging; see `evomerge.merging.adapters.ReversibleLora`.

    Attributes:
        components: Of the basis at each position.
    """

    method: Literal["rmm"]
    adapters: tuple[AdapterRef, ...] = Field(min_length=2)
    components: int = Field(ge=1)


class ExtractSettings(AdapterSettings):
    """An adapter from a fine-tuned model by SVD; see `evomerge.merging.adapters.extract`.

    Attributes:
        base: The model that was fine-tuned; a whole checkpoint.
        model: The fine-tuned model.
        rank: Of the result.
        modules: Last parts of the names of the modules to take, such as `q_proj`; default: every linear
            module in the layers. What else differs (norms, biases, embedding, head, experts and routers) is
            left out and reported.
    """

    method: Literal["extract"]
    base: ModelRef
    model: ModelRef
    rank: int = Field(ge=1)
    modules: tuple[str, ...] | None = Field(default=None, min_length=1)


MergeSettings = SumSettings | LegoSettings | RmmSettings
Settings = MergeSettings | ExtractSettings

_METHODS: dict[str, type[SumSettings] | type[LegoSettings] | type[RmmSettings] | type[ExtractSettings]] = {
    "sum": SumSettings,
    "lego": LegoSettings,
    "rmm": RmmSettings,
    "extract": ExtractSettings,
}


def read_settings(path: Path) -> Settings:
    """Return the settings in a YAML file.

    Raises:
        RecipeError: In one line naming the file, the key, what was expected and what was got.
    """
    data = read_yaml(path, RecipeError)
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: expected a mapping with a method, got {type(data).__name__}")
    method = data.get("method")
    if not isinstance(method, str) or method not in _METHODS:
        hint = nearest(str(method), _METHODS)
        raise RecipeError(f"{path}: method: expected a way to merge adapters, got {method!r}{hint}")
    return validated(_METHODS[method], data, str(path), RecipeError)
