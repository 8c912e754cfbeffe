"""What a comparison of objectives hands back: rows, a table, a data frame."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flowvi.diagnostics._table import number, text_table, with_error
from flowvi.diagnostics.importance import Bound

__all__ = ["Comparison", "ComparisonRow"]

_NONE = Bound(math.nan, math.nan)


@dataclass(frozen=True)
class ComparisonRow:
    """One guide trained with one objective.

    Args:
        guide: name of the guide.
        objective: name of the objective.
        num_particles: draws per step of the objective.
        num_steps: steps taken.
        bound: value of the objective itself at the end, in nats: the lower bound it raises, or
            the upper bound or divergence that it lowers.
        is_upper_bound: whether ``bound`` is one from above.
        elbo: ELBO of the trained guide, in nats.
        iw_elbo: number of particles -> importance-weighted bound, in nats.
        pareto_k: shape of the tail of the guide's importance weights.
        trusted: whether weights of that k can be trusted.
        gradient_sd: root of the variance (trace of the covariance) of one gradient at the end.
        signal_to_noise: norm of the expected gradient over that root, where training starts:
            for one guide at the same parameters for all objectives.
        num_gradients: gradients behind these two; a signal-to-noise below its inverse root cannot
            be told from 0.
        milliseconds: median wall time of a step.
        seconds: wall time of the whole pair.
        notes: what a reader should know, such as skipped steps.
        failure: why the pair was refused or broke off; empty if it did not.
    """

    guide: str
    objective: str
    num_particles: int
    num_steps: int = 0
    bound: Bound = _NONE
    is_upper_bound: bool = False
    elbo: Bound = _NONE
    iw_elbo: Mapping[int, Bound] = field(default_factory=dict)
    pareto_k: float = math.nan
    trusted: bool = False
    gradient_sd: float = math.nan
    signal_to_noise: float = math.nan
    num_gradients: int = 0
    milliseconds: float = math.nan
    seconds: float = math.nan
    notes: tuple[str, ...] = ()
    failure: str = ""

    @property
    def verdict(self) -> str:
        """What Pareto k says about the guide's importance weights."""
        if math.isnan(self.pareto_k):
            return "-"
        return "trust" if self.trusted else "no"

    @property
    def best(self) -> Bound:
        """The tightest lower bound: that of the most particles."""
        return self.iw_elbo[max(self.iw_elbo)] if self.iw_elbo else self.elbo


