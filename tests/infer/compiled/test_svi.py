"""Compiled steps are the eager steps of the user's optimiser, and either can go on."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from step_programs import DATA, guide, model
from torch import Tensor, nn

from flowvi.infer import CompiledSVI, FlowSVI, GlobalOptim, Schedule
from flowvi.infer.compiled import Interpreter, NotCompilable
from flowvi.objectives import ELBO, BetaELBO, LinearSchedule


def compiled(optim: pyro.optim.PyroOptim, **options: object) -> CompiledSVI:
    options = {"backend": Interpreter(), "check": 0, "loss": Trace_ELBO(), **options}
    loss = options.pop("loss")
    return CompiledSVI(options.pop("model", model), guide, optim, loss, **options)


OPTIMIZERS: dict[str, Callable] = {
    "adam": lambda: pyro.optim.Adam({"lr": 0.05, "weight_decay": 0.1}),
    "adamw": lambda: pyro.optim.AdamW({"lr": 0.05, "betas": (0.8, 0.9)}),
    "clipped adam": lambda: pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.97, "clip_norm": 0.5}),
    "sgd": lambda: pyro.optim.SGD({"lr": 0.01, "momentum": 0.9, "dampening": 0.3}),
    "sgd, nesterov": lambda: pyro.optim.SGD({"lr": 0.01, "momentum": 0.9, "nesterov": True}),
    "sgd, plain": lambda: pyro.optim.SGD({"lr": 0.01, "weight_decay": 0.1}),
    "global": lambda: GlobalOptim(0.05, clip_norm=1.0, schedule=Schedule(60)),
    "rmsprop": lambda: pyro.optim.RMSprop({"lr": 0.01, "weight_decay": 0.1, "alpha": 0.9}),
    "rmsprop, centred": lambda: pyro.optim.RMSprop({"lr": 0.01, "centered": True}),
    "rmsprop, in Python": lambda: pyro.optim.RMSprop({"lr": 0.01, "momentum": 0.5}),
    "adam clipped by tensor, in Python": lambda: pyro.optim.Adam({"lr": 0.05}, {"clip_norm": 1.0}),
}


def parameters() -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in pyro.get_param_store().named_parameters()}


def trajectory(svi: SVI, num_steps: int = 50) -> tuple[list[float], dict[str, Tensor]]:
    torch.manual_seed(1)
    losses = [svi.step(DATA) for _ in range(num_steps)]
    return losses, parameters()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fifty_steps_are_those_of_the_eager_optimiser(name: str):
    losses, expected = trajectory(SVI(model, guide, OPTIMIZERS[name](), Trace_ELBO()))
    pyro.clear_param_store()
    found_losses, found = trajectory(compiled(OPTIMIZERS[name]()))
    # GlobalOptim's eager step clips by a factor in float32.
    assert found_losses == pytest.approx(losses, rel=1e-7)
    for key, value in expected.items():
        assert (value - guide_start(key)).abs().max() > 1e-3
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-7)


def guide_start(name: str) -> Tensor:
    starts = {"loc": torch.tensor([0.3, -0.2]), "sd": torch.tensor([0.5, 0.8]).log()}
    return starts[name]


def test_several_steps_per_call_are_the_steps_one_by_one_with_the_same_noise():
    svi = compiled(pyro.optim.Adam({"lr": 0.05}))
    svi.step(DATA)
    (program,) = svi._programs.values()
    start = parameters()
    losses = svi.run(20, DATA)
    noise = [table[:20].clone() for table in program.noise.tables]
    together = parameters()
    pyro.clear_param_store()
    again = compiled(pyro.optim.Adam({"lr": 0.05}))
    torch.manual_seed(0)
    pyro.set_rng_seed(0)
    again.step(DATA)
    for name, value in parameters().items():
        torch.testing.assert_close(value, start[name])
    (other,) = again._programs.values()
    rows = iter(range(20))

    def given() -> None:
        row = next(rows)
        for table, values in zip(other.noise.tables, noise, strict=True):
            table[0] = values[row]

    other.noise.draw_one = given
    singly = torch.tensor([again.step(DATA) for _ in range(20)])
    torch.testing.assert_close(losses, singly)
    for name, value in parameters().items():
        torch.testing.assert_close(value, together[name], rtol=0, atol=1e-9)


def test_runs_longer_than_a_table_of_draws():
    svi = compiled(GlobalOptim(0.05), loss=ELBO())
    losses = svi.run(300, DATA)
    assert losses.shape == (300,)
    assert losses[-100:].mean() < losses[:20].mean()
    assert svi.optim.step_count == 300
    assert len(losses.unique()) == 300


@pytest.mark.parametrize("name", ["adam", "global", "clipped adam", "sgd"])
def test_eager_and_compiled_steps_take_turns(name: str):
    objective = ELBO(max_plate_nesting=1) if name == "global" else Trace_ELBO()
    _, expected = trajectory(SVI(model, guide, OPTIMIZERS[name](), objective), 12)
    pyro.clear_param_store()
    optim = OPTIMIZERS[name]()
    fast = compiled(optim, loss=objective)
    slow = SVI(model, guide, optim, objective)
    torch.manual_seed(1)
    for i in range(12):
        (slow if i % 4 == 1 else fast).step(DATA)
    for key, value in parameters().items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ["adam", "global"])
@pytest.mark.parametrize("first", [True, False])
def test_a_state_saved_by_one_is_taken_up_by_the_other(name: str, first: bool):
    objective = ELBO(max_plate_nesting=1) if name == "global" else Trace_ELBO()
    _, expected = trajectory(SVI(model, guide, OPTIMIZERS[name](), objective), 8)
    pyro.clear_param_store()
    makers = [
        lambda optim: compiled(optim, loss=objective),
        lambda optim: SVI(model, guide, optim, objective),
    ]
    makers = makers if first else makers[::-1]
    optim = OPTIMIZERS[name]()
    svi = makers[0](optim)
    torch.manual_seed(1)
    for _ in range(4):
        svi.step(DATA)
    state = copy.deepcopy(optim.get_state())
    values = copy.deepcopy(pyro.get_param_store().get_state())
    pyro.clear_param_store()
    pyro.get_param_store().set_state(values)
    later = OPTIMIZERS[name]()
    if name == "global":
        later.admit(pyro.get_param_store().named_parameters())
    later.set_state(state)
    svi = makers[1](later)
    for _ in range(4):
        svi.step(DATA)
    for key, value in parameters().items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-7)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted():
    svi = compiled(GlobalOptim(0.05), loss=ELBO())
    svi.step(DATA)
    before, counts = parameters(), svi.optim.get_state()["moments"]["loc"]["step"].clone()
    assert not torch.tensor(svi.step(DATA * torch.inf)).isfinite()
    assert bool(svi.optim.last_skipped)
    assert int(svi.optim.skipped) == 1
    for name, value in parameters().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert svi.optim.get_state()["moments"]["loc"]["step"] == counts
    svi.step(DATA)
    assert not bool(svi.optim.last_skipped)
    assert int(svi.optim.skipped) == 1
    assert svi.optim.step_count == 3
    eager = FlowSVI(model, guide, svi.optim, ELBO())
    eager.step(DATA * torch.inf)
    assert int(svi.optim.skipped) == 2
    svi.step(DATA * torch.inf)
    assert int(svi.optim.skipped) == 3


def test_a_schedule_of_the_objective_and_its_report():
    def make() -> BetaELBO:
        return BetaELBO(2, beta=LinearSchedule(10), max_plate_nesting=1)

    eager = FlowSVI(model, guide, GlobalOptim(0.05), make())
    losses, expected = trajectory(eager, 6)
    betas = eager.objective.report["beta/latent"]
    pyro.clear_param_store()
    svi = compiled(GlobalOptim(0.05), loss=make(), check=2)
    found, values = trajectory(svi, 6)
    assert found == pytest.approx(losses)
    for key, value in expected.items():
        torch.testing.assert_close(values[key], value, rtol=0, atol=1e-9)
    assert svi.objective.report["beta/latent"] == pytest.approx(float(betas))
    assert int(svi.objective.step) == 6


def test_checks_leave_everything_as_it_was():
    net = nn.Sequential(nn.Linear(1, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))

    def prior(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def encoder(y: Tensor) -> None:
        pyro.module("net", net)
        loc, log_scale = net(y[:, None]).unbind(-1)
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))

    def after(num_checks: int) -> dict[str, Tensor]:
        torch.manual_seed(3)
        optim = pyro.optim.Adam({"lr": 0.01})
        if num_checks < 0:
            svi = SVI(prior, encoder, optim, Trace_ELBO())
        else:
            options = {"backend": Interpreter(), "check": num_checks}
            svi = CompiledSVI(prior, encoder, optim, Trace_ELBO(), **options)
        for _ in range(3):
            svi.step(DATA)
        return {n: t.detach().clone() for n, t in net.state_dict().items()}

    start = copy.deepcopy(net.state_dict())
    expected = after(-1)
    for num_checks in (0, 2):
        pyro.clear_param_store()
        net.load_state_dict(start)
        for name, value in after(num_checks).items():
            torch.testing.assert_close(value, expected[name])


def test_new_shapes_are_compiled_and_share_one_state():
    svi = compiled(pyro.optim.Adam({"lr": 0.05}))
    batches = [DATA, DATA[:3], DATA, DATA[:3]]
    torch.manual_seed(1)
    losses = [svi.step(batch) for batch in batches]
    found = parameters()
    assert len(svi._programs) == 2
    assert len(svi._buffers) == 1
    pyro.clear_param_store()
    eager = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    torch.manual_seed(1)
    assert losses == pytest.approx([eager.step(batch) for batch in batches])
    for key, value in parameters().items():
        torch.testing.assert_close(value, found[key], rtol=0, atol=1e-9)


def test_data_that_cannot_be_changed_is_checked():
    optim = pyro.optim.Adam({"lr": 0.05})
    svi = compiled(optim, check=1)
    assert svi.step(torch.tensor(0.7).expand(5)) == pytest.approx(svi.step(DATA), abs=100)
    assert len(svi._programs) == 2


def test_too_many_shapes_are_refused():
    svi = compiled(pyro.optim.Adam({"lr": 0.05}), max_programs=1)
    svi.step(DATA)
    with pytest.raises(NotCompilable, match=r"`max_programs` must be .*; got 1\. Pad batches"):
        svi.step(DATA[:3])


def test_training_flags_are_settings():
    net = nn.Sequential(nn.Linear(1, 2), nn.Dropout(0.5))

    def encoder(y: Tensor) -> None:
        pyro.module("net", net)
        loc, log_scale = net(y[:, None]).unbind(-1)
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))

    def prior(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    optim = pyro.optim.SGD({"lr": 1e-3})
    svi = CompiledSVI(prior, encoder, optim, Trace_ELBO(), backend=Interpreter(), check=0)
    svi.step(DATA)
    net.eval()
    svi.step(DATA)
    assert len(svi._programs) == 2
    net.train()
    svi.step(DATA)
    assert len(svi._programs) == 2


def branching(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean if mean > 0 else -mean, scale), obs=y)


def test_fallback_takes_eager_steps_and_says_why():
    _, expected = trajectory(SVI(branching, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO()), 5)
    pyro.clear_param_store()
    svi = compiled(pyro.optim.Adam({"lr": 0.05}), model=branching, fallback=True)
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match=r"Steps are eager: .*value of a tensor in Python"):
        svi.step(DATA)
    assert svi.run(4, DATA).shape == (4,)
    assert len(svi.notes) == 1
    for key, value in parameters().items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-12)


def test_a_wrong_compiled_step_is_not_trusted():
    class Wrong(Interpreter):
        def prepare(self, step: object) -> object:
            loop = super().prepare(step)
            right = loop.run

            def run(inputs: list[Tensor], num_steps: int) -> None:
                right(inputs, num_steps)
                inputs[1].mul_(1.01)

            loop.run = run
            return loop

    svi = compiled(pyro.optim.Adam({"lr": 0.05}), backend=Wrong(), check=1)
    with pytest.raises(NotCompilable, match="the optimiser's state differs"):
        svi.step(DATA)


def test_parameters_of_two_dtypes_are_refused():
    def mixed(y: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.3, dtype=torch.float32))
        scale = pyro.param("sd", torch.tensor(0.5, dtype=torch.float64))
        pyro.sample("mean", dist.Normal(loc, scale))
        pyro.sample("scale", dist.LogNormal(loc, scale))

    svi = CompiledSVI(
        model, mixed, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(), backend=Interpreter()
    )
    with pytest.raises(NotCompilable, match="needs parameters of one dtype and device"):
        svi.step(DATA)


def test_parameters_updated_unequally_are_refused():
    svi = compiled(GlobalOptim(0.05), loss=ELBO())
    svi.step(DATA)
    state = copy.deepcopy(svi.optim.get_state())
    state["moments"]["loc"]["step"] += 1
    svi.optim.set_state(state)
    with pytest.raises(NotCompilable, match="updated equally often"):
        svi.step(DATA)


def test_arguments_are_checked():
    optim = pyro.optim.Adam({"lr": 0.05})
    with pytest.raises(TypeError, match="`backend` must be a Backend; got str"):
        compiled(optim, backend="inductor")
    with pytest.raises(ValueError, match="`check` must be an integer of at least 0; got -1"):
        compiled(optim, check=-1)
    with pytest.raises(ValueError, match="`max_programs` must be an integer of at least 1"):
        compiled(optim, max_programs=0)
    with pytest.raises(ValueError, match="`num_steps` must be an integer of at least 1; got 0"):
        compiled(optim).run(0, DATA)


def test_a_program_without_parameters_is_refused():
    def fixed(y: Tensor) -> None:
        pyro.sample("mean", dist.Normal(0.0, 1.0))
        pyro.sample("scale", dist.LogNormal(0.0, 1.0))

    optim = pyro.optim.Adam({"lr": 0.05})
    svi = CompiledSVI(model, fixed, optim, Trace_ELBO(), backend=Interpreter())
    with pytest.raises(NotCompilable, match="must train at least one parameter"):
        svi.step(DATA)


def test_minibatch_indices_are_drawn_in_every_step():
    def local(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(y), subsample_size=2) as index:
            pyro.sample("y", dist.Normal(mean, scale), obs=y[index])

    svi = compiled(pyro.optim.Adam({"lr": 0.05}), model=local)
    svi.run(40, DATA)
    (program,) = svi._programs.values()
    (table,) = (t for t in program.noise.tables if t.dtype == torch.int64)
    assert table.shape == (256, 2)
    assert (table[:40, 0] != table[:40, 1]).all()
    assert table[:40].unique().tolist() == [0, 1, 2, 3, 4]


def test_an_automatic_guide_is_trained():
    automatic = AutoNormal(model)
    optim = pyro.optim.Adam({"lr": 0.05})
    svi = CompiledSVI(model, automatic, optim, Trace_ELBO(), backend=Interpreter(), check=1)
    losses = svi.run(200, DATA)
    assert losses[-50:].mean() < losses[:20].mean()
    assert automatic.median(DATA)["mean"] != 0
