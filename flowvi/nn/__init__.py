"""Networks that make the parameters of transforms."""

from flowvi.nn.conv import GatedConv2d, GatedConvTranspose2d
from flowvi.nn.conv_conditioner import ConvConditioner
from flowvi.nn.denoisers import Denoiser, MLPDenoiser, ResidualDenoiser
from flowvi.nn.fields import FunctionField, VectorField
from flowvi.nn.labels import one_hot
from flowvi.nn.layered_fields import ConcatSquashField, GatedField, MLPField
from flowvi.nn.made import MADE
from flowvi.nn.mlp import MLP
from flowvi.nn.potential import PotentialField
from flowvi.nn.precision import mixed_precision
from flowvi.nn.time_embedding import FourierFeatures, FourierTime, SinusoidalTime
from flowvi.nn.unet import UNet

__all__ = [
    "MADE",
    "MLP",
    "ConcatSquashField",
    "ConvConditioner",
    "Denoiser",
    "FourierFeatures",
    "FourierTime",
    "FunctionField",
    "GatedConv2d",
    "GatedConvTranspose2d",
    "GatedField",
    "MLPDenoiser",
    "MLPField",
    "PotentialField",
    "ResidualDenoiser",
    "SinusoidalTime",
    "UNet",
    "VectorField",
    "mixed_precision",
    "one_hot",
]