@dataclass(frozen=True)
class Comparison:
    """Result of :func:`compare`; ``print`` it, or draw it by ``flowvi.plots.comparison``.

    Args:
        rows: one per pair, in the order given, refused ones included.
        budget: what each pair was given, in words.
        log_evidence: log p(x) in nats, where it is known.
    """

    rows: tuple[ComparisonRow, ...]
    budget: str
    log_evidence: float | None = None

    def __iter__(self) -> Iterator[ComparisonRow]:
        return iter(self.rows)

    @classmethod
    def join(cls, parts: Iterable[Comparison]) -> Comparison:
        """One comparison from several of the same model, say of processes that shared the work.

        Raises:
            ValueError: if there is none, or budgets or evidences differ.
        """
        parts = list(parts)
        if not parts:
            raise ValueError("`parts` must hold at least one comparison; got none.")
        kinds = {(part.budget, part.log_evidence) for part in parts}
        if len(kinds) > 1:
            raise ValueError(f"`parts` must agree in budget and evidence; got {sorted(kinds)}.")
        rows = tuple(row for part in parts for row in part.rows)
        return cls(rows, parts[0].budget, parts[0].log_evidence)

    @property
    def reference(self) -> tuple[float, str]:
        """What bounds are measured from, in nats, and its name.

        The known log evidence, or else the highest lower bound, of rows with trusted weights if
        there are any.
        """
        if self.log_evidence is not None:
            return self.log_evidence, "log p(x)"
        done = [row for row in self.rows if math.isfinite(row.best.value)]
        trusted = [row for row in done if row.trusted] or done
        best = max((row.best.value for row in trusted), default=math.nan)
        return best, "highest bound"

    def to_dataframe(self) -> Any:
        """The rows as a ``pandas.DataFrame``, indexed by guide and objective.

        Bounds and standard errors are columns of their own (``elbo``, ``elbo_se``,
        ``iw_elbo_100``, ...), in nats.
        """
        from pandas import DataFrame

        frame = DataFrame([self._record(row) for row in self.rows])
        return frame.set_index(["guide", "objective"])

    def _record(self, row: ComparisonRow) -> dict[str, Any]:
        bounds = {"bound": row.bound, "elbo": row.elbo}
        bounds.update({f"iw_elbo_{n}": row.iw_elbo.get(n, _NONE) for n in self._particles})
        record: dict[str, Any] = {
            "guide": row.guide,
            "objective": row.objective,
            "num_particles": row.num_particles,
            "num_steps": row.num_steps,
        }
        for name, bound in bounds.items():
            record[name], record[f"{name}_se"] = bound.value, bound.se
        record |= {
            "is_upper_bound": row.is_upper_bound,
            "log_evidence": math.nan if self.log_evidence is None else self.log_evidence,
            "pareto_k": row.pareto_k,
            "trusted": row.trusted,
            "gradient_sd": row.gradient_sd,
            "signal_to_noise": row.signal_to_noise,
            "num_gradients": row.num_gradients,
            "milliseconds": row.milliseconds,
            "seconds": row.seconds,
            "notes": "; ".join(row.notes),
            "failure": row.failure,
        }
        return record

    @property
    def _particles(self) -> list[int]:
        return sorted({n for row in self.rows for n in row.iw_elbo})

    def __str__(self) -> str:
        particles = self._particles
        header = ["guide", "objective", "own bound", "ELBO", *[f"IW {n}" for n in particles]]
        header += ["k", "weights", "grad sd", "SNR", "ms/step", "steps"]
        if self.log_evidence is not None:
            header.insert(4, "gap")
        rows, last = [], None
        for row in self.rows:
            if not row.failure:
                rows.append([row.guide if row.guide != last else "", *self._cells(row)])
                last = row.guide
        lines = [f"Each pair: {self.budget}.", self._legend(), ""]
        lines.append(text_table(header, rows, num_left=2))
        for title, said in (
            ("Refused or broken off", [(row, row.failure) for row in self.rows if row.failure]),
            ("Notes", [(row, note) for row in self.rows for note in row.notes]),
        ):
            if said:
                lines += ["", f"{title}:", *self._grouped(said)]
        return "\n".join(lines)

    def _grouped(self, said: Sequence[tuple[ComparisonRow, str]]) -> list[str]:
        """One line per guide and thing said, with the objectives it is said of."""
        groups: dict[tuple[str, str], list[str]] = {}
        for row, text in said:
            groups.setdefault((row.guide, text), []).append(row.objective)
        return [
            f"- {guide} with {', '.join(names)}: {text}" for (guide, text), names in groups.items()
        ]

    def _legend(self) -> str:
        text = (
            "Bounds in nats (* from above). k: Pareto k of the guide's weights, and whether to "
            "trust them.\ngrad sd: noise of a gradient at the end; SNR: its signal to noise at "
            "the start."
        )
        if self.log_evidence is not None:
            text = (
                f"log p(x) = {self.log_evidence:.3f}; gap = log p(x) - ELBO = KL(q || p).\n{text}"
            )
        return text

    def _signal(self, row: ComparisonRow) -> str:
        floor = row.num_gradients**-0.5 if row.num_gradients else 0.0
        if row.signal_to_noise < floor:
            return f"<{number(floor, 1)}"
        return number(row.signal_to_noise, 2)

    def _cells(self, row: ComparisonRow) -> list[str]:
        own = with_error(row.bound.value, row.bound.se) + ("*" if row.is_upper_bound else " ")
        cells = [row.objective, own, with_error(row.elbo.value, row.elbo.se)]
        if self.log_evidence is not None:
            cells.append(number(self.log_evidence - row.elbo.value))
        for n in self._particles:
            bound = row.iw_elbo.get(n, _NONE)
            cells.append(with_error(bound.value, bound.se))
        return [
            *cells,
            number(row.pareto_k, 2),
            row.verdict,
            number(row.gradient_sd, 2),
            self._signal(row),
            number(row.milliseconds, 2),
            str(row.num_steps),
        ]
