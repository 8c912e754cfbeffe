"""The models of ``svi_step.py`` in NumPyro, where it is installed."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import numpy as jnp
from jax.example_libraries import stax
from numpyro.infer import SVI, Trace_ELBO, autoguide

__all__ = ["eight_schools", "numpyro_steps"]


def eight_schools(y: jax.Array, sigma: jax.Array) -> None:
    mean = numpyro.sample("mean", dist.Normal(0.0, 5.0))
    spread = numpyro.sample("spread", dist.HalfCauchy(5.0))
    with numpyro.plate("school", 8):
        effect = numpyro.sample("effect", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(mean + spread * effect, sigma), obs=y)


def logistic(x: jax.Array, y: jax.Array) -> None:
    slope = numpyro.sample("slope", dist.Normal(jnp.zeros(x.shape[1]), 1.0).to_event(1))
    offset = numpyro.sample("offset", dist.Normal(0.0, 1.0))
    with numpyro.plate("row", len(x)):
        numpyro.sample("y", dist.Bernoulli(logits=x @ slope + offset), obs=y)


def _dense(width: int) -> tuple:
    return stax.Dense(width)


def vae_programs(hidden: int, latent: int, pixels: int) -> tuple[Callable, Callable]:
    heads = stax.parallel(_dense(latent), stax.serial(_dense(latent), stax.Exp))
    encoder = stax.serial(_dense(hidden), stax.Softplus, stax.FanOut(2), heads)
    decoder = stax.serial(_dense(hidden), stax.Softplus, _dense(pixels))

    def model(x: jax.Array) -> None:
        decode = numpyro.module("decoder", decoder, (len(x), latent))
        with numpyro.plate("image", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(latent), 1.0).to_event(1))
            numpyro.sample("x", dist.Bernoulli(logits=decode(z)).to_event(1), obs=x)

    def guide(x: jax.Array) -> None:
        encode = numpyro.module("encoder", encoder, (len(x), pixels))
        with numpyro.plate("image", len(x)):
            numpyro.sample("z", dist.Normal(*encode(x)).to_event(1))

    return model, guide


def numpyro_steps(
    model: str, guide: str, data: tuple[np.ndarray, ...], lr: float
) -> dict[str, Callable[[int], None]]:
    """Functions that take a number of steps: one jitted step per call, and one scan over all."""
    arrays = [jnp.asarray(array) for array in data]
    if model == "vae":
        program, made = vae_programs(400, 20, 784)
    else:
        program = {"eight schools": eight_schools, "logistic": logistic}[model]
        dim = {"eight schools": 10, "logistic": 51}[model]
        made = {
            "mean field": lambda: autoguide.AutoNormal(program),
            "full rank": lambda: autoguide.AutoMultivariateNormal(program),
            "iaf": lambda: autoguide.AutoIAFNormal(
                program, num_flows=3, hidden_dims=[dim, dim], nonlinearity=stax.Relu
            ),
        }[guide]()
    svi = SVI(program, made, numpyro.optim.Adam(lr), Trace_ELBO())
    first = svi.init(jax.random.key(0), *arrays)
    state = {"update": first, "scan": first}
    update = jax.jit(svi.update)
    compiled: dict[int, Callable] = {}

    def steps(num_steps: int) -> None:
        for _ in range(num_steps):
            state["update"], loss = update(state["update"], *arrays)
            float(loss)

    def scanned(num_steps: int) -> None:
        if num_steps not in compiled:
            compiled[num_steps] = jax.jit(
                lambda carry, *d: jax.lax.scan(
                    lambda c, _: svi.update(c, *d), carry, None, length=num_steps
                )
            )
        state["scan"], losses = compiled[num_steps](state["scan"], *arrays)
        jax.block_until_ready(losses)

    return {"numpyro update": steps, "numpyro scan": scanned}
