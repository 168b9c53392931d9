"""Which parameters are pruned: names and kinds, whatever the framework."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hvdlm.algorithms.patterns import parse_pattern
from hvdlm.algorithms.pruning import keep_largest, keep_n_of_m
from hvdlm.errors import ConfigError
from hvdlm.options import Options

__all__ = ["Candidate", "final_sparsity", "masks_of", "prunable"]


class Candidate(NamedTuple):
    """A parameter of a model."""

    where: str
    """Where its model was found."""
    name: str
    parameter: Any
    is_matrix: bool
    """Whether it is a matrix or larger, of floats, and no embedding."""


def prunable(candidates: Iterable[Candidate], exclude: str) -> list[tuple[str, Any]]:
    """(name, parameter) of what is pruned: matrices and larger, but for embeddings and what the person excludes.

    Args:
        candidates: All parameters of the models.
        exclude: Patterns of parameter names, as of a shell, joined by commas.

    Raises:
        ConfigError: A pattern matches no parameter, or nothing is left to prune.
    """
    patterns = [pattern.strip() for pattern in exclude.split(",") if pattern.strip()]
    found: dict[int, tuple[str, Any]] = {}
    unused, known = set(patterns), []
    for where, name, p, is_matrix in candidates:
        known.append(name)
        whole = f"{where}.{name}"
        hits = [one for one in patterns if fnmatch.fnmatchcase(name, one) or fnmatch.fnmatchcase(whole, one)]
        unused -= set(hits)
        if is_matrix and not hits:
            found.setdefault(id(p), (whole, p))
    if unused:
        shown = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
        raise ConfigError(
            f"prune_exclude: {sorted(unused)[0]!r} matches no parameter.", hint=f"the parameters are: {shown}"
        )
    if not found:
        raise ConfigError(
            'prune="magnitude": the model has no weight to prune (matrices that are no embeddings and not excluded).',
            hint='set prune="none" (--prune none), or exclude less',
        )
    return list(found.values())


def final_sparsity(options: Options) -> float:
    """Part of the weights that ends up as zeros."""
    pattern = parse_pattern(options.prune_pattern)
    return 1 - pattern[0] / pattern[1] if pattern else options.prune_sparsity


def masks_of(weights: Sequence[npt.NDArray[Any]], target: float, options: Options) -> list[npt.NDArray[np.bool_]]:
    """What is kept of each of these at a sparsity on the way to the final one."""
    pattern, final = parse_pattern(options.prune_pattern), final_sparsity(options)
    if pattern is not None:
        n, m = pattern
        kept = m - round((m - n) * target / final)
        return [keep_n_of_m(weight, kept, m) for weight in weights]
    if options.prune_scope == "global":
        return keep_largest(weights, target)
    return [keep_largest([weight], target)[0] for weight in weights]
