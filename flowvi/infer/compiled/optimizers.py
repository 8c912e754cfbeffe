"""The user's optimiser and a compiled update that share one state, so that either can go on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import pyro
import torch
from pyro.optim.clipped_adam import ClippedAdam as PyroClippedAdam
from torch import Tensor

from flowvi.infer.compiled.hazards import NotCompilable
from flowvi.infer.compiled.step import Buffers
from flowvi.infer.compiled.updates import (
    SGD,
    Adam,
    ClippedAdam,
    GlobalAdam,
    Gradients,
    RMSprop,
    Update,
)
from flowvi.infer.optim import GlobalOptim

__all__ = ["OptimizerState", "state_of"]


class OptimizerState(ABC):
    """An optimiser whose state lives in the flat buffers of a step.

    Args:
        optim: the optimiser.
        named: names and trained tensors.
    """

    update: Update
    # Whether the optimiser itself is called after every step.
    steps_in_python = False

    def __init__(self, optim: pyro.optim.PyroOptim, named: Sequence[tuple[str, Tensor]]) -> None:
        self.optim = optim
        self.params = [param for _, param in named]

    @torch.no_grad()
    def bind(self, buffers: Buffers) -> None:
        """Copy parameters and state into the buffers, and let both be views of them.

        Raises:
            NotCompilable: if the parameters have been updated different numbers of times.
        """
        for param, view in zip(self.params, buffers.layout.split(buffers.param), strict=True):
            view.copy_(param)
            param.data = view
        moments = [buffers.layout.split(moment) for moment in buffers.moments]
        for i, param in enumerate(self.params):
            self._bind_one(i, param, [m[i] for m in moments], buffers.counts[i])
        self._bind_counters(buffers.counters)
        if len(buffers.counts.unique()) > 1:
            raise NotCompilable(
                "A compiled step needs parameters that have been updated equally often; got "
                f"{[int(c) for c in buffers.counts.unique()]} updates. Start with a new optimiser."
            )

    def is_bound(self, buffers: Buffers) -> bool:
        """Whether parameters and state are still views of the buffers."""
        for param, place in zip(self.params, buffers.views, strict=True):
            if param.data_ptr() != place or not param.requires_grad:
                return False
        return True

    @abstractmethod
    def rates(self, num_steps: int) -> list[float]:
        """Learning rates of the steps to come."""

    @abstractmethod
    def advance(self, num_steps: int) -> None:
        """Count steps that were taken."""

    @abstractmethod
    def snapshot(self) -> Callable[[], None]:
        """Remember what is not in the buffers; calling the result restores it."""

    @abstractmethod
    def _bind_one(self, i: int, param: Tensor, moments: list[Tensor], count: Tensor) -> None:
        """Move one parameter's state into the buffers."""

    @abstractmethod
    def _bind_counters(self, counters: Tensor) -> None:
        """Take over the count of skipped steps."""


class _Global(OptimizerState):
    """:class:`GlobalOptim`."""

    def __init__(self, optim: GlobalOptim, named: Sequence[tuple[str, Tensor]]) -> None:
        super().__init__(optim, named)
        optim.admit(named)
        names = {id(param): name for name, param in optim.named_parameters()}
        self._names = [names[id(param)] for param in self.params]
        self.update = GlobalAdam(betas=optim.betas, clip_norm=optim.clip_norm)

    def _bind_one(self, i: int, param: Tensor, moments: list[Tensor], count: Tensor) -> None:
        views = dict(zip(("step", *self.update.state_keys), (count, *moments), strict=True))
        old = self.optim.moments.get(self._names[i], {})
        for key, view in views.items():
            view.copy_(old[key]) if old else view.zero_()
        self.optim.moments[self._names[i]] = views

    def _bind_counters(self, counters: Tensor) -> None:
        skipped = self.optim.skipped
        counters.zero_()
        if skipped is not None:
            counters[1] = skipped
        self.optim.skipped, self.optim.last_skipped = counters[1], counters[2]
        self._skipped = self.optim.skipped
        self._first = [self.optim.moments[name] for name in self._names]

    def is_bound(self, buffers: Buffers) -> bool:
        moments = self.optim.moments
        same = all(moments.get(n) is m for n, m in zip(self._names, self._first, strict=True))
        return same and self.optim.skipped is self._skipped and super().is_bound(buffers)

    def rates(self, num_steps: int) -> list[float]:
        optim, start = self.optim, self.optim.step_count
        if optim.schedule is None:
            return [optim.lr] * num_steps
        return [optim.lr * optim.schedule(start + i) for i in range(num_steps)]

    def advance(self, num_steps: int) -> None:
        self.optim.step_count += num_steps

    def snapshot(self) -> Callable[[], None]:
        optim, count = self.optim, self.optim.step_count
        skipped, last = optim.skipped, optim.last_skipped

        def restore() -> None:
            optim.step_count, optim.skipped, optim.last_skipped = count, skipped, last

        return restore


