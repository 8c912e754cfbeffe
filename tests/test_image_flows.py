"""Recipes of image flows: the whole multi-scale map, its density, its start from data."""

from __future__ import annotations

import copy
import io
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from registry import IMAGE_FLOWS, Case
from torch import Tensor

from flowvi.distributions import AugmentedFlow, Flow, MixtureFlow, StandardNormal
from flowvi.flows import glow_image, realnvp_image
from flowvi.guides import AutoFlow
from flowvi.nn import ConvConditioner, one_hot
from flowvi.transforms import (
    ActNorm,
    Coupling,
    NumericalInverse,
    Squeezed,
    ToInterval,
    compose,
    initialize_norms,
)

NAMES = sorted(IMAGE_FLOWS)
every = pytest.mark.parametrize("name", NAMES)
conditional = pytest.mark.parametrize("name", [n for n in NAMES if IMAGE_FLOWS[n].context_dim])
SMALL = {"num_layers": 2, "hidden_dims": (4,)}


def build(name: str, std: float = 0.0) -> tuple[Case, Flow]:
    """A flow of the registry, as it starts or with its parameters moved at random."""
    case = IMAGE_FLOWS[name]
    flow = case.make()
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(std * torch.randn_like(p))
    return case, flow


def context_of(case: Case, *batch: int) -> Tensor | None:
    return torch.randn(*batch, case.context_dim) if case.context_dim else None


@every
def test_starts_at_the_standard_normal(name):
    case, flow = build(name)
    y, log_q = flow(context_of(case, 5)).rsample_and_log_prob(() if case.context_dim else (5,))
    assert y.shape == (5, *case.event_shape)
    expected = dist.Normal(0.0, 1.0).log_prob(y).sum((-3, -2, -1))
    torch.testing.assert_close(log_q, expected, rtol=0, atol=1e-9)


@every
def test_whole_flow_agrees_with_its_jacobian(name):
    case, flow = build(name, 0.2)
    x, context = torch.randn(3, *case.event_shape), context_of(case, 3)
    y, ladj = flow.transform.call_and_ladj(x, context)
    args = (x,) if context is None else (x, context)
    jacobian = torch.func.vmap(torch.func.jacrev(flow.transform))(*args)
    expected = torch.linalg.slogdet(jacobian.reshape(3, x[0].numel(), -1)).logabsdet
    assert expected.abs().min() > 1e-3
    torch.testing.assert_close(ladj, expected, rtol=0, atol=1e-8)
    log_q = flow(context).log_prob(y.detach().clone())
    base = dist.Normal(0.0, 1.0).log_prob(x).sum((-3, -2, -1))
    torch.testing.assert_close(log_q, base - expected, rtol=0, atol=1e-7)


@every
def test_round_trip_of_the_whole_flow(name):
    case, flow = build(name, 0.2)
    y, context = torch.randn(4, *case.event_shape), context_of(case, 4)
    x, back = flow.transform.inverse_and_ladj(y, context)
    again, ladj = flow.transform.call_and_ladj(x, context)
    torch.testing.assert_close((again, ladj), (y, -back), rtol=0, atol=1e-8)


@every
def test_every_entry_is_moved_by_others(name):
    case, flow = build(name, 0.3)
    context = context_of(case)
    x = torch.randn(case.event_shape)
    jacobian = torch.func.jacrev(lambda x: flow.transform(x, context))(x)
    moved = jacobian.reshape(x.numel(), -1) != 0
    assert (moved.sum(1) > 1).all()


def test_density_of_two_scales_integrates_to_one():
    flow = realnvp_image((1, 2, 4), num_levels=2, num_layers=1, hidden_dims=(4,))
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.2 * torch.randn_like(p))
        draws = flow().sample((4000,)).flatten(1)
        cover = dist.MultivariateStudentT(
            torch.tensor(5.0), draws.mean(0), 1.3 * torch.linalg.cholesky(draws.T.cov())
        )
        y = cover.sample((40_000,))
        weights = (flow().log_prob(y.reshape(-1, 1, 2, 4)) - cover.log_prob(y)).exp()
    error = weights.std() / len(weights) ** 0.5
    # 40000 points, 4 standard errors.
    assert error < 0.01
    assert abs(weights.mean() - 1) < 4 * error


