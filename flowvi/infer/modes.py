"""Separated modes of a log-density, with a Gaussian and a weight for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowvi.infer._gaussian import Gaussian, antithetic, robust_cholesky
from flowvi.infer._searches import Search
from flowvi.infer.batch_and_match import batch_and_match
from flowvi.infer.laplace import laplace
from flowvi.infer.quasi_newton import Ascent, ascend

__all__ = ["Mode", "find_modes", "modes_are_separated"]

_DISTANCE = 3.0  # standard deviations
_DIP = 0.5  # nats
_LEAST_WEIGHT = 1e-3
_TRIES = 32  # random points per wide start


@dataclass(frozen=True)
class Mode:
    """One mode of a posterior in unconstrained coordinates.

    Args:
        loc: mean of the Gaussian of the mode, ``(dim,)``.
        scale_tril: its lower-triangular scale, ``(dim, dim)``.
        log_prob: log joint density at the mode's summit, in nats.
        weight: estimated share of the posterior's mass, in [0, 1].
    """

    loc: Tensor
    scale_tril: Tensor
    log_prob: float
    weight: float


def modes_are_separated(
    first: Gaussian,
    second: Gaussian,
    *,
    distance: float = _DISTANCE,
    dip: float = _DIP,
) -> Search[bool]:
    """Find out whether two summits are modes that one unimodal guide would miss or blur.

    They are if each is at least ``distance`` standard deviations from the other, by the Gaussian
    of either, and the log-density along the segment between them falls at least ``dip`` nats below
    the lower of the two. Two unit normals of equal weight 4 apart are; 3 apart they are not.

    Args:
        first: Laplace approximation of one summit.
        second: Laplace approximation of the other.
        distance: least Mahalanobis distance.
        dip: least depth of the valley, in nats.
    """
    apart = min(float(first.distance(second.loc[None])), float(second.distance(first.loc[None])))
    if apart < distance:
        return False
    t = torch.linspace(0.0, 1.0, 25, dtype=first.loc.dtype)[:, None]
    log_p, _ = yield first.loc + t * (second.loc - first.loc)
    return bool(log_p.min() < torch.minimum(log_p[0], log_p[-1]) - dip)


def find_modes(
    first: Ascent,
    *,
    generator: torch.Generator,
    num_starts: int = 24,
    radii: tuple[float, float] = (0.5, 30.0),
    max_modes: int = 8,
    num_refinements: int = 20,
) -> Search[list[Mode]]:
    """Search for separated modes, starting from the ends of a first ascent.

    The ends of ``first`` give one or several modes. A second ascent starts half of its points in
    boxes of geometrically growing half-widths around the origin, half in boxes around the best
    mode in units of its own standard deviations, so that both the prior's scale and the
    posterior's are covered. Boxes come in opposite pairs; in each, the start is that of 32 random
    points whose log-density lies highest above the quadratic of the best mode. A start that comes
    within one standard deviation of a known mode stops. With two modes or more, the density is cut
    by the responsibilities of the Laplace mixture into pieces that sum to it, batch-and-match fits
    a Gaussian to each piece, and the weights follow from the pieces' ELBOs. Modes of weight below
    0.001 are dropped.

    Args:
        first: an ascent from starts near the origin.
        generator: source of the random starts and draws.
        num_starts: number of starts of the second ascent; 0 takes the first ascent alone.
        radii: least and largest half-width of the boxes.
        max_modes: number of modes at most.
        num_refinements: batch-and-match steps per mode.

    Returns:
        Modes by decreasing weight; empty if no start converged to a summit.
    """
    summits = yield from _collect(first, [], max_modes)
    if num_starts and summits:
        wide = yield from _wide_starts(summits[0][0], num_starts, radii, generator)
        second = yield from ascend(
            wide,
            max_evaluations=50,
            max_snapshots=2,
            absorb=lambda z: _near_any(z, [summit for summit, _ in summits]),
        )
        summits = yield from _collect(second, summits, max_modes)
    if not summits:
        return []
    gaussians = [summit for summit, _ in summits]
    log_mass = torch.tensor([log_p for _, log_p in summits], dtype=torch.float64)
    log_mass = log_mass + torch.stack([gaussian.log_det for gaussian in gaussians])
    keep = (log_mass.softmax(0) >= _LEAST_WEIGHT).nonzero()[:, 0].tolist()
    summits, log_mass = [summits[k] for k in keep], log_mass[keep]
    refined = [summit for summit, _ in summits]
    if len(summits) > 1:
        refined, log_mass = yield from _refine(refined, log_mass, generator, num_refinements)
    weights = log_mass.softmax(0).tolist()
    modes = [
        Mode(gaussian.loc, gaussian.scale_tril, log_p, weight)
        for gaussian, (_, log_p), weight in zip(refined, summits, weights, strict=True)
    ]
    return sorted(modes, key=lambda mode: -mode.weight)


def _wide_starts(
    centre: Gaussian,
    num_starts: int,
    radii: tuple[float, float],
    generator: torch.Generator,
) -> Search[Tensor]:
    """In each box, of ``_TRIES`` random points the one that the known mode explains least."""
    half = (num_starts + 1) // 2
    low, high = (torch.tensor(radius, dtype=torch.float64).log() for radius in radii)
    outer = torch.linspace(low, high, half // 2, dtype=torch.float64).exp()
    # In units of the mode's own scale, anything below 3 falls back into the mode.
    inner = torch.linspace(1.1, high, half - half // 2, dtype=torch.float64).exp()
    dim = len(centre.loc)
    box = 2 * torch.rand(half, _TRIES, dim, generator=generator, dtype=torch.float64) - 1
    box = box * _some_coordinates(box, generator)
    outer = outer[:, None, None] * box[: half // 2]
    inner = inner[:, None, None] * box[half // 2 :] @ centre.scale_tril.T
    tries = torch.cat([outer, centre.loc + inner, -outer, centre.loc - inner])[:num_starts]
    flat = tries.reshape(-1, dim)
    log_p, _ = yield flat
    unexplained = log_p + 0.5 * centre.distance(flat) ** 2
    chosen = unexplained.reshape(num_starts, _TRIES).argmax(-1)
    return tries[torch.arange(num_starts), chosen]


def _some_coordinates(box: Tensor, generator: torch.Generator) -> Tensor:
    """Zero-one mask: all coordinates of every other point, 1 to ``dim`` random ones of the rest.

    Modes often differ in few coordinates, and a narrow one is hit only if the others stay put.
    """
    dim = box.shape[-1]
    size = dim ** torch.rand(*box.shape[:-1], 1, generator=generator, dtype=box.dtype)
    ranks = torch.rand(box.shape, generator=generator, dtype=box.dtype).argsort(-1).argsort(-1)
    mask = ranks < size
    mask[:, ::2] = True
    return mask.to(box)


def _near_any(z: Tensor, gaussians: Sequence[Gaussian]) -> Tensor:
    return torch.stack([gaussian.distance(z) < 1.0 for gaussian in gaussians]).any(0)


def _collect(
    ascent: Ascent, known: list[tuple[Gaussian, float]], max_modes: int
) -> Search[list[tuple[Gaussian, float]]]:
    """Known summits and the ends of an ascent that are separated from them, highest first."""
    found = list(known)
    for row in ascent.log_prob.argsort(descending=True).tolist():
        if len(found) >= max_modes or not ascent.converged[row]:
            continue
        half_log_det = 0.5 * torch.linalg.slogdet(ascent.inverse_hessian[row])[1]
        mass = float(ascent.log_prob[row] + half_log_det)
        if found and mass < max(log_p + float(g.log_det) for g, log_p in found) - 20:
            continue  # far below the least weight, even for a rough inverse Hessian
        if found and bool(_near_any(ascent.loc[row : row + 1], [g for g, _ in found])):
            continue
        try:
            rough = Gaussian(ascent.loc[row], robust_cholesky(ascent.inverse_hessian[row]))
            summit = yield from laplace(rough, num_steps=3)
        except RuntimeError:
            continue  # a Hessian without a decomposition is no summit
        log_prob, _ = yield summit.loc[None]
        log_p = float(log_prob)
        if not summit.is_finite or log_p == -torch.inf:
            continue
        for other, _ in found:
            if not (yield from modes_are_separated(other, summit)):
                break
        else:
            found.append((summit, log_p))
    return sorted(found, key=lambda pair: -pair[1])


def _refine(
    gaussians: list[Gaussian],
    log_mass: Tensor,
    generator: torch.Generator,
    num_steps: int,
) -> Search[tuple[list[Gaussian], Tensor]]:
    """Fit each piece of the density by batch-and-match; log masses from the pieces' ELBOs."""
    refined, masses = [], []
    eps = antithetic(256, len(gaussians[0].loc), generator)
    for k, gaussian in enumerate(gaussians):
        fit = batch_and_match(gaussian, generator=generator, num_steps=num_steps)
        fitted = yield from _in_piece(fit, gaussians, log_mass, k)
        options = []
        for option in (gaussian, fitted):
            z = option.at(eps)
            log_p, _ = _piece(z, (yield z), gaussians, log_mass, k)
            log_w = log_p - option.log_prob_of_noise(eps)
            # A draw of density zero counts as a bad one, not as an infinitely bad one.
            options.append((float(log_w.clamp(min=float(log_w.max()) - 1e3).mean()), option))
        elbo, best = max(options, key=lambda pair: pair[0])
        refined.append(best)
        masses.append(elbo)
    return refined, torch.tensor(masses, dtype=torch.float64)


