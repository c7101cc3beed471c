"""Numbers that training must not go on with (NaN, infinity, Q-values that explode), and where they come from."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch as th

# What is larger becomes infinite as float32, in which networks compute
LARGEST = float(np.finfo(np.float32).max)
MAX_NAMED_ROWS = 5


class NumericalFault(ValueError):
    """
    NaN, infinity, or Q-values beyond ``max_abs_q``. A ``ValueError`` as that of SB3's ``VecCheckNan``, so that searches for
    hyperparameters prune such a trial.
    """


def check_step(**parts: Any) -> None:
    """
    :param parts: what a step of the environments consists of, by name: arrays of shape ``(n_envs, ...)``, or dicts of such
    :raises NumericalFault: if one holds NaN, infinity or what float32 cannot hold
    """
    for name, array in flat(parts).items():
        array = np.asarray(array)
        if array.dtype.kind == "f" and not (np.abs(array) <= LARGEST).all():
            place = tuple(np.argwhere(~(np.abs(array) <= LARGEST))[0])
            raise NumericalFault(
                f"`{name}` of environment {place[0]} hold {array[place]}. The transition was not stored: repair the "
                "environment, or set `on_fault='skip'` to go on without such steps"
            )


def is_fine(values: th.Tensor, limit: float = LARGEST) -> bool:
    """
    :param values: any shape, not empty
    :param limit: largest absolute value
    :return: whether none is larger or NaN
    """
    if not values.is_floating_point():
        return True
    return values.detach().abs().max().item() <= limit


def find_fault(
    rows: np.ndarray,
    minibatch: Mapping[str, Any],
    parameters: Iterable[tuple[str, th.Tensor]],
    tensors: Mapping[str, th.Tensor],
    limits: Mapping[str, float],
) -> str | None:
    """
    Where the numbers of an update go wrong: the first in the order from causes to effects.

    :param rows: the replay's flat indices of the minibatch, shape ``(n_batches, batch_size)``
    :param minibatch: its fields by name, shape ``(n_batches * batch_size, ...)``, or dicts of such
    :param parameters: of all networks, with their names
    :param tensors: what was computed, by name: shape ``(..., batch_size)``, with ``n_batches`` first if that is above 1, or
        scalars
    :param limits: largest absolute value of those tensors that have one
    :return: what is wrong, and how to repair it; ``None`` if nothing is
    """
    n_batches, batch_size = rows.shape

    def where(bad: th.Tensor) -> str:
        found = np.unique(rows[bad.cpu().numpy()])
        named = ", ".join(map(str, found[:MAX_NAMED_ROWS])) + (", ..." if len(found) > MAX_NAMED_ROWS else "")
        return f"in {int(bad.sum())} of the minibatch's {rows.size} rows (in the replay: {named})"

    for name, field in flat(minibatch).items():
        if not is_fine(field):
            bad = ~(field.abs() <= LARGEST)
            by_row = where(bad.reshape(n_batches, batch_size, -1).any(dim=2))
            return f"`{name}` hold {field[bad][0].item():g} {by_row}. Repair or remove those"
    for name, parameter in parameters:
        if not is_fine(parameter):
            return f"the parameter `{name}` is not finite before the update: load the last checkpoint"
    for name, tensor in tensors.items():
        limit = limits.get(name, LARGEST)
        if is_fine(tensor, limit):
            continue
        bad = ~(tensor.detach().abs() <= limit)
        value = f"{tensor.detach()[bad].flatten()[0].item():g}"
        at_fault = f"`{name}` is {value}"
        if tensor.dim() > 0:
            at_fault = f"`{name}` are {value} {where(bad.reshape(n_batches, -1, batch_size).any(dim=1))}"
        if name in limits and np.isfinite(float(value)):
            at_fault += f", beyond `max_abs_q={limit:g}`: load the last checkpoint and lower the learning rates or scale the "
            return f"{at_fault}rewards down; or raise `max_abs_q` if they are right"
        return (
            f"{at_fault}, from a minibatch and parameters that are finite: load the last checkpoint, lower the learning rates"
        )
    return None


def flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """
    :param fields: arrays or tensors by name, or dicts of such
    :return: the parts of dicts as fields of their own, e.g. ``observations['image']``
    """
    parts: dict[str, Any] = {}
    for name, field in fields.items():
        parts |= {f"{name}[{key!r}]": part for key, part in field.items()} if isinstance(field, Mapping) else {name: field}
    return parts
