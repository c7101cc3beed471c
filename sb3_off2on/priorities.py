"""Priorities, and draws in proportion to them: as a tree on the host, as a vector on an accelerator."""

import numpy as np
import torch as th


def checked_priorities(priorities: float | np.ndarray) -> np.ndarray:
    """
    :param priorities: any shape
    :return: the same in float64
    :raises ValueError: if one is negative, infinite or NaN
    """
    checked = np.asarray(priorities, dtype=np.float64)
    if not (np.isfinite(checked) & (checked >= 0)).all():
        raise ValueError("Priorities must be finite and not negative")
    return checked


class SumTree:
    """
    Non-negative priorities with fast draws in proportion to them. The leaves and every level above are flat float64
    arrays; a node is the sum of ``FAN_OUT`` neighbours one level below. NumPy works on a whole batch a level, so few
    levels count more than narrow nodes: 2^21 leaves need two below a top level that is searched as one array.

    :param capacity: number of leaves, at least 1; all priorities start at 0
    :raises ValueError: if ``capacity`` is below 1
    """

    FAN_OUT = 32
    MAX_TOP = 2048

    def __init__(self, capacity: int):
        if capacity < 1:
            raise ValueError(f"A sum-tree needs at least one leaf, got capacity={capacity}")
        self._capacity = capacity
        # Padded to whole nodes; padding stays at 0, so that it is never found
        self._levels: list[np.ndarray] = []
        width = capacity
        while width > self.MAX_TOP:
            n_nodes = -(-width // self.FAN_OUT)
            self._levels.append(np.zeros(n_nodes * self.FAN_OUT))
            width = n_nodes
        self._levels.append(np.zeros(width))

    def __len__(self) -> int:
        """:return: number of leaves"""
        return self._capacity

    @property
    def total(self) -> float:
        """Sum of all priorities."""
        return float(self._levels[-1].sum())

    @property
    def leaves(self) -> np.ndarray:
        """All priorities, shape ``(capacity,)``, as a read-only view."""
        leaves = self._levels[0][: self._capacity]
        leaves.flags.writeable = False
        return leaves

    def get(self, indices: np.ndarray) -> np.ndarray:
        """
        :param indices: leaves, shape ``(n,)``
        :return: their priorities, shape ``(n,)``
        :raises ValueError: if an index is out of range
        """
        return self._levels[0][self._checked_indices(indices)]

    def update(self, indices: np.ndarray, priorities: np.ndarray) -> None:
        """
        Set the priorities of some leaves; where an index repeats, its last priority wins.

        :param indices: leaves, shape ``(n,)``
        :param priorities: new priorities, shape ``(n,)``
        :raises ValueError: if an index is out of range or a priority negative or not finite; nothing is written then
        """
        nodes, priorities = self._checked_indices(indices), checked_priorities(priorities)
        self._levels[0][nodes] = priorities
        # Parents are summed anew instead of adding differences, whose rounding errors would add up. A node that several
        # leaves share is summed for each of them: cheaper than finding the distinct ones
        for children, parents in zip(self._levels[:-1], self._levels[1:], strict=True):
            nodes = nodes // self.FAN_OUT
            parents[nodes] = children.reshape(-1, self.FAN_OUT).take(nodes, axis=0).sum(axis=1)

    def fill(self, start: int, stop: int, priorities: float | np.ndarray) -> None:
        """
        Set the priorities of the leaves ``start, ..., stop - 1``.

        :param start: first leaf
        :param stop: leaf after the last
        :param priorities: one priority for all, or shape ``(stop - start,)``
        :raises ValueError: if the range is not inside the tree or a priority negative or not finite
        """
        if not 0 <= start <= stop <= self._capacity:
            raise ValueError(f"Leaves {start} to {stop} are not within the {self._capacity} leaves")
        self._levels[0][start:stop] = checked_priorities(priorities)
        for children, parents in zip(self._levels[:-1], self._levels[1:], strict=True):
            start, stop = start // self.FAN_OUT, -(-stop // self.FAN_OUT)
            parents[start:stop] = children.reshape(-1, self.FAN_OUT)[start:stop].sum(axis=1)

    def find(self, values: np.ndarray) -> np.ndarray:
        """
        Leaves at which the running sum of the priorities first exceeds ``values``. Their priority is never zero.

        :param values: prefix sums in [0, total), shape ``(n,)``
        :return: leaves, shape ``(n,)``
        :raises ValueError: if all priorities are zero
        """
        running_sum = self._levels[-1].cumsum()
        if not running_sum[-1] > 0:
            raise ValueError("Nothing to draw: all priorities are zero")
        # The first child whose running sum exceeds a value in [0, sum) has a positive priority. Rounding can push a value
        # out of that range by a hair, on either side, hence the clipping on every level
        values = np.clip(values, 0.0, np.nextafter(running_sum[-1], 0.0))
        nodes = running_sum.searchsorted(values, side="right")
        values = values - (running_sum[nodes] - self._levels[-1][nodes])
        rows = np.arange(len(values))
        for level in reversed(self._levels[:-1]):
            children = level.reshape(-1, self.FAN_OUT).take(nodes, axis=0)
            running_sums = children.cumsum(axis=1)
            values = np.maximum(np.minimum(values, np.nextafter(running_sums[:, -1], 0.0)), 0.0)
            child = (running_sums > values[:, None]).argmax(axis=1)
            values -= running_sums[rows, child] - children[rows, child]
            nodes = nodes * self.FAN_OUT + child
        return nodes

    def _checked_indices(self, indices: np.ndarray) -> np.ndarray:
        indices = np.asarray(indices)
        if indices.size and not 0 <= indices.min() <= indices.max() < self._capacity:
            raise ValueError(f"Indices must be in [0, {self._capacity}), got {indices.min()} to {indices.max()}")
        return indices


class DevicePriorities:
    """
    ``SumTree`` for tensors on a device, which is never waited for: what would have to be read back is not checked. One vector
    and no tree, as an accelerator adds up two million numbers in one short kernel; a tree needs several for each level.

    :param capacity: number of leaves; all priorities start at 0
    :param device: where they are kept, in float64
    """

    def __init__(self, capacity: int, device: th.device):
        self.leaves = th.zeros(capacity, dtype=th.float64, device=device)

    def __len__(self) -> int:
        """:return: number of leaves"""
        return len(self.leaves)

    @property
    def total(self) -> th.Tensor:
        """Sum of all priorities, a scalar."""
        return self.leaves.sum()

    def get(self, indices: th.Tensor) -> th.Tensor:
        """
        :param indices: leaves, shape ``(n,)``
        :return: their priorities, shape ``(n,)``
        """
        return self.leaves[indices]

    def update(self, indices: th.Tensor, priorities: th.Tensor) -> None:
        """
        Set the priorities of some leaves; where an index repeats, one of its priorities wins (the last one on a CPU).

        :param indices: leaves, shape ``(n,)``
        :param priorities: new priorities, shape ``(n,)``
        """
        self.leaves[indices] = priorities.double()

    def fill(self, start: int, stop: int, priorities: float | th.Tensor) -> None:
        """
        Set the priorities of the leaves ``start, ..., stop - 1``.

        :param start: first leaf
        :param stop: leaf after the last
        :param priorities: one priority for all, or shape ``(stop - start,)``
        """
        self.leaves[start:stop] = priorities

    def find(self, values: th.Tensor) -> th.Tensor:
        """
        Leaves at which the running sum of the priorities first exceeds ``values``.

        :param values: prefix sums in [0, total), shape ``(n,)``
        :return: leaves, shape ``(n,)``
        """
        running_sum = self.leaves.cumsum(0)
        zero = th.zeros_like(running_sum[-1])
        return th.searchsorted(running_sum, values.clip(zero, running_sum[-1].nextafter(zero)), right=True)
