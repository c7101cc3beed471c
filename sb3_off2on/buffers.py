"""Balanced experience replay (Lee et al. 2021, Section 4.1): SB3's replay buffer beside a read-only offline dataset."""

from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
from stable_baselines3.common.preprocessing import get_obs_shape
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.common.vec_env import VecNormalize

from sb3_off2on.datasets import OfflineDataset, map_arrays

SCHEMES = ("balanced", "uniform", "online", "offline", "symmetric")


def initial_priority(n_offline: int, n_online: int, fraction: float) -> float:
    """
    Priority ``P0 = M / n_online * rho / (1 - rho)`` at which ``n_online`` fresh rows beside ``M`` offline rows of priority
    1.0 make up the share ``rho`` of the draws (Lee et al. 2021, Section D, where ``n_online`` is 1000).

    :param n_offline: number of offline rows (``M``)
    :param n_online: number of online rows at the first update, at least 1
    :param fraction: share of online rows (``rho``) in [0, 1); at 0 fresh rows are not drawn
    :return: the default priority to start with
    :raises ValueError: if ``fraction`` is outside [0, 1) or ``n_online`` is below 1
    """
    if not 0.0 <= fraction < 1.0:
        raise ValueError(f"The initial online fraction must be in [0, 1), got {fraction}")
    if n_online < 1:
        raise ValueError(f"n_online must be at least 1, got {n_online}")
    return n_offline / n_online * fraction / (1.0 - fraction)


def _storage(observation_space: spaces.Space) -> Any:
    # SB3 has one class for arrays and one for dictionaries, and the latter only stores differently. Its functions are
    # borrowed rather than inherited, so that one class serves both kinds of observation space
    return DictReplayBuffer if isinstance(observation_space, spaces.Dict) else ReplayBuffer


def _checked_priorities(priorities: float | np.ndarray) -> np.ndarray:
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
        nodes, priorities = self._checked_indices(indices), _checked_priorities(priorities)
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
        self._levels[0][start:stop] = _checked_priorities(priorities)
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


class BalancedReplayBufferSamples(NamedTuple):
    """SB3's ``ReplayBufferSamples`` (``DictReplayBufferSamples``), and where the rows came from: flat ``(batch_size,)``."""

    observations: PyTorchObs
    actions: th.Tensor
    next_observations: PyTorchObs
    dones: th.Tensor
    rewards: th.Tensor
    discounts: th.Tensor | None = None
    # The default is only there because ``discounts``, in SB3's position, has one
    indices: np.ndarray = np.empty(0, dtype=np.int64)


