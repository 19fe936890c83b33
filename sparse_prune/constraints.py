"""Constraints on pruning: which connections stay, and how scores are adjusted before the cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from sparse_prune.pattern import whole_number
from sparse_prune.ranges import check_range

FarField = Literal["block", "head", "layer"]


@dataclass(frozen=True, kw_only=True)
class Constraints:
    """Constraints on pruning: which connections stay, and how scores are adjusted before the cut.

    Raises:
        TypeError: If a count is not a whole number, a switch not a bool, or a name or head is given instead of a tuple.
        ValueError: If a count is negative or a share is outside its range.
    """

    sink_blocks: int = 1
    """First key blocks that every query keeps."""
    recent_blocks: int = 1
    """Key blocks up to and including the diagonal that every query keeps. At least 1."""
    min_density: float = 0.0
    """Smallest share of possible blocks that every head keeps, in [0, 1]."""
    share_kv_groups: bool = False
    """Give the query heads of one KV head one pattern, by their largest score: needed to free KV cache."""
    share_diagonals: float | None = None
    """How much blocks at the same distance from the diagonal share their scores, in [0, 1]; sink columns apart. A block
    scores the geometric mean of its own score, with weight 1 - share_diagonals, and the largest one on its diagonal.
    Single blocks are known from few samples, diagonals from many (docs/frontier.md). 0: every block stands for itself.
    1: patterns are bands, the same at every length. None: 0.5 for causal patterns, 0 for bidirectional ones, where
    sharing raised the loss (docs/recipes/vision.md)."""
    reach_price: float = 0.0
    """Divide the score of a block by 1 + reach_price * distance, where distance is its distance from the diagonal as a
    share of the longest. A KV cache must hold all that a head reaches back over, so only high scores should reach far.
    0: distance costs nothing."""
    fill_reach: bool = False
    """Keep every block between the diagonal and the furthest one that a row keeps, sinks excepted. The KV cache holds
    these blocks anyway, so the model attends to more at the same cache size and a lower sparsity
    (docs/constraints.md)."""
    far_field: FarField = "block"
    """The unit that is kept or pruned as a whole beyond sinks and recent blocks, by its mean score: a block, a head (a
    KV head, with share_kv_groups), or a layer. Whole far fields give patterns that other programs can read
    (docs/serving.md); sparsity then rises in as many steps as there are units. min_density must be 0."""
    regrow: bool = True
    """Whether pruned blocks come back when their score has risen."""
    hysteresis: float = 0.1
    """Multiply the scores of kept blocks by 1 + hysteresis, so that blocks at the threshold do not flicker."""
    protected_layers: tuple[str, ...] = ()
    """Names of layers that stay dense."""
    protected_heads: Mapping[str, tuple[int, ...]] | None = None
    """Layer name -> query heads that stay dense."""

    def __post_init__(self) -> None:
        for name in ("sink_blocks", "recent_blocks"):
            count = whole_number(getattr(self, name))
            if count is None:
                raise TypeError(f"`{name}` must be a whole number of blocks, got {getattr(self, name)!r}.")
            object.__setattr__(self, name, count)
        for name in ("share_kv_groups", "fill_reach", "regrow"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"`{name}` must be True or False, got {getattr(self, name)!r}.")
        if isinstance(self.protected_layers, str):
            raise TypeError(
                f"`protected_layers` must be a tuple of names, got the string {self.protected_layers!r}. "
                f"Write ({self.protected_layers!r},)."
            )
        for layer, heads in (self.protected_heads or {}).items():
            if isinstance(heads, int):
                raise TypeError(f"`protected_heads` of {layer!r} must be a tuple, got {heads}. Write ({heads},).")
        if self.far_field not in get_args(FarField):
            raise ValueError(f"`far_field` must be one of {get_args(FarField)}, got {self.far_field!r}.")
        if self.far_field != "block" and self.min_density:
            raise ValueError(
                f"`min_density` must be 0 with far_field={self.far_field!r}, which keeps a far field whole or prunes "
                f"it whole, got {self.min_density}. Keep more `recent_blocks` instead."
            )
        check_range("[0, inf)", sink_blocks=self.sink_blocks, reach_price=self.reach_price, hysteresis=self.hysteresis)
        check_range("[1, inf)", "The diagonal is one.", recent_blocks=self.recent_blocks)
        check_range("[0, 1]", min_density=self.min_density, share_diagonals=self.share_diagonals or 0.0)

    def check_protected(self, num_heads: Mapping[str, int]) -> None:
        """Refuse protected layers and heads that a model does not have.

        Args:
            num_heads: Layer -> its query heads.

        Raises:
            ValueError: If there is no such layer or head.
        """
        heads = self.protected_heads or {}
        for name in (*self.protected_layers, *heads):
            if name not in num_heads:
                raise ValueError(
                    f"`protected_layers` and `protected_heads` must name attention layers, got {name!r}. "
                    f"The layers are {list(num_heads)}."
                )
            wrong = [head for head in heads.get(name, ()) if not 0 <= head < num_heads[name]]
            if wrong:
                raise ValueError(f"`protected_heads` of {name!r} must lie in 0..{num_heads[name] - 1}, got {wrong}.")
