"""Data-parallel SVI over the processes of torch.distributed."""

from __future__ import annotations

import enum
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from flowvi.infer.optim import GlobalOptim
from flowvi.infer.svi import STEP_ERRORS, FlowSVI, buffers
from flowvi.objectives import Objective

__all__ = ["DistributedSVI", "Spread"]


class Spread(enum.Enum):
    """What the processes share out among themselves.

    ``MINIBATCH``: each takes its own part of the minibatch of every subsampled plate. Latents
    outside of such plates have the same draws everywhere, latents inside have draws of their own.
    ``PARTICLES``: all see the same minibatch, each with draws of its own.
    """

    MINIBATCH = enum.auto()
    PARTICLES = enum.auto()


class DistributedSVI(FlowSVI):
    r"""SVI on several processes, with one result on all of them.

    Every process runs the same program on W processes, started with ``torchrun`` and joined by
    ``torch.distributed.init_process_group``. Gradients and losses are averaged in every step, so

    .. math:: \frac{1}{W} \sum_{r=1}^W \frac{N}{B} \sum_{i \in S_r} \nabla\ell_i
        = \frac{N}{WB} \sum_{i \in S_1 \cup \dots \cup S_W} \nabla\ell_i

    is the gradient of one process with a minibatch of W B items. ``subsample_size`` in the model
    is B, the number for one process; the parts :math:`S_r` of the minibatch do not overlap. Where
    all random latents are global the steps equal those of one process with ``subsample_size`` W B
    up to rounding (if the parameters exist before the first step, since making them takes random
    numbers); with local latents they do in law. ``Spread.PARTICLES`` likewise stands for W
    times as many particles.

    Parameters, buffers and the state of torch's random generator are those of the first process
    (rank 0) from the first step on. A data set that does not fit into one process is split by the
    user: give each process its own items, and the plate their number in all as ``size`` and the
    number at hand as ``subsample_size``. Terms that are not sums over items, the floors of
    ``FreeBits`` and batch norm, are those of each process's own part. A step in which one process
    meets a numerical error is skipped by all, with a warning.

    Args:
        model: Pyro model.
        guide: Pyro guide.
        optim: the optimiser; it clips the averaged gradient.
        objective: the loss.
        spread: what is shared out.
        group: process group; the default one if left out.

    Raises:
        RuntimeError: if torch.distributed has not been set up, or (in a step) if processes have
            different parameters.
        NotImplementedError: if particles are to be spread whose weights the objective combines.
        ValueError: in a step, if a plate has fewer items than all processes need together.

    References:
        Li et al. (2020), PyTorch distributed: experiences on accelerating data parallel training,
        arXiv:2006.15704, section 3.1.
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        optim: GlobalOptim,
        objective: Objective,
        *,
        spread: Spread = Spread.MINIBATCH,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(model, guide, optim, objective)
        if not isinstance(spread, Spread):
            raise TypeError(f"`spread` must be a Spread; got {spread!r}.")
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "DistributedSVI needs several processes that know each other. Start the program "
                "with torchrun and call torch.distributed.init_process_group first."
            )
        if spread is Spread.PARTICLES and objective._joins_runs:
            raise NotImplementedError(
                f"{type(objective).__name__} combines the weights of all particles, so they "
                "cannot be spread over processes. Use Spread.MINIBATCH, or ELBO or STL."
            )
        self.spread = spread
        self.group = group
        self.rank, self.num_processes = dist.get_rank(group), dist.get_world_size(group)
        self._settled = False
        self._report_names: list[str] = []

    def step_async(self, *args: object, **kwargs: object) -> Tensor:
        """One step; gives the loss (nats) averaged over processes, as a tensor on the device."""
        if not self._settled:
            self._settle(args, kwargs)
        return super().step_async(*args, **kwargs)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What ``make()`` gives in the first process, or the error that it raises there."""
        made: list = [None, None]
        if self.is_first:
            try:
                made[0] = make()
            except Exception as error:
                made[1] = error
        dist.broadcast_object_list(made, self._source, self.group)
        if made[1] is not None:
            raise made[1]
        return made[0]

    @torch.no_grad()
    def _settle(self, args: tuple, kwargs: dict) -> None:
        """Make all parameters, and give every process those of the first."""
        state = self.from_first(_rng_state)
        _set_rng_state(state)
        # What the program creates as it runs must be there before the first gradient; apart from
        # that the first step is to be as if this had not been.
        nesting = self.objective.max_plate_nesting
        with self._share():
            self.objective.differentiable_loss(self.model, self.guide, *args, **kwargs)
        self.objective.max_plate_nesting = nesting
        self._report_names = sorted(self.objective.report)
        _set_rng_state(state)
        self._admit()
        self._settled = True

    def _backward(self, args: tuple, kwargs: dict) -> Tensor:
        try:
            with self._share():
                return super()._backward(args, kwargs)
        except STEP_ERRORS as error:
            # The other processes wait for this one; a step that fails here is skipped by all.
            reason = str(error).partition("\n")[0]
            warnings.warn(f"Process {self.rank} skips a step: {reason}", stacklevel=3)
            return next(self.named_parameters())[1].new_full((), torch.nan)

    def _share(self) -> _Share:
        return _Share(self.spread, self.rank, self.num_processes, self.optim.step_count)

    @torch.no_grad()
    def _admit(self) -> None:
        super()._admit()
        named = {**dict(self.optim.named_parameters()), **buffers(self.model, self.guide)}
        every: list[dict] = [{}] * self.num_processes
        shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}
        dist.all_gather_object(every, shapes, self.group)
        for rank, other in enumerate(every):
            differ = sorted(n for n in {*other, *shapes} if other.get(n) != shapes.get(n))
            if differ:
                raise RuntimeError(
                    "All processes must have the same parameters and buffers; those of process "
                    f"{rank} differ from those of process {self.rank} in {differ}."
                )
        for tensor in named.values():
            dist.broadcast(tensor.detach(), self._source, self.group)

    @property
    def _source(self) -> int:
        return 0 if self.group is None else dist.get_global_rank(self.group, 0)

    @torch.no_grad()
    def _average(self, loss: Tensor) -> Tensor:
        """Put means over the processes in place of gradients and report; give that of the loss."""
        missing = torch.full_like(loss, torch.nan)
        report = [self.objective.report.get(name, missing) for name in self._report_names]
        numbers = torch.stack([loss, *(value.to(loss) for value in report)])
        params = [param for _, param in self.optim.named_parameters()]
        for param in params:
            param.grad = torch.zeros_like(param) if param.grad is None else param.grad
        for bucket in _buckets([numbers, *(param.grad for param in params)]):
            flat = torch.cat([part.reshape(-1) for part in bucket])
            dist.all_reduce(flat, group=self.group)
            means = (flat / self.num_processes).split([part.numel() for part in bucket])
            for part, mean in zip(bucket, means, strict=True):
                part.copy_(mean.view_as(part))
        self.objective.report = dict(zip(self._report_names, numbers[1:], strict=True))
        return numbers[0]


