from __future__ import annotations

import torch
from torch import Tensor

from flowvi.infer._searches import Search, together


def test_searches_share_evaluations_and_get_their_own_answers() -> None:
    asked = []

    def density(z: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(len(z))
        return -(z**2).sum(-1), -2 * z

    def climb(start: Tensor, num_steps: int) -> Search[tuple[Tensor, Tensor]]:
        z = start
        for _ in range(num_steps):
            log_p, grad = yield z
            z = z + 0.25 * grad
        return z, log_p

    def nothing() -> Search[str]:
        return "at once"
        yield

    starts = torch.randn(2, 3), torch.randn(5, 3)
    first, idle, second = together(density, climb(starts[0], 2), nothing(), climb(starts[1], 4))
    assert asked == [7, 7, 5, 5]
    assert idle == "at once"
    torch.testing.assert_close(first, (starts[0] / 4, -(starts[0] ** 2).sum(-1) / 4))
    torch.testing.assert_close(second, (starts[1] / 16, -(starts[1] ** 2).sum(-1) / 64))
