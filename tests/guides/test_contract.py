"""What every guide does, whatever its law is: one case per guide of the registry."""

from __future__ import annotations

import copy
import io
import pickle

import pyro
import pytest
import torch
from guide_models import DATA, hierarchy, shake
from pyro import poutine
from pyro.infer import SVI, Predictive, ReweightedWakeSleep, Trace_ELBO
from pyro.infer.autoguide import AutoGuide
from pyro.util import check_model_guide_match
from registry import GUIDES
from torch import nn

from flowvi.nn._store import is_shown_buffer
from flowvi.objectives import ELBO, STL

every = pytest.mark.parametrize("name", sorted(GUIDES))
exact = pytest.mark.parametrize("name", sorted(n for n, c in GUIDES.items() if not c.bound))
SITES = {"mu": (), "z": (6,)}


def build(name: str, initialize: bool = True) -> AutoGuide:
    guide = GUIDES[name].make(hierarchy)
    if initialize:
        guide.initialize(DATA)
        shake(guide)
    return guide


def named_values(trace: poutine.Trace) -> dict[str, torch.Tensor]:
    return {name: trace.nodes[name]["value"].detach() for name in SITES}


def train(guide: AutoGuide, steps: int = 2) -> None:
    svi = SVI(hierarchy, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(steps):
        svi.step(DATA)


@every
def test_before_initialize_nothing_is_silently_empty(name: str) -> None:
    guide = build(name, initialize=False)
    for use in (
        lambda: list(guide.parameters()),
        lambda: list(guide.named_parameters()),
        guide.state_dict,
        lambda: guide.load_state_dict({}),
        guide.double,
        lambda: guide.to("cpu"),
        guide.median,
        lambda: guide.log_q({}),
    ):
        with pytest.raises(RuntimeError, match=r"no parameters yet. Call guide.initialize"):
            use()
    train(guide)
    assert list(guide.parameters())


@every
def test_initialize_builds_once_and_registers_once(name: str) -> None:
    guide = build(name)
    before = {k: v.clone() for k, v in guide.state_dict().items()}
    guide.initialize(DATA)
    assert all(torch.equal(v, before[k]) for k, v in guide.state_dict().items())
    names = [n for n, _ in guide.named_parameters(remove_duplicate=False)]
    assert len(names) == len(list(guide.parameters()))
    train(guide)
    store = pyro.get_param_store()
    trained = {id(p) for n in store if not is_shown_buffer(p := store._params[n])}
    assert {id(p) for p in guide.parameters()} == trained


@every
def test_matches_the_model(name: str) -> None:
    guide = build(name)
    guide_trace = poutine.trace(guide).get_trace(DATA)
    model_trace = poutine.trace(poutine.replay(hierarchy, trace=guide_trace)).get_trace(DATA)
    check_model_guide_match(model_trace, guide_trace, 1)
    shapes = {n: tuple(v.shape) for n, v in named_values(guide_trace).items()}
    assert shapes == SITES


@exact
def test_log_q_equals_the_trace_and_the_replayed_trace(name: str) -> None:
    guide = build(name)
    trace = poutine.trace(guide).get_trace(DATA)
    values = named_values(trace)
    log_q = guide.log_q(values, DATA)
    torch.testing.assert_close(log_q, trace.log_prob_sum())
    model_trace = poutine.trace(hierarchy).get_trace(DATA)
    for handler in (
        lambda: poutine.replay(guide, trace=model_trace),
        lambda: poutine.condition(guide, data=named_values(model_trace)),
    ):
        replayed = poutine.trace(handler()).get_trace(DATA)
        values = named_values(replayed)
        assert all(torch.equal(values[n], model_trace.nodes[n]["value"]) for n in SITES)
        torch.testing.assert_close(replayed.log_prob_sum(), guide.log_q(values, DATA))


@every
def test_log_q_is_batched_over_leading_dimensions(name: str) -> None:
    guide = build(name)
    values = {n: torch.randn(3, 2, *shape) for n, shape in SITES.items()}
    together = guide.log_q(values, DATA)
    assert together.shape == (3, 2)
    one_by_one = [
        guide.log_q({n: v[i, j] for n, v in values.items()}, DATA)
        for i in range(3)
        for j in range(2)
    ]
    torch.testing.assert_close(together.flatten(), torch.stack(one_by_one))


@every
def test_replay_of_some_sites_is_refused(name: str) -> None:
    guide = build(name)
    with pytest.raises(
        NotImplementedError, match=r"Sites \['mu'\] are replayed.* \['z'\] are not"
    ):
        poutine.condition(guide, data={"mu": torch.zeros(())})(DATA)


@every
@pytest.mark.parametrize("insomnia", [0.0, 1.0])
@pytest.mark.parametrize("vectorize", [False, True])
def test_reweighted_wake_sleep_is_finite(name: str, insomnia: float, vectorize: bool) -> None:
    guide = build(name)

    def with_observations(x: torch.Tensor, observations: object = None) -> object:
        return guide(x)

    loss = ReweightedWakeSleep(
        num_particles=4,
        insomnia=insomnia,
        model_has_params=False,
        vectorize_particles=vectorize,
        max_plate_nesting=1,
    )
    _, phi = loss.loss_and_grads(hierarchy, with_observations, DATA)
    assert torch.tensor(phi).isfinite()
    gradients = [p.grad for p in guide.parameters() if p.grad is not None]
    assert gradients
    assert all(g.isfinite().all() for g in gradients)


@every
def test_vectorized_particles_draw_the_same_law(name: str) -> None:
    guide = build(name)
    one = Trace_ELBO(num_particles=400, vectorize_particles=True, max_plate_nesting=1)
    losses = torch.tensor([one.loss(hierarchy, guide, DATA) for _ in range(6)])
    loop = torch.tensor([Trace_ELBO().loss(hierarchy, guide, DATA) for _ in range(60)])
    error = (losses.var() / 6 + loop.var() / 60).sqrt()
    assert (losses.mean() - loop.mean()).abs() < 4 * error


@every
def test_copies_leave_the_live_guide_alone(name: str) -> None:
    guide = build(name)
    train(guide)
    values = named_values(poutine.trace(hierarchy).get_trace(DATA))
    log_q = guide.log_q(values, DATA)
    buffer = io.BytesIO()
    torch.save(guide, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(guide),
        pickle.loads(pickle.dumps(guide)),
        torch.load(buffer, weights_only=False),
    ]
    assert guide.model is not None
    for other in copies:
        torch.testing.assert_close(other.log_q(values, DATA), log_q)
    train(copies[0], 5)
    torch.testing.assert_close(guide.log_q(values, DATA), log_q)
    assert not torch.allclose(copies[0].log_q(values, DATA), log_q)
    train(guide)
    assert not torch.allclose(guide.log_q(values, DATA), log_q)
    with pytest.raises(RuntimeError, match="The guide has no model"):
        _ = copies[1].model


@every
def test_two_guides_of_one_class_both_train(name: str) -> None:
    guides = [build(name), build(name)]
    for guide in guides:
        before = [p.clone() for p in guide.parameters()]
        train(guide)
        assert all(not torch.equal(p, q) for p, q in zip(before, guide.parameters(), strict=True))
    values = named_values(poutine.trace(hierarchy).get_trace(DATA))
    log_q = guides[0].log_q(values, DATA)
    train(guides[1])
    torch.testing.assert_close(guides[0].log_q(values, DATA), log_q)


@every
def test_module_local_parameters_with_a_torch_optimizer(name: str) -> None:
    with pyro.settings.context(module_local_params=True):
        guides = [build(name), build(name)]
        for guide in guides:
            elbo = Trace_ELBO()(hierarchy, guide)
            before = [p.clone() for p in elbo.parameters()]
            optimizer = torch.optim.Adam(elbo.parameters(), 0.01)
            for _ in range(2):
                optimizer.zero_grad()
                elbo(DATA).backward()
                optimizer.step()
            moved = [not torch.equal(p, q) for p, q in zip(before, elbo.parameters(), strict=True)]
            assert moved
            assert all(moved)
    assert not list(pyro.get_param_store())


@every
def test_state_dict_and_param_store_carry_everything(name: str, tmp_path: object) -> None:
    guide = build(name)
    train(guide)
    values = named_values(poutine.trace(hierarchy).get_trace(DATA))
    log_q = guide.log_q(values, DATA)
    file = str(tmp_path / "store")
    pyro.get_param_store().save(file)

    other = GUIDES[name].make(hierarchy).initialize(DATA)
    other.load_state_dict(guide.state_dict())
    torch.testing.assert_close(other.log_q(values, DATA), log_q)

    pyro.clear_param_store()
    pyro.get_param_store().load(file)
    # From another initial point: the coordinates it starts from are in the store as well.
    torch.manual_seed(99)
    fresh = GUIDES[name].make(hierarchy).initialize(DATA)
    torch.testing.assert_close(fresh.log_q(values, DATA), log_q)


@every
def test_predictive(name: str) -> None:
    guide = build(name)
    for parallel in (False, True):
        draws = Predictive(hierarchy, guide=guide, num_samples=7, parallel=parallel)(DATA)
        assert draws["z"].shape[0] == 7
        assert draws["z"].shape[-1] == 6


@every
def test_median_and_quantiles_follow_the_draws(name: str) -> None:
    guide = build(name)
    levels = [0.1, 0.5, 0.9]
    result = guide.quantiles(levels, DATA)
    assert {n: tuple(v.shape) for n, v in result.items()} == {n: (3, *s) for n, s in SITES.items()}
    with poutine.mask(mask=False), pyro.plate("draws", 4000, dim=-2), torch.no_grad():
        draws = guide(DATA)["z"]
    # 4000 draws: the share below a quantile has a standard error of at most 0.008; the quantile's
    # own 10000 draws add 0.005.
    below = (draws.reshape(4000, 1, 6) < result["z"]).double().mean(0)
    assert (below - torch.tensor(levels)[:, None]).abs().max() < 0.04
    assert guide.median(DATA)["z"].shape == (6,)
    with pytest.raises(ValueError, match=r"`quantiles` must be in \[0, 1\]"):
        guide.quantiles([1.5], DATA)


@every
@pytest.mark.parametrize("objective", [ELBO, STL])
def test_loss_and_backward_on_the_meta_device(name: str, objective: type) -> None:
    with pyro.validation_enabled(False), torch.device("meta"):
        guide = GUIDES[name].make(hierarchy)
        if isinstance(getattr(guide, "encoder", None), nn.Module):
            guide.encoder.to("meta")
        data = DATA.to("meta")
        guide.initialize(data)
        loss = objective(num_particles=4, max_plate_nesting=1)
        loss.differentiable_loss(hierarchy, guide, data).backward()
    assert all(p.is_meta and p.grad is not None for p in guide.parameters())


@every
def test_path_gradients_train(name: str) -> None:
    guide = build(name)
    STL(num_particles=4, max_plate_nesting=1).differentiable_loss(
        hierarchy, guide, DATA
    ).backward()
    assert all(p.grad.isfinite().all() for p in guide.parameters() if p.grad is not None)


@every
def test_dtype_follows_the_latents(name: str) -> None:
    guide = GUIDES[name].make(hierarchy)
    if isinstance(getattr(guide, "encoder", None), nn.Module):
        guide.encoder.float()
    guide.initialize(DATA.float())
    assert {p.dtype for p in guide.parameters()} == {torch.float32}
    guide.double()
    assert guide(DATA)["z"].dtype == torch.float64


@every
def test_missing_and_misshapen_values(name: str) -> None:
    guide = build(name)
    with pytest.raises(ValueError, match=r"exactly the latent sites \['mu', 'z'\]; got \['mu'\]"):
        guide.log_q({"mu": torch.zeros(())}, DATA)
    with pytest.raises(ValueError, match=r"`values\['z'\]` must end with shape \(6,\)"):
        guide.log_q({"mu": torch.zeros(()), "z": torch.zeros(5)}, DATA)


@every
def test_data_on_another_device(name: str) -> None:
    guide = build(name)
    with pytest.raises(ValueError, match="Argument `0` must be on cpu.*got meta"):
        guide(DATA.to("meta"))


@every
@pytest.mark.gpu
def test_everything_stays_on_the_gpu(name: str) -> None:
    guide = GUIDES[name].make(hierarchy)
    if isinstance(getattr(guide, "encoder", None), nn.Module):
        guide.encoder.cuda()
    data = DATA.cuda()
    guide.initialize(data)
    svi = SVI(hierarchy, guide, pyro.optim.Adam({"lr": 0.01}), STL(4, max_plate_nesting=1))
    assert torch.tensor(svi.step(data)).isfinite()
    assert all(t.is_cuda for t in guide.state_dict().values())
    assert guide.median(data)["z"].is_cuda
    with pytest.raises(ValueError, match="Argument `0` must be on cuda.*got cpu"):
        guide(DATA)
