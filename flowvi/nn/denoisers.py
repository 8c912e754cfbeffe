"""Networks of a noised state and its time: fully connected, with and without residuals."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from flowvi.nn.mlp import MLP, check_sizes, start_at_zero
from flowvi.nn.time_embedding import FourierFeatures, SinusoidalTime

__all__ = ["Denoiser", "MLPDenoiser", "ResidualDenoiser"]


class Denoiser(nn.Module):
    """Base of networks that predict from a noised state and its time.

    What is predicted (data, noise, velocity, score) is not the network's business. A new one
    writes ``predict``.

    Args:
        input_dim: number of dimensions of the state, at least 1.
        context_dim: length of the context vector, such as a one-hot label; 0 for none. A row of
            zeros stands for "no context".
        time_dim: length of the features of time.
        max_frequency: largest frequency of these features, above 1. Large, to tell noise levels
            near the data apart; small, such as 10, where the derivative in time enters a loss,
            as that of an encoder does.

    Shape:
        x: ``(*batch, input_dim)``; t: ``(*batch, 1)``; context: ``(*batch, context_dim)``; times
        and contexts broadcast against the batch of ``x``; output: ``(*batch, input_dim)``.

    Raises:
        ValueError: if a size is too small, or the context has the wrong shape.
    """

    def __init__(
        self,
        input_dim: int,
        context_dim: int = 0,
        *,
        time_dim: int = 32,
        max_frequency: float = 1000.0,
    ) -> None:
        super().__init__()
        check_sizes(input_dim, (), input_dim, context_dim)
        self.input_dim = input_dim
        self.context_dim = context_dim
        self.time = SinusoidalTime(max(time_dim // 2, 2), max_frequency)
        self.condition_dim = self.time.output_dim + context_dim

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        given = 0 if context is None else context.shape[-1]
        if given != self.context_dim:
            raise ValueError(
                f"`context` must end with size {self.context_dim} (context_dim); got {given}."
            )
        features = self.time(t.squeeze(-1))
        if context is not None:
            batch = torch.broadcast_shapes(features.shape[:-1], context.shape[:-1])
            parts = (features, context.to(features.dtype))
            features = torch.cat([part.expand(*batch, -1) for part in parts], -1)
        return self.predict(x, features)

    def predict(self, x: Tensor, condition: Tensor) -> Tensor:
        """Prediction from states and the features of time and context."""
        raise NotImplementedError(f"{type(self).__name__} predicts nothing. Write `predict`.")


class MLPDenoiser(Denoiser):
    """Fully connected network; time and context enter its first layer.

    Args:
        input_dim: number of dimensions of the state.
        hidden_dims: widths of the hidden layers.
        context_dim: length of the context vector; 0 for none.
        time_dim: length of the features of time.
        max_frequency: largest frequency of these features.
        activation: makes the nonlinearity.
        zero_last: start with a prediction of zero.

    Example:
        >>> network = MLPDenoiser(2, (16, 16), context_dim=3)
        >>> network(torch.zeros(5, 4, 2), torch.zeros(5, 4, 1), torch.zeros(4, 3)).shape
        torch.Size([5, 4, 2])
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dims: Sequence[int] = (128, 128),
        context_dim: int = 0,
        *,
        time_dim: int = 32,
        max_frequency: float = 1000.0,
        activation: Callable[[], nn.Module] = nn.SiLU,
        zero_last: bool = True,
    ) -> None:
        super().__init__(input_dim, context_dim, time_dim=time_dim, max_frequency=max_frequency)
        self.net = MLP(
            input_dim,
            hidden_dims,
            input_dim,
            self.condition_dim,
            activation=activation,
            zero_last=zero_last,
        )

    def predict(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.net(x, condition)


class ResidualDenoiser(Denoiser):
    """Residual blocks of equal width; time and context shift each block.

    Args:
        input_dim: number of dimensions of the state.
        hidden_dim: width of the blocks.
        num_blocks: number of blocks, at least 1.
        context_dim: length of the context vector; 0 for none.
        time_dim: length of the features of time.
        max_frequency: largest frequency of these features.
        fourier: features of the state to see besides the state itself.
        activation: makes the nonlinearity.

    Raises:
        ValueError: if a size is too small.

    Example:
        >>> ResidualDenoiser(3, 16, 2)(torch.zeros(5, 3), torch.zeros(5, 1)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int = 128,
        num_blocks: int = 3,
        context_dim: int = 0,
        *,
        time_dim: int = 32,
        max_frequency: float = 1000.0,
        fourier: FourierFeatures | None = None,
        activation: Callable[[], nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__(input_dim, context_dim, time_dim=time_dim, max_frequency=max_frequency)
        check_sizes(input_dim, (hidden_dim,), input_dim, context_dim)
        if num_blocks < 1:
            raise ValueError(f"`num_blocks` must be at least 1; got {num_blocks}.")
        self.fourier = fourier
        multiple = 1 if fourier is None else fourier.multiple
        self.first = nn.Linear(multiple * input_dim, hidden_dim)
        self.condition = nn.Sequential(nn.Linear(self.condition_dim, hidden_dim), activation())
        self.shifts = nn.Linear(hidden_dim, num_blocks * hidden_dim)
        self.blocks = nn.ModuleList(
            MLP(hidden_dim, (hidden_dim,), hidden_dim, activation=activation)
            for _ in range(num_blocks)
        )
        self.activation = activation()
        self.last = MLP(hidden_dim, (), input_dim)
        start_at_zero(self.last)

    def predict(self, x: Tensor, condition: Tensor) -> Tensor:
        h = self.first(x if self.fourier is None else self.fourier(x))
        shifts = self.shifts(self.condition(condition)).chunk(len(self.blocks), -1)
        for block, shift in zip(self.blocks, shifts, strict=True):
            h = h + block(self.activation(h + shift))
        return self.last(self.activation(h))
