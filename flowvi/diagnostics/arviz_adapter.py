"""The only place that imports ArviZ; works with its 0.2x and 1.x releases.

ArviZ is imported inside the functions: the import takes two seconds, and a warning that 0.23
raises at import must not reach users who run with warnings as errors.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

__all__ = ["import_arviz", "inference_data", "pareto_smooth"]


def import_arviz() -> ModuleType:
    """The ``arviz`` module, imported without its announcement of the 1.x refactor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("arviz")


def pareto_smooth(log_weights: np.ndarray) -> tuple[np.ndarray, float]:
    """Pareto-smoothed normalised log weights, and the shape k of their tail.

    Args:
        log_weights: finite log importance weights ``(num_draws,)``, in nats.

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry (2024), Pareto smoothed importance sampling,
        arXiv:1507.02646; the tail fit is that of Zhang and Stephens (2009).
    """
    log_weights = np.array(log_weights, dtype=np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arviz = import_arviz()
        if hasattr(arviz, "psislw"):
            smoothed, k = arviz.psislw(log_weights)
        else:
            # 1.x takes the log of the inverse weights (a log-likelihood, as in PSIS-LOO).
            stats = importlib.import_module("arviz_stats.base").array_stats
            smoothed, k = stats.psislw(-log_weights)
    smoothed = np.asarray(smoothed)
    return smoothed - np.logaddexp.reduce(smoothed), float(k)


def inference_data(
    groups: Mapping[str, Mapping[str, np.ndarray]],
    *,
    coords: Mapping[str, Sequence] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> Any:
    """An ``InferenceData`` (0.2x) or ``DataTree`` (1.x) from nested dictionaries of arrays.

    Args:
        groups: group name -> variable name -> array; draws start with (chain, draw), and
            ``observed_data`` has neither.
        coords: dimension name -> index values.
        dims: variable name -> names of its dimensions after (chain, draw).
        attrs: attributes of the posterior group.
    """
    filled = {name: dict(group) for name, group in groups.items() if group}
    options: dict[str, Any] = {"coords": dict(coords or {}), "dims": dict(dims or {})}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arviz = import_arviz()
        if int(arviz.__version__.split(".")[0]) >= 1:
            data = arviz.from_dict(filled, **options)
        else:
            data = arviz.from_dict(**filled, **options)
    data["posterior"].attrs.update(attrs or {})
    return data
