"""Gradient estimators side by side, on the user's own model: spread, bias, signal, cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tqdm.auto import tqdm

from flowvi.diagnostics._moments import (
    Moments,
    gradient_moments,
    guide_parameters,
    placed,
    plate_depth,
    reason_of,
)
from flowvi.diagnostics._random import seeded
from flowvi.diagnostics._table import number, text_table
from flowvi.objectives import ELBO, IWAE, STL, STLIWAE, VIMCO, DReG, Objective

__all__ = ["GradientReport", "GradientRow", "gradient_report"]

# Estimators of a bound that has a plainer, unbiased estimator.
_PLAIN = {STL: ELBO, DReG: IWAE, STLIWAE: IWAE, VIMCO: IWAE}
# Unbiased estimators of one bound have one expected gradient; that of IWAE depends on K.
_ONE_BOUND = {"ELBO": "ELBO", "STL": "ELBO", "IWAE": "IWAE", "DReG": "IWAE", "VIMCO": "IWAE"}


@dataclass(frozen=True)
class GradientRow:
    """One estimator.

    Args:
        objective: its name.
        kind: name of its class.
        num_particles: draws per gradient.
        norm: norm of the expected gradient, in nats per unit of the parameters, noise taken away.
        sd: root of the trace of one gradient's covariance, in the same unit.
        signal_to_noise: ``norm / sd`` of one gradient. Unbiased estimators of one bound (ELBO and
            STL; IWAE, DReG and VIMCO of one K) share the norm that the least noisy of them gives.
        floor: signal-to-noise below which it cannot be told from 0 with so many repeats.
        bias: norm of the mean gradient minus that of the reference, noise taken away; at least 0,
            and NaN for an objective that is its own reference.
        bias_z: size of that difference in units of what noise alone gives on average (1: none).
        milliseconds: median wall time of one gradient.
        cost: variance times time, relative to the first objective; below 1 is better. It compares
            estimators of one bound; bounds differ in the size of their gradients.
        num_bad: gradients that were not finite.
        failure: why the estimator was refused; empty if it was not.
    """

    objective: str
    kind: str
    num_particles: int
    norm: float = math.nan
    sd: float = math.nan
    signal_to_noise: float = math.nan
    floor: float = math.nan
    bias: float = math.nan
    bias_z: float = math.nan
    milliseconds: float = math.nan
    cost: float = math.nan
    num_bad: int = 0
    failure: str = ""


@dataclass(frozen=True)
class GradientReport:
    """Result of :func:`gradient_report`; ``print`` it, or draw it by ``flowvi.plots.gradients``.

    Args:
        rows: one per objective, in the order given.
        num_parameters: length of the gradient.
        num_repeats: gradients per estimator.
        num_reference: gradients behind each reference.
    """

    rows: tuple[GradientRow, ...]
    num_parameters: int
    num_repeats: int
    num_reference: int

    def __iter__(self) -> Iterator[GradientRow]:
        return iter(self.rows)

    def to_dataframe(self) -> Any:
        """The rows as a ``pandas.DataFrame``, indexed by objective."""
        from pandas import DataFrame

        return DataFrame([vars(row) for row in self.rows]).set_index("objective")

    def __str__(self) -> str:
        header = ("objective", "particles", "|E g|", "sd of g", "signal/noise", "bias", "bias z",
                  "ms", "cost")  # fmt: skip
        rows = [
            (row.objective, str(row.num_particles), number(row.norm), number(row.sd),
             self._signal(row), number(row.bias, 2), number(row.bias_z, 2),
             number(row.milliseconds), number(row.cost))
            for row in self.rows if not row.failure
        ]  # fmt: skip
        lines = [
            f"Gradients of {self.num_parameters} parameters, {self.num_repeats} of each "
            f"estimator, {self.num_reference} of each reference.",
            "",
            text_table(header, rows),
            "",
            "signal/noise = |E g| / sd of one gradient; bias z = 1 is what noise alone gives;",
            "cost = variance x ms, first objective = 1, for estimators of one bound.",
        ]
        lines += [f"{row.objective}: {row.failure}" for row in self.rows if row.failure]
        return "\n".join(lines)

    def _signal(self, row: GradientRow) -> str:
        if row.signal_to_noise < row.floor:
            return f"< {number(row.floor, 1)}"
        return number(row.signal_to_noise)


def gradient_report(
    model: Callable,
    guide: Callable,
    objectives: Mapping[str, Objective],
    *args: Any,
    num_repeats: int = 100,
    num_reference: int | None = None,
    reference: Objective | Mapping[str, Objective] | None = None,
    model_parameters: bool = False,
    seed: int | None = None,
    progress_bar: bool = True,
    **kwargs: Any,
) -> GradientReport:
    r"""Measure gradient estimators at the guide's present parameters, which stay as they are.

    .. math:: \mathrm{SNR} = \lVert E\,g \rVert \,/\, \sqrt{\operatorname{tr} \operatorname{Cov} g}

    **Reference.** The bias of an estimator is its mean against the mean of ``num_reference``
    gradients of a reference objective. By default that is the plain estimator of the same bound
    with as many particles: the ELBO for STL; IWAE for DReG, STL-IWAE and VIMCO. Other objectives
    have none. What should be compared with something else, such as a self-normalised estimator
    at small K with one at large K, is named in ``reference``.

    Args:
        model: Pyro model.
        guide: Pyro guide, trained or not, whose parameters exist or are made by one call. Inside
            ``with fit.scope():`` for one trained by :func:`flowvi.infer.fit`.
        objectives: name -> objective.
        *args: arguments of model and guide.
        num_repeats: gradients per objective, at least 2.
        num_reference: gradients per reference; ``4 * num_repeats`` if left out.
        reference: objective to compare all with, or name -> objective for some.
        model_parameters: include the model's parameters in the gradient.
        seed: seed of all draws; the global random state is then left as it was.
        progress_bar: show a bar.
        **kwargs: keyword arguments of model and guide.

    Raises:
        ValueError: if a number is at fault, there is no objective or no parameter, or
            ``reference`` names an unknown objective.

    References:
        Rainforth et al. (2018), Tighter variational bounds are not necessarily better,
        arXiv:1802.04537, section 3.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        >>> def guide():
        ...     loc = pyro.param("loc", torch.zeros(2))
        ...     pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
        >>> report = gradient_report(
        ...     model, guide, {"ELBO": ELBO(8), "STL": STL(8)}, seed=0, progress_bar=False
        ... )
        >>> report.rows[0].sd > 0, report.rows[1].sd < 1e-6
        (True, True)
    """
    _check(objectives, num_repeats, num_reference, reference)
    num_reference = 4 * num_repeats if num_reference is None else num_reference
    with seeded(seed):
        guide(*args, **kwargs)
        params = guide_parameters(guide, args, kwargs, model if model_parameters else None)
        task = (model, guide, args, kwargs, list(params.values()))
        depth = plate_depth(model, guide, args, kwargs)
        rows: list[GradientRow] = []
        first = None
        for name, objective in tqdm(
            objectives.items(), desc="gradients", disable=not progress_bar
        ):
            start = GradientRow(name, type(objective).__name__, objective.num_particles)
            try:
                found = gradient_moments(placed(objective, depth), *task, num_repeats)
                against = _reference_of(name, objective, reference)
                if against is not None:
                    against = gradient_moments(placed(against, depth), *task, num_reference)
            except Exception as error:  # an objective may refuse, and a model fail in any way
                rows.append(replace(start, failure=reason_of(error)))
                continue
            first = found if first is None else first
            rows.append(_row(start, found, against, first))
    size = sum(t.numel() for t in params.values())
    return GradientReport(_share_signal(rows), size, num_repeats, num_reference)


def _check(
    objectives: Mapping[str, Objective],
    num_repeats: int,
    num_reference: int | None,
    reference: Objective | Mapping[str, Objective] | None,
) -> None:
    if not objectives:
        raise ValueError("`objectives` must hold at least one objective; got none.")
    for name, value in (("num_repeats", num_repeats), ("num_reference", num_reference)):
        if value is not None and (not isinstance(value, int) or value < 2):
            raise ValueError(f"`{name}` must be an integer of at least 2; got {value!r}.")
    unknown = set(reference) - set(objectives) if isinstance(reference, Mapping) else set()
    if unknown:
        raise ValueError(f"`reference` must name given objectives; got {sorted(unknown)}.")


def _reference_of(
    name: str, objective: Objective, reference: Objective | Mapping[str, Objective] | None
) -> Objective | None:
    """The objective to compare with; None for one that would be compared with itself."""
    if isinstance(reference, Mapping):
        if name in reference:
            return reference[name]
    elif reference is not None:
        return reference
    plain = _PLAIN.get(type(objective))
    if plain is None:
        return None
    return plain(objective.num_particles, vectorize_particles=objective.vectorize_particles)


def _row(
    start: GradientRow, found: Moments, against: Moments | None, first: Moments
) -> GradientRow:
    bias, z = (math.nan, math.nan) if against is None else _bias(found, against)
    base = first.variance * first.milliseconds
    return replace(
        start,
        norm=found.norm,
        sd=found.sd,
        signal_to_noise=found.signal_to_noise,
        floor=found.num_repeats**-0.5,
        bias=bias,
        bias_z=z,
        milliseconds=found.milliseconds,
        cost=found.variance * found.milliseconds / base if base > 0 else math.nan,
        num_bad=found.num_bad,
    )


def _share_signal(rows: list[GradientRow]) -> tuple[GradientRow, ...]:
    """Give estimators of one bound the norm that the least noisy of them found."""
    best: dict[tuple, GradientRow] = {}
    for row in rows:
        if not row.failure and row.kind in _ONE_BOUND:
            key = _bound_of(row)
            best[key] = min(row, best.get(key, row), key=lambda r: r.sd)
    shared = []
    for row in rows:
        found = best.get(_bound_of(row))
        if found is not None and row.sd > 0 and not row.failure:
            ratio = found.sd / row.sd
            row = replace(
                row,
                norm=found.norm,
                signal_to_noise=found.norm / row.sd,
                floor=ratio * found.floor,
            )
        shared.append(row)
    return tuple(shared)


def _bound_of(row: GradientRow) -> tuple:
    bound = _ONE_BOUND.get(row.kind)
    return bound, row.num_particles if bound == "IWAE" else 0


def _bias(found: Moments, reference: Moments) -> tuple[float, float]:
    """Norm of the difference of two means without its noise, and in units of that noise."""
    gap = found.mean - reference.mean
    noise = found.variance / found.num_repeats + reference.variance / reference.num_repeats
    square = float(gap.square().sum())
    z = math.sqrt(square / noise) if noise > 0 else (0.0 if square == 0 else math.inf)
    return math.sqrt(max(square - noise, 0.0)), z
