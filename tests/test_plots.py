from __future__ import annotations

import math
from dataclasses import replace

import matplotlib
import pytest
import torch

from flowvi import plots
from flowvi.diagnostics import Comparison, ComparisonRow, GradientReport, GradientRow
from flowvi.diagnostics.importance import Bound
from flowvi.diagnostics.shifts import Shifts

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

BOUND = Bound(-2.0, 0.1)
ROWS = (
    ComparisonRow("a", "ELBO", 8, 10, BOUND, False, BOUND, {10: Bound(-1.0, 0.1)}, 0.3, True,
                  1.0, 0.5, 5, 3.0, 1.0),
    ComparisonRow("a", "CUBO", 8, 10, Bound(1.0, 0.1), True, Bound(-1e9, 1.0), {}, math.inf),
    ComparisonRow("b", "STL", 8, failure="NotImplementedError: " + 30 * "long "),
)  # fmt: skip
ESTIMATORS = tuple(
    GradientRow(f"{kind} {k}", kind, k, 1.0, 2.0, 0.5 * k)
    for kind in ("IWAE", "DReG")
    for k in (1, 4)
)
LABELS = ["mu", "theta[0]", "theta[1]"]


@pytest.fixture(autouse=True)
def _close():
    yield
    pyplot.close("all")


def _shifts():
    return Shifts(LABELS, *(torch.tensor([0.1, 0.2, 0.02]) for _ in range(4)))


