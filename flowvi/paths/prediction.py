"""Data, noise, velocity and score predictions: one 2x2 linear system, and prior drifts from it."""

from __future__ import annotations

import enum
from collections.abc import Callable

from torch import Tensor, nn

from flowvi.paths.diffusion import Diffusion
from flowvi.paths.gaussian import DiffusionPath
from flowvi.paths.process import ProcessFamily
from flowvi.paths.schedules import Schedule, ScheduleValues

__all__ = ["PredictedDrift", "Prediction", "convert", "prediction_family", "split"]


class Prediction(enum.Enum):
    r"""What a network says about a state :math:`x = \alpha\,data + \sigma\,noise`.

    Each is a linear function of data and noise: the data, the noise, the velocity
    :math:`\alpha'\,data + \sigma'\,noise`, the score :math:`-noise / \sigma` and the angular
    velocity :math:`\alpha\,noise - \sigma\,data`, known as v-prediction, whose size is that of
    the data at all times where the schedule preserves variance (Salimans and Ho (2022),
    Progressive distillation, arXiv:2202.00512, appendix D).
    """

    ANGULAR = enum.auto()
    DATA = enum.auto()
    NOISE = enum.auto()
    SCORE = enum.auto()
    VELOCITY = enum.auto()

    def row(self, values: ScheduleValues) -> tuple[Tensor | float, Tensor | float]:
        """Its two coefficients, of the data and of the noise."""
        if self is Prediction.DATA:
            return 1.0, 0.0
        if self is Prediction.NOISE:
            return 0.0, 1.0
        if self is Prediction.SCORE:
            return 0.0, -1 / values.sigma
        if self is Prediction.ANGULAR:
            return -values.sigma, values.alpha
        return values.d_alpha, values.d_sigma


def split(
    output: Tensor, prediction: Prediction, state: Tensor, values: ScheduleValues
) -> tuple[Tensor, Tensor]:
    r"""Data and noise that a prediction implies, by Cramer's rule.

    .. math:: \begin{pmatrix} \alpha & \sigma \\ c_d & c_n \end{pmatrix}
        \begin{pmatrix} data \\ noise \end{pmatrix} =
        \begin{pmatrix} state \\ output \end{pmatrix}

    Args:
        output: the prediction, ``(*batch, dim)``.
        prediction: what it is a prediction of.
        state: where it was made, ``(*batch, dim)``.
        values: the schedule there, each ``(*batch, 1)``.

    Example:
        >>> import torch
        >>> from flowvi.paths import Linear
        >>> split(torch.tensor([2.0]), Prediction.VELOCITY, torch.tensor([1.0]),
        ...       Linear()(torch.tensor([0.25])))
        (tensor([2.5000]), tensor([0.5000]))
    """
    c_data, c_noise = prediction.row(values)
    det = values.alpha * c_noise - values.sigma * c_data
    data = (state * c_noise - values.sigma * output) / det
    noise = (values.alpha * output - state * c_data) / det
    return data, noise


def convert(
    output: Tensor,
    source: Prediction,
    target: Prediction,
    state: Tensor,
    values: ScheduleValues,
) -> Tensor:
    """One prediction as another.

    Args:
        output: the prediction that is given, ``(*batch, dim)``.
        source: what it is a prediction of.
        target: what is wanted.
        state: where it was made, ``(*batch, dim)``.
        values: the schedule there, each ``(*batch, 1)``.

    Shape:
        result: ``(*batch, dim)``.

    References:
        Lipman et al. (2024), Flow matching guide and code, arXiv:2412.06264, table 1, lists the
        cases one by one.
    """
    data, noise = split(output, source, state, values)
    c_data, c_noise = target.row(values)
    return c_data * data + c_noise * noise


def prediction_family(
    schedule: Schedule,
    network: Callable[[Tensor, Tensor], Tensor],
    prediction: Prediction,
    diffusion: float | Tensor | Callable | Diffusion,
) -> ProcessFamily:
    """All processes of a trained network, one network call per drift.

    Args:
        schedule: signal and noise over time.
        network: maps states ``(*batch, dim)`` and times ``(*batch, 1)`` to the prediction.
        prediction: what the network predicts.
        diffusion: b, for example ``ScheduleDiffusion(schedule)``.
    """

    def field(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        values = schedule(t)
        data, noise = split(network(x, t), prediction, x, values)
        return values.d_alpha * data + values.d_sigma * noise, -noise / values.sigma

    return ProcessFamily(field, diffusion)


class PredictedDrift(nn.Module):
    r"""Prior drift f of a diffusion, given by a network's prediction.

    .. math:: f = \alpha' \hat d + \Big(\sigma' - \frac{b^2}{2\sigma}\Big) \hat n

    with data :math:`\hat d` and noise :math:`\hat n` implied by the prediction: the drift of the
    posterior with the prediction in place of the truth. A :class:`~flowvi.distributions.PathPrior`
    takes f - g from the difference of the prediction and its target (``difference``), which
    float32 resolves where two large drifts would cancel.

    Args:
        path: the path of the posterior.
        network: maps states ``(*batch, dim)`` and times ``(*batch, 1)`` to the prediction.
        prediction: what the network predicts.

    Raises:
        TypeError: if ``path`` has no schedule or ``prediction`` is no :class:`Prediction`.

    Example:
        >>> import torch
        >>> from flowvi.paths import DiffusionPath, LinearLogSNR
        >>> path = DiffusionPath(2, LinearLogSNR())
        >>> drift = PredictedDrift(path, lambda x, t: torch.zeros_like(x), Prediction.DATA)
        >>> drift(torch.ones(3, 2), torch.full((3, 1), 0.5)).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        path: DiffusionPath,
        network: Callable[[Tensor, Tensor], Tensor],
        prediction: Prediction = Prediction.DATA,
    ) -> None:
        super().__init__()
        if not isinstance(path, DiffusionPath):
            raise TypeError(f"`path` must be a DiffusionPath; got {type(path).__name__}.")
        if not isinstance(prediction, Prediction):
            raise TypeError(f"`prediction` must be a Prediction; got {prediction!r}.")
        self.path = path
        self.network = network
        self.prediction = prediction

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        values = self.path.schedule(t)
        data, noise = split(self.network(x, t), self.prediction, x, values)
        of_data, of_noise = self.path.drift_rates(t, values, self.path.diffusion(x, t))
        return of_data * data + of_noise * noise

    def difference(self, x: Tensor, t: Tensor, data: Tensor, noise: Tensor, b: Tensor) -> Tensor:
        """F - g, for a posterior drift g that is this drift at the given data and noise.

        Args:
            x: states, ``(*batch, dim)``.
            t: times, ``(*batch, 1)``.
            data: what a prediction of the data must equal for f = g, like ``x``.
            noise: the same for a prediction of the noise.
            b: the diffusion there.
        """
        values = self.path.schedule(t)
        c_data, c_noise = self.prediction.row(values)
        gap = self.network(x, t) - (c_data * data + c_noise * noise)
        # The state is common to both, so only the second row of the 2x2 system differs.
        det = values.alpha * c_noise - values.sigma * c_data
        of_data, of_noise = self.path.drift_rates(t, values, b)
        return (values.alpha * of_noise - values.sigma * of_data) / det * gap
