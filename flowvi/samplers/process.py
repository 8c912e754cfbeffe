"""What a sampler sees of a model: its start, and what drives its states from noise to data."""

from __future__ import annotations

import copy
import enum
from collections.abc import Callable, Iterable

from pyro.distributions import Distribution
from torch import Tensor

from flowvi.paths import (
    Diffusion,
    PredictedDrift,
    Prediction,
    ProcessFamily,
    Schedule,
    ScheduleDiffusion,
    split,
)
from flowvi.paths.diffusion import as_diffusion

__all__ = [
    "Ability",
    "DriftProcess",
    "FieldProcess",
    "GenerativeProcess",
    "PredictionProcess",
]

Function = Callable[[Tensor, Tensor], Tensor]


class Ability(enum.Enum):
    """What a generative process can say, and so which samplers it can serve."""

    FLOW = "a velocity without noise (probability flow)"
    NOISING = "a drift with noise (SDE)"
    SCORE = "a score of its marginals"
    SCHEDULE = "predictions of data and noise under a schedule"


class GenerativeProcess:
    """Base of generative processes; states run from ``low`` (noise) to ``high`` (data).

    A subclass writes what its ``abilities`` promise: ``velocity`` for FLOW, ``drift`` and
    ``scale`` for NOISING, ``score`` for SCORE, ``predict`` and ``schedule`` for SCHEDULE.

    Args:
        start: law of the state at ``low``, event shape ``(dim,)``.
        abilities: what the process can say.
        low: first time.
        high: last time.
        name: what errors call it.

    Shape:
        x: ``(*batch, dim)``; t: ``(*batch, 1)``.

    Raises:
        ValueError: if times are not ordered or the start has another event shape.
    """

    schedule: Schedule | None = None
    diffusion: Diffusion | None = None

    def __init__(
        self,
        start: Distribution,
        abilities: Iterable[Ability],
        *,
        low: float = 0.0,
        high: float = 1.0,
        name: str = "the process",
    ) -> None:
        if len(start.event_shape) != 1:
            raise ValueError(
                f"`start` must have an event shape of one dim; got {tuple(start.event_shape)}."
            )
        if not 0 <= low < high <= 1:
            raise ValueError(f"`high` must be above `low`, both in [0, 1]; got {high} and {low}.")
        self.start = start
        self.abilities = frozenset(abilities)
        self.low = float(low)
        self.high = float(high)
        self.name = name
        self.num_calls = 0

    @property
    def dim(self) -> int:
        """Number of dimensions of a state."""
        return self.start.event_shape[0]

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """Velocity of the probability flow."""
        raise NotImplementedError

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        """Score of the marginal."""
        raise NotImplementedError

    def drift(self, x: Tensor, t: Tensor, level: float = 1.0) -> Tensor:
        """Drift of the process with ``level`` times the variance of its noise."""
        raise NotImplementedError

    def scale(self, x: Tensor, t: Tensor) -> Tensor:
        """Noise b per square root of time."""
        return self.diffusion(x, t)

    def predict(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Data and noise that the model sees in a state."""
        raise NotImplementedError

    def require(self, needs: Iterable[Ability], sampler: str, way_out: str) -> None:
        """Refuse a sampler that needs what the process has not.

        Raises:
            NotImplementedError: if an ability is missing.
        """
        missing = [need.value for need in needs if need not in self.abilities]
        if missing:
            raise NotImplementedError(
                f"{sampler} needs {' and '.join(sorted(missing))}, which {self.name} does not "
                f"have. {way_out}"
            )

    def counted(self) -> GenerativeProcess:
        """The same process with its own count of network calls, from zero."""
        new = copy.copy(self)
        new.num_calls = 0
        return new


class PredictionProcess(GenerativeProcess):
    r"""Process of a network that predicts data, noise, velocity or score under a schedule.

    .. math:: v = \alpha' \hat d + \sigma' \hat n, \qquad s = -\hat n / \sigma, \qquad
        f = v + \tfrac{b^2}{2} s

    Args:
        schedule: signal and noise over time.
        network: maps states and times to the prediction.
        prediction: what it predicts.
        start: law of the first state.
        diffusion: b; the schedule's best noise if left out.
        abilities: all of them if left out. A prediction that stands for the drift alone
            (DiffEnc) has no flow and no score; one that stands for the velocity alone (rectified
            flow with a coupling) has no noise and no score.
        low: first time.
        high: last time.
        name: what errors call it.

    Example:
        >>> import torch
        >>> from pyro.distributions import Normal
        >>> from flowvi.paths import LinearLogSNR
        >>> process = PredictionProcess(
        ...     LinearLogSNR(), lambda x, t: torch.zeros_like(x), Prediction.DATA,
        ...     Normal(torch.zeros(2), 1.0).to_event(1))
        >>> process.score(torch.ones(3, 2), torch.zeros(3, 1)).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        schedule: Schedule,
        network: Function,
        prediction: Prediction,
        start: Distribution,
        *,
        diffusion: float | Tensor | Callable | Diffusion | None = None,
        abilities: Iterable[Ability] = tuple(Ability),
        low: float = 0.0,
        high: float = 1.0,
        name: str = "the process",
    ) -> None:
        super().__init__(start, abilities, low=low, high=high, name=name)
        if not isinstance(prediction, Prediction):
            raise TypeError(f"`prediction` must be a Prediction; got {prediction!r}.")
        self.schedule = schedule
        self.network = network
        self.prediction = prediction
        self.diffusion = as_diffusion(
            ScheduleDiffusion(schedule) if diffusion is None else diffusion
        )

    def predict(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        self.num_calls += 1
        return split(self.network(x, t), self.prediction, x, self.schedule(t))

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        return self.drift(x, t, 0.0)

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        return -self.predict(x, t)[1] / self.schedule(t).sigma

    def drift(self, x: Tensor, t: Tensor, level: float = 1.0) -> Tensor:
        values = self.schedule(t)
        data, noise = self.predict(x, t)
        rate = values.d_sigma
        if level:
            rate = rate - level * self.diffusion(x, t).square() / (2 * values.sigma)
        return values.d_alpha * data + rate * noise


class FieldProcess(GenerativeProcess):
    """Process whose velocity and score come together, such as that of a learned flow path.

    Args:
        family: the processes with these marginals.
        start: law of the first state.
        low: first time.
        high: last time.
        name: what errors call it.
    """

    def __init__(
        self,
        family: ProcessFamily,
        start: Distribution,
        *,
        low: float = 0.0,
        high: float = 1.0,
        name: str = "the process",
    ) -> None:
        abilities = (Ability.FLOW, Ability.NOISING, Ability.SCORE)
        super().__init__(start, abilities, low=low, high=high, name=name)
        self.family = family
        self.diffusion = family.diffusion

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        return self.drift(x, t, 0.0)

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        self.num_calls += 1
        return self.family.field(x, t)[1]

    def drift(self, x: Tensor, t: Tensor, level: float = 1.0) -> Tensor:
        self.num_calls += 1
        return self.family.drift(x, t, level)


class DriftProcess(GenerativeProcess):
    """Process of which a velocity, or a drift with its noise, is all that is known.

    Args:
        drift: f; the velocity where there is no noise.
        diffusion: b; ``None`` for none.
        start: law of the first state.
        low: first time.
        high: last time.
        name: what errors call it.

    Example:
        >>> import torch
        >>> from pyro.distributions import Normal
        >>> decay = DriftProcess(lambda x, t: -x, None, Normal(torch.zeros(2), 1.0).to_event(1))
        >>> decay.velocity(torch.ones(2), torch.zeros(1))
        tensor([-1., -1.])
    """

    def __init__(
        self,
        drift: Function,
        diffusion: float | Tensor | Callable | Diffusion | None,
        start: Distribution,
        *,
        low: float = 0.0,
        high: float = 1.0,
        name: str = "the process",
    ) -> None:
        ability = Ability.FLOW if diffusion is None else Ability.NOISING
        super().__init__(start, (ability,), low=low, high=high, name=name)
        self._drift = drift
        self.diffusion = None if diffusion is None else as_diffusion(diffusion)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        self.num_calls += 1
        return self._drift(x, t)

    def drift(self, x: Tensor, t: Tensor, level: float = 1.0) -> Tensor:
        self.num_calls += 1
        return self._drift(x, t)


def as_process(source: object, start: Distribution | None) -> GenerativeProcess:
    """A generative process from a process, a model that has one, or a predicted drift.

    Raises:
        TypeError: if it is none of these.
        ValueError: if a drift comes without the law of its start.
    """
    if isinstance(source, GenerativeProcess):
        return source
    if isinstance(source, PredictedDrift):
        if start is None:
            raise ValueError("`start` must be given with a drift, which has no law of its own.")
        path = source.path
        plain = getattr(path, "encoder", None) is None
        abilities = Ability if plain else (Ability.NOISING, Ability.SCHEDULE)
        return PredictionProcess(
            path.schedule,
            source.network,
            source.prediction,
            start,
            diffusion=path.diffusion,
            abilities=abilities,
            name="a drift of a path with an encoder",
        )
    make = getattr(source, "process", None)
    if callable(make):
        return make()
    raise TypeError(
        "`source` must be a GenerativeProcess, a PredictedDrift or a model with a method "
        f"`process`; got {type(source).__name__}."
    )
