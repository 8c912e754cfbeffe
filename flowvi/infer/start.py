"""The warm start: a good Gaussian for a target before any stochastic optimisation."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flowvi.infer._gaussian import Gaussian, antithetic, robust_cholesky
from flowvi.infer._searches import Search, together
from flowvi.infer.batch_and_match import batch_and_match
from flowvi.infer.laplace import laplace
from flowvi.infer.modes import Mode, find_modes
from flowvi.infer.natural_gradient import natural_gradient
from flowvi.infer.pathfinder import choose, elbos, path_gaussians
from flowvi.infer.quasi_newton import Ascent, ascend
from flowvi.infer.target import Target

__all__ = ["Start", "warm_start"]

_ROWS = 512  # points per evaluation, which bounds the memory of models with much data
_ROUNDS = 5  # of natural-gradient ascent at most
_WORTH_A_ROUND = 0.03  # nats
_NEGLIGIBLE = 0.003  # nats


@dataclass(frozen=True)
class Start:
    """A Gaussian in unconstrained coordinates from which a guide starts.

    Args:
        loc: mean, ``(dim,)``.
        scale_tril: lower-triangular scale, ``(dim, dim)``.
        elbo: its ELBO in nats, NaN where it was not computed.
        elbo_se: standard error of ``elbo``.
        modes: separated modes that were found, by decreasing weight; empty if none was looked for.
        seconds: CPU seconds that the search took.
        source: the stage that gave the Gaussian, in words.
    """

    loc: Tensor
    scale_tril: Tensor
    elbo: float = float("nan")
    elbo_se: float = float("nan")
    modes: list[Mode] = field(default_factory=list)
    seconds: float = 0.0
    source: str = "given"

    @classmethod
    def from_loc(cls, loc: Tensor, scale: float | Tensor = 0.1) -> Start:
        """Start at ``loc`` with independent coordinates of standard deviation ``scale``.

        Raises:
            ValueError: if ``loc`` is not a finite vector or ``scale`` is not positive.
        """
        _check_loc(loc)
        scale = torch.as_tensor(scale, dtype=loc.dtype, device=loc.device)
        if not bool((scale > 0).all() & torch.isfinite(scale).all()) or scale.dim() > 1:
            raise ValueError(f"`scale` must be positive, a number or a vector; got {scale}.")
        return cls(loc, torch.diag(scale.expand(len(loc)).clone()))

    @classmethod
    def from_moments(cls, loc: Tensor, covariance: Tensor) -> Start:
        """Start at the Gaussian with mean ``loc`` and a given covariance matrix.

        Raises:
            ValueError: if ``loc`` is not a finite vector, or ``covariance`` is not a symmetric
                positive definite matrix of its size.
        """
        _check_loc(loc)
        dim = len(loc)
        if covariance.shape != (dim, dim):
            shape = tuple(covariance.shape)
            raise ValueError(f"`covariance` must have shape ({dim}, {dim}); got {shape}.")
        scale_tril, info = torch.linalg.cholesky_ex(covariance)
        symmetric = torch.allclose(covariance, covariance.T, rtol=1e-4, atol=0.0)
        if int(info) or not symmetric or not bool(torch.isfinite(scale_tril).all()):
            raise ValueError(
                "`covariance` must be symmetric and positive definite; got a matrix with diagonal "
                f"{covariance.diagonal().tolist()[:8]}."
            )
        return cls(loc, scale_tril)


def _check_loc(loc: Tensor) -> None:
    if loc.dim() != 1 or not len(loc) or not bool(torch.isfinite(loc).all()):
        raise ValueError(f"`loc` must be a finite vector; got shape {tuple(loc.shape)}: {loc}.")


class _Host:
    """A target in float64 on the CPU, where the small linear algebra of the start is done."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def density(self, z: Tensor) -> tuple[Tensor, Tensor]:
        parts = [self.target.log_prob_and_grad(self._there(part)) for part in z.split(_ROWS)]
        log_p, grad = zip(*parts, strict=True)
        return self._here(torch.cat(log_p)), self._here(torch.cat(grad))

    def log_density(self, z: Tensor) -> Tensor:
        parts = [self.target.guarded_log_prob(self._there(part)) for part in z.split(_ROWS)]
        return self._here(torch.cat(parts))

    def _there(self, z: Tensor) -> Tensor:
        return z.to(self.target.device, self.target.dtype)

    def _here(self, x: Tensor) -> Tensor:
        return x.to("cpu", torch.float64)


