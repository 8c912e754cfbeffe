"""Diffusion with a learned encoder that changes over time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flowvi.models.data_ends import DataEnd
from flowvi.models.vdm import VDM
from flowvi.paths import Prediction, Schedule

__all__ = ["DiffEnc", "FadingEncoder", "LearnedEncoder"]


class _Encoder(nn.Module):
    """What encoders share: a share of change that falls from the noise end to 0 at the data end.

    Args:
        schedule: gives the share, the noise's variance above that at the data end.
    """

    def __init__(self, schedule: Schedule, high: float = 1.0) -> None:
        super().__init__()
        self.schedule = schedule
        self.high = high

    def share(self, t: Tensor) -> Tensor:
        """Share of change at times."""
        last = self.schedule(torch.full_like(t, self.high)).sigma
        return self.schedule(t).sigma.square() - last.square()


class LearnedEncoder(_Encoder):
    r"""Encoder that adds what a network sees in the data, more towards the noise end.

    .. math:: F_\phi(y, t) = y + (\sigma_t^2 - \sigma_1^2)\,e_\phi(y, t)

    It is the identity at the data end, and everywhere while the network gives zero, as a
    :class:`~flowvi.nn.Denoiser` does at first. Its derivative in time enters the bound, so low
    frequencies suit the network (``max_frequency``).

    Args:
        network: e; takes ``(y, t)`` as a denoiser does.
        schedule: signal and noise over time, that of the model.
        high: time of the data end.

    References:
        Nielsen, Christensen, Dittadi and Winther (2024), DiffEnc, arXiv:2310.19789, section 4
        (time mirrored); the trainable encoder there is this with the network plus y in place of
        the network, and without the second variance.

    Example:
        >>> from flowvi.nn import MLPDenoiser
        >>> from flowvi.paths import LinearLogSNR
        >>> encoder = LearnedEncoder(MLPDenoiser(2, (8,)), LinearLogSNR())
        >>> encoder(torch.ones(3, 2), torch.full((3, 1), 0.5))
        tensor([[1., 1.],
                [1., 1.],
                [1., 1.]], grad_fn=<AddBackward0>)
    """

    def __init__(self, network: nn.Module, schedule: Schedule, high: float = 1.0) -> None:
        super().__init__(schedule, high)
        self.network = network

    def forward(self, y: Tensor, t: Tensor) -> Tensor:
        return y + self.share(t) * self.network(y, t)


class FadingEncoder(_Encoder):
    r"""Encoder without parameters: data shrink towards the noise end, beyond the schedule.

    .. math:: F(y, t) = (1 - \sigma_t^2 + \sigma_1^2)\,y

    Args:
        schedule: signal and noise over time, that of the model.
        high: time of the data end.

    References:
        Nielsen, Christensen, Dittadi and Winther (2024), DiffEnc, arXiv:2310.19789, section 4
        (time mirrored); the non-trainable encoder there is this without the second variance.

    Example:
        >>> from flowvi.paths import LinearLogSNR
        >>> FadingEncoder(LinearLogSNR(-5.0, 5.0))(torch.ones(1), torch.ones(1))
        tensor([1.])
    """

    def forward(self, y: Tensor, t: Tensor) -> Tensor:
        return y - self.share(t) * y


class DiffEnc(VDM):
    r"""Diffusion model whose data are encoded anew at every time, by a learned encoder.

    .. math:: z_t = \alpha_t F_\phi(y, t) + \sigma_t \epsilon, \qquad
        \tfrac12 \int_0^1 \mathrm{SNR}'(t)\,
        E \Big|\hat d(z_t, t) - F_\phi - \frac{d F_\phi}{d \log \mathrm{SNR}}\Big|^2\,dt

    The integral is the diffusion term. This is :class:`VDM` with another path, and equal to it
    where the encoder is the identity. A prediction stands for the drift of the model's process,
    not for the data or a score, so :class:`~flowvi.samplers.Ancestral` and
    :class:`~flowvi.samplers.ReverseSDE` sample from it, and there is no probability flow.

    Args:
        end: law of an item given its last state.
        network: predicts from states and times.
        encoder: F, called with ``(y, t)``; :class:`LearnedEncoder` (trained along),
            :class:`FadingEncoder`, or any module that is the identity at the data end.
        schedule: as for :class:`VDM`.
        prediction: what the network predicts; the angular velocity (v) if left out.
        **options: as for :class:`VDM`.

    Raises:
        TypeError: if the encoder cannot be called.
        ValueError: as for :class:`VDM`, and if the encoder is not the identity at the data end.

    References:
        Nielsen, Christensen, Dittadi and Winther (2024), DiffEnc, arXiv:2310.19789, sections
        3 and 4 (time mirrored).

    Example:
        >>> from flowvi.models import RealEnd
        >>> from flowvi.nn import MLPDenoiser
        >>> from flowvi.paths import LinearLogSNR
        >>> schedule = LinearLogSNR(-5.0, 8.0)
        >>> encoder = LearnedEncoder(MLPDenoiser(2, (8,)), schedule)
        >>> diffenc = DiffEnc(RealEnd((2,)), MLPDenoiser(2, (16,)), encoder, schedule)
        >>> diffenc.terms(torch.zeros(5, 2)).diffusion.shape
        torch.Size([5])
    """

    def __init__(
        self,
        end: DataEnd,
        network: nn.Module,
        encoder: nn.Module,
        schedule: Schedule | None = None,
        *,
        prediction: Prediction = Prediction.ANGULAR,
        **options: Any,
    ) -> None:
        if not callable(encoder):
            raise TypeError(f"`encoder` must be callable; got {type(encoder).__name__}.")
        super().__init__(end, network, schedule, encoder=encoder, prediction=prediction, **options)
