"""Model-and-guide pairs for stock ``SVI``."""

from flowvi.models.bits import bits_per_dim
from flowvi.models.couplings import (
    IndependentCoupling,
    LearnedCoupling,
    OptimalTransportCoupling,
    PairedCoupling,
    SinkhornCoupling,
    StartCoupling,
)
from flowvi.models.data_ends import DataEnd, LevelEnd, RealEnd
from flowvi.models.dequantisation import (
    Dequantizer,
    UniformDequantizer,
    VariationalDequantizer,
)
from flowvi.models.diffenc import DiffEnc, FadingEncoder, LearnedEncoder
from flowvi.models.diffusion import DiffusionModel, DiffusionTerms
from flowvi.models.drifts import DiffusionMLP, DriftMLP
from flowvi.models.encoders import (
    ConvolutionalEncoder,
    FirstFramesEncoder,
    RecurrentEncoder,
    SeriesEncoder,
)
from flowvi.models.f_vae import FVAE
from flowvi.models.hierarchical import HierarchicalVAE
from flowvi.models.image_flow import ImageFlow, ImageFlowLikelihood
from flowvi.models.image_networks import ConvDecoder, ConvEncoder, MLPDecoder, MLPEncoder
from flowvi.models.image_pair import ImagePair
from flowvi.models.ladder import LadderVAE, precision_weighted
from flowvi.models.latent_posteriors import (
    LatentPosterior,
    SimulatedLatent,
    SimulationFreeLatent,
)
from flowvi.models.latent_rectified_flow import LatentRectifiedFlow, LatentRectifiedTerms
from flowvi.models.latent_sde import (
    GaussianDecoder,
    LatentSDE,
    LatentTerms,
    NormalStart,
    Prediction,
)
from flowvi.models.likelihoods import (
    BernoulliLikelihood,
    CategoricalLikelihood,
    ContinuousBernoulliLikelihood,
    DiscretisedLogisticLikelihood,
    Likelihood,
    NormalLikelihood,
)
from flowvi.models.marginals import Marginals, MLPMarginals, RhythmicMarginals
from flowvi.models.neural_diffusion import NeuralFlowDiffusion
from flowvi.models.ode_likelihood import ODELikelihood
from flowvi.models.pair import ELBOTerms, LogLikelihood, ModelGuidePair
from flowvi.models.posteriors import (
    DiagonalPosterior,
    FlowPosterior,
    cnf_posterior,
    full_posterior,
    householder_sylvester_posterior,
    iaf_posterior,
    orthogonal_sylvester_posterior,
    planar_posterior,
    realnvp_posterior,
    spline_posterior,
    triangular_sylvester_posterior,
)
from flowvi.models.rectified_flow import RectifiedFlow
from flowvi.models.rectified_terms import RectifiedTerms
from flowvi.models.residual import ResidualStage, ResidualVAE
from flowvi.models.score import ScoreModel
from flowvi.models.top_down import Stage, TopDownVAE
from flowvi.models.transport import (
    TransportCost,
    normalised_path_energy,
    wasserstein_distance,
)
from flowvi.models.vae import VAE, VampPrior
from flowvi.models.vdm import VDM, noise_weighting

__all__ = [
    "FVAE",
    "VAE",
    "VDM",
    "BernoulliLikelihood",
    "CategoricalLikelihood",
    "ContinuousBernoulliLikelihood",
    "ConvDecoder",
    "ConvEncoder",
    "ConvolutionalEncoder",
    "DataEnd",
    "Dequantizer",
    "DiagonalPosterior",
    "DiffEnc",
    "DiffusionMLP",
    "DiffusionModel",
    "DiffusionTerms",
    "DiscretisedLogisticLikelihood",
    "DriftMLP",
    "ELBOTerms",
    "FadingEncoder",
    "FirstFramesEncoder",
    "FlowPosterior",
    "GaussianDecoder",
    "HierarchicalVAE",
    "ImageFlow",
    "ImageFlowLikelihood",
    "ImagePair",
    "IndependentCoupling",
    "LadderVAE",
    "LatentPosterior",
    "LatentRectifiedFlow",
    "LatentRectifiedTerms",
    "LatentSDE",
    "LatentTerms",
    "LearnedCoupling",
    "LearnedEncoder",
    "LevelEnd",
    "Likelihood",
    "LogLikelihood",
    "MLPDecoder",
    "MLPEncoder",
    "MLPMarginals",
    "Marginals",
    "ModelGuidePair",
    "NeuralFlowDiffusion",
    "NormalLikelihood",
    "NormalStart",
    "ODELikelihood",
    "OptimalTransportCoupling",
    "PairedCoupling",
    "Prediction",
    "RealEnd",
    "RectifiedFlow",
    "RectifiedTerms",
    "RecurrentEncoder",
    "ResidualStage",
    "ResidualVAE",
    "RhythmicMarginals",
    "ScoreModel",
    "SeriesEncoder",
    "SimulatedLatent",
    "SimulationFreeLatent",
    "SinkhornCoupling",
    "Stage",
    "StartCoupling",
    "TopDownVAE",
    "TransportCost",
    "UniformDequantizer",
    "VampPrior",
    "VariationalDequantizer",
    "bits_per_dim",
    "cnf_posterior",
    "full_posterior",
    "householder_sylvester_posterior",
    "iaf_posterior",
    "noise_weighting",
    "normalised_path_energy",
    "orthogonal_sylvester_posterior",
    "planar_posterior",
    "precision_weighted",
    "realnvp_posterior",
    "spline_posterior",
    "triangular_sylvester_posterior",
    "wasserstein_distance",
]