def warm_start(
    target: Target,
    *,
    num_starts: int = 8,
    radius: float = 2.0,
    seed: int | None = None,
    num_matches: int = 30,
    num_climbs: int = 30,
    num_draws: int = 1024,
    num_mode_starts: int = 24,
) -> Start:
    """Find a Gaussian close to a posterior, and the posterior's separated modes.

    Quasi-Newton ascent from ``num_starts`` points at once; a Laplace approximation at the best
    end; the best by ELBO among it and the Gaussians along the paths (which save posteriors without
    a mode, such as centred funnels); batch-and-match from there, because the mode is not the mean;
    natural-gradient ascent of the ELBO, repeated while it gains. A stage that fails or does not
    gain leaves the Gaussian of the stage before. Linear algebra is in float64 whatever the model's
    dtype.

    Args:
        target: the log joint density.
        num_starts: number of starts; start ``i`` is uniform in a box of half-width from 0 to
            ``radius``.
        radius: half-width of the largest box.
        seed: seed of the start's own generator; None draws one from torch's global generator.
        num_matches: steps of batch-and-match.
        num_climbs: steps of one round of natural-gradient ascent of the ELBO; there are up to 5.
        num_draws: draws of the final ELBO.
        num_mode_starts: starts of the search for further modes; 0 leaves the search out.

    Raises:
        ValueError: if an argument is out of range.
        RuntimeError: if the log joint is finite at no start.

    References:
        Zhang, Carpenter, Gelman and Vehtari (2022), Pathfinder, arXiv:2108.03782.
        Cai et al. (2024), Batch and match, arXiv:2402.14758.
    """
    if num_starts < 1:
        raise ValueError(f"`num_starts` must be at least 1; got {num_starts}.")
    if not radius >= 0:
        raise ValueError(f"`radius` must not be negative; got {radius}.")
    began = time.process_time()
    if seed is None:
        seed = int(torch.randint(2**31 - 1, ()))
    generator = torch.Generator().manual_seed(seed)
    host = _Host(target)
    difference = 1e-3 if target.dtype == torch.float64 else 3e-2
    starts = _finite_starts(host, num_starts, radius, generator)
    (ascent,) = together(host.density, ascend(starts))
    candidates = _candidates(host, ascent, difference)
    eps = antithetic(32, target.dim, generator)
    best, _ = choose(host.log_density, [g for _, g in candidates], eps)
    eps = antithetic(num_draws, target.dim, generator)
    searches = [_improve(host, candidates[best], eps, generator, num_matches, num_climbs)]
    if num_mode_starts:
        other = torch.Generator().manual_seed(seed + 1)
        searches.append(find_modes(ascent, generator=other, num_starts=num_mode_starts))
    (source, gaussian, log_w), *modes = together(host.density, *searches)
    if num_mode_starts:
        modes = modes[0] or [Mode(gaussian.loc, gaussian.scale_tril, float("nan"), 1.0)]
    return Start(
        loc=gaussian.loc.to(target.device, target.dtype),
        scale_tril=gaussian.scale_tril.to(target.device, target.dtype),
        elbo=float(log_w.mean()),
        elbo_se=float(log_w.std() / num_draws**0.5),
        modes=modes,
        seconds=time.process_time() - began,
        source=source,
    )


