"""Model-and-guide pairs for stock ``SVI``."""

from flowvi.models.drifts import DriftMLP
from flowvi.models.encoders import (
    ConvolutionalEncoder,
    FirstFramesEncoder,
    RecurrentEncoder,
    SeriesEncoder,
)
from flowvi.models.latent_posteriors import (
    LatentPosterior,
    SimulatedLatent,
    SimulationFreeLatent,
)
from flowvi.models.latent_sde import (
    GaussianDecoder,
    LatentSDE,
    LatentTerms,
    NormalStart,
    Prediction,
)
from flowvi.models.pair import ELBOTerms, LogLikelihood, ModelGuidePair

__all__ = [
    "ConvolutionalEncoder",
    "DriftMLP",
    "ELBOTerms",
    "FirstFramesEncoder",
    "GaussianDecoder",
    "LatentPosterior",
    "LatentSDE",
    "LatentTerms",
    "LogLikelihood",
    "ModelGuidePair",
    "NormalStart",
    "Prediction",
    "RecurrentEncoder",
    "SeriesEncoder",
    "SimulatedLatent",
    "SimulationFreeLatent",
]
