"""Recipes: flows named as in the literature, ready as prior, likelihood or guide.

Every recipe stacks a body that starts at, or very near, the identity and ends in a trainable
affine map with location and full lower-triangular scale, so a new flow is a standard normal. One
dimension works and is not affine. With ``context_dim`` every layer, the affine one included,
depends on a context. Recipes of images take their shape, and have no such last layer. Random masks
come from a generator of their own, so two flows of the same arguments have the same masks; weights
come from torch's generator.
"""

from flowvi.flows.continuous import cnf
from flowvi.flows.discrete import (
    glow,
    iaf,
    maf,
    nice,
    nsf,
    planar,
    radial,
    realnvp,
    sylvester,
)
from flowvi.flows.images import glow_image, realnvp_image

__all__ = [
    "cnf",
    "glow",
    "glow_image",
    "iaf",
    "maf",
    "nice",
    "nsf",
    "planar",
    "radial",
    "realnvp",
    "realnvp_image",
    "sylvester",
]
