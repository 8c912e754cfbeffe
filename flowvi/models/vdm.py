"""Variational diffusion models: the data fade into noise under a schedule."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flowvi.distributions import PathPosterior
from flowvi.models.data_ends import DataEnd
from flowvi.models.diffusion import DiffusionModel, normal_divergence, require_sizes
from flowvi.paths import (
    ChainPath,
    DiffusionPath,
    LinearLogSNR,
    PredictedDrift,
    Prediction,
    Schedule,
    ScheduleValues,
    TimeLaw,
    VarianceTrained,
)
from flowvi.samplers import Ability, Ancestral, PredictionProcess, Sampler

__all__ = ["VDM", "noise_weighting"]

Weighting = Callable[[ScheduleValues], Tensor]


def noise_weighting(values: ScheduleValues) -> Tensor:
    r"""Weights that turn the bound's integrand into :math:`|\hat n - n|^2`.

    This is denoising score matching with weight :math:`\sigma^2` at every time, and the simple
    loss of DDPM. The bound itself (no weighting) is score matching with weight :math:`b^2`.

    References:
        Ho, Jain and Abbeel (2020), Denoising diffusion probabilistic models, arXiv:2006.11239,
        equation 14; Song et al. (2021), Score-based generative modeling through stochastic
        differential equations, arXiv:2011.13456, equation 7.
    """
    return 2 / values.d_log_snr


class VDM(DiffusionModel):
    r"""Variational diffusion model, in continuous time or with finitely many layers.

    .. math:: -\log p(x) \le KL(q(z_0 | x) \| p(z_0)) - E \log p(x | z_1)
        + \tfrac12 \int_0^1 \mathrm{SNR}'(t)\,E |\hat y(z_t, t) - y|^2\,dt

    The three terms are "prior", reconstruction and "diffusion" of :meth:`terms`. With
    ``num_layers`` it is a hierarchical VAE with so many latent layers, of which training draws
    one for each item and step, and :meth:`terms` takes all.

    The schedule may be fixed, learned through the bound (:class:`~flowvi.paths.LearnedMonotone`,
    for a chain) or by the variance of the loss (:class:`~flowvi.paths.VarianceTrained`, in
    continuous time, where the bound does not depend on its interior).

    Args:
        end: law of an item given its last state; :class:`LevelEnd` or :class:`RealEnd`.
        network: predicts from states ``(*batch, num_pixels)`` and times; with a learned schedule
            it sees the log signal-to-noise ratio, scaled to [0, 1], as its time.
        schedule: log signal-to-noise ratio from -5 to 13.3, linear in time, if left out.
        encoder: for :class:`~flowvi.models.DiffEnc`; none if left out.
        prediction: what the network predicts.
        num_layers: number of layers; None for continuous time.
        times: law of the random times in continuous time; uniform, low-discrepancy if left out.
            A schedule whose ratio is infinite at an end needs times that stop short of it.
        num_times: random times for each item and step.
        weighting: factor of the integrand at each time in training, such as
            :func:`noise_weighting`; what is trained is then no bound. :meth:`terms` are not
            weighted.
        drop_context: probability of training without the context.
        num_total: number of items in all, where ``x`` is a minibatch.

    Shape:
        x: ``(B, *event_shape)``; context: ``(B, context_dim)``.

    Raises:
        TypeError: if ``schedule`` is no :class:`Schedule` or ``prediction`` no
            :class:`Prediction`.
        ValueError: if the schedule does not increase or is infinite at an end that is used, or if
            sizes do not fit.

    References:
        Kingma, Salimans, Poole and Ho (2021), Variational diffusion models, arXiv:2107.00630,
        sections 3 and 4 (time mirrored).

    Example:
        >>> from flowvi.models import RealEnd
        >>> from flowvi.nn import MLPDenoiser
        >>> vdm = VDM(RealEnd((2,)), MLPDenoiser(2, (16,)))
        >>> terms = vdm.terms(torch.zeros(5, 2), num_times=10)
        >>> terms.elbo.shape, sorted(terms.divergences)
        (torch.Size([5]), ['diffusion', 'prior'])
    """

    def __init__(
        self,
        end: DataEnd,
        network: nn.Module,
        schedule: Schedule | None = None,
        *,
        encoder: Callable[[Tensor, Tensor], Tensor] | None = None,
        prediction: Prediction = Prediction.NOISE,
        num_layers: int | None = None,
        times: TimeLaw | None = None,
        num_times: int = 1,
        weighting: Weighting | None = None,
        drop_context: float = 0.1,
        num_total: int | None = None,
    ) -> None:
        schedule = LinearLogSNR() if schedule is None else schedule
        if num_layers is None:
            path = DiffusionPath(end.num_pixels, schedule, encoder)
        else:
            path = ChainPath(end.num_pixels, schedule, num_layers, encoder)
        if not isinstance(prediction, Prediction):
            raise TypeError(f"`prediction` must be a Prediction; got {prediction!r}.")
        require_sizes(network, end.num_pixels)
        if num_layers is not None:
            if times is not None:
                raise ValueError("`times` must not be given with `num_layers`, which sets them.")
            times = path.times
        super().__init__(
            path,
            network,
            end,
            times=times,
            num_times=num_times,
            start_scale=_start_scale(schedule, times),
            drop_context=drop_context,
            num_total=num_total,
        )
        self.prediction = prediction
        self.weighting = weighting
        if encoder is not None:
            self._check_encoder()
        if isinstance(schedule, VarianceTrained) and not self._bound_ignores_interior:
            raise ValueError(
                "`schedule` must not be VarianceTrained where the bound depends on its interior "
                "(layers, an encoder or a weighting). Use LearnedMonotone."
            )

    def drift(self, context: Tensor | None) -> PredictedDrift:
        return PredictedDrift(self.path, self._timed(context), self.prediction)

    def trained_drift(self, context: Tensor | None) -> PredictedDrift:
        return _TrainedDrift(self, self._timed(context))

    def process(
        self, context: Tensor | None = None, *, guidance: float = 0.0
    ) -> PredictionProcess:
        return PredictionProcess(
            self.path.schedule,
            self._timed(context, guidance),
            self.prediction,
            self.start(),
            abilities=self._abilities,
            low=self.times.low,
            high=self.times.high,
            name=type(self).__name__,
        )

    def default_sampler(self) -> Sampler:
        return Ancestral()

    @property
    def _abilities(self) -> tuple[Ability, ...]:
        # The prediction of an encoded path mixes the data and their rate of change.
        return tuple(Ability) if self.path.encoder is None else (Ability.NOISING, Ability.SCHEDULE)

    @property
    def _bound_ignores_interior(self) -> bool:
        plain = type(self.path) is DiffusionPath and self.path.encoder is None
        return plain and self.weighting is None

    def _timed(self, context: Tensor | None, guidance: float = 0.0) -> Callable:
        """The network on the clock of the schedule."""
        network = self._network(context, guidance)
        clock = getattr(self.path.schedule, "share_and_rate", None)
        if clock is None:
            return network
        return lambda x, t: network(x, clock(t)[0])

    def _divergence_of_start(
        self, posterior: PathPosterior, value: Tensor, score: Tensor
    ) -> Tensor:
        return normal_divergence(self.path, posterior.y, self.times.low, self.start())

    @torch.no_grad()
    def _check_encoder(self) -> None:
        y = torch.linspace(-1, 1, self.path.dim).to(self.start.loc).unsqueeze(0)
        last = self.path.encoder(y, y.new_full((1, 1), self.times.high))
        if not y.is_meta and not torch.allclose(last, y, rtol=0.0, atol=1e-5):
            raise ValueError(
                "`encoder` must be the identity at the data end, where items are read off the "
                f"state; got a change of {float((last - y).abs().max()):.3g}."
            )


class _TrainedDrift(PredictedDrift):
    """Drift of a step of training: weighted, and its losses shown to the schedule."""

    def __init__(self, model: VDM, network: Callable) -> None:
        super().__init__(model.path, network, model.prediction)
        self.weighting = model.weighting
        self.schedule = model.path.schedule

    def difference(self, x: Tensor, t: Tensor, data: Tensor, noise: Tensor, b: Tensor) -> Tensor:
        gap = super().difference(x, t, data, noise, b)
        if isinstance(self.schedule, VarianceTrained):
            self.schedule.record((gap / b).square().sum(-1, keepdim=True))
        if self.weighting is None:
            return gap
        return gap * self.weighting(self.schedule(t)).sqrt()


@torch.no_grad()
def _start_scale(schedule: Schedule, times: TimeLaw | None) -> float:
    """Standard deviation of the first state where the data have variance 1."""
    low, high = (0.0, 1.0) if times is None else (times.low, times.high)
    like = next(iter([*schedule.parameters(), *schedule.buffers()]), torch.empty(0))
    values = schedule(like.new_tensor([low, high]))
    if not bool(values.log_snr.isfinite().all()):
        raise ValueError(
            "`schedule` must have a finite log signal-to-noise ratio at both ends of `times`, "
            f"{low:g} and {high:g}; got {values.log_snr.tolist()}. Give times such as "
            "UniformTimes(1e-3, 1 - 1e-3)."
        )
    scale = float((values.alpha[0].square() + values.sigma[0].square()).sqrt())
    # Rounding of a schedule that preserves variance.
    return 1.0 if abs(scale - 1) < 1e-6 else scale
