"""Solvers of continuous flows: order, gradients, memory, scale, failure."""

from __future__ import annotations

import math
import warnings
import weakref

import pytest
import torch
from building import redraw
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from flowvi.distributions import Flow
from flowvi.nn import FunctionField, GatedField, MLPField
from flowvi.transforms import (
    RK4,
    Adaptive,
    AdaptiveMethod,
    Continuous,
    DormandPrince,
    Euler,
    ExactDivergence,
    Midpoint,
    Solver,
)

TIGHT = {"rtol": 1e-8, "atol": 1e-8}


# Order.


@pytest.mark.parametrize("kind", [Euler, Midpoint, RK4, DormandPrince])
def test_measured_order(kind):
    field = redraw(MLPField(2, (6,)), 0.3)
    x = torch.randn(20, 2)
    with torch.no_grad():
        exact = Continuous(field, solver=DormandPrince(300)).call_and_ladj(x)
        found = [Continuous(field, solver=kind(n)).call_and_ladj(x) for n in (64, 128)]
    for part in (0, 1):
        low, high = ((f[part] - exact[part]).square().mean().sqrt().item() for f in found)
        assert abs(math.log2(low / high) - kind.order) < 0.4


@pytest.mark.parametrize("kind", [Euler, Midpoint, RK4, DormandPrince])
def test_evaluations_are_what_the_method_needs(kind):
    calls = []

    def velocity(t: Tensor, x: Tensor) -> Tensor:
        calls.append(t)
        return -x

    transform = Continuous(FunctionField(2, velocity), ExactDivergence(), kind(3))
    transform(torch.zeros(4, 2))
    stages = {Euler: 1, Midpoint: 2, RK4: 4, DormandPrince: 6}[kind]
    assert transform.last_solve.num_evaluations == 3 * stages
    # The exact divergence evaluates the velocity along the way.
    assert len(calls) == 3 * stages
    assert all(0 <= t <= 1 for t in calls)


# Gradients.

MODES = {
    "direct": DormandPrince(10),
    "checkpointed": DormandPrince(10, checkpointed=True),
    "adaptive": Adaptive(**TIGHT),
    "adjoint": Adaptive(**TIGHT, adjoint=True),
    "adjoint, 8th order": Adaptive(AdaptiveMethod.DOPRI8, **TIGHT, adjoint=True),
}


class Problem:
    """A scalar function of parameters, context and start of a flow."""

    def __init__(self, *, inverse: bool = False) -> None:
        self.field = redraw(GatedField(2, (3,), 2, low_rank=1, hyper_dims=(3,)), 0.4)
        self.x = torch.randn(3, 2, requires_grad=True)
        self.context = torch.randn(3, 2, requires_grad=True)
        self.weights = torch.randn(3, 2), torch.randn(3)
        self.inverse = inverse

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, self.context, *self.field.parameters()]

    def value(self, solver: Solver) -> Tensor:
        transform = Continuous(self.field, solver=solver)
        method = transform.inverse_and_ladj if self.inverse else transform.call_and_ladj
        y, ladj = method(self.x, self.context)
        return (self.weights[0] * y.sin()).sum() + (self.weights[1] * ladj.square()).sum()

    def gradients(self, solver: Solver) -> list[Tensor]:
        return torch.autograd.grad(self.value(solver), self.leaves)

    @torch.no_grad()
    def slopes(self, solver: Solver, directions: list[Tensor], step: float = 1e-5) -> list[float]:
        """Central differences along one direction of every leaf."""
        found = []
        for leaf, direction in zip(self.leaves, directions, strict=True):
            sides = []
            for shift in (step, -2 * step):
                leaf.add_(shift * direction)
                sides.append(self.value(solver).item())
            leaf.add_(step * direction)
            found.append((sides[0] - sides[1]) / (2 * step))
        return found


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_gradients_equal_finite_differences(inverse):
    problem = Problem(inverse=inverse)
    directions = [torch.randn_like(leaf) for leaf in problem.leaves]
    for solver, modes in (
        (DormandPrince(10), ("direct", "checkpointed")),
        (DormandPrince(30), ("adaptive", "adjoint", "adjoint, 8th order")),
    ):
        expected = problem.slopes(solver, directions)
        for mode in modes:
            gradients = problem.gradients(MODES[mode])
            found = [(g * d).sum().item() for g, d in zip(gradients, directions, strict=True)]
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-5), mode


@pytest.mark.parametrize("mode", MODES)
def test_frozen_parameters_and_inputs(mode):
    problem = Problem()
    expected = problem.gradients(MODES[mode])
    own = list(problem.field.parameters())
    for p in own[::2]:
        p.requires_grad_(False)
    problem.x.requires_grad_(False)
    problem.context.requires_grad_(False)
    problem.value(MODES[mode]).backward()
    assert problem.x.grad is None
    for p, grad in zip(own, expected[2:], strict=True):
        if p.requires_grad:
            torch.testing.assert_close(p.grad, grad, rtol=1e-6, atol=1e-8)
        else:
            assert p.grad is None
    # Nothing but the start is free.
    problem.field.requires_grad_(False)
    problem.x.requires_grad_(True)
    problem.value(MODES[mode]).backward()
    torch.testing.assert_close(problem.x.grad, expected[0], rtol=1e-6, atol=1e-8)
    # Nothing at all.
    problem.x.requires_grad_(False)
    assert not problem.value(MODES[mode]).requires_grad


