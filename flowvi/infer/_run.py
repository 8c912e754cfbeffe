"""The loop behind fit: steps, reports, checkpoints."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowvi.infer._plateau import Plateau
from flowvi.infer._progress import Progress
from flowvi.infer.averaging import Average, copy_into
from flowvi.infer.checkpoint import (
    get_rng_state,
    load_checkpoint,
    match_tensors,
    save_checkpoint,
    set_rng_state,
)
from flowvi.infer.compiled import CompiledSVI
from flowvi.infer.guard import find_non_finite
from flowvi.infer.svi import STEP_ERRORS, FlowSVI, buffers

__all__ = ["Run", "RunOptions"]

_REPORT_EVERY = 50
_GIVE_UP_AFTER = 50


@dataclass(frozen=True)
class RunOptions:
    """How long to run and what to do on the way; see :func:`flowvi.infer.fit`."""

    num_steps: int
    max_seconds: float | None
    checkpoint: str | os.PathLike | None
    checkpoint_every: int
    callback: Callable[[int, Tensor], object] | None
    progress_bar: bool


class Run:
    """Everything that changes while a guide is trained, as one state that can be saved.

    Args:
        svi: model, guide, optimiser and objective.
        average: average of the iterates.
        plateau: the stopping rule; ``None`` never stops early.
        options: how long to run and what to do on the way.
        args: positional arguments of model and guide.
        kwargs: keyword arguments of model and guide.
        began: reading of ``time.monotonic`` at the start of the run.
    """

    def __init__(
        self,
        svi: FlowSVI | CompiledSVI,
        average: Average,
        plateau: Plateau | None,
        options: RunOptions,
        args: tuple,
        kwargs: dict[str, Any],
        began: float,
    ) -> None:
        self.svi = svi
        self.average = average
        self.plateau = plateau
        self.options = options
        self.args, self.kwargs = args, kwargs
        self.step = 0
        self.losses: Tensor | None = None
        self.history: dict[str, Tensor] = {}
        self.raised = 0
        self.skipped_sites: dict[str, int] = {}
        self.stop_reason = f"all {options.num_steps} steps"
        self.seconds_before = 0.0
        self._began = began
        self._unlucky = 0

    @property
    def seconds(self) -> float:
        """Wall seconds, those before a resume included."""
        return self.seconds_before + time.monotonic() - self._began

    @property
    def skipped(self) -> int:
        """Number of steps that changed nothing."""
        counted = self.svi.optim.skipped
        return self.raised + (0 if counted is None else int(counted))

    def train(self) -> None:
        """Run until the schedule ends, the plateau rule ends it, or time is up."""
        schedule, options = self.svi.optim.schedule, self.options
        visible = options.progress_bar and self.svi.is_first
        progress = Progress(schedule.num_steps, self.step, visible=visible)
        try:
            while self.step < schedule.num_steps:
                self._take_step()
                if options.callback is not None:
                    options.callback(self.step - 1, self.losses[self.step - 1])
                if self.step % _REPORT_EVERY == 0:
                    progress.update(self._recorded(), schedule.num_steps)
                    self._look_at_skips()
                self._look_for_plateau()
                if options.checkpoint is not None and self.step % options.checkpoint_every == 0:
                    self.save()
                if options.max_seconds is not None and self.seconds > options.max_seconds:
                    self.stop_reason = f"max_seconds = {options.max_seconds}"
                    break
            progress.update(self._recorded(), schedule.num_steps)
        finally:
            progress.close()

    def _take_step(self) -> None:
        optim = self.svi.optim
        before = get_rng_state() if self._on_cpu() else None
        try:
            self.svi.objective.report = {}
            loss = self.svi.step_async(*self.args, **self.kwargs)
            failed = before is not None and optim.last_skipped is not None
            failed = failed and bool(optim.last_skipped)
        except STEP_ERRORS:
            loss, failed = torch.tensor(torch.nan), True
            self.raised += 1
            optim.step_count += 1
        if self.losses is None:
            self.losses = loss.new_full((self.options.num_steps,), torch.nan)
        self.losses[self.step] = loss
        self._keep_report()
        self.average.update(optim.named_parameters())
        self.step += 1
        self._unlucky = self._unlucky + 1 if failed else 0
        if failed:
            self._name_site(before)
        if self._unlucky >= _GIVE_UP_AFTER:
            raise RuntimeError(
                f"The last {_GIVE_UP_AFTER} steps were all non-finite: {self._worst_site()}. "
                "Check the data and the support of that site, or start elsewhere (init_loc_fn)."
            )

    def _keep_report(self) -> None:
        for name, value in self.svi.objective.report.items():
            if name not in self.history:
                self.history[name] = torch.full_like(self.losses, torch.nan)
            self.history[name][self.step] = value

    def _name_site(self, rng_state: dict | None) -> None:
        after = get_rng_state()
        if rng_state is not None:
            set_rng_state(rng_state)
        try:
            svi = self.svi
            where = find_non_finite(svi.objective, svi.model, svi.guide, self.args, self.kwargs)
        finally:
            set_rng_state(after)
        self.skipped_sites[where] = self.skipped_sites.get(where, 0) + 1

    def _look_at_skips(self) -> None:
        """On a device whose steps are not watched one by one, count here and name by a new run."""
        if self._on_cpu():
            return
        new = self.skipped - sum(self.skipped_sites.values())
        if new > 0:
            self._name_site(None)
            where = next(reversed(self.skipped_sites))
            self.skipped_sites[where] += new - 1
        if not self._recorded()[-_REPORT_EVERY:].isfinite().any():
            raise RuntimeError(
                f"The last {_REPORT_EVERY} steps were all non-finite: {self._worst_site()}. "
                "Check the data and the support of that site, or start elsewhere (init_loc_fn)."
            )

    def _look_for_plateau(self) -> None:
        schedule, plateau = self.svi.optim.schedule, self.plateau
        ending = schedule.num_steps < self.options.num_steps
        if plateau is None or ending or self.step % plateau.window:
            return
        # Losses of an annealed objective are of one quantity only once it is settled.
        unsettled = self.svi.objective.settled_from
        if self.step - unsettled < 2 * plateau.window:
            return
        reason = plateau.update(self._recorded())
        if reason is not None:
            schedule.finish(self.step, plateau.window)
            if schedule.num_steps < self.options.num_steps:
                self.stop_reason = f"plateau after {self.step} steps: {reason}"

    def _recorded(self) -> Tensor:
        return self.losses[: self.step].cpu()

    def _worst_site(self) -> str:
        return max(self.skipped_sites, key=self.skipped_sites.get, default="not reproducible")

    def _on_cpu(self) -> bool:
        return all(p.device.type == "cpu" for _, p in self.svi.optim.named_parameters())

    # Checkpoints.

    def save(self) -> None:
        """Write everything to the checkpoint file; of several processes only the first does."""
        if not self.svi.is_first:
            return
        optim = self.svi.optim
        state = {
            "step": self.step,
            "num_steps": self.options.num_steps,
            "losses": self.losses,
            "history": self.history,
            "objective": self.svi.objective.state_dict(),
            "params": {n: p.detach() for n, p in optim.named_parameters()},
            "buffers": buffers(self.svi.model, self.svi.guide),
            "optim": optim.get_state(),
            "schedule": optim.schedule.state_dict(),
            "average": self.average.values,
            "strikes": [0, 0] if self.plateau is None else self.plateau.strikes,
            "raised": self.raised,
            "unlucky": self._unlucky,
            "skipped_sites": self.skipped_sites,
            "stop_reason": self.stop_reason,
            "seconds": self.seconds,
            "rng": get_rng_state(),
        }
        save_checkpoint(self.options.checkpoint, state)

    def resume(self) -> bool:
        """Take up the run in the checkpoint file, if there is one.

        Returns:
            Whether there is.

        Raises:
            ValueError: if the file is of another model, guide or length of run.
        """
        path = self.options.checkpoint
        if path is None:
            return False
        state = self.svi.from_first(
            lambda: load_checkpoint(path) if os.path.exists(path) else None
        )
        if state is None:
            return False
        optim = self.svi.optim
        params = dict(optim.named_parameters())
        match_tensors("parameter", state["params"], params)
        present = buffers(self.svi.model, self.svi.guide)
        match_tensors("buffer", state["buffers"], present)
        if state["num_steps"] != self.options.num_steps:
            raise ValueError(
                f"`num_steps` must be that of the checkpoint, {state['num_steps']}; "
                f"got {self.options.num_steps}."
            )
        self.svi.objective.load_state_dict(state["objective"])
        copy_into((p, state["params"][n]) for n, p in params.items())
        copy_into((b, state["buffers"][n]) for n, b in present.items())
        device = next(iter(params.values())).device
        optim.set_state(state["optim"])
        optim.schedule.load_state_dict(state["schedule"])
        self.average.values = state["average"]
        if self.plateau is not None:
            self.plateau.strikes = state["strikes"]
        self.step, self.losses = state["step"], state["losses"].to(device)
        self.history = {n: v.to(device) for n, v in state["history"].items()}
        self.raised, self._unlucky = state["raised"], state["unlucky"]
        self.skipped_sites = state["skipped_sites"]
        self.stop_reason = state["stop_reason"]
        self.seconds_before = state["seconds"]
        set_rng_state(state["rng"])
        return True
