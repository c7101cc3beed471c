"""Balanced experience replay (Lee et al. 2021, Section 4.1): SB3's replay buffer beside a read-only offline dataset."""

from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
from stable_baselines3.common.preprocessing import get_obs_shape, is_image_space
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.common.vec_env import VecNormalize

from sb3_off2on.datasets import OfflineDataset, map_arrays
from sb3_off2on.faults import check_step
from sb3_off2on.images import random_offsets, shift_images
from sb3_off2on.priorities import DevicePriorities, SumTree, checked_priorities

SCHEMES = ("balanced", "uniform", "online", "offline", "symmetric")
# Rows that are copied to `buffer_device` together: images must not be gathered all at once
UPLOAD_ROWS = 4096
# SB3's arrays of the online part, shape (buffer_size, n_envs, ...) each
ONLINE_ROWS = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")


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


def to_device(values: np.ndarray | th.Tensor, device: th.device) -> th.Tensor:
    """
    Copy to a device, unless the values are there. To a CUDA device without waiting for it: from page-locked memory, which
    PyTorch keeps until the copy has been made.

    :param values: any shape
    :param device: where to
    :return: the same values; on the CPU they share the memory of an array
    """
    tensor = th.as_tensor(values)
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _on_host(values: Any) -> np.ndarray:
    return values.cpu().numpy() if isinstance(values, th.Tensor) else np.asarray(values)


def _usable_device(buffer_device: th.device | str) -> th.device:
    try:
        device = th.device(buffer_device)
        th.zeros(1, dtype=th.float64, device=device).cpu()
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(
            f"buffer_device={str(buffer_device)!r} cannot be used here: {str(error).splitlines()[0]}. Choose another, or None "
            "to keep the rows on the host (for a saved model, pass replay_buffer_kwargs to load())"
        ) from error
    return device


def _standardized(values: th.Tensor, mean: Any, var: Any, clip: float) -> th.Tensor:
    """``VecNormalize``'s formula, which is for NumPy, on the device of ``values`` and in float64 as there."""
    center, scale = (to_device(np.asarray(x), values.device) for x in (mean, np.sqrt(var)))
    return ((values.double() - center) / scale).clip(-clip, clip).float()


