"""What a saved parameter store carries: the whole law of a guide, its buffers included."""

from __future__ import annotations

from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

from flowvi.flows import glow_image
from flowvi.guides import AutoFlow
from flowvi.infer import FlowSVI, GlobalOptim
from flowvi.models import ImageFlow
from flowvi.objectives import ELBO
from flowvi.transforms import ActNorm

VALUES = {"w": torch.tensor([[0.5, 1.0, 3.0]], dtype=torch.float64)}


def model() -> None:
    pyro.sample("w", dist.Normal(torch.arange(3.0), 0.5).to_event(1))


def train(guide: AutoFlow, num_steps: int = 3) -> SVI:
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(num_particles=2))
    for _ in range(num_steps):
        svi.step()
    return svi


def save(path: Path) -> str:
    """Save the store and empty it, as a new program would find it."""
    pyro.get_param_store().save(str(path))
    pyro.clear_param_store()
    return str(path)


def density(guide: AutoFlow) -> Tensor:
    with torch.no_grad():
        return guide.eval().log_q(VALUES)


@pytest.mark.parametrize("built_first", [True, False])
def test_a_new_guide_is_the_saved_one(tmp_path: Path, built_first: bool) -> None:
    guide = AutoFlow(model).initialize()
    train(guide)
    # Coordinates that no initial point gives.
    guide.whiten(torch.full((3,), 2.0), 0.3 * torch.eye(3))
    expected = density(guide)
    file = save(tmp_path / "store")
    new = AutoFlow(model)
    if built_first:
        new.initialize()
    pyro.get_param_store().load(file)
    assert torch.equal(density(new.initialize()), expected)
    assert new._pyro_name == "AutoFlow"
    moved = new.whitening.loc.clone()
    train(new)
    assert torch.equal(new.whitening.loc, moved)


def test_activation_normalisation_does_not_start_again(tmp_path: Path) -> None:
    flow = glow_image((1, 4, 4), num_layers=1, num_levels=1, hidden_dims=(4, 4))
    pair = ImageFlow(flow, 4)
    x = torch.randint(0, 4, (6, 1, 4, 4)).to(torch.float64)
    pair.initialize(x)
    SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(x)
    file = save(tmp_path / "store")
    new = ImageFlow(glow_image((1, 4, 4), num_layers=1, num_levels=1, hidden_dims=(4, 4)), 4)
    pyro.get_param_store().load(file)
    new.train().model(x)
    assert any(isinstance(module, ActNorm) for module in new.modules())
    for key, value in pair.state_dict().items():
        assert torch.equal(new.state_dict()[key], value), key


def test_buffers_in_the_store_follow_and_are_not_trained() -> None:
    guide = AutoFlow(model).initialize()
    train(guide)
    store = pyro.get_param_store()
    (name,) = (n for n in store if n.endswith("whitening$$$loc"))
    guide.whiten(torch.full((3,), 7.0), torch.eye(3))
    assert torch.equal(store[name], guide.whitening.loc)
    guide.float()
    guide()
    assert store[name].dtype == torch.float32
    svi = FlowSVI(model, guide, GlobalOptim(), ELBO(2))
    assert not any("whitening" in n for n, _ in svi.named_parameters())


def test_hooks_on_everything_in_the_store() -> None:
    guide = AutoFlow(model).initialize()
    svi = train(guide, 1)
    norms: dict[str, float] = {}
    for name, value in pyro.get_param_store().named_parameters():
        value.register_hook(lambda grad, name=name: norms.update({name: grad.norm()}))
    svi.step()
    assert len(norms) == len(list(guide.parameters()))


def test_two_guides_keep_their_own_buffers() -> None:
    first, second = (AutoFlow(model).initialize() for _ in range(2))
    train(second)
    train(first)
    store = pyro.get_param_store()
    for guide in (first, second):
        assert torch.equal(store[f"{guide._pyro_name}.whitening$$$loc"], guide.whitening.loc)
        guide.whiten(torch.randn(3), torch.eye(3))
    assert {first._pyro_name, second._pyro_name} == {"AutoFlow", "AutoFlow_1"}
    for guide in (first, second):
        assert torch.equal(store[f"{guide._pyro_name}.whitening$$$loc"], guide.whitening.loc)
