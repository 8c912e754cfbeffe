from __future__ import annotations

import pyro
import pytest
import torch


@pytest.fixture(autouse=True)
def _clean() -> None:
    """Float64, one seed, an empty parameter store and a fresh thread setting for every test."""
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()
    torch.set_default_dtype(torch.float32)
