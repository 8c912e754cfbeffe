"""Pyro's SVI with one optimiser over everything and no host sync in a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.infer
import torch
from torch import Tensor, nn

from flowvi.infer.optim import GlobalOptim
from flowvi.nn._store import is_shown_buffer
from flowvi.objectives import Objective

__all__ = ["STEP_ERRORS", "FlowSVI"]

# What a step may raise once the draws have left the region in which the model can be evaluated.
STEP_ERRORS = (torch.linalg.LinAlgError, ValueError, ArithmeticError)


class SingleProcess:
    """What ``fit`` asks about the processes that take its steps."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return True

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What ``make()`` gives in the first process."""
        return make()


class FlowSVI(SingleProcess, pyro.infer.SVI):
    """``pyro.infer.SVI`` whose step can stay on the device.

    Trained are all unconstrained parameters in the parameter store and those of a model or guide
    that is a module, found by identity, so two modules with one name cannot shadow each other.

    Args:
        model: Pyro model.
        guide: Pyro guide.
        optim: the optimiser.
        objective: the loss.
    """

    def __init__(
        self, model: Callable, guide: Callable, optim: GlobalOptim, objective: Objective
    ) -> None:
        if not isinstance(optim, GlobalOptim):
            raise TypeError(f"`optim` must be a GlobalOptim; got {type(optim).__name__}.")
        if not isinstance(objective, Objective):
            raise TypeError(
                f"`objective` must be a flowvi.objectives.Objective; "
                f"got {type(objective).__name__}."
            )
        super().__init__(model, guide, optim, objective)
        self.objective = objective
        # What a user should know about how the steps were taken.
        self.notes: list[str] = []
        self._admitted = -1

    def step_async(self, *args: object, **kwargs: object) -> Tensor:
        """One step; gives the loss (nats) as a tensor on the device."""
        for _, param in self.optim.named_parameters():
            param.grad = None
        loss = self._backward(args, kwargs)
        if self._size_of_store() != self._admitted:
            self._admit()
        loss = self._average(loss)
        self.optim((), loss)
        return loss

    def step(self, *args: object, **kwargs: object) -> float:
        """One step; gives the loss (nats) as a float."""
        return self.step_async(*args, **kwargs).item()

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Unconstrained trainable parameters in a fixed order, each once."""
        seen: set[int] = set()
        for name, param in self._candidates():
            trained = param.requires_grad and not is_shown_buffer(param)
            if trained and id(param) not in seen:
                seen.add(id(param))
                yield name, param

    def _backward(self, args: tuple, kwargs: dict) -> Tensor:
        """Loss of this process, whose gradients are left in the parameters."""
        loss = self.objective.differentiable_loss(self.model, self.guide, *args, **kwargs)
        loss.backward()
        return loss.detach()

    def _admit(self) -> None:
        """Show the optimiser parameters that are new."""
        self.optim.admit(self.named_parameters())
        self._admitted = self._size_of_store()

    def _average(self, loss: Tensor) -> Tensor:
        """Loss of all processes; where there are several, gradients are averaged in place."""
        return loss

    def _size_of_store(self) -> int:
        return len(pyro.get_param_store())

    def _candidates(self) -> Iterator[tuple[str, Tensor]]:
        yield from pyro.get_param_store().named_parameters()
        for owner, program in (("guide", self.guide), ("model", self.model)):
            module = owning_module(program)
            if module is not None:
                yield from module.named_parameters(prefix=owner)


def owning_module(program: Callable) -> nn.Module | None:
    """The module that a program is, or is a method of."""
    if isinstance(program, nn.Module):
        return program
    owner = getattr(program, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


def buffers(model: Callable, guide: Callable) -> dict[str, torch.Tensor]:
    """Named buffers of model and guide, where they are modules."""
    found = {}
    for owner, program in (("guide", guide), ("model", model)):
        module = owning_module(program)
        if module is not None:
            found.update(module.named_buffers(prefix=owner))
    return found
