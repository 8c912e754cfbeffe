"""The posteriors of ``quality.py`` in NumPyro, where it is installed."""

from __future__ import annotations

import time
from collections.abc import Sequence

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
from _svi_numpyro import eight_schools
from jax import numpy as jnp
from jax.example_libraries import stax
from numpyro.infer import SVI, Trace_ELBO, autoguide

__all__ = ["numpyro_curve"]


def funnel(like: jax.Array) -> None:
    z0 = numpyro.sample("z0", dist.Normal(0.0, 3.0))
    with numpyro.plate("rest", 9):
        numpyro.sample("z", dist.Normal(0.0, jnp.exp(0.5 * z0)))


def seeds(n: jax.Array, total: jax.Array, x1: jax.Array, x2: jax.Array) -> None:
    tau = numpyro.sample("tau", dist.Gamma(0.01, 0.01))
    a = numpyro.sample("a", dist.Normal(jnp.zeros(4), 10.0).to_event(1))
    fixed = jnp.stack([jnp.ones_like(x1), x1, x2, x1 * x2], -1) @ a
    with numpyro.plate("plate", len(n)):
        b = numpyro.sample("b", dist.Normal(0.0, 1 / jnp.sqrt(tau)))
        numpyro.sample("n", dist.Binomial(total.astype(int), logits=fixed + b), obs=n)


def german_credit(x: jax.Array, label: jax.Array) -> None:
    w = numpyro.sample("w", dist.Normal(jnp.zeros(x.shape[-1]), 1.0).to_event(1))
    with numpyro.plate("applicant", len(x)):
        numpyro.sample("label", dist.Bernoulli(logits=x @ w), obs=label)


MODELS = {
    "eight_schools": eight_schools,
    "funnel": funnel,
    "seeds": seeds,
    "german_credit": german_credit,
}
_CHUNK = 500


def numpyro_curve(
    kind: str,
    target: str,
    arrays: Sequence[np.ndarray],
    exact: float,
    num_steps: int,
    setting: tuple[float, float, int, int],
) -> list[tuple[float, float, float]]:
    """Gap and its standard error against CPU seconds, compiling included."""
    first, last, particles, draws = setting
    jax.config.update("jax_enable_x64", True)
    began, spent, curve = time.process_time(), 0.0, []
    model, data = MODELS[target], [jnp.asarray(array) for array in arrays]
    options = {}
    if kind == "AutoIAFNormal":
        options = {"num_flows": 3, "hidden_dims": [50, 50], "nonlinearity": stax.Relu}
    guide = getattr(autoguide, kind)(model, **options)
    rate = jax.numpy.log(last / first) / num_steps
    optim = numpyro.optim.Adam(lambda step: first * jnp.exp(rate * step))
    svi = SVI(model, guide, optim, Trace_ELBO(particles))
    state = svi.init(jax.random.key(0), *data)
    measured = Trace_ELBO(draws // 10)

    @jax.jit
    def steps(state: object) -> object:
        return jax.lax.scan(lambda s, _: svi.update(s, *data), state, None, length=_CHUNK)[0]

    @jax.jit
    def loss(key: jax.Array, params: dict) -> jax.Array:
        return measured.loss(key, params, model, guide, *data)

    following = 0.25
    for done in range(_CHUNK, num_steps + _CHUNK, _CHUNK):
        state = jax.block_until_ready(steps(state))
        seconds = spent + time.process_time() - began
        if seconds > following or done >= num_steps:
            params = svi.get_params(state)
            keys = jax.random.split(jax.random.key(1), 10)
            losses = np.array([float(loss(key, params)) for key in keys])
            error = float(losses.std() / np.sqrt(10))
            gap = float(losses.mean()) + exact
            curve.append((round(seconds, 3), round(gap, 4), round(error, 4)))
            spent, following, began = seconds, 1.5 * seconds, time.process_time()
    return curve