class _Share(Messenger):
    """Give this process its part of what is drawn in a step.

    Args:
        spread: what is shared out.
        rank: number of this process, from 0.
        num_processes: how many there are.
        step: number of the step, from which the draws of this process follow.
    """

    def __init__(self, spread: Spread, rank: int, num_processes: int, step: int) -> None:
        super().__init__()
        self._spread = spread
        self._rank, self._num_processes = rank, num_processes
        self._split: set[str] = set()
        entropy = [torch.initial_seed() % 2**64, step, rank]
        self._seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
        self._state: dict | None = None

    def _pyro_sample(self, msg: dict) -> None:
        if site_is_subsample(msg):
            if self._spread is Spread.MINIBATCH:
                self._take_part(msg)
        elif msg["value"] is None and not msg["done"] and self._is_own(msg):
            with self._own_stream():
                msg["value"] = msg["fn"](*msg["args"], **msg["kwargs"])
            msg["done"] = True

    def _take_part(self, msg: dict) -> None:
        size, number = msg["fn"].size, msg["fn"].subsample_size
        if msg["value"] is None and number is not None and number < size:
            if number * self._num_processes > size:
                raise ValueError(
                    f"`subsample_size` of plate `{msg['name']}`, for one process, times the "
                    f"number of processes must be at most its size, {size}; "
                    f"got {number} * {self._num_processes}."
                )
            together = torch.randperm(size, device=msg["fn"].device)
            start = self._rank * number
            msg["value"] = together[start : start + number].clone()
        if msg["value"] is not None and len(msg["value"]) < size:
            self._split.add(msg["name"])

    def _is_own(self, msg: dict) -> bool:
        if self._spread is Spread.PARTICLES:
            return True
        return any(frame.name in self._split for frame in msg["cond_indep_stack"])

    @contextmanager
    def _own_stream(self) -> Iterator[None]:
        """Draw from the generator of this process, and leave the common one as it was."""
        common = _rng_state()
        if self._state is None:
            torch.manual_seed(self._seed)
        else:
            _set_rng_state(self._state)
        try:
            yield
        finally:
            self._state = _rng_state()
            _set_rng_state(common)


def _rng_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def _buckets(tensors: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """Tensors that can be sent together."""
    found: dict[tuple, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return found.values()