def _candidates(host: _Host, ascent: Ascent, difference: float) -> list[tuple[str, Gaussian]]:
    """Laplace approximation of the best end, Gaussians along the paths, and round ones.

    The round ones, at the best end and at the origin, are the last resort: of a centred funnel all
    path points may be bad, and a unit normal is not.
    """
    best = int(ascent.log_prob.argmax())
    eye = torch.eye(ascent.loc.shape[-1], dtype=torch.float64)
    candidates = [
        ("round", Gaussian(loc, scale * eye))
        for loc in (ascent.loc[best], torch.zeros_like(ascent.loc[best]))
        for scale in (1.0, 0.3, 0.1, 0.01)
    ]
    candidates += [("pathfinder", gaussian) for gaussian in path_gaussians(ascent)]
    try:
        rough = Gaussian(ascent.loc[best], robust_cholesky(ascent.inverse_hessian[best]))
        (fitted,) = together(host.density, laplace(rough, difference=difference))
        candidates.append(("laplace", fitted))
    except RuntimeError:
        pass  # no eigendecomposition: the paths remain
    return [(name, gaussian) for name, gaussian in candidates if gaussian.is_finite]


def _improve(
    host: _Host,
    first: tuple[str, Gaussian],
    eps: Tensor,
    generator: torch.Generator,
    num_matches: int,
    num_climbs: int,
) -> Search[tuple[str, Gaussian, Tensor]]:
    """Batch-and-match, then natural gradients until they gain little; the best and its weights."""
    (name, here), log_w = first, elbos(host.log_density, [first[1]], eps)[0]
    stages = [("batch and match", batch_and_match, num_matches)]
    stages += [("natural gradient", natural_gradient, num_climbs)] * _ROUNDS
    for stage_name, stage, num_steps in stages:
        there = yield from stage(here, generator=generator, num_steps=num_steps)
        if not there.is_finite:
            continue
        new_log_w = elbos(host.log_density, [there], eps)[0]
        gain, noise = _gain(new_log_w, log_w)
        # Noise must not throw batch-and-match away; under heavy tails it is also the safer of the
        # two, so natural gradients have to show their gain.
        if gain > (noise if stage is natural_gradient else -0.5 * noise - _NEGLIGIBLE):
            name, here, log_w = stage_name, there, new_log_w
        if stage is natural_gradient and gain < _WORTH_A_ROUND + 2 * noise:
            break
    return name, here, log_w


def _gain(new: Tensor, old: Tensor) -> tuple[float, float]:
    """Difference of two ELBOs on common noise and its standard error.

    Where a draw is impossible under one of them, the number of such draws decides.
    """
    impossible = (~torch.isfinite(old)).sum() - (~torch.isfinite(new)).sum()
    if int(impossible):
        return 1e3 * float(impossible), 0.0
    both = torch.isfinite(old) & torch.isfinite(new)
    lead = (new - old)[both]
    if len(lead) < 2:
        return 0.0, 0.0
    return float(lead.mean()), float(lead.std() / len(lead) ** 0.5)


def _finite_starts(
    host: _Host, num_starts: int, radius: float, generator: torch.Generator
) -> Tensor:
    """Starts of finite density: boxes from 0 to ``radius``, other tries where that fails."""
    dim = host.target.dim
    widths = torch.linspace(0.0, radius, num_starts, dtype=torch.float64)
    starts = torch.zeros(num_starts, dim, dtype=torch.float64)
    missing = torch.ones(num_starts, dtype=torch.bool)
    for attempt in range(12):
        box = torch.rand(num_starts, dim, generator=generator, dtype=torch.float64)
        # Later tries alternate between wider and narrower boxes.
        factor = 1.0 if not attempt else 2.0 ** ((attempt + 1) // 2 * (-1) ** attempt)
        reach = widths if not attempt else widths.clamp(min=0.1)
        trial = factor * reach[:, None] * (2 * box - 1)
        starts[missing] = trial[missing]
        missing = ~torch.isfinite(host.density(starts)[0])
        if not bool(missing.any()):
            return starts
    if bool(missing.all()):
        raise RuntimeError(
            "The log joint density is finite at no start. Check the data and the priors, or give "
            f"a Start of your own. Last error inside the model: {host.target.last_error}."
        )
    return starts[~missing]