@every
def test_every_parameter_learns_from_scoring(name):
    case, flow = build(name, 0.3)
    flow(context_of(case, 4)).log_prob(torch.randn(4, *case.event_shape)).sum().backward()
    for key, parameter in flow.named_parameters():
        assert parameter.grad is not None, key
        assert bool(parameter.grad.any()), key


@every
def test_one_pass_for_a_draw_and_its_score(name):
    case, flow = build(name, 0.3)
    counts: dict[str, int] = {}
    for key, module in flow.named_modules():
        if isinstance(module, ConvConditioner):
            module.register_forward_hook(
                lambda *_, key=key: counts.__setitem__(key, counts.get(key, 0) + 1)
            )
    q = flow(context_of(case, 4))
    q.log_prob(q.rsample((2,)))
    assert counts
    assert set(counts.values()) == {1}


@conditional
def test_context_batch_equals_rows(name):
    case, flow = build(name, 0.3)
    y, context = torch.randn(3, *case.event_shape), context_of(case, 3)
    together = flow(context).log_prob(y)
    rows = torch.stack([flow(c).log_prob(v) for v, c in zip(y, context, strict=True)])
    torch.testing.assert_close(together, rows)
    assert (flow(context.flip(0)).log_prob(y) - together).abs().max() > 1e-3
    wide = flow(context).log_prob(y.expand(2, 3, *case.event_shape))
    torch.testing.assert_close(wide, together.expand(2, 3))


# The start from data.


@pytest.mark.parametrize("recipe", [glow_image, realnvp_image])
def test_start_from_data_standardises_what_every_normalisation_passes_on(recipe, monkeypatch):
    flow = recipe((1, 4, 4), **SMALL)
    data = 7 + 3 * torch.randn(50, 1, 4, 4) * torch.linspace(1, 4, 4)
    initialize_norms(flow.transform, data)
    assert all(m.initialized for m in flow.modules() if isinstance(m, ActNorm))
    passed = []
    inverse = ActNorm._inverse_and_ladj

    def record(norm, y, context):
        x, ladj = inverse(norm, y, context)
        passed.append(x.flatten(0, -2))
        return x, ladj

    monkeypatch.setattr(ActNorm, "_inverse_and_ladj", record)
    flow.transform.inverse_and_ladj(data)
    assert len(passed) == sum(isinstance(m, ActNorm) for m in flow.modules())
    for rows in passed:
        size = rows.shape[1]
        torch.testing.assert_close(rows.mean(0), torch.zeros(size), rtol=0, atol=1e-10)
        torch.testing.assert_close(rows.std(0), torch.ones(size), rtol=0, atol=1e-10)


@pytest.mark.parametrize("recipe", [glow_image, realnvp_image])
def test_start_from_data_survives_saving_bit_by_bit(recipe):
    flow = recipe((1, 4, 4), 2, **SMALL)
    data, context = 7 + 3 * torch.randn(50, 1, 4, 4), torch.randn(50, 2)
    initialize_norms(flow.transform, data, context)
    expected = flow(context).log_prob(data)
    file = io.BytesIO()
    torch.save(flow.state_dict(), file)
    file.seek(0)
    loaded = recipe((1, 4, 4), 2, **SMALL)
    for norm in loaded.modules():
        if isinstance(norm, ActNorm):
            norm._pending = True  # as made with lazy=True: loading must end the waiting
    loaded.load_state_dict(torch.load(file))
    loaded.train()
    assert torch.equal(loaded(context).log_prob(data), expected)
    assert torch.equal(copy.deepcopy(loaded)(context).log_prob(data), expected)


