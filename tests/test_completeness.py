"""Every public class is in the registry, so the property tests reach it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import ELBO as PyroELBO
from pyro.infer.autoguide import AutoGuide
from registry import (
    CHAINS,
    FLOWS,
    GUIDES,
    IMAGE_FLOWS,
    LIKELIHOODS,
    OBJECTIVES,
    PAIRS,
    PATHS,
    POSTERIORS,
    SAMPLERS,
    SAMPLERS_OF_MODELS,
    SCHEDULES,
    TRANSFORMS,
)

import flowvi
from flowvi import flows, models
from flowvi.distributions import Flow
from flowvi.paths import Path, Schedule
from flowvi.samplers import Sampler, SDESolver
from flowvi.transforms import FlowTransform


def public_subclasses(base: type) -> set[type]:
    """Subclasses that a package of flowvi exports and that can be made."""
    return {c for c in exported() if issubclass(c, base) and not inspect.isabstract(c)} - {base}


def exported() -> Iterator[type]:
    for info in pkgutil.iter_modules(flowvi.__path__, "flowvi."):
        package = importlib.import_module(info.name)
        for name in getattr(package, "__all__", ()):
            value = getattr(package, name)
            if inspect.isclass(value):
                yield value


def model() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 3):
        w = pyro.sample("w", dist.Normal(z, 1.0))
        pyro.sample("x", dist.Normal(w, 1.0), obs=torch.zeros(3))


def test_every_transform_is_registered():
    registered = {type(case.make()) for case in TRANSFORMS.values()}
    assert public_subclasses(FlowTransform) <= registered


def test_every_transform_is_tried_in_one_dimension_and_with_context():
    for name in ("planar", "radial", "coupling, affine", "autoregressive, affine"):
        assert TRANSFORMS[f"{name}, 1-D"].input_dim == 1
        assert TRANSFORMS[f"{name}, context"].context_dim > 0


def test_every_guide_is_registered():
    registered = {type(case.make(model)) for case in GUIDES.values()}
    assert public_subclasses(AutoGuide) <= registered


def test_every_objective_is_registered():
    registered = {type(case.make(4)) for case in OBJECTIVES.values()}
    objectives = public_subclasses(PyroELBO)
    assert objectives
    assert objectives <= registered


def test_every_schedule_is_registered():
    assert public_subclasses(Schedule) <= {type(case.make()) for case in SCHEDULES.values()}


def test_every_path_is_registered():
    assert public_subclasses(Path) <= {type(case.make()) for case in (PATHS | CHAINS).values()}


def test_every_sampler_is_registered():
    assert public_subclasses(SDESolver) <= {type(case.make()) for case in SAMPLERS.values()}
    of_models = {type(case.make()) for case in SAMPLERS_OF_MODELS.values()}
    assert public_subclasses(Sampler) <= of_models


def test_every_model_of_images_is_registered():
    # Tested on their own: their latents are images or paths, or their laws are those of a flow.
    own = {models.ImageFlow, models.ImageFlowLikelihood, models.LatentRectifiedFlow}
    own |= {models.LevelEnd, models.RealEnd}
    pairs = {type(case.make()) for case in PAIRS.values()}
    assert public_subclasses(models.ImagePair) - own <= pairs
    likelihoods = {type(case.make()) for case in LIKELIHOODS.values()}
    assert public_subclasses(models.Likelihood) - own <= likelihoods


def test_every_posterior_family_is_registered():
    families = {name for name in models.__all__ if name.endswith("_posterior")}
    assert families == {case.make.func.__name__ for case in POSTERIORS.values()}


def test_every_recipe_is_registered():
    assert {name.split(",")[0] for name in FLOWS | IMAGE_FLOWS} == set(flows.__all__)


@pytest.mark.parametrize("name", sorted(TRANSFORMS | FLOWS | IMAGE_FLOWS))
def test_sizes_of_a_case_are_those_of_what_it_makes(name: str):
    case = (TRANSFORMS | FLOWS | IMAGE_FLOWS)[name]
    made = case.make()
    assert isinstance(made, FlowTransform | Flow)
    assert (made.input_dim, made.context_dim) == (case.input_dim, case.context_dim)