@pytest.mark.parametrize("mode", MODES)
def test_density_with_constant_parameters(mode):
    """What sticking the landing asks for: the gradient of the value only."""
    problem = Problem()
    q = Flow(Continuous(problem.field, solver=MODES[mode]))(problem.context)
    value = torch.randn(3, 2, requires_grad=True)
    (expected,) = torch.autograd.grad(q.log_prob(value).sum(), value)
    grads = torch.autograd.grad(
        q.log_prob_stopped(value).sum(), [value, *problem.leaves], allow_unused=True
    )
    torch.testing.assert_close(grads[0], expected, rtol=1e-6, atol=1e-8)
    assert all(g is None for g in grads[1:])


def test_path_gradient_is_the_same_in_every_mode():
    problem, found = Problem(), []
    fine = DormandPrince(24), DormandPrince(24, checkpointed=True)
    for solver in (*fine, MODES["adaptive"], MODES["adjoint"]):
        torch.manual_seed(5)
        transform = Continuous(problem.field, solver=solver)
        q = Flow(transform)(problem.context).path_derivative()
        z, log_q = q.rsample_and_log_prob((4,))
        loss = log_q.sum() + z.pow(4).sum()
        found.append(torch.autograd.grad(loss, [problem.context, *problem.field.parameters()]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-4)


def test_checkpoints_work_inside_function_transforms():
    transform = Continuous(redraw(MLPField(2, (4,))), solver=RK4(9, checkpointed=True))
    plain = Continuous(transform.field, solver=RK4(9))
    x = torch.randn(3, 2)
    found, expected = (torch.func.vmap(torch.func.jacrev(t))(x) for t in (transform, plain))
    torch.testing.assert_close(found, expected)


# Memory.


class PeakMemory(TorchDispatchMode):
    """Largest number of bytes in tensors made inside and alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self.track(value.untyped_storage())
        return out

    def track(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.release, key, size)

    def release(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def peak_of(num_steps: int, *, checkpointed: bool) -> int:
    field = redraw(MLPField(2, (16,)), 0.1)
    transform = Continuous(field, solver=Euler(num_steps, checkpointed))
    x = torch.randn(2000, 2)
    with PeakMemory() as memory:
        y, ladj = transform.call_and_ladj(x)
        (y.sum() + ladj.sum()).backward()
    return memory.peak


def test_memory_of_checkpoints_grows_like_the_square_root():
    direct = [peak_of(n, checkpointed=False) for n in (25, 100, 400)]
    saved = [peak_of(n, checkpointed=True) for n in (25, 100, 400)]
    for low, high in zip(direct, direct[1:], strict=False):
        assert 3.5 < high / low < 4.2
    for low, high in zip(saved, saved[1:], strict=False):
        assert 1.4 < high / low < 2.3
    assert direct[-1] > 8 * saved[-1]


# Adaptive solves.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_rows_of_any_scale_are_solved_together(dtype):
    """A homogeneous field turns and grows rows of every size alike."""
    matrix = torch.tensor([[0.4, -3.0], [3.0, 0.2]], dtype=dtype)
    scales = 10.0 ** torch.tensor([-12, -6, 0, 6, 12], dtype=dtype)
    x = torch.randn(5, 2, dtype=dtype) * scales[:, None]
    transform = Continuous(FunctionField(2, lambda t, x: x @ matrix.T), solver=Adaptive())
    y, ladj = transform.call_and_ladj(x)
    expected = x @ torch.linalg.matrix_exp(matrix).T
    relative = (y - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert relative.max() < 2e-4
    torch.testing.assert_close(ladj, torch.full_like(ladj, 0.6), rtol=0, atol=1e-4)
    alone = [transform.call_and_ladj(row)[0] for row in x]
    assert transform.last_solve.num_evaluations < 200
    torch.testing.assert_close(y, torch.stack(alone), rtol=1e-3, atol=0)


def test_small_numbers_beside_large_ones_do_not_stop_the_solve():
    """In float32 the small coordinate has the rounding error of the large one."""
    rotation = lambda t, x: 5 * torch.stack([-x[..., 1], x[..., 0]], -1)  # noqa: E731
    transform = Continuous(FunctionField(2, rotation), solver=Adaptive())
    x = torch.tensor([[1e8, 0.0], [0.0, 1e-3]], dtype=torch.float32)
    y = transform(x)
    turn = torch.tensor([[math.cos(5), math.sin(5)], [-math.sin(5), math.cos(5)]])
    relative = (y.double() - x.double() @ turn).norm(dim=-1) / x.double().norm(dim=-1)
    assert relative.max() < 2e-4


def test_one_hard_row_among_many_is_as_right_as_the_others():
    """A mean over rows would accept steps too long for the one that turns fast."""
    spin = lambda t, x: x[..., 2:] * torch.stack([-x[..., 1], x[..., 0], 0 * x[..., 2]], -1)  # noqa: E731
    transform = Continuous(FunctionField(3, spin), solver=Adaptive())
    x = torch.randn(2000, 3)
    x[:, 2] = 0.1
    x[7, 2] = 30.0
    y = transform(x)
    angle = x[:, 2]
    expected = torch.stack(
        [
            angle.cos() * x[:, 0] - angle.sin() * x[:, 1],
            angle.sin() * x[:, 0] + angle.cos() * x[:, 1],
            angle,
        ],
        -1,
    )
    # Its size is 17 and it turns by 30 radians.
    assert (y - expected).norm(dim=-1).max() < 2e-2


@pytest.mark.parametrize("method", list(AdaptiveMethod))
def test_every_method_meets_its_tolerance(method):
    field = redraw(MLPField(2, (6,)), 0.8)
    x = torch.randn(20, 2)
    with torch.no_grad():
        exact = Continuous(field, solver=DormandPrince(300)).call_and_ladj(x)
        solver = Adaptive(method, rtol=1e-5, atol=1e-5)
        found = Continuous(field, solver=solver).call_and_ladj(x)
        report = Continuous(field, solver=solver).report(x)
    error = (found[0] - exact[0]).norm(dim=-1).max()
    assert error < 1e-3
    assert 0.3 < report.error / error < 3


def test_empty_batches():
    transform = Continuous(redraw(MLPField(2, (6,))), solver=Adaptive())
    y, ladj = transform.call_and_ladj(torch.zeros(0, 2))
    assert y.shape == (0, 2)
    assert ladj.shape == (0,)


def test_too_many_evaluations_degrade_with_a_warning():
    stiff = FunctionField(2, lambda t, x: -80 * (x - (6 * t).cos()))
    transform = Continuous(stiff, solver=Adaptive(max_nfe=240), name="posterior").eval()
    x = torch.randn(5, 2)
    with pytest.warns(UserWarning, match="posterior was not solved .* max_nfe=240 .* 40 fixed"):
        y = transform(x)
    assert "40 fixed steps instead" in transform.last_solve.note
    exact = Continuous(stiff, solver=DormandPrince(800))(x)
    assert (y - exact).abs().max() < 1e-2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        free = Continuous(stiff, solver=Adaptive())
        free(x)
    assert free.last_solve.note == ""
    assert free.last_solve.num_evaluations > 240


def test_adjoint_that_cannot_be_solved_backwards_degrades():
    """Forwards this field forgets, so backwards it explodes."""
    field = FunctionField(1, lambda t, x: -field.rate * (x - (3 * t).cos()))
    field.rate = torch.nn.Parameter(torch.tensor(60.0))
    solver = Adaptive(rtol=1e-6, atol=1e-6, max_nfe=900, adjoint=True)
    x = torch.randn(4, 1, requires_grad=True)
    y = Continuous(field, solver=solver, name="decay")(x)
    with pytest.warns(UserWarning, match="The gradient of decay was not solved"):
        (grad,) = torch.autograd.grad(y.sum(), field.rate)
    plain = Continuous(field, solver=DormandPrince(400))(x)
    (expected,) = torch.autograd.grad(plain.sum(), field.rate)
    torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_fields_that_are_not_finite_are_named(training):
    field = FunctionField(2, lambda t, x: torch.where(t > 0.5, math.nan, 1.0) * x)
    transform = Continuous(field, solver=Adaptive(), name="prior").train(training)
    with pytest.raises(
        RuntimeError, match="The field of prior cannot be solved: it is not finite"
    ):
        transform(torch.ones(3, 2))


def test_adjoint_refuses_further_integrals_and_scores():
    transform = Continuous(MLPField(2), solver=Adaptive(adjoint=True))
    assert not transform.has_score_recursion
    x = torch.zeros(3, 2)
    with pytest.raises(NotImplementedError, match="adjoint integrates the log-determinant only"):
        transform.call_with_integrals(x, [lambda stage: stage.divergence])
    with pytest.raises(NotImplementedError, match="adjoint integrates the log-determinant only"):
        transform.call_ladj_and_score(x, -x)


@pytest.mark.parametrize("adjoint", [False, True])
def test_adaptive_solves_run_on_meta(adjoint):
    transform = Continuous(MLPField(2, (4,)), solver=Adaptive(adjoint=adjoint)).to("meta")
    y, ladj = transform.call_and_ladj(torch.empty(5, 2, device="meta"))
    (y.sum() + ladj.sum()).backward()
    assert y.is_meta
    assert all(p.grad is not None for p in transform.parameters())


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="`num_steps` must be a positive integer; got 0"):
        RK4(0)
    with pytest.raises(ValueError, match="`num_steps` must be a positive integer; got 2.5"):
        Euler(2.5)
    with pytest.raises(ValueError, match="`rtol` must be positive; got 0"):
        Adaptive(rtol=0.0)
    with pytest.raises(ValueError, match="`max_nfe` must be at least 20; got 3"):
        Adaptive(max_nfe=3)
    with pytest.raises(TypeError, match="`method` must be an AdaptiveMethod; got 'dopri5'"):
        Adaptive("dopri5")