class _PerParameter(OptimizerState):
    """``pyro.optim.PyroOptim``: one torch optimiser for every parameter."""

    def __init__(self, optim: pyro.optim.PyroOptim, named: Sequence[tuple[str, Tensor]]) -> None:
        super().__init__(optim, named)
        self._admit()
        updates = {_update_of(optim.optim_objs[p], optim.grad_clip[p]) for p in self.params}
        rates = {self._group(p).get("lr") for p in self.params}
        fused = len(updates) == 1 and len(rates) == 1
        self.update = (updates.pop() if fused else None) or Gradients()
        self.steps_in_python = isinstance(self.update, Gradients)
        # Where the optimisers keep views of the buffers.
        self._places: list[tuple[dict, str, Tensor]] = []
        # Of ClippedAdam, which counts its steps in Python.
        self._steps = 0

    def _admit(self) -> None:
        """What PyroOptim does when it first meets a parameter."""
        optim, store = self.optim, pyro.get_param_store()
        for param in self.params:
            if param not in optim.optim_objs:
                single = optim.optim_objs[param] = optim._get_optim(param)
                optim.grad_clip[param] = optim._get_grad_clip(param)
                name = store.param_name(param)
                state = optim._state_waiting_to_be_consumed.pop(name, None)
                if state is not None:
                    single.load_state_dict(state)

    def _group(self, param: Tensor) -> dict:
        groups = getattr(self.optim.optim_objs[param], "param_groups", None) or [{}]
        return groups[0]

    def _bind_one(self, i: int, param: Tensor, moments: list[Tensor], count: Tensor) -> None:
        if self.steps_in_python:
            return
        state = self.optim.optim_objs[param].state[param]
        if isinstance(self.update, SGD):
            count.fill_(1.0 if state.get("momentum_buffer") is not None else 0.0)
        else:
            count.fill_(float(state.get("step", 0)))
        for key, view in zip(self.update.state_keys, moments, strict=False):
            old = state.get(key)
            view.zero_() if old is None else view.copy_(old)
            state[key] = view
            self._places.append((state, key, view))
        if isinstance(self.update, Adam | RMSprop):
            state["step"] = count
        elif isinstance(self.update, ClippedAdam):
            state["step"] = self._steps = int(count)

    def bind(self, buffers: Buffers) -> None:
        self._places = []
        super().bind(buffers)

    def _bind_counters(self, counters: Tensor) -> None:
        counters.zero_()

    def is_bound(self, buffers: Buffers) -> bool:
        if self.optim._state_waiting_to_be_consumed or not super().is_bound(buffers):
            return False
        for state, key, view in self._places:
            if state.get(key) is not view:
                return False
        return not isinstance(self.update, ClippedAdam) or self._count_agrees()

    def _count_agrees(self) -> bool:
        objects = self.optim.optim_objs
        return all(objects[p].state[p].get("step") == self._steps for p in self.params)

    def rates(self, num_steps: int) -> list[float]:
        group = self._group(self.params[0])
        lr = float(group.get("lr", 0.0))
        decay = group["lrd"] if isinstance(self.update, ClippedAdam) else 1.0
        return [lr * decay ** (i + 1) for i in range(num_steps)]

    def advance(self, num_steps: int) -> None:
        if isinstance(self.update, ClippedAdam):
            for param in self.params:
                self.optim.optim_objs[param].state[param]["step"] += num_steps
                group = self._group(param)
                group["lr"] *= group["lrd"] ** num_steps
            self._steps += num_steps
        elif self.steps_in_python:
            self.optim(self.params)
            for param in self.params:
                param.grad = None

    def snapshot(self) -> Callable[[], None]:
        kept = []
        for param in self.params:
            single = self.optim.optim_objs[param]
            state = getattr(single, "state", {}).get(param, {})
            step = state.get("step") if not isinstance(state.get("step"), Tensor) else None
            kept.append((self._group(param), self._group(param).get("lr"), state, step))

        steps = self._steps

        def restore() -> None:
            self._steps = steps
            for group, lr, state, step in kept:
                if lr is not None:
                    group["lr"] = lr
                if step is not None:
                    state["step"] = step

        return restore


def _update_of(single: object, grad_clip: object) -> Update | None:
    """The compiled form of a torch optimiser; None if there is none."""
    if grad_clip is not None or not hasattr(single, "param_groups"):
        return None
    group = single.param_groups[0]
    if type(single) in (torch.optim.Adam, torch.optim.AdamW):
        if group.get("amsgrad") or isinstance(group["lr"], Tensor):
            return None
        decoupled = type(single) is torch.optim.AdamW or group.get("decoupled_weight_decay", False)
        return Adam(
            **_pick(group, "betas", "eps", "weight_decay", "maximize"), decoupled=decoupled
        )
    if type(single) is PyroClippedAdam:
        keys = ("betas", "eps", "weight_decay", "clip_norm", "centered_variance")
        return ClippedAdam(**_pick(group, *keys))
    if type(single) is torch.optim.SGD:
        keys = ("momentum", "dampening", "weight_decay", "nesterov", "maximize")
        return SGD(**_pick(group, *keys))
    if type(single) is torch.optim.RMSprop:
        if group.get("momentum") or isinstance(group["lr"], Tensor):
            return None
        return RMSprop(**_pick(group, "alpha", "eps", "weight_decay", "centered", "maximize"))
    return None


def _pick(group: Mapping, *keys: str) -> dict:
    return {key: tuple(v) if isinstance(v := group[key], list) else v for key in keys}


def state_of(optim: pyro.optim.PyroOptim, named: Sequence[tuple[str, Tensor]]) -> OptimizerState:
    """The shared state of an optimiser and a compiled update.

    Adam, AdamW, SGD, RMSprop without momentum, ClippedAdam and GlobalOptim become part of the
    compiled step. Any other is called after each step with gradients from the compiled graph.
    """
    kind = _Global if isinstance(optim, GlobalOptim) else _PerParameter
    return kind(optim, named)