class BalancedReplayBuffer(ReplayBuffer):
    """
    SB3's replay buffer for what is collected online, beside an optional offline dataset that is only read and from which
    rows are drawn as well (Lee et al. 2021, Section 4.1). Array and dictionary observations alike.

    A flat index names every row: offline row ``i`` is ``i``, and the online row ``(pos, env)`` is
    ``n_offline + pos * n_envs + env``. ``size()``, ``pos`` and ``full`` are about the online part alone. Batches have the
    dtype of the online storage, which is the observation space's; offline rows are cast to it.

    :param buffer_size: maximum number of online transitions
    :param observation_space: observation space
    :param action_space: action space
    :param device: PyTorch device
    :param n_envs: number of parallel environments
    :param optimize_memory_usage: not supported
    :param handle_timeout_termination: do not treat timeouts as the end of the task, in both parts
    :param scheme: how ``sample()`` draws: ``"balanced"`` by priority from both parts (uniformly without a dataset),
        ``"uniform"`` all rows of both parts alike, ``"online"`` or ``"offline"`` from one part, ``"symmetric"`` the first
        half of each batch offline and the rest online
    :raises ValueError: if ``scheme`` is unknown or ``optimize_memory_usage`` is set
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        device: th.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        handle_timeout_termination: bool = True,
        scheme: str = "balanced",
    ):
        if scheme not in SCHEMES:
            raise ValueError(f"Unknown scheme={scheme!r}, it must be one of {', '.join(map(repr, SCHEMES))}")
        if optimize_memory_usage:
            raise ValueError(
                "BalancedReplayBuffer does not support optimize_memory_usage=True: it would keep a next observation only "
                "until the row after it is overwritten, but rows are drawn by priority at any time"
            )
        _storage(observation_space).__init__(
            self,
            buffer_size,
            observation_space,
            action_space,
            device,
            n_envs=n_envs,
            handle_timeout_termination=handle_timeout_termination,
        )
        self.scheme = scheme
        self.dataset: OfflineDataset | None = None
        # Outlives pickling, which the dataset does not
        self.dataset_info: dict[str, Any] | None = None
        self._default_priority = 1.0
        self._tree = SumTree(self.buffer_size * self.n_envs) if scheme == "balanced" else None

    @property
    def has_offline(self) -> bool:
        """Whether offline rows can be drawn. False after unpickling, until ``set_offline_data()``."""
        return self.dataset is not None

    @property
    def n_offline(self) -> int:
        """Number of offline rows (``M``), counted after unpickling as well: flat indices start behind them."""
        return 0 if self.dataset_info is None else self.dataset_info["n_transitions"]

    @property
    def n_online(self) -> int:
        """Number of online rows present."""
        return self.size() * self.n_envs

    @property
    def default_priority(self) -> float:
        """Priority of rows that are added (``p0`` in Algorithm 2)."""
        return self._default_priority

    def set_scheme(self, scheme: str) -> None:
        """
        :param scheme: how to draw from now on, see the class; where priorities are new, all rows get the default priority
        :raises ValueError: if it is unknown
        """
        if scheme not in SCHEMES:
            raise ValueError(f"Unknown scheme={scheme!r}, it must be one of {', '.join(map(repr, SCHEMES))}")
        if scheme != self.scheme:
            self.scheme, self._tree = scheme, None
            if scheme == "balanced":
                self._tree = SumTree(self.n_offline + self.buffer_size * self.n_envs)
                self.reset_priorities(self._default_priority)

    def set_offline_data(self, dataset: OfflineDataset) -> None:
        """
        Attach the dataset, of which nothing is copied. Offline rows get priority 1.0, unless it is the dataset that the
        buffer already knows: then they keep theirs. Online rows keep theirs anyway.

        :param dataset: observations and actions as the environment gives and takes them
        :raises ValueError: if it does not fit the spaces, or is not the one that an unpickled buffer had
        """
        shapes = (get_obs_shape(dataset.observation_space), dataset.action_space.shape)
        if shapes != (self.obs_shape, self.action_space.shape) or not isinstance(self.action_space, spaces.Box):
            raise ValueError(
                f"The dataset {dataset.source!r} has {dataset.observation_space} and {dataset.action_space}, "
                f"but the buffer has {self.observation_space} and {self.action_space}"
            )
        info = dataset.info
        known = self.dataset_info
        is_known = known is not None and known["fingerprint"] == info["fingerprint"]
        if known is not None and self.dataset is None and not is_known:
            raise ValueError(
                f"The buffer was saved with the dataset {known['source']!r} (fingerprint {known['fingerprint']}), which is "
                f"not {info['source']!r} (fingerprint {info['fingerprint']}): attach that dataset, or start a new buffer"
            )
        if self._tree is not None and not is_known:
            online = self._tree.leaves[self.n_offline :]
            self._tree = SumTree(len(dataset) + len(online))
            self._tree.fill(0, len(dataset), 1.0)
            self._tree.fill(len(dataset), len(self._tree), online)
        self.dataset, self.dataset_info = dataset, info

    def add(
        self,
        obs: Any,
        next_obs: Any,
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """SB3's; the new rows get the default priority (Algorithm 2, line 11), whatever the rows they replace had."""
        first = self.n_offline + self.pos * self.n_envs  # flat index, before ``pos`` moves on
        _storage(self.observation_space).add(self, obs, next_obs, action, reward, done, infos)
        if self._tree is not None:
            self._tree.fill(first, first + self.n_envs, self._default_priority)

    def reset(self) -> None:
        """Empty the online part."""
        super().reset()
        if self._tree is not None:
            self._tree.fill(self.n_offline, len(self._tree), 0.0)

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> BalancedReplayBufferSamples:  # type: ignore[override]
        """
        Draw a batch by the buffer's scheme, from NumPy's global generator as SB3 does.

        :param batch_size: number of rows
        :param env: normalizes observations and rewards of both parts
        :return: the batch; its ``indices`` are what ``update_priorities()`` takes
        :raises ValueError: if the scheme needs a part that is missing or empty
        """
        return self._get_samples(self._draw(batch_size), env)

    def sample_offline(self, batch_size: int, env: VecNormalize | None = None) -> BalancedReplayBufferSamples:
        """Draw uniformly from the offline part, whatever the scheme; else as ``sample()``."""
        return self._get_samples(self._draw_offline(batch_size, "sample_offline()"), env)

    def sample_uniform(self, batch_size: int, env: VecNormalize | None = None) -> BalancedReplayBufferSamples:
        """As ``sample()``, from all rows alike, offline and online, whatever the scheme."""
        return self._get_samples(self._draw_uniform(batch_size), env)

    def sample_online(self, batch_size: int, env: VecNormalize | None = None) -> BalancedReplayBufferSamples:
        """Draw uniformly from the online part, whatever the scheme; else as ``sample()``."""
        return self._get_samples(self._draw_online(batch_size, "sample_online()"), env)

    def priorities(self, indices: np.ndarray) -> np.ndarray:
        """
        :param indices: flat indices, shape ``(n,)``
        :return: their priorities, shape ``(n,)``; 0 where the online part has no row yet
        :raises ValueError: if an index is out of range or the scheme keeps no priorities
        """
        return self._priority_tree().get(indices)

    def update_priorities(self, indices: np.ndarray, priorities: np.ndarray) -> None:
        """
        Set priorities of rows drawn just before, and raise the default priority to the highest of them if that is more
        (Algorithm 2, lines 19-22).

        :param indices: flat indices, shape ``(n,)``
        :param priorities: finite and not negative, shape ``(n,)``
        :raises ValueError: if they do not fit together, name a row that is not there, or the scheme keeps no priorities;
            nothing is written then
        """
        tree = self._priority_tree()
        indices, priorities = np.asarray(indices), np.asarray(priorities, dtype=np.float64)
        if indices.shape != priorities.shape:
            raise ValueError(f"indices {indices.shape} and priorities {priorities.shape} must have the same shape")
        n_rows = self.n_offline + self.n_online
        # An online slot without a row must keep priority 0
        if (indices >= n_rows).any():
            raise ValueError(f"Indices must be below the {n_rows} rows present, got {indices.max()}")
        tree.update(indices, priorities)
        self._default_priority = float(priorities.max(initial=self._default_priority))

    def set_default_priority(self, value: float) -> None:
        """
        :param value: priority of the rows added from now on (``p0``)
        :raises ValueError: if it is negative or not finite, or the scheme keeps no priorities
        """
        self._priority_tree()
        self._default_priority = float(_checked_priorities(value))

    def reset_priorities(self, default_priority: float) -> None:
        """
        Priorities at the start of the online phase (Algorithm 2, lines 3-7): 1.0 for offline rows, ``P0`` for online ones.

        :param default_priority: ``P0``, see ``initial_priority()``
        :raises ValueError: if it is negative or not finite, or the scheme keeps no priorities
        """
        self.set_default_priority(default_priority)
        tree = self._priority_tree()
        tree.fill(0, self.n_offline, 1.0)
        tree.fill(self.n_offline, self.n_offline + self.n_online, default_priority)

    def effective_sample_size(self) -> float:
        """
        :return: ``(sum p)^2 / sum p^2`` over all rows: how many equally likely ones would be as diverse; 0 without rows
        :raises ValueError: if the scheme keeps no priorities
        """
        leaves = self._priority_tree().leaves
        # Not `leaves @ leaves`: the threads of NumPy's linear algebra would spin on for a while, at others' cost
        return float(leaves.sum() ** 2 / max(np.square(leaves).sum(), np.finfo(np.float64).tiny))

    def __getstate__(self) -> dict[str, Any]:
        # A dataset can be huge and has its own home: only ``dataset_info`` remembers it
        return {**self.__dict__, "dataset": None}

    def _priority_tree(self) -> SumTree:
        if self._tree is None:
            raise ValueError(f"Only scheme='balanced' has priorities: scheme={self.scheme!r} keeps no priorities")
        return self._tree

    def _require_offline(self, what: str) -> OfflineDataset:
        if self.dataset is None and self.dataset_info is not None:
            raise ValueError(
                f"{what} needs the dataset {self.dataset_info['source']!r}, which is not saved with the buffer: "
                "call set_dataset() with it"
            )
        if self.dataset is None:
            raise ValueError(f"{what} needs a dataset: pass dataset=... or call set_dataset()")
        return self.dataset

    def _draw(self, batch_size: int) -> np.ndarray:
        """:return: flat indices by the scheme, shape ``(batch_size,)``"""
        what = f"scheme={self.scheme!r}"
        if self.scheme == "offline":
            return self._draw_offline(batch_size, what)
        if self.scheme == "symmetric":
            offline = self._draw_offline(batch_size // 2, what)
            return np.concatenate([offline, self._draw_online(batch_size - len(offline), what)])
        # Without a dataset nothing estimates density ratios: "balanced" is uniform, and so is "online" by definition
        if self.scheme == "online" or self.dataset_info is None:
            return self._draw_online(batch_size, what)
        self._require_offline(what)
        if self._tree is None:
            return self._draw_uniform(batch_size)
        # Stratified: one draw in each of batch_size equal parts of the total priority
        strata = np.arange(batch_size) + np.random.random_sample(batch_size)
        return self._tree.find(self._tree.total / batch_size * strata)

    def _draw_uniform(self, batch_size: int) -> np.ndarray:
        return np.random.randint(0, self.n_offline + self.n_online, size=batch_size)

    def _draw_offline(self, batch_size: int, what: str) -> np.ndarray:
        return np.random.randint(0, len(self._require_offline(what)), size=batch_size)

    def _draw_online(self, batch_size: int, what: str) -> np.ndarray:
        if self.n_online == 0:
            raise ValueError(f"{what} needs online transitions, but none have been added yet: collect some first")
        # Two draws rather than one of a flat index: the rows are those that SB3 draws with the same seed
        positions = np.random.randint(0, self.size(), size=batch_size)
        return self.n_offline + positions * self.n_envs + np.random.randint(0, high=self.n_envs, size=batch_size)

    def _get_samples(self, batch_inds: np.ndarray, env: VecNormalize | None = None) -> BalancedReplayBufferSamples:  # type: ignore[override]
        """
        :param batch_inds: flat indices, shape ``(batch_size,)``
        :param env: normalizes observations and rewards
        :return: row k of every field belongs to ``batch_inds[k]``
        """
        is_offline = batch_inds < self.n_offline
        ring = np.divmod(batch_inds[~is_offline] - self.n_offline, self.n_envs)
        fields = [
            map_arrays(lambda array: array[ring], self.observations),
            self.actions[ring],
            map_arrays(lambda array: array[ring], self.next_observations),
            # Only use dones that are not due to timeouts
            self.dones[ring] * (1 - self.timeouts[ring]),
            self.rewards[ring],
        ]

        def interleave(online: np.ndarray, offline: np.ndarray) -> np.ndarray:
            batch = np.empty((len(batch_inds), *online.shape[1:]), dtype=online.dtype)
            batch[~is_offline] = online
            batch[is_offline] = offline.reshape(-1, *online.shape[1:])
            return batch

        if is_offline.any():
            offline_fields = self._offline_rows(batch_inds[is_offline])
            fields = [map_arrays(interleave, *parts) for parts in zip(fields, offline_fields, strict=True)]
        observations, actions, next_observations, dones, rewards = fields
        # Indexing has copied every row already: the tensors can share their memory
        return BalancedReplayBufferSamples(
            observations=map_arrays(self._as_tensor, self._normalize_obs(observations, env)),
            actions=self._as_tensor(actions),
            next_observations=map_arrays(self._as_tensor, self._normalize_obs(next_observations, env)),
            dones=self._as_tensor(dones.reshape(-1, 1)),
            rewards=self._as_tensor(self._normalize_reward(rewards.reshape(-1, 1), env)),
            indices=batch_inds,
        )

    def _offline_rows(self, rows: np.ndarray) -> list[Any]:
        """:return: offline rows as SB3 would have stored them, in the order of its fields"""
        dataset = self._require_offline("Offline rows")
        assert isinstance(self.action_space, spaces.Box)
        low, high = self.action_space.low, self.action_space.high
        dones = dataset.terminations[rows]
        if not self.handle_timeout_termination:
            dones = dones | dataset.truncations[rows]
        return [
            map_arrays(lambda frames: frames[dataset.obs_index[rows]], dataset.frames),
            # As in SB3's BasePolicy.scale_action(): the online part holds actions scaled to [-1, 1]
            2.0 * ((dataset.actions[rows] - low) / (high - low)) - 1.0,
            map_arrays(lambda frames: frames[dataset.next_obs_index[rows]], dataset.frames),
            dones,
            dataset.rewards[rows],
        ]

    def _as_tensor(self, array: np.ndarray) -> th.Tensor:
        return self.to_torch(array, copy=False)
