"""What a recipe says of single tokens whose rows the sources do not share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from evomerge.strict import StrictModel

UNION = "union"
"""Value of `tokenizer` for the tokens of all sources together."""


class ZeroRow(StrictModel):
    """Zeros in embedding and head.

    Attributes:
        kind: `zero`.
    """

    kind: Literal["zero"]


class ModelToken(StrictModel):
    """The row of a source for one of its tokens, given by `token` or `token_id`.

    Attributes:
        kind: `model_token`.
        model: Name of the source, or of the base.
        token: The token's text.
        token_id: Its number.
    """

    kind: Literal["model_token"]
    model: str
    token: str | None = None
    token_id: int | None = Field(default=None, ge=0)


class TokenRow(StrictModel):
    """What a token has in embedding and head of the sources that lack it.

    Attributes:
        source: Name of the source (or base) whose row of this token it is, or another row.
        force: Whether the sources that have the token take that row too.
    """

    source: str | ZeroRow | ModelToken
    force: bool = False

    @property
    def model(self) -> str | None:
        """Name of the source the row comes from; None for zeros."""
        return self.source if isinstance(self.source, str) else getattr(self.source, "model", None)

    def identity(self, identities: Mapping[str, str]) -> list[Any]:
        """Return what the recipe's digest sees of it, given each source's identity by name."""
        row = {"kind": "source"} if isinstance(self.source, str) else self.source.model_dump()
        where = [identities.get(self.model or ""), row.get("token"), row.get("token_id")]
        return [row["kind"], *where, self.force]
