"""The latent-SDE training step of ``sde.py`` as a jitted ``jax.lax.scan``, where jax is there."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax import numpy as jnp
from torch import Tensor, nn

__all__ = ["scan_step"]

# Of Adam, as torch has them.
_RATE, _BETA_1, _BETA_2, _EPS = 1e-3, 0.9, 0.999, 1e-8


def scan_step(module: nn.Module, target: Tensor, residual: float, steps: int) -> Callable:
    """One optimiser step on the parameters that a torch module starts from; compiles it.

    Args:
        module: has networks ``posterior`` and ``prior``, a ``noise`` and the start's ``loc`` and
            ``log_scale``.
        target: observations, ``(observed, batch, dim)``, at equal steps from the start.
        residual: their standard deviation.
        steps: Euler steps.
    """
    params = {name: jnp.asarray(p.detach().numpy()) for name, p in module.named_parameters()}
    state = [params, _zeros(params), _zeros(params), 0]
    seen, every, dt = jnp.asarray(target.numpy()), steps // (len(target) - 1), 1.0 / steps
    _, batch, dim = target.shape

    def loss(p: dict, key: jax.Array) -> jax.Array:
        first, second = jax.random.split(key)
        x = p["loc"] + jnp.exp(p["log_scale"]) * jax.random.normal(first, (batch, dim))
        noise = jax.random.normal(second, (steps, batch, dim)) * dt**0.5

        def move(carry: tuple, given: tuple) -> tuple:
            x, path = carry
            t, dw = given
            g = _network(p, "posterior", jnp.concatenate([x, jnp.full((batch, 1), t)], -1))
            f = _network(p, "prior", x)
            b = 0.2 + jax.nn.sigmoid(p["noise.a"] * x + p["noise.b"])
            path = path + 0.5 * dt * jnp.square((g - f) / b).sum(-1)
            x = x + g * dt + b * dw
            return (x, path), x

        times = jnp.arange(steps) * dt
        (_, path), later = jax.lax.scan(move, (x, jnp.zeros(batch)), (times, noise))
        states = jnp.concatenate([x[None], later[every - 1 :: every]])
        fit = -0.5 * jnp.square((states - seen) / residual).sum((0, 2)).mean()
        square = jnp.square(p["loc"]) + jnp.exp(2 * p["log_scale"]) - 1
        return path.mean() + (0.5 * square - p["log_scale"]).sum() - fit

    @jax.jit
    def update(p: dict, first: dict, second: dict, count: int) -> tuple[dict, dict, dict]:
        grads = jax.grad(loss)(p, jax.random.key(count))
        first = jax.tree.map(lambda m, g: _BETA_1 * m + (1 - _BETA_1) * g, first, grads)
        second = jax.tree.map(lambda v, g: _BETA_2 * v + (1 - _BETA_2) * g * g, second, grads)
        rate = _RATE * jnp.sqrt(1 - _BETA_2**count) / (1 - _BETA_1**count)
        moved = jax.tree.map(lambda w, m, v: w - rate * m / (jnp.sqrt(v) + _EPS), p, first, second)
        return moved, first, second

    def run() -> None:
        state[3] += 1
        state[:3] = update(*state)
        jax.block_until_ready(state[0])

    run()
    return run


def _zeros(params: dict) -> dict:
    return jax.tree.map(jnp.zeros_like, params)


def _network(p: dict, name: str, x: jax.Array) -> jax.Array:
    for place in (0, 2):
        x = jax.nn.softplus(x @ p[f"{name}.{place}.weight"].T + p[f"{name}.{place}.bias"])
    return x @ p[f"{name}.4.weight"].T + p[f"{name}.4.bias"]
