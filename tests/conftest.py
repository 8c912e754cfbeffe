from __future__ import annotations

import pyro
import pytest
import torch

# Tests are small: a second thread costs more in waiting than it gains.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _clean() -> None:
    """Float64, one seed and an empty parameter store for every test."""
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()
    torch.set_default_dtype(torch.float32)