def _in_piece(
    search: Search, gaussians: list[Gaussian], log_mass: Tensor, k: int
) -> Search[Gaussian]:
    """A search of piece ``k`` as one of the whole density."""
    answer = None
    while True:
        try:
            z = search.send(answer)
        except StopIteration as end:
            return end.value
        answer = _piece(z, (yield z), gaussians, log_mass, k)


def _piece(
    z: Tensor,
    answer: tuple[Tensor, Tensor],
    gaussians: list[Gaussian],
    log_mass: Tensor,
    k: int,
) -> tuple[Tensor, Tensor]:
    """The density times the responsibility of component ``k``; the pieces sum to the density."""
    log_p, grad = answer
    log_terms, grads = [], []
    for gaussian, mass in zip(gaussians, log_mass, strict=True):
        tril = gaussian.scale_tril
        white = torch.linalg.solve_triangular(tril, (z - gaussian.loc).T, upper=False)
        # The mass contains the log-determinant of the scale, which the density divides by.
        log_terms.append(mass - gaussian.log_det - 0.5 * (white**2).sum(0))
        grads.append(-torch.linalg.solve_triangular(tril.T, white, upper=True).T)
    log_terms, grads = torch.stack(log_terms), torch.stack(grads)
    share = log_terms.softmax(0)
    log_p = log_p + log_terms.log_softmax(0)[k]
    return log_p, grad + grads[k] - (share[:, :, None] * grads).sum(0)