CASES = {
    "marginals": lambda ax=None: plots.marginals(
        {"a": torch.randn(200), "b": torch.zeros(200)}, ax, reference=torch.randn(50), label="mu"
    ),
    "pairs": lambda ax=None: plots.pairs({"a": torch.randn(50, 3)}, ax, labels=LABELS),
    "pairs, one": lambda ax=None: plots.pairs({"a": torch.randn(50, 1)}, ax, labels=["mu"]),
    "elbo_trace": lambda ax=None: plots.elbo_trace(torch.randn(300), ax),
    "elbo_trace, short": lambda ax=None: plots.elbo_trace(torch.tensor([3.0, 2.0, 1.0]), ax),
    "shift_errors": lambda ax=None: plots.shift_errors(_shifts(), ax),
    "drift_scores": lambda ax=None: plots.drift_scores(_shifts(), ax),
    "comparison": lambda ax=None: plots.comparison(Comparison(ROWS, "10 steps", 0.0), ax),
    "comparison, no evidence": lambda ax=None: plots.comparison(Comparison(ROWS, ""), ax),
    "gradients": lambda ax=None: plots.gradients(GradientReport(ESTIMATORS, 3, 100, 2), ax),
    "image_grid": lambda ax=None: plots.image_grid(torch.rand(5, 1, 8, 6), ax),
    "image_grid, colours": lambda ax=None: plots.image_grid(torch.rand(3, 3, 4, 4), ax),
    "latent_manifold": lambda ax=None: plots.latent_manifold(
        lambda z: z.sum(-1).reshape(-1, 1, 1, 1).expand(-1, 1, 4, 5), ax, num_columns=3
    ),
    "latent_points": lambda ax=None: plots.latent_points(torch.randn(9, 2), ax),
    "latent_points, labels": lambda ax=None: plots.latent_points(
        torch.randn(9, 2), ax, labels=torch.arange(9) % 4
    ),
    "pareto_k_bars": lambda ax=None: plots.pareto_k_bars({"a": 0.2, "b": float("inf")}, ax),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_draws_on_a_given_axes_and_makes_its_own(case):
    _, ax = pyplot.subplots()
    assert case(ax) is ax
    own = case()
    assert isinstance(own, Axes)
    assert own is not ax
    own.figure.canvas.draw()


def test_marginal_density_is_that_of_the_draws():
    ax = plots.marginals({"a": torch.randn(20_000) * 2 + 1})
    x, y = ax.lines[0].get_data()
    exact = torch.distributions.Normal(1.0, 2.0).log_prob(torch.as_tensor(x)).exp().numpy()
    assert abs(y - exact).max() < 0.02


def test_elbo_trace_is_the_moving_average():
    losses = torch.arange(100.0)
    losses[7] = float("nan")
    ax = plots.elbo_trace(losses, window=10)
    x, y = ax.lines[0].get_data()
    assert x[-1] == 99
    assert y[-1] == pytest.approx(-94.5)


def test_pareto_colours_follow_the_threshold():
    ax = plots.pareto_k_bars({"good": 0.69, "bad": 0.71})
    assert ax.patches[0].get_facecolor() != ax.patches[1].get_facecolor()


def test_image_grid_puts_images_in_rows():
    images = torch.arange(3.0).reshape(3, 1, 1, 1).expand(3, 1, 2, 3)
    ax = plots.image_grid(images, num_columns=2, high=4.0)
    sheet = ax.images[0].get_array()
    assert sheet.shape == (5, 7, 3)
    assert (sheet[:2, :3] == 0).all()
    assert (sheet[:2, 4:] == 0.25).all()
    assert (sheet[3:, :3] == 0.5).all()
    assert (sheet[2] == 1).all()


def test_latent_manifold_is_even_in_probability():
    seen = []
    plots.latent_manifold(lambda z: seen.append(z) or torch.zeros(len(z), 1, 2, 2), num_columns=4)
    grid = torch.special.ndtr(seen[0]).unflatten(0, (4, 4))
    places = torch.tensor([1, 3, 5, 7]) / 8
    assert torch.allclose(grid[..., 0], places.expand(4, 4), atol=1e-6)
    # The second latent grows upwards.
    assert torch.allclose(grid[..., 1], places.flip(0).unsqueeze(-1).expand(4, 4), atol=1e-6)


def test_latent_points_have_a_colour_for_each_label():
    ax = plots.latent_points(torch.randn(30, 2), labels=torch.arange(30) % 10)
    colors = {tuple(c.get_facecolor()[0]) for c in ax.collections}
    assert len(colors) == 10


def test_messages():
    with pytest.raises(ValueError, match="`num_columns` must be at least 2; got 1"):
        plots.latent_manifold(lambda z: z, num_columns=1)
    with pytest.raises(ValueError, match=r"`z` must have shape \(N, 2\); got \(3, 3\)"):
        plots.latent_points(torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"`labels` must have shape \(3,\); got \(2,\)"):
        plots.latent_points(torch.zeros(3, 2), labels=torch.zeros(2))
    with pytest.raises(ValueError, match=r"`images` must have shape \(N, C, H, W\)"):
        plots.image_grid(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="`num_columns` must be at least 1; got 0"):
        plots.image_grid(torch.zeros(3, 1, 8, 8), num_columns=0)
    with pytest.raises(ValueError, match="`draws` must hold at least one guide"):
        plots.marginals({})
    with pytest.raises(ValueError, match=r"`draws\['a'\]` must be a vector of at least 2 finite"):
        plots.marginals({"a": torch.tensor([1.0, float("nan")])})
    with pytest.raises(ValueError, match=r"`draws\['a'\]` must have shape \(num_draws, 3\)"):
        plots.pairs({"a": torch.randn(5, 2)}, labels=LABELS)
    with pytest.raises(ValueError, match="`window` must be at least 2; got 1"):
        plots.elbo_trace(torch.randn(5), window=1)
    with pytest.raises(ValueError, match="`losses` must hold at least 2 finite values; got 1"):
        plots.elbo_trace(torch.tensor([1.0, float("inf")]))
    with pytest.raises(ValueError, match="`result` must hold at least one row"):
        plots.comparison(Comparison((), ""))
    with pytest.raises(ValueError, match="`report` must hold a finite signal-to-noise"):
        plots.gradients(GradientReport((), 3, 100, 2))
    with pytest.raises(ValueError, match="`values` must hold at least one Pareto k"):
        plots.pareto_k_bars({})


def test_comparison_shows_every_pair_and_where_its_bounds_are():
    ax = plots.comparison(Comparison(ROWS, "", 0.0))
    bounds, *_ = ax.child_axes
    assert [t.get_text() for t in bounds.get_yticklabels()] == ["a", "ELBO", "CUBO", "b", "STL"]
    points = [tuple(map(float, (*line.get_xdata(), line.get_ydata()[0])))
              for line in bounds.lines
              if line.get_marker() in ("o", "<") and len(line.get_xdata())]  # fmt: skip
    # From the open circle of the ELBO to the filled one; 10,000 nats is as low as is drawn.
    assert points[:2] == [(-2.0, 1.0), (-1.0, 1.0)]
    assert (-1e4, 2.0) in points
    assert (1.0, 2.0) in points
    assert any(t.get_text().startswith("refused: long") for t in bounds.texts)


@pytest.mark.parametrize("slowest", [30.0, 2e3, 4e7])
def test_comparison_has_few_round_ticks_on_a_logarithmic_axis(slowest: float):
    rows = [replace(ROWS[0], milliseconds=ms) for ms in (3.3, slowest)]
    ax = plots.comparison(Comparison(tuple(rows), "", 0.0))
    panel = ax.child_axes[-1]
    assert panel.get_xlabel() == "ms per step"
    labels = [text.get_text() for text in panel.get_xticklabels()]
    assert panel.get_xscale() == "log"
    assert 1 <= len(labels) <= 4
    assert all(3.3 <= float(label) <= slowest for label in labels)
    assert not panel.get_xticks(minor=True).size
