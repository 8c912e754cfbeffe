"""Samplers of one linear step between data and noise: DDIM and ancestral sampling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowvi.samplers.base import Sampler, Span
from flowvi.samplers.process import Ability, GenerativeProcess

__all__ = ["DDIM", "Ancestral"]


class DDIM(Sampler):
    r"""Predicts data and noise, and mixes them anew for the next time.

    .. math:: x_s = \alpha_s \hat d + \sqrt{\sigma_s^2 - \nu^2}\,\hat n + \nu z, \qquad
        \nu^2 = \eta^2 \frac{\sigma_s^2}{\sigma_t^2}
        \Big(\sigma_t^2 - \frac{\alpha_t^2}{\alpha_s^2} \sigma_s^2\Big)

    With ``eta=0`` it is deterministic, the first-order exponential integrator of the
    probability-flow ODE; with ``eta=1`` it is :class:`Ancestral` sampling. Here s is later than t.

    Args:
        eta: noise, from 0 to 1.

    Raises:
        ValueError: if ``eta`` is outside [0, 1].

    References:
        Song, Meng and Ermon (2021), Denoising diffusion implicit models, arXiv:2010.02502,
        equations 12 and 16 (time mirrored).

    Example:
        >>> DDIM(eta=0.5).is_stochastic
        True
    """

    order = 1.0

    def __init__(self, eta: float = 0.0) -> None:
        if not 0 <= eta <= 1:
            raise ValueError(f"`eta` must lie in [0, 1]; got {eta!r}.")
        self.eta = eta
        self.num_noises = int(eta > 0)

    @property
    def needs(self) -> frozenset[Ability]:
        needs = {Ability.SCHEDULE}
        if self.eta < 1:
            needs.add(Ability.FLOW)
        if self.eta > 0:
            needs.add(Ability.NOISING)
        return frozenset(needs)

    def step(
        self, process: GenerativeProcess, x: Tensor, span: Span, state: Any
    ) -> tuple[Tensor, Any]:
        data, n_hat = process.predict(x, span.start)
        now, then = process.schedule(span.start), process.schedule(span.end)
        if span.noise is None:
            return then.alpha * data + then.sigma * n_hat, state
        # Share of the noise's variance that is drawn anew, 1 - SNR_t / SNR_s at eta = 1.
        fresh = self.eta**2 * -torch.expm1(now.log_snr - then.log_snr)
        kept = torch.sqrt(1 - fresh) * n_hat + torch.sqrt(fresh) * span.noise[0]
        return then.alpha * data + then.sigma * kept, state


class Ancestral(DDIM):
    r"""Draws each state from the model's own transition, layer by layer.

    .. math:: x_s \sim q(x_s \mid x_t, y = \hat d)

    This is sampling from the hierarchical VAE that a diffusion model is. It serves every model
    whose prediction stands for its drift under the schedule's best noise, so DiffEnc as well.

    References:
        Ho, Jain and Abbeel (2020), Denoising diffusion probabilistic models, arXiv:2006.11239,
        algorithm 2; Kingma, Salimans, Poole and Ho (2021), Variational diffusion models,
        arXiv:2107.00630, appendix A.4 (time mirrored).
    """

    def __init__(self) -> None:
        super().__init__(eta=1.0)
