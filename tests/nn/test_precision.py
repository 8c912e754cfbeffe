"""Networks in bfloat16 inside exact maps."""

from __future__ import annotations

import copy
import io

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from flowvi.flows import iaf, nsf, realnvp
from flowvi.guides import AutoFlow
from flowvi.models import VAE, BernoulliLikelihood, DiagonalPosterior, MLPDecoder, MLPEncoder
from flowvi.nn import MLP, UNet, mixed_precision


@pytest.fixture(autouse=True)
def _single() -> None:
    # Autocast leaves float64, which the tests' default is, alone.
    torch.set_default_dtype(torch.float32)


def flow_of(recipe: object) -> nn.Module:
    flow = recipe(4, hidden_dims=(16,))
    for parameter in flow.parameters():
        nn.init.normal_(parameter, std=0.3)
    return flow


@pytest.mark.parametrize("recipe", [realnvp, nsf, iaf])
def test_the_density_is_that_of_the_map_as_it_runs(recipe: object) -> None:
    full = flow_of(recipe)
    low = mixed_precision(copy.deepcopy(full))
    x = torch.randn(6, 4)
    y, ladj = low.transform.call_and_ladj(x)
    assert y.dtype == ladj.dtype == torch.float32
    there = full.transform.call_and_ladj(x)[0]
    # The networks are rounded, so the map is another one, but not by much.
    assert 1e-5 < (y - there).abs().max() < 0.2
    # Part by part: rounded gradients of the networks spoil only what is off the block diagonal.
    for part in low.transform.parts:
        jacobian = torch.autograd.functional.jacobian(lambda v, part=part: part(v).sum(0), x)
        expected = jacobian.transpose(0, 1).slogdet().logabsdet
        assert torch.allclose(part.call_and_ladj(x)[1], expected, atol=2e-5)


@pytest.mark.parametrize("recipe", [realnvp, nsf])
def test_couplings_stay_invertible(recipe: object) -> None:
    low = mixed_precision(flow_of(recipe))
    x = torch.randn(50, 4)
    y, ladj = low.transform.call_and_ladj(x)
    back, other = low.transform.inverse_and_ladj(y)
    assert torch.allclose(back, x, atol=1e-4)
    assert torch.allclose(other, -ladj, atol=1e-4)


def test_products_are_in_bfloat16_and_gradients_are_not() -> None:
    network, x = MLP(3, (5,), 2, zero_last=False), torch.randn(4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        expected = network(x)
    assert expected.dtype == torch.bfloat16
    out = mixed_precision(network)(x)
    assert out.dtype == torch.float32
    assert torch.equal(out, expected.float())
    out.sum().backward()
    assert all(p.grad.dtype == p.dtype == torch.float32 for p in network.parameters())


def test_a_guide_trains_and_is_copied_and_saved() -> None:
    def model(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z, 0.5).to_event(1), obs=y)

    y = torch.tensor([1.0, -1.0])
    guide = mixed_precision(AutoFlow(model, realnvp).initialize(y))
    svi = SVI(
        model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO(16, vectorize_particles=True)
    )
    losses = [svi.step(y) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10])
    file = io.BytesIO()
    torch.save(guide, file)
    file.seek(0)
    x = torch.randn(3, 2)
    expected = guide.flow.transform(x)
    for other in (copy.deepcopy(guide), torch.load(file, weights_only=False)):
        assert torch.equal(other.flow.transform(x), expected)
        assert not torch.is_autocast_enabled("cpu")


def test_networks_of_a_pair() -> None:
    likelihood = BernoulliLikelihood((1, 4, 4))
    decoder = MLPDecoder(2, (8,), likelihood.output_shape)
    encoder = MLPEncoder((1, 4, 4), (8,))
    vae = mixed_precision(VAE(encoder, decoder, likelihood, DiagonalPosterior(8, 2)))
    hooked = [m for m in vae.modules() if m._forward_hooks]
    assert {type(m) for m in hooked} == {MLP}
    assert len(hooked) >= 2
    assert vae.terms(torch.ones(3, 1, 4, 4)).elbo.dtype == torch.float32


def test_networks_that_raise_leave_no_autocast() -> None:
    class Raising(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("inside")

    network = mixed_precision(Raising())
    with pytest.raises(RuntimeError, match="inside"):
        network(torch.ones(1))
    assert not torch.is_autocast_enabled("cpu")


def test_double_networks_and_meta_tensors_are_as_before() -> None:
    network = MLP(3, (5,), 2, zero_last=False).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    before = network(x)
    assert torch.equal(mixed_precision(network)(x), before)
    unet = mixed_precision(UNet((1, 4, 4), 4, (1,))).to("meta")
    assert unet(torch.empty(2, 16, device="meta"), torch.empty(2, 1, device="meta")).is_meta


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="`module` must be a torch.nn.Module; got function"):
        mixed_precision(lambda x: x)
    with pytest.raises(ValueError, match="in mixed precision already"):
        mixed_precision(mixed_precision(MLP(2, (3,), 1)))