class BalancedReplayBufferSamples(NamedTuple):
    """
    SB3's ``ReplayBufferSamples`` (``DictReplayBufferSamples``), and where the rows came from: flat ``(batch_size,)``, a tensor
    if the buffer has a ``buffer_device``.
    """

    observations: PyTorchObs
    actions: th.Tensor
    next_observations: PyTorchObs
    dones: th.Tensor
    rewards: th.Tensor
    discounts: th.Tensor | None = None
    # The default is only there because ``discounts``, in SB3's position, has one
    indices: Any = np.empty(0, dtype=np.int64)


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
    :param buffer_device: keep a copy of all rows, and the priorities, on this device (e.g. ``"cuda"``), so that drawing and
        updating priorities neither gathers on the host nor waits for the device. It has room for the dataset and
        ``buffer_size`` rows, and gets what is new with the next draw. ``None`` gathers on the host
    :param random_shift: move the images of every batch at random, by up to this many pixels along each axis (DrQ, Kostrikov
        et al. 2020, where it is 4; 0 for none): an observation and its next one independently, all channels of one alike
    :raises ValueError: if ``scheme`` is unknown, ``optimize_memory_usage`` is set, ``buffer_device`` cannot be used, or
        ``random_shift`` is negative or there are no images to shift
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
        buffer_device: th.device | str | None = None,
        random_shift: int = 0,
    ):
        if scheme not in SCHEMES:
            raise ValueError(f"Unknown scheme={scheme!r}, it must be one of {', '.join(map(repr, SCHEMES))}")
        if optimize_memory_usage:
            raise ValueError(
                "BalancedReplayBuffer does not support optimize_memory_usage=True: it would keep a next observation only "
                "until the row after it is overwritten, but rows are drawn by priority at any time"
            )
        if isinstance(random_shift, bool) or not isinstance(random_shift, int) or random_shift < 0:
            raise ValueError(f"`random_shift` must be an integer of at least 0 (pixels), got {random_shift!r}")
        is_image = map_arrays(lambda space: is_image_space(space, check_channels=False), observation_space)
        if random_shift > 0 and True not in (is_image.values() if isinstance(is_image, dict) else [is_image]):
            raise ValueError(
                f"`random_shift={random_shift}` is for images of type uint8, of which there are none in {observation_space}: "
                "set it to 0"
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
        self.random_shift, self._is_image = random_shift, is_image
        self.buffer_device = None if buffer_device is None else _usable_device(buffer_device)
        # The copy there, which the first draw makes, and the number of positions it lacks, which the next draw copies
        self._device_rows: list[Any] = []
        self._n_new = 0
        # A scalar on `buffer_device` once priorities were updated there
        self._default_priority: Any = 1.0
        self._tree: Any = self._new_tree(self.buffer_size * self.n_envs) if scheme == "balanced" else None

    @property
    def has_offline(self) -> bool:
        """Whether offline rows can be drawn. False after unpickling, until ``set_offline_data()``."""
        return self.dataset is not None

    @property
    def n_offline(self) -> int:
        """Number of offline rows (``M``), counted after unpickling as well: flat indices of online rows follow."""
        return 0 if self.dataset_info is None else self.dataset_info["n_transitions"]

    @property
    def n_online(self) -> int:
        """Number of online rows present."""
        return self.size() * self.n_envs

    @property
    def default_priority(self) -> float:
        """
        Priority of rows that are added (``p0`` in Algorithm 2). With a ``buffer_device``, which this reads, it raises
        ``ValueError`` if a priority since the last ``reset_priorities()`` was negative or not finite.
        """
        return float(checked_priorities(float(self._default_priority)))

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
                self._tree = self._new_tree(self.n_offline + self.buffer_size * self.n_envs)
                self.reset_priorities(self.default_priority)

    def set_buffer_device(self, buffer_device: th.device | str | None) -> None:
        """
        Copy rows and priorities anew, e.g. after the arrays of the online part were written by hand.

        :param buffer_device: where they are from now on, see the class
        :raises ValueError: if it cannot be used
        """
        self.buffer_device = None if buffer_device is None else _usable_device(buffer_device)
        self._device_rows, self._default_priority = [], float(self._default_priority)
        if self._tree is not None:
            leaves = np.array(_on_host(self._tree.leaves))
            self._tree = self._new_tree(len(leaves))
            self._tree.fill(0, len(leaves), self._on_buffer_device(leaves))

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
            self._tree = self._new_tree(len(dataset) + len(online))
            self._tree.fill(0, len(dataset), 1.0)
            self._tree.fill(len(dataset), len(self._tree), online)
        self.dataset, self.dataset_info, self._device_rows = dataset, info, []

    def add(
        self,
        obs: Any,
        next_obs: Any,
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """
        SB3's; the new rows get the default priority (Algorithm 2, line 11), whatever the rows they replace had.

        :raises NumericalFault: if something is NaN, infinite or too large for float32; nothing is stored then
        """
        check_step(observations=obs, next_observations=next_obs, actions=action, rewards=reward)
        first = self.n_offline + self.pos * self.n_envs  # flat index, before ``pos`` moves on
        _storage(self.observation_space).add(self, obs, next_obs, action, reward, done, infos)
        if self._tree is not None:
            self._tree.fill(first, first + self.n_envs, self._default_priority)
        self._n_new = min(self._n_new + 1, self.buffer_size)

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
        return self._augmented(self._get_samples(self._draw(batch_size), env))

    def sample_offline(self, batch_size: int, env: VecNormalize | None = None) -> BalancedReplayBufferSamples:
        """Draw uniformly from the offline part, whatever the scheme; else as ``sample()``."""
        return self._augmented(self._get_samples(self._draw_offline(batch_size, "sample_offline()"), env))

    def sample_uniform(self, batch_size: int, env: VecNormalize | None = None) -> BalancedReplayBufferSamples:
        """As ``sample()``, from all rows alike, offline and online, whatever the scheme."""
        return self._augmented(self._get_samples(self._draw_uniform(batch_size, "sample_uniform()"), env))

    def sample_online(self, batch_size: int, env: VecNormalize | None = None) -> BalancedReplayBufferSamples:
        """Draw uniformly from the online part, whatever the scheme; else as ``sample()``."""
        return self._augmented(self._get_samples(self._draw_online(batch_size, "sample_online()"), env))

    def priorities(self, indices: np.ndarray | th.Tensor) -> Any:
        """
        :param indices: flat indices, shape ``(n,)``
        :return: their priorities, shape ``(n,)``, a tensor if there is a ``buffer_device``; 0 where the online part has no
            row yet
        :raises ValueError: if an index is out of range or the scheme keeps no priorities
        """
        return self._priority_tree().get(self._on_buffer_device(indices))

    def update_priorities(self, indices: Any, priorities: Any) -> None:
        """
        Set priorities of rows drawn just before, and raise the default priority to the highest of them if that is more
        (Algorithm 2, lines 19-22). A ``buffer_device`` is not waited for to check the values: see ``default_priority``.

        :param indices: flat indices, shape ``(n,)``, an array or a tensor
        :param priorities: finite and not negative, shape ``(n,)``, an array or a tensor
        :raises ValueError: if they do not fit together, name a row that is not there, or the scheme keeps no priorities;
            nothing is written then
        """
        tree = self._priority_tree()
        indices, priorities = self._on_buffer_device(indices), self._on_buffer_device(priorities)
        shapes = tuple(indices.shape), tuple(priorities.shape)
        if shapes[0] != shapes[1]:
            raise ValueError(f"indices {shapes[0]} and priorities {shapes[1]} must have the same shape")
        if self.buffer_device is None:
            n_rows = self.n_offline + self.n_online
            # An online slot without a row must keep priority 0
            if (indices >= n_rows).any():
                raise ValueError(f"Indices must be below the {n_rows} rows present, got {indices.max()}")
            tree.update(indices, priorities)
            self._default_priority = float(priorities.astype(np.float64).max(initial=self._default_priority))
        elif len(priorities) > 0:
            tree.update(indices, priorities)
            # NaN stays the highest from here on, until it is read
            highest = priorities.masked_fill(priorities < 0, th.nan).max()
            self._default_priority = highest.double().clip(min=self._default_priority)

    def set_default_priority(self, value: float) -> None:
        """
        :param value: priority of the rows added from now on (``p0``)
        :raises ValueError: if it is negative or not finite, or the scheme keeps no priorities
        """
        self._priority_tree()
        self._default_priority = float(checked_priorities(value))

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
        return float(leaves.sum()) ** 2 / max(float((leaves**2).sum()), np.finfo(np.float64).tiny)

    def get_state(self) -> dict[str, Any]:
        """:return: what a checkpoint holds: the online rows, and the priorities of all rows; views, not copies"""
        n_rows = self.size()
        priorities = None if self._tree is None else _on_host(self._tree.leaves)[: self.n_offline + self.n_online]
        return {
            "scheme": self.scheme,
            "rows": {name: map_arrays(lambda array: array[:n_rows], getattr(self, name)) for name in ONLINE_ROWS},
            "pos": self.pos,
            "full": self.full,
            "priorities": priorities,
            "default_priority": float(self._default_priority),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """
        Go on where another buffer with the same dataset was. The scheme stays this buffer's; if it has priorities and the
        other one had none, they stay to be reset.

        :param state: its ``get_state()``
        :raises ValueError: if it does not fit; nothing changes then
        """

        def check(own: np.ndarray, rows: np.ndarray) -> None:
            is_full = state["full"] and len(rows) != len(own)
            if own.shape[1:] != rows.shape[1:] or own.dtype != rows.dtype or len(rows) > len(own) or is_full:
                raise ValueError(f"Rows of {rows.shape} {rows.dtype} do not fit a buffer of {own.shape} {own.dtype}")

        def put(own: np.ndarray, rows: np.ndarray) -> None:
            own[: len(rows)] = rows

        for apply in (check, put):
            for name in ONLINE_ROWS:
                map_arrays(apply, getattr(self, name), state["rows"][name])
        self.pos, self.full = state["pos"], state["full"]
        self._default_priority = state["default_priority"]
        # Upper levels are sums of lower ones, however these came about: the tree is the same to the last bit
        if self._tree is not None and state["priorities"] is not None:
            self._tree = self._new_tree(len(self._tree))
            self._tree.fill(0, len(state["priorities"]), self._on_buffer_device(state["priorities"]))
        self._device_rows = []

    def __getstate__(self) -> dict[str, Any]:
        # A dataset can be huge and has its own home: only ``dataset_info`` remembers it. No tensors either, so that the file
        # can be read without the device
        state = {**self.__dict__, "dataset": None, "_device_rows": [], "_default_priority": float(self._default_priority)}
        if isinstance(self._tree, DevicePriorities):
            state["_tree"] = SumTree(len(self._tree))
            state["_tree"].fill(0, len(self._tree), _on_host(self._tree.leaves))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.buffer_device is not None:
            try:
                self.set_buffer_device(self.buffer_device)
            except ValueError:  # the device of another machine
                self.buffer_device = None

    def _new_tree(self, capacity: int) -> SumTree | DevicePriorities:
        return SumTree(capacity) if self.buffer_device is None else DevicePriorities(capacity, self.buffer_device)

    def _on_buffer_device(self, values: np.ndarray | th.Tensor) -> Any:
        """:return: an array, or a tensor on ``buffer_device`` if there is one"""
        return _on_host(values) if self.buffer_device is None else to_device(values, self.buffer_device)

    def _priority_tree(self) -> SumTree | DevicePriorities:
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

    def _draw(self, batch_size: int) -> np.ndarray | th.Tensor:
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
            return self._draw_uniform(batch_size, what)
        # Stratified: one draw in each of batch_size equal parts of the total priority
        strata = np.arange(batch_size) + np.random.random_sample(batch_size)
        drawn = self._tree.find(self._tree.total / batch_size * self._on_buffer_device(strata))
        # An accelerator rounds each running sum in its own way: after the last row they can exceed that row's by a hair
        return drawn if self.buffer_device is None else drawn.clip(max=self.n_offline + self.n_online - 1)

    def _draw_uniform(self, batch_size: int, what: str) -> np.ndarray:
        if self.n_offline > 0:
            self._require_offline(what)
        return np.random.randint(0, self.n_offline + self.n_online, size=batch_size)

    def _draw_offline(self, batch_size: int, what: str) -> np.ndarray:
        return np.random.randint(0, len(self._require_offline(what)), size=batch_size)

    def _draw_online(self, batch_size: int, what: str) -> np.ndarray:
        if self.n_online == 0:
            raise ValueError(f"{what} needs online transitions, but none have been added yet: collect some first")
        # Two draws rather than one of a flat index: the rows are those that SB3 draws with the same seed
        positions = np.random.randint(0, self.size(), size=batch_size)
        return self.n_offline + positions * self.n_envs + np.random.randint(0, high=self.n_envs, size=batch_size)

    def _get_samples(self, batch_inds: Any, env: VecNormalize | None = None) -> BalancedReplayBufferSamples:  # type: ignore[override]
        """
        :param batch_inds: flat indices, shape ``(batch_size,)``, an array or a tensor
        :param env: normalizes observations and rewards
        :return: row k of every field belongs to ``batch_inds[k]``
        """
        batch_inds = self._on_buffer_device(batch_inds)
        if self.buffer_device is None:
            fields = self._host_rows(batch_inds)
        else:
            fields = [map_arrays(lambda column: column[batch_inds], field) for field in self._rows_on_device()]
        observations, actions, next_observations, dones, rewards = fields
        # Indexing has copied every row already: the tensors can share their memory
        return BalancedReplayBufferSamples(
            observations=map_arrays(self._as_tensor, self._normalized_obs(observations, env)),
            actions=self._as_tensor(actions),
            next_observations=map_arrays(self._as_tensor, self._normalized_obs(next_observations, env)),
            dones=self._as_tensor(dones.reshape(-1, 1)),
            rewards=self._as_tensor(self._normalized_reward(rewards.reshape(-1, 1), env)),
            indices=batch_inds,
        )

    def _augmented(self, samples: BalancedReplayBufferSamples) -> BalancedReplayBufferSamples:
        """:return: the same rows with their images shifted; not in ``_get_samples``, whose callers want the rows themselves"""
        if self.random_shift == 0:
            return samples

        def shifted(part: th.Tensor, is_image: bool) -> th.Tensor:
            if not is_image:
                return part
            return shift_images(part, to_device(random_offsets(len(part), self.random_shift), part.device))

        return samples._replace(
            observations=map_arrays(shifted, samples.observations, self._is_image),
            next_observations=map_arrays(shifted, samples.next_observations, self._is_image),
        )

    def _rows_on_device(self) -> list[Any]:
        """:return: what ``_host_rows()`` gives for all flat indices, with tensors on ``buffer_device``"""
        if not self._device_rows:
            n_rows = self.n_offline + self.buffer_size * self.n_envs

            def reserved(column: np.ndarray) -> th.Tensor:
                dtype = th.as_tensor(column).dtype
                return th.zeros((n_rows, *column.shape[1:]), dtype=dtype, device=self.buffer_device)

            fields = [map_arrays(reserved, field) for field in self._host_rows(np.arange(0))]
            self._upload(fields, np.arange(self.n_offline if self.has_offline else 0))
            self._device_rows, self._n_new = fields, self.size()
        if self._n_new > 0:
            positions = np.arange(self.pos - self._n_new, self.pos) % self.buffer_size
            rows = self.n_offline + positions[:, None] * self.n_envs + np.arange(self.n_envs)
            self._upload(self._device_rows, rows.flatten())
            self._n_new = 0
        return self._device_rows

    def _upload(self, fields: list[Any], rows: np.ndarray) -> None:
        def upload(column: th.Tensor, values: np.ndarray) -> None:
            column.index_copy_(0, indices, self._on_buffer_device(values))

        for start in range(0, len(rows), UPLOAD_ROWS):
            some = rows[start : start + UPLOAD_ROWS]
            indices = self._on_buffer_device(some)
            for field, values in zip(fields, self._host_rows(some), strict=True):
                map_arrays(upload, field, values)

    def _host_rows(self, batch_inds: np.ndarray) -> list[Any]:
        """
        :param batch_inds: flat indices, shape ``(batch_size,)``
        :return: their rows as SB3 stores them, in the order of its fields
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
        return fields

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

    def _normalized_obs(self, obs: Any, env: VecNormalize | None) -> Any:
        if self.buffer_device is None or env is None or not env.norm_obs:
            return self._normalize_obs(obs, env)
        obs_rms: Any = env.obs_rms
        if not isinstance(obs, dict):
            return _standardized(obs, obs_rms.mean, obs_rms.var + env.epsilon, env.clip_obs)
        return obs | {
            key: _standardized(obs[key], obs_rms[key].mean, obs_rms[key].var + env.epsilon, env.clip_obs)
            for key in env.norm_obs_keys or []
        }

    def _normalized_reward(self, rewards: Any, env: VecNormalize | None) -> Any:
        if self.buffer_device is None or env is None:
            return self._normalize_reward(rewards, env)
        return _standardized(rewards, 0.0, env.ret_rms.var + env.epsilon, env.clip_reward) if env.norm_reward else rewards

    def _as_tensor(self, values: np.ndarray | th.Tensor) -> th.Tensor:
        return to_device(values, self.device)
