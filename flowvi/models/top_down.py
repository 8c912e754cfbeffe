"""Autoencoders whose latents are inferred in the order in which they are generated."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from pyro import sample
from pyro.distributions import Distribution
from torch import Tensor, nn

from flowvi.models.image_pair import ImagePair
from flowvi.models.likelihoods import Likelihood

__all__ = ["Stage", "TopDownVAE"]


class Stage(nn.Module, ABC):
    """One layer of latents: its laws given the state from above, and the state it hands on.

    Shape:
        state: what the stage above made, the batch first; None above the first of a ladder.
    """

    @abstractmethod
    def prior(self, state: Tensor | None) -> Distribution:
        """Law of the latents in the model."""

    @abstractmethod
    def posterior(
        self, prior: Distribution, state: Tensor | None, evidence: Tensor
    ) -> Distribution:
        """Law of the latents in the guide.

        Args:
            prior: what :meth:`prior` made of the state.
            state: what the stage above made.
            evidence: what the encoder made for this stage.
        """

    @abstractmethod
    def advance(self, state: Tensor | None, z: Tensor) -> Tensor:
        """State for the stage below."""


class _Step(NamedTuple):
    """What one stage made in the guide's pass: its prior given a state, and the state after z."""

    state: Tensor | None
    prior: Distribution
    z: Tensor
    after: Tensor


class _Pass:
    """The guide's pass from the top down, for the model's next one."""

    def __init__(self, pair: nn.Module, steps: dict[str, _Step]) -> None:
        self.steps = steps
        self._facts, self._tensors = _facts(pair)

    def is_current(self, pair: nn.Module) -> bool:
        """Whether every network would give the same again, with a graph where one is wanted."""
        facts, tensors = _facts(pair)
        same = zip(self._tensors, tensors, strict=True) if facts == self._facts else [(0, 1)]
        return all(a is b for a, b in same)


def _facts(pair: nn.Module) -> tuple[list, list[Tensor]]:
    """Modes, versions and identities of all that the networks' results rest on."""
    tensors = list(itertools.chain(pair.parameters(), pair.buffers()))
    # Tensors made in inference mode keep no version.
    versions = [-1 if t.is_inference() else t._version for t in tensors]
    modes = [module.training for module in pair.modules()]
    return [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), modes, versions], tensors


class TopDownVAE(ImagePair):
    r"""Autoencoder with stages of latents that model and guide both pass from the top down.

    .. math:: p(z) = \prod_l p(z_l \mid s_l), \qquad q(z \mid x) = \prod_l q(z_l \mid s_l, e_l(x)),
        \qquad s_{l-1} = g_l(s_l, z_l)

    The state s is made by the same networks in both, so the guide corrects what the model
    expects. A model that is replayed on the guide's draws takes over the guide's states and
    priors, so that every network runs (and every batch normalisation updates) once in a step; it
    does so once, only for the very same draws, and only if no parameter or mode has changed since.
    Sites are "z1", next to the image, to "zL".

    Args:
        encoder: maps images to what each stage gets of them, the top first.
        stages: the stages, the top first.
        decoder: maps the last state to what the likelihood takes.
        likelihood: law of an image.
        start: state above the top stage, a tensor that is learned; None for none.
        num_total: number of images in all, where ``x`` is a minibatch.
    """

    def __init__(
        self,
        encoder: nn.Module,
        stages: Sequence[Stage],
        decoder: nn.Module,
        likelihood: Likelihood,
        *,
        start: Tensor | None = None,
        num_total: int | None = None,
    ) -> None:
        super().__init__(likelihood, num_total=num_total)
        if not stages:
            raise ValueError("`stages` must hold at least one stage; got none.")
        self.encoder = encoder
        self.stages = nn.ModuleList(stages)
        self.decoder = decoder
        self.start = None if start is None else nn.Parameter(start)
        self._pass: _Pass | None = None

    def generate(self, context: Tensor | None) -> Distribution:
        known, state = self._take_pass(), self.start
        for name, stage in self._named_stages():
            step = known.get(name)
            if step is not None and step.state is not state:
                step = None
            z = sample(name, stage.prior(state) if step is None else step.prior)
            # Another value than the guide's is one that somebody has put there.
            taken = step is not None and step.z is z
            state = step.after if taken else stage.advance(state, z)
        return self.likelihood(self.decoder(state))

    def infer(self, x: Tensor, context: Tensor | None) -> None:
        evidence, state, steps = self.encoder(self.inputs(x)), self.start, {}
        for (name, stage), seen in zip(self._named_stages(), evidence, strict=True):
            prior = stage.prior(state)
            z = sample(name, stage.posterior(prior, state, seen))
            steps[name] = _Step(state, prior, z, stage.advance(state, z))
            state = steps[name].after
        self._pass = None if torch.compiler.is_compiling() else _Pass(self, steps)

    def _take_pass(self) -> dict[str, _Step]:
        """What the guide's last pass made, once, if it still holds."""
        last, self._pass = self._pass, None
        return last.steps if last is not None and last.is_current(self) else {}

    def _named_stages(self) -> Iterator[tuple[str, Stage]]:
        for k, stage in enumerate(self.stages):
            yield f"z{len(self.stages) - k}", stage

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_pass": None}