def test_logit_of_the_data_comes_first():
    """The density of pixels is that of their logits times the slope."""
    shape = (1, 4, 4)
    data = 256 * torch.rand(30, *shape) ** 3
    plain, flow = (glow_image(shape, **SMALL) for _ in range(2))
    flow.load_state_dict(plain.state_dict())
    logits = torch.logit(0.05 + 0.9 * data / 256)
    initialize_norms(plain.transform, logits)
    both = flow.then(ToInterval(shape, 0.0, 256.0, margin=0.05))
    initialize_norms(both.transform, data)
    share = 0.05 + 0.9 * data / 256
    slope = (0.9 / 256 / (share * (1 - share))).log().sum((1, 2, 3))
    torch.testing.assert_close(both().log_prob(data), plain().log_prob(logits) + slope)
    drawn = both().sample((50,))
    assert drawn.min() > -0.06 * 256
    assert drawn.max() < 1.06 * 256
    with pytest.raises(ValueError, match="within the support"):
        both().log_prob(data + 300)


def test_start_from_data_keeps_modes_and_refuses_what_it_cannot_use():
    flow = glow_image((1, 4, 4), **SMALL)
    flow.eval()
    initialize_norms(flow.transform, torch.randn(5, 1, 4, 4))
    assert not any(m.training for m in flow.modules())
    with pytest.raises(ValueError, match="`batch` must be finite; got 16 entries"):
        initialize_norms(flow.transform, torch.full((1, 1, 4, 4), torch.nan))
    with pytest.raises(ValueError, match="`transform` must hold an ActNorm; got none"):
        initialize_norms(Coupling(2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match=re.escape("`y` must end with shape (1, 4, 4)")):
        initialize_norms(flow.transform, torch.randn(5, 1, 4, 5))
    start = Flow(compose(Squeezed(Coupling((4, 1, 1))), Coupling((1, 2, 2), mask=_half())))
    with pytest.raises(ValueError, match="`transform` must hold an ActNorm"):
        initialize_norms(start.transform, torch.randn(5, 1, 2, 2))


def _half() -> Tensor:
    return torch.tensor([[[True, False], [False, True]]])


# As a distribution.


def test_temperature_scales_the_base():
    flow = glow_image((1, 4, 4), **SMALL)
    cool = flow.tempered(0.5)
    assert {id(p) for p in cool.parameters()} == {id(p) for p in flow.parameters()}
    y = cool().sample((500,))
    # 8000 numbers: 5 standard errors of a standard deviation.
    assert abs(y.std() - 0.5) < 5 * 0.5 / (2 * 8000) ** 0.5
    expected = dist.Normal(0.0, 0.5).log_prob(y).sum((-3, -2, -1))
    torch.testing.assert_close(cool().log_prob(y.clone()), expected)
    with pytest.raises(ValueError, match="`temperature` must be positive; got 0"):
        flow.tempered(0)
    skew = Flow(flow.transform, _Laplace())
    with pytest.raises(NotImplementedError, match="_Laplace, the base, has no temperature"):
        skew.tempered(0.7)


class _Laplace(torch.nn.Module):
    def forward(self) -> dist.Distribution:
        return dist.Laplace(torch.zeros(1, 4, 4), 1.0).to_event(3)


def test_is_a_pyro_site_that_learns_its_labels():
    labels = torch.arange(32) % 2
    images = 3.0 * labels.reshape(-1, 1, 1, 1) + 0.3 * torch.randn(32, 1, 2, 2)
    flow = glow_image((1, 2, 2), 2, num_levels=1, num_layers=1, hidden_dims=(4,))
    context = one_hot(labels, 2)
    initialize_norms(flow.transform, images, context)

    def model(x, context):
        pyro.module("flow", flow)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", flow(context), obs=x)

    svi = SVI(model, lambda *_: None, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO())
    first = svi.evaluate_loss(images, context)
    for _ in range(60):
        last = svi.step(images, context)
    assert last < first - 32
    right, wrong = flow(context).log_prob(images), flow(context.flip(-1)).log_prob(images)
    assert (right - wrong).mean() > 2


@pytest.mark.parametrize(
    "name",
    [n if n == "glow_image, context" else pytest.param(n, marks=pytest.mark.slow) for n in NAMES],
)
def test_runs_on_meta(name):
    case, flow = build(name)
    flow.to("meta")
    context = torch.empty(4, case.context_dim, device="meta") if case.context_dim else None
    q = flow(context)
    y, log_q = q.rsample_and_log_prob((3,))
    (y.sum() + log_q.sum() + flow(context).log_prob(y.detach().clone()).sum()).backward()
    assert all(p.grad is not None and p.grad.is_meta for p in flow.parameters())
    initialize_norms(flow.transform, y.detach(), context)
    assert flow.tempered(0.7)(context).sample().is_meta


@pytest.mark.gpu
@every
def test_gpu_equals_cpu(name):
    case, flow = build(name, 0.3)
    y, context = torch.randn(8, *case.event_shape), context_of(case, 8)
    expected = flow(context).log_prob(y)
    flow.cuda()
    found = flow(None if context is None else context.cuda()).log_prob(y.cuda())
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-9, atol=1e-9)


