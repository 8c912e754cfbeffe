"""Score models: denoising score matching at all noise levels of a schedule."""

from __future__ import annotations

from typing import Any

from torch import nn

from flowvi.models.data_ends import DataEnd
from flowvi.models.vdm import VDM, Weighting, noise_weighting
from flowvi.paths import Prediction, Schedule, TimeLaw, UniformTimes

__all__ = ["ScoreModel"]


class ScoreModel(VDM):
    r"""Score of noised data, matched at many noise levels; a diffusion with another weighting.

    .. math:: \int \lambda(t)\,E\,|\hat s(z_t, t) + \epsilon / \sigma_t|^2\,dt, \qquad
        \lambda = \sigma_t^2

    :class:`~flowvi.paths.VarianceExploding`, :class:`~flowvi.paths.VariancePreserving` and
    :class:`~flowvi.paths.SubVariancePreserving` are its usual schedules. With
    ``weighting=None`` the weight is :math:`b^2` and the loss is the evidence lower bound
    (maximum likelihood training). :meth:`terms` are always those of the bound.
    :class:`~flowvi.samplers.AnnealedLangevin` is the sampler of the first such models.

    Args:
        end: law of an item given its last state.
        network: predicts from states and times.
        schedule: signal and noise over time.
        prediction: what the network predicts; ``Prediction.SCORE`` for the score itself, the
            noise (its score times minus sigma) if left out.
        weighting: factor of the bound's integrand, as for :class:`VDM`.
        times: law of the random times; uniform, stopping at ``1 - 1e-3`` if left out, since the
            usual schedules have no noise at all at the data end.
        **options: as for :class:`VDM`.

    Raises:
        TypeError: as for :class:`VDM`.
        ValueError: as for :class:`VDM`.

    References:
        Song and Ermon (2019), Generative modeling by estimating gradients of the data
        distribution, arXiv:1907.05600, equation 6; Song et al. (2021), Score-based generative
        modeling through stochastic differential equations, arXiv:2011.13456, equation 7; Song,
        Durkan, Murray and Ermon (2021), Maximum likelihood training of score-based diffusion
        models, arXiv:2101.09258, theorem 1 (times mirrored).

    Example:
        >>> import torch
        >>> from flowvi.models import RealEnd
        >>> from flowvi.nn import MLPDenoiser
        >>> from flowvi.paths import VarianceExploding
        >>> model = ScoreModel(
        ...     RealEnd((2,)), MLPDenoiser(2, (16,)), VarianceExploding(0.1, 10.0))
        >>> model.sample(3, num_steps=10).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        end: DataEnd,
        network: nn.Module,
        schedule: Schedule,
        *,
        prediction: Prediction = Prediction.NOISE,
        weighting: Weighting | None = noise_weighting,
        times: TimeLaw | None = None,
        **options: Any,
    ) -> None:
        if times is None and options.get("num_layers") is None:
            times = UniformTimes(0.0, 1 - 1e-3)
        super().__init__(
            end,
            network,
            schedule,
            prediction=prediction,
            weighting=weighting,
            times=times,
            **options,
        )
