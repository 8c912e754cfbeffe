"""The solvers of torchsde behind the same call as flowvi's own."""

from __future__ import annotations

import enum

import torch
from torch import Tensor, nn

from flowvi.paths.sde import SDE

__all__ = ["TorchSDE", "TorchSDEMethod"]


class TorchSDEMethod(enum.Enum):
    """Methods of torchsde for diagonal noise; the value is the name it has there."""

    EULER = "euler"
    MILSTEIN = "milstein"
    SRK = "srk"
    HEUN = "heun"
    MIDPOINT = "midpoint"
    REVERSIBLE_HEUN = "reversible_heun"

    @property
    def is_stratonovich(self) -> bool:
        """Whether the drift is read in Stratonovich's sense, not in Ito's."""
        return self in _STRATONOVICH


_STRATONOVICH = (
    TorchSDEMethod.HEUN,
    TorchSDEMethod.MIDPOINT,
    TorchSDEMethod.REVERSIBLE_HEUN,
)


class TorchSDE:
    """Back end for :func:`flowvi.samplers.simulate` that calls torchsde.

    It steps within the intervals of the grid with steps of its own, and can solve its adjoint
    equation backwards in place of keeping the path. Slower than the fixed-grid solvers here,
    several times so with the adjoint. It draws its own noise, and all items share one grid.

    Args:
        method: method of torchsde.
        max_step: largest step, in units of time; the steps of the grid if left out.
        adjoint: get gradients from the adjoint equation (constant memory, gradients with their
            own discretisation error) instead of through the solver.

    Raises:
        TypeError: if ``method`` is not a :class:`TorchSDEMethod`.
        ValueError: if ``max_step`` is not positive.

    References:
        Li, Wong, Chen and Duvenaud (2020), Scalable gradients for stochastic differential
        equations, arXiv:2001.01328; Kidger et al. (2021), arXiv:2105.13493.

    Example:
        >>> from flowvi.samplers import simulate
        >>> ou = SDE(lambda x, t: -x, 0.5)
        >>> path = simulate(ou, torch.ones(3, 2), torch.linspace(0, 1, 5), solver=TorchSDE())
        >>> path.increments.shape
        torch.Size([4, 3, 2])
    """

    def __init__(
        self,
        method: TorchSDEMethod = TorchSDEMethod.EULER,
        *,
        max_step: float | None = None,
        adjoint: bool = False,
    ) -> None:
        if not isinstance(method, TorchSDEMethod):
            raise TypeError(f"`method` must be a TorchSDEMethod; got {method!r}.")
        if max_step is not None and not max_step > 0:
            raise ValueError(f"`max_step` must be positive; got {max_step!r}.")
        self.method = method
        self.max_step = max_step
        self.adjoint = adjoint

    @property
    def is_stratonovich(self) -> bool:
        """Whether the drift is read in Stratonovich's sense, not in Ito's."""
        return self.method.is_stratonovich

    def solve(
        self, sde: SDE, start: Tensor, times: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """States, drifts, diffusions and increments on the grid; times come first.

        Raises:
            NotImplementedError: if the process has no noise or items have grids of their own.
        """
        if sde.is_deterministic:
            raise NotImplementedError(
                "torchsde needs a diffusion. Use one of flowvi's solvers for a process without."
            )
        if times.dim() > 1:
            raise NotImplementedError(
                "torchsde needs one grid for all items. Use one of flowvi's solvers for a grid of "
                "each item."
            )
        # Imported here: it takes longer than all solvers of flowvi together.
        import torchsde

        flat = start.reshape(-1, start.shape[-1])
        adapted = _Adapted(sde, start.shape, self.is_stratonovich)
        noise = torchsde.BrownianInterval(
            times[0], times[-1], flat.shape, flat.dtype, flat.device,
            levy_area_approximation="space-time",
        )  # fmt: skip
        step = times.diff().max().item() if self.max_step is None else self.max_step
        options = {"bm": noise, "method": self.method.value, "dt": step}
        if self.adjoint:
            states = torchsde.sdeint_adjoint(
                adapted, flat, times, adjoint_params=_learned(sde), **options
            )
        else:
            states = torchsde.sdeint(adapted, flat, times, **options)
        states = states.reshape(len(times), *start.shape)
        pairs = zip(times, times[1:], strict=False)
        increments = torch.stack([noise(a, b) for a, b in pairs]).reshape(-1, *start.shape)
        t = times[:-1].reshape(-1, *(1,) * start.dim())
        drift = sde.drift(states[:-1], t)
        diffusion = sde.diffusion_given(states[:-1], sde.embed_diffusion(t))
        return states, drift, diffusion.expand_as(drift), increments


class _Adapted(nn.Module):
    """The attributes that torchsde looks for."""

    noise_type = "diagonal"

    def __init__(self, sde: SDE, shape: torch.Size, stratonovich: bool) -> None:
        super().__init__()
        self.sde = sde
        self.shape = shape
        self.sde_type = "stratonovich" if stratonovich else "ito"

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return self.sde.drift(y.reshape(self.shape), t.reshape(1)).reshape(y.shape)

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        x = y.reshape(self.shape)
        time = self.sde.embed_diffusion(t.reshape(1))
        return self.sde.diffusion_given(x, time).expand_as(x).reshape(y.shape)


def _learned(sde: SDE) -> tuple[Tensor, ...]:
    """Parameters, and tensors with a graph that coefficients carry (a context)."""
    carried = (v for m in sde.modules() for v in vars(m).values() if torch.is_tensor(v))
    return (*sde.parameters(), *(v for v in carried if v.requires_grad))
