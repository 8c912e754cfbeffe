"""Times of series: checks, padding, and grids that hit every observation time."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_series", "refine", "settle_times"]


def settle_times(times: Tensor, mask: Tensor | None, like: Tensor) -> Tensor:
    """Times that never decrease, whatever stands at masked places.

    Between two observations that count a masked time is kept within them; before the first and
    after the last one, where it may be padding, theirs is repeated.

    Args:
        times: ``(T,)`` or ``(*batch, T)``.
        mask: ``(*batch, T)``, boolean, or None.
        like: tensor that shows dtype and device.
    """
    times = times.to(like)
    if mask is None:
        return times
    counted = torch.where(mask, times, torch.inf)
    low = torch.where(mask, times, -torch.inf).cummax(-1).values
    low = low.maximum(counted.amin(-1, keepdim=True))
    high = counted.flip(-1).cummin(-1).values.flip(-1)
    high = torch.where(high < torch.inf, high, low)
    kept = torch.where(times.isfinite(), times, low)
    return kept.minimum(high).maximum(low).cummax(-1).values


def refine(times: Tensor, num_steps: int) -> Tensor:
    """Every interval cut into equal steps; the times themselves stay as they are, to the bit.

    Args:
        times: ``(*batch, T)``, not decreasing.
        num_steps: steps in each interval.

    Shape:
        result: ``(*batch, (T - 1) * num_steps + 1)``.
    """
    if num_steps == 1:
        return times
    part = torch.arange(num_steps, dtype=times.dtype, device=times.device) / num_steps
    inner = times[..., :-1, None] + times.diff(dim=-1).unsqueeze(-1) * part
    return torch.cat([inner.flatten(-2), times[..., -1:]], -1)


def check_series(
    data: Tensor | None, times: Tensor, mask: Tensor | None, data_dim: int, *, values: bool
) -> None:
    """Refuse series whose shapes or times do not fit together.

    Args:
        data: ``(B, T, data_dim)`` or None.
        times: ``(T,)`` or ``(B, T)``.
        mask: ``(B, T)``, boolean, or None.
        data_dim: length of an observation.
        values: whether to look at the values as well.
    """
    if not torch.is_tensor(times) or times.dim() not in (1, 2) or times.shape[-1] < 2:
        got = tuple(times.shape) if torch.is_tensor(times) else type(times).__name__
        raise ValueError(f"`times` must have shape (T,) or (B, T) with T at least 2; got {got}.")
    if mask is not None and (mask.dtype != torch.bool or mask.dim() != 2):
        raise ValueError(
            f"`mask` must be boolean of shape (B, T); got {mask.dtype}, {tuple(mask.shape)}."
        )
    length = times.shape[-1]
    if data is not None and (data.dim() != 3 or data.shape[1:] != (length, data_dim)):
        raise ValueError(
            f"`data` must have shape (B, {length}, {data_dim}), one row for each of the times; "
            f"got {tuple(data.shape)}."
        )
    if mask is not None and mask.shape[-1] != length:
        raise ValueError(f"`mask` must end with {length}, as `times`; got {tuple(mask.shape)}.")
    rows = {
        "data": None if data is None else len(data),
        "times": len(times) if times.dim() == 2 else None,
        "mask": None if mask is None else len(mask),
    }
    if len({n for n in rows.values() if n is not None}) > 1:
        raise ValueError(f"`data`, `times` and `mask` must have one batch size; got {rows}.")
    if values and not times.is_meta:
        _check_values(data, times, mask)


def _check_values(data: Tensor | None, times: Tensor, mask: Tensor | None) -> None:
    if mask is not None:
        empty = ~mask.any(-1)
        if bool(empty.any()):
            raise ValueError(
                f"`mask` must leave at least one observation in each series; got none in "
                f"{int(empty.sum())} of {len(mask)}."
            )
        finite = bool(times.isfinite().expand_as(mask)[mask].all())
        times = settle_in_order(times, mask)
    else:
        finite = bool(times.isfinite().all())
    steps = times.diff(dim=-1)
    if not finite or bool((steps < 0).any()):
        worst = float(steps.nan_to_num(nan=-torch.inf).min())
        raise ValueError(
            f"`times` must be finite and sorted within each series; got a step of {worst:g}."
        )
    if data is not None:
        bad = ~data.isfinite()
        bad = bad if mask is None else bad & mask.unsqueeze(-1)
        if bool(bad.any()):
            raise ValueError(
                f"`data` must be finite where it is observed; got {int(bad.sum())} values that "
                "are not. Leave missing observations out with `mask`."
            )


def settle_in_order(times: Tensor, mask: Tensor) -> Tensor:
    """Times with masked ones replaced by the last unmasked one, so that only real steps show."""
    times = times.expand(mask.shape)
    place = torch.arange(mask.shape[-1], device=mask.device)
    last = torch.where(mask, place, -1).cummax(-1).values
    first = torch.where(mask, place, mask.shape[-1]).amin(-1, keepdim=True)
    return torch.take_along_dim(times, torch.where(last < 0, first, last), -1)
