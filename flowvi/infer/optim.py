"""One optimiser over all parameters, with global clipping, a schedule and a non-finite guard."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import pyro
import pyro.optim
import torch
from torch import Tensor, nn
from torch.optim.adam import adam

__all__ = ["GlobalOptim", "Schedule"]


class Schedule:
    r"""Linear warm-up, then a cosine from 1 down to ``final``.

    After :meth:`finish` the rest of the cosine is replaced by a shorter one that starts at the
    factor reached.

    Args:
        num_steps: length of the whole schedule, at least 1.
        warmup_steps: steps of linear warm-up.
        final: factor at the end, in [0, 1].
    """

    def __init__(self, num_steps: int, *, warmup_steps: int = 20, final: float = 0.0) -> None:
        self.num_steps = num_steps
        self.warmup_steps = min(warmup_steps, num_steps // 2)
        self.final = final
        self._from = self.warmup_steps
        self._height = 1.0

    def __call__(self, step: int) -> float:
        """Factor of the learning rate at ``step``, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = (step - self._from) / max(self.num_steps - self._from, 1)
        cosine = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        return self.final + (self._height - self.final) * cosine

    def finish(self, step: int, cooldown: int) -> None:
        """End after ``cooldown`` more steps, if that is earlier than planned."""
        if step + cooldown >= self.num_steps:
            return
        self._height = self(step)
        self._from = step
        self.num_steps = step + cooldown

    def state_dict(self) -> dict:
        """Numbers that :meth:`load_state_dict` restores."""
        return {"num_steps": self.num_steps, "from": self._from, "height": self._height}

    def load_state_dict(self, state: dict) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.num_steps = state["num_steps"]
        self._from, self._height = state["from"], state["height"]


class GlobalOptim(pyro.optim.PyroOptim):
    """One fused Adam over every parameter seen so far; usable wherever ``SVI`` takes an optimiser.

    It grows when new parameters appear. The gradient of all parameters together is clipped to
    ``clip_norm``. A step whose loss or gradient is not finite changes nothing, is counted, and
    is found out on the device, without a sync.

    Args:
        lr: learning rate, positive.
        betas: Adam's decay rates.
        clip_norm: bound on the global gradient norm; ``None`` clips nothing.
        schedule: factor of the learning rate as a function of the step.

    References:
        Kingma and Ba (2015), Adam, arXiv:1412.6980, algorithm 1.
    """

    def __init__(
        self,
        lr: float = 1e-2,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        clip_norm: float | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        if not lr > 0:
            raise ValueError(f"`lr` must be positive; got {lr!r}.")
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"`clip_norm` must be positive; got {clip_norm!r}.")
        super().__init__(torch.optim.Adam, {"lr": lr, "betas": betas})
        self.lr = lr
        self.betas = betas
        self.clip_norm = clip_norm
        self.schedule = schedule
        self.step_count = 0
        self.skipped: Tensor | None = None
        self.last_skipped: Tensor | None = None
        self.moments: dict[str, dict[str, Tensor]] = {}
        self._names: dict[str, nn.Parameter | Tensor] = {}
        self._known: set[int] = set()

    def __call__(
        self, params: Iterable[Tensor], loss: Tensor | None = None, *args: object, **kwargs: object
    ) -> None:
        """Take one step on every known parameter that has a gradient."""
        self.admit(self._named(params))
        named = {n: p for n, p in self._names.items() if p.grad is not None}
        if not named:
            return
        grads = [p.grad for p in named.values()]
        norm = nn.utils.get_total_norm(grads)
        bad = ~norm.isfinite() if loss is None else ~(norm.isfinite() & loss.isfinite())
        self.last_skipped = bad
        self.skipped = bad.to(torch.int64) if self.skipped is None else self.skipped + bad
        self._step(named, grads, norm, bad)
        self.step_count += 1

    @torch.no_grad()
    def _step(
        self, named: dict[str, Tensor], grads: list[Tensor], norm: Tensor, bad: Tensor
    ) -> None:
        # The class torch.optim.Adam would do the same, but it first imports all of torch's
        # compiler, at the price of a small fit.
        for name, param in named.items():
            if name not in self.moments:
                self.moments[name] = {
                    "step": torch.zeros((), dtype=torch.float32, device=param.device),
                    "exp_avg": torch.zeros_like(param),
                    "exp_avg_sq": torch.zeros_like(param),
                }
        moments = [self.moments[name] for name in named]
        clip, factor = self.clip_norm, 1.0
        if self.schedule is not None:
            factor = self.schedule(self.step_count)
        adam(
            list(named.values()),
            grads,
            [m["exp_avg"] for m in moments],
            [m["exp_avg_sq"] for m in moments],
            [],
            [m["step"] for m in moments],
            fused=True,
            # Fused Adam divides by `grad_scale` and does nothing where `found_inf` is set.
            grad_scale=None if clip is None else (norm / clip).clamp(min=1.0).float(),
            found_inf=bad.float(),
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=self.lr * factor,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )

    def admit(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Take in parameters that are not known yet, under unique names."""
        new = [(n, p) for n, p in named if id(p) not in self._known]
        if not new:
            return
        for name, param in new:
            if id(param) in self._known:
                continue
            while name in self._names:
                name = name + "'"
            self._names[name] = param
            self._known.add(id(param))

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Names and unconstrained values of all known parameters."""
        return iter(self._names.items())

    def get_state(self) -> dict:
        """State by parameter name, in plain tensors and numbers."""
        moments = {name: dict(self.moments.get(name, {})) for name in self._names}
        return {"step_count": self.step_count, "skipped": self.skipped, "moments": moments}

    def set_state(self, state_dict: dict) -> None:
        """Restore what :meth:`get_state` gave; the parameters must be known already."""
        self.step_count = state_dict["step_count"]
        self.skipped = state_dict["skipped"]
        self.moments = {n: dict(m) for n, m in state_dict["moments"].items() if m}

    def _named(self, params: Iterable[Tensor]) -> list[tuple[str, Tensor]]:
        # SVI hands over a set, whose order differs between processes; names do not.
        store = pyro.get_param_store()
        unknown = [p for p in params if id(p) not in self._known]
        named = [(store.param_name(p) or "parameter", p) for p in unknown]
        return sorted(named, key=lambda pair: pair[0])
