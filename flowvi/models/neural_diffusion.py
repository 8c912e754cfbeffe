"""Neural flow diffusion: the marginals of the path are learned flows."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from flowvi.models.data_ends import DataEnd
from flowvi.models.diffusion import DiffusionModel, require_sizes
from flowvi.paths import FadedFlowPath, ProcessFamily, TimeLaw
from flowvi.samplers import FieldProcess, ReverseSDE, Sampler

__all__ = ["NeuralFlowDiffusion"]


class NeuralFlowDiffusion(DiffusionModel):
    r"""Diffusion model whose marginals given an item are those of a learned flow.

    .. math:: z_t = \alpha_t y + \sigma_t T_\phi(\epsilon \mid y, t), \qquad
        f(z, t) = g(z, \hat y(z, t), t)

    The network predicts the item, and the model's drift is the posterior's with that prediction
    in its place. Velocity and score follow in the same way, so there is a probability flow. With
    T the identity this is :class:`VDM` with data predictions.

    Args:
        end: law of an item given its last state.
        network: predicts encoded items from states ``(*batch, num_pixels)`` and times.
        path: the path, with T in it.
        times: law of the random times, and the ends of the process.
        num_times: random times for each item and step.
        drop_context: probability of training without the context.
        num_total: number of items in all, where ``x`` is a minibatch.

    Shape:
        x: ``(B, *event_shape)``; context: ``(B, context_dim)``.

    Raises:
        TypeError: if ``path`` is no :class:`FadedFlowPath`.
        ValueError: if sizes do not fit.

    References:
        Bartosh, Vetrov and Naesseth (2024), Neural flow diffusion models, arXiv:2404.12940,
        section 3 (time mirrored).

    Example:
        >>> import torch
        >>> from flowvi.flows import realnvp
        >>> from flowvi.models import RealEnd
        >>> from flowvi.nn import MLPDenoiser
        >>> from flowvi.paths import LinearLogSNR
        >>> path = FadedFlowPath(realnvp(2, 3).transform, LinearLogSNR(-4.0, 6.0))
        >>> model = NeuralFlowDiffusion(RealEnd((2,)), MLPDenoiser(2, (16,)), path)
        >>> model.terms(torch.zeros(5, 2)).elbo.shape
        torch.Size([5])
    """

    def __init__(
        self,
        end: DataEnd,
        network: nn.Module,
        path: FadedFlowPath,
        *,
        times: TimeLaw | None = None,
        num_times: int = 1,
        drop_context: float = 0.1,
        num_total: int | None = None,
    ) -> None:
        if not isinstance(path, FadedFlowPath):
            raise TypeError(f"`path` must be a FadedFlowPath; got {type(path).__name__}.")
        require_sizes(network, end.num_pixels)
        super().__init__(
            path,
            network,
            end,
            times=times,
            num_times=num_times,
            drop_context=drop_context,
            num_total=num_total,
        )

    def drift(self, context: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
        return self._family(context).drift

    def process(self, context: Tensor | None = None, *, guidance: float = 0.0) -> FieldProcess:
        return FieldProcess(
            self._family(context, guidance),
            self.start(),
            low=self.times.low,
            high=self.times.high,
            name=type(self).__name__,
        )

    def default_sampler(self) -> Sampler:
        return ReverseSDE()

    def _family(self, context: Tensor | None, guidance: float = 0.0) -> ProcessFamily:
        network = self._network(context, guidance)

        def field(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            return self.path.velocity_and_score(x, t, network(x, t))

        return ProcessFamily(field, self.path.diffusion)
