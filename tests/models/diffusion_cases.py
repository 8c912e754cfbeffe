"""Small diffusion models, and exact ones for Gaussian mixtures."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from flowvi.flows import realnvp
from flowvi.models import (
    VDM,
    DiffEnc,
    FadingEncoder,
    LearnedEncoder,
    LevelEnd,
    NeuralFlowDiffusion,
    RealEnd,
    ScoreModel,
)
from flowvi.nn import MLPDenoiser
from flowvi.paths import (
    FadedFlowPath,
    LearnedMonotone,
    LinearLogSNR,
    Prediction,
    SubVariancePreserving,
    VarianceExploding,
    VarianceTrained,
)

__all__ = ["MODELS", "ExactDenoiser", "faded_path", "mixture", "small"]

MIXTURE_WEIGHTS, MIXTURE_MEANS, MIXTURE_SCALES = (0.35, 0.65), (-1.5, 1.0), (0.3, 0.5)


def mixture() -> dist.Distribution:
    """Two components in one dimension, event shape ``(1,)``."""
    means = torch.tensor(MIXTURE_MEANS).unsqueeze(-1)
    scales = torch.tensor(MIXTURE_SCALES).unsqueeze(-1)
    parts = dist.Normal(means, scales).to_event(1)
    return dist.MixtureSameFamily(dist.Categorical(torch.tensor(MIXTURE_WEIGHTS)), parts)


class ExactDenoiser(nn.Module):
    """Mean of the data given a noised state, for the mixture: responsibilities by Bayes."""

    def __init__(self, schedule):
        super().__init__()
        self.schedule = schedule

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        weights, means, scales = (
            torch.tensor(v) for v in (MIXTURE_WEIGHTS, MIXTURE_MEANS, MIXTURE_SCALES)
        )
        values = self.schedule(t)
        total = values.alpha**2 * scales**2 + values.sigma**2
        gap = x - values.alpha * means
        shares = (weights.log() - total.log() / 2 - gap**2 / (2 * total)).softmax(-1)
        gain = values.alpha * scales**2 / total
        return (shares * (means + gain * gap)).sum(-1, keepdim=True)


def small(context_dim: int = 0, dim: int = 2) -> MLPDenoiser:
    return MLPDenoiser(dim, (8,), context_dim, time_dim=8, zero_last=False)


def schedule() -> LinearLogSNR:
    return LinearLogSNR(-4.0, 6.0)


def faded_path() -> FadedFlowPath:
    flow = realnvp(2, 3, num_layers=2, hidden_dims=(8,))
    return FadedFlowPath(flow.transform, schedule())


def diffenc(**options: object) -> DiffEnc:
    own = schedule()
    return DiffEnc(RealEnd((2,)), small(), LearnedEncoder(small(), own), own, **options)


# Context length and maker of each; items have shape (2,).
MODELS = {
    "diffenc": (0, diffenc),
    "diffenc, chain": (0, lambda: diffenc(num_layers=5)),
    "diffenc, fading": (
        0,
        lambda: DiffEnc(RealEnd((2,)), small(), FadingEncoder(schedule()), schedule()),
    ),
    "neural flow": (0, lambda: NeuralFlowDiffusion(RealEnd((2,)), small(), faded_path())),
    "score, ve": (0, lambda: ScoreModel(RealEnd((2,)), small(), VarianceExploding(0.1, 10.0))),
    "score, sub-vp": (
        0,
        lambda: ScoreModel(
            RealEnd((2,)), small(), SubVariancePreserving(), prediction=Prediction.SCORE
        ),
    ),
    "vdm": (0, lambda: VDM(RealEnd((2,)), small(), schedule())),
    "vdm, chain": (
        0,
        lambda: VDM(RealEnd((2,)), small(), LearnedMonotone(4, -4.0, 6.0), num_layers=5),
    ),
    "vdm, context": (3, lambda: VDM(RealEnd((2,)), small(3), schedule())),
    "vdm, levels": (
        0,
        lambda: VDM(LevelEnd((1, 1, 2), 4), small(), schedule(), prediction=Prediction.ANGULAR),
    ),
    "vdm, variance": (
        0,
        lambda: VDM(RealEnd((2,)), small(), VarianceTrained(4, -4.0, 6.0, learn_ends=True)),
    ),
}