# Refusals.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: glow_image((1, 7, 8)), "`shape` must have a height and width that 4 divides"),
        (lambda: glow_image((1, 6, 8)), "for 2 levels; got (1, 6, 8). Use fewer levels, or pad"),
        (lambda: realnvp_image((1, 4, 5)), "height and width that 2 divides, for 2 levels"),
        (
            lambda: realnvp_image((1, 2, 2)),
            "that leave more than one pixel at the last level of 2",
        ),
        (lambda: glow_image((8, 8)), "`shape` must be (channels, height, width); got (8, 8)"),
        (lambda: glow_image((1, 8, 0)), "must hold integers of at least 1; got (1, 8, 0)"),
        (lambda: glow_image((1, 8, 8), num_levels=0), "`num_levels` must be an integer of at lea"),
        (lambda: realnvp_image((1, 8, 8), num_levels=1.0), "`num_levels` must be an integer of"),
        (lambda: glow_image((1, 8, 8), num_layers=0), "`num_layers` must be an integer of at le"),
        (lambda: glow_image((1, 8, 8), hidden_dims=8), "`hidden_dims` must be a sequence of posi"),
        (
            lambda: glow_image((1, 8, 8), 65, context_shape=(1, 8, 8)),
            "`context_shape` must have 3 sizes with product 65 (context_dim)",
        ),
        (
            lambda: glow_image((1, 8, 8), 36, context_shape=(1, 6, 6)),
            "`context_shape` must have a height and width that are the same multiple of (4, 4)",
        ),
        (lambda: StandardNormal(3, temperature=-1.0), "`temperature` must be positive; got -1.0"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_images_and_contexts_of_the_wrong_shape_are_refused():
    flow = glow_image((1, 4, 4), 2, **SMALL)
    with pytest.raises(
        ValueError, match=re.escape("`context` must end with size 2 (context_dim)")
    ):
        flow(torch.zeros(5, 3))
    with pytest.raises(
        ValueError, match=re.escape("`context` must end with size 2 (context_dim)")
    ):
        flow()
    with pytest.raises(
        ValueError, match=re.escape("`y` must end with shape (1, 4, 4); got shape")
    ):
        flow(torch.zeros(5, 2)).unchecked().log_prob(torch.zeros(5, 4, 4, 1))


@pytest.mark.parametrize(
    ("use", "name"),
    [
        (lambda flow: MixtureFlow([flow, flow]), "flows"),
        (lambda flow: AugmentedFlow(flow, 2), "flow"),
        (lambda flow: NumericalInverse(flow.transform), "transform"),
        (lambda flow: AutoFlow(_vector_model, flow).initialize(), "recipe"),
    ],
)
def test_what_is_for_vectors_refuses_image_flows(use, name):
    flow = glow_image((1, 4, 4), **SMALL)
    with pytest.raises(ValueError, match=rf"`{name}` must be of vectors; got event shape \(1, 4,"):
        use(flow)


def _vector_model() -> None:
    pyro.sample("z", dist.Normal(torch.zeros(16), 1.0).to_event(1))
