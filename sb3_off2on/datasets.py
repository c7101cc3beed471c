"""Offline datasets: one container, and one loader for every usual source."""

import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py  # type: ignore[import-untyped]
import minari  # type: ignore[import-untyped]
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from minari.storage import get_dataset_path  # type: ignore[import-untyped]
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.save_util import load_from_pkl
from tqdm import tqdm

Frames = np.ndarray | dict[str, np.ndarray]

# Returns of a random and of an expert policy, from D4RL (Fu et al. 2020): Minari's MuJoCo sets carry none.
D4RL_REFERENCE_SCORES = {
    "HalfCheetah": (-280.178953, 12135.0),
    "Hopper": (-20.272305, 3234.3),
    "Walker2d": (1.629008, 4592.3),
}
_REQUIRED_FIELDS = ("observations", "actions", "rewards", "terminations")
_OPTIONAL_FIELDS = ("truncations", "next_observations", "observation_space", "action_space", "env_id", "env_spec")
_D4RL_NAMES = {"terminals": "terminations", "timeouts": "truncations"}
_SOURCES = (
    "a Minari id, a MinariDataset or its folder, a D4RL file (.hdf5, .h5), an SB3 ReplayBuffer or its pickle (.pkl), "
    "a .npz file, a dict of arrays, an OfflineDataset, or a list of these"
)
_EPISODES_AT_ONCE = 50
_CHUNK = 1024  # frames looked at together: a pass over a large set of images must not allocate another one
_FINGERPRINT_FRAMES = 4096


@dataclass(frozen=True, eq=False)
class OfflineDataset:
    """
    Transitions in order, with every observation stored once.

    Episodes are contiguous and the last row of each is terminated or truncated; where both are given, termination wins.
    Where the source stops in the middle of an episode, the last row is marked truncated, which does not affect
    bootstrapping. Everything is checked here, whatever the source.

    :param frames: every observation, shape ``(n_frames, *obs_shape)``, a dict of such arrays for a Dict space; may be a
        ``np.memmap``. uint8 stays, anything else becomes float32 (SB3 casts to float anyway)
    :param obs_index: row of ``frames`` that is the observation of each transition, shape ``(n,)``
    :param next_obs_index: row of ``frames`` that is its next observation, shape ``(n,)``
    :param actions: in the environment's own range (not scaled to [-1, 1]), shape ``(n, *action_shape)``
    :param rewards: shape ``(n,)`` or ``(n, 1)``
    :param terminations: shape ``(n,)`` or ``(n, 1)``
    :param truncations: shape ``(n,)`` or ``(n, 1)``
    :param observation_space: a Box or a flat Dict of Boxes
    :param action_space: a Box with finite bounds
    :param env_spec: of the environment that the data comes from
    :param ref_min_score: return of a random policy; without both scores, D4RL's are used where the environment has some
    :param ref_max_score: return of an expert
    :param source: what the data was loaded from
    :raises ValueError: if the data is empty, of the wrong shape, not finite or outside of the action bounds
    """

    frames: Frames
    obs_index: np.ndarray
    next_obs_index: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminations: np.ndarray
    truncations: np.ndarray
    observation_space: spaces.Space
    action_space: spaces.Box
    env_spec: EnvSpec | None = None
    ref_min_score: float | None = None
    ref_max_score: float | None = None
    source: str = "arrays"

    def __post_init__(self) -> None:
        check_spaces(self.observation_space, self.action_space, self.source)
        n = len(self.obs_index)
        if n == 0:
            raise ValueError(f"{self.source}: holds no transitions (a row without a next observation does not count).")
        columns: dict[str, Any] = {"frames": _checked_frames(self.frames, self.observation_space, self.source)}
        index_dtype = np.int32 if _n_frames(self.frames) < 2**31 else np.int64
        for name in ("obs_index", "next_obs_index", "rewards", "terminations", "truncations"):
            column = np.asarray(getattr(self, name))
            if column.shape not in ((n,), (n, 1)):
                raise ValueError(f"{self.source}: {name} have shape {column.shape}, expected ({n},), one value a transition.")
            dtype = np.float32 if name == "rewards" else index_dtype if name.endswith("index") else np.bool_
            _check_numeric(column, f"{self.source}: {name}")
            if dtype is np.bool_ and not ((column == 0) | (column == 1)).all():
                raise ValueError(
                    f"{self.source}: {name} must be flags, 0 or 1, got {column[(column != 0) & (column != 1)][0]}."
                )
            columns[name] = column.reshape(n).astype(dtype, copy=False)
        columns["truncations"] = columns["truncations"] & ~columns["terminations"]
        columns["truncations"][-1] = not columns["terminations"][-1]
        _check_finite(columns["rewards"], f"{self.source}: rewards")
        columns["actions"] = self._checked_actions(n)
        if self.env_spec is not None and None in (self.ref_min_score, self.ref_max_score):
            scores = D4RL_REFERENCE_SCORES.get(self.env_spec.name, (self.ref_min_score, self.ref_max_score))
            columns["ref_min_score"], columns["ref_max_score"] = scores
        for name, value in columns.items():
            object.__setattr__(self, name, value)

    def _checked_actions(self, n: int) -> np.ndarray:
        actions, low, high = np.asarray(self.actions), self.action_space.low, self.action_space.high
        if actions.shape != (n, *low.shape):
            raise ValueError(f"{self.source}: actions have shape {actions.shape}, expected {(n, *low.shape)}.")
        _check_numeric(actions, f"{self.source}: actions")
        actions = actions.astype(np.float32, copy=False)
        _check_finite(actions, f"{self.source}: actions")
        # Rounding is forgiven; anything more is a wrong action space or a scaled action
        tolerance = 1e-5 * np.maximum(1.0, high - low)
        outside = np.argwhere((actions < low - tolerance) | (actions > high + tolerance))
        if len(outside):
            raise ValueError(
                f"{self.source}: actions are outside of {self.action_space}: row {outside[0][0]} holds "
                f"{actions[tuple(outside[0])]:.6g}. Clip them, or name the right action_space (in a dict of arrays)."
            )
        return np.clip(actions, low, high, dtype=np.float32)

    def __len__(self) -> int:
        return len(self.obs_index)

    def __repr__(self) -> str:
        returns = self.episode_returns
        score = "" if self.ref_max_score is None else f", normalized score {self.normalized_score(returns.mean()):.1f}"
        return (
            f"OfflineDataset({self.source})\n"
            f"  environment:  {self.env_spec.id if self.env_spec else 'unknown'}\n"
            f"  transitions:  {len(self)} in {self.n_episodes} episodes\n"
            f"  return:       {returns.mean():.1f} +/- {returns.std():.1f}{score}\n"
            f"  observations: {self.observation_space}\n"
            f"  actions:      {self.action_space}"
        )

    @property
    def observations(self) -> Frames:
        """Observations, shape ``(n, *obs_shape)``: gathered anew (a copy) at each access."""
        return map_arrays(lambda frames: frames[self.obs_index], self.frames)

    @property
    def next_observations(self) -> Frames:
        """
        Next observations, shape ``(n, *obs_shape)``: gathered anew (a copy) at each access.

        A terminated row whose source has no next observation gives its own observation.
        """
        return map_arrays(lambda frames: frames[self.next_obs_index], self.frames)

    @property
    def episode_ends(self) -> np.ndarray:
        """Whether a row is the last of its episode, shape ``(n,)``."""
        return self.terminations | self.truncations

    @property
    def n_episodes(self) -> int:
        return int(self.episode_ends.sum())

    @property
    def episode_lengths(self) -> np.ndarray:
        """Transitions of each episode, shape ``(n_episodes,)``."""
        return np.diff(np.flatnonzero(self.episode_ends), prepend=-1)

    @property
    def episode_returns(self) -> np.ndarray:
        """Undiscounted return of each episode, float64, shape ``(n_episodes,)``."""
        starts = np.append(0, np.flatnonzero(self.episode_ends)[:-1] + 1)
        return np.add.reduceat(self.rewards.astype(np.float64), starts)

    def monte_carlo_returns(self, gamma: float) -> np.ndarray:
        """
        Discounted return-to-go of each row inside its episode (Cal-QL's lower bound of the values).

        What would follow after a truncation counts as zero.

        :param gamma: discount factor in [0, 1]
        :return: float32, shape ``(n,)``
        :raises ValueError: if ``gamma`` is not in [0, 1]
        """
        if not 0.0 <= gamma <= 1.0:
            raise ValueError(f"gamma must be in [0, 1], got {gamma}.")
        returns, return_to_go = [], 0.0
        for reward, end in zip(self.rewards[::-1].tolist(), self.episode_ends[::-1].tolist(), strict=True):
            return_to_go = reward + (0.0 if end else gamma * return_to_go)
            returns.append(return_to_go)
        return np.array(returns[::-1], dtype=np.float32)

    def normalized_score(self, returns: Any) -> Any:
        """
        D4RL's normalized score: 0 for a random policy, 100 for an expert.

        :param returns: undiscounted return(s) of episodes, a number or an array
        :return: the score(s), of the same shape
        :raises ValueError: if the dataset has no reference scores
        """
        if self.ref_min_score is None or self.ref_max_score is None:
            raise ValueError(
                f"{self.source} has no reference scores: give ref_min_score and ref_max_score, "
                "e.g. dataclasses.replace(dataset, ref_min_score=..., ref_max_score=...)."
            )
        return normalized_score(returns, self.ref_min_score, self.ref_max_score)

    @cached_property
    def fingerprint(self) -> str:
        """
        SHA-256 of the content, as hex: of the sizes, spaces, actions, rewards, flags and indices, and of at most 4096 evenly
        spaced frames, so that it stays fast with large sets of images. The source, environment and scores are left out.
        """
        digest = hashlib.sha256(f"{len(self)} {self.observation_space!r} {self.action_space!r}".encode())
        for name in ("actions", "rewards", "terminations", "truncations", "obs_index", "next_obs_index"):
            digest.update(np.ascontiguousarray(getattr(self, name)).data)
        for frames in _parts(self.frames):
            chosen = np.linspace(0, len(frames) - 1, min(len(frames), _FINGERPRINT_FRAMES)).astype(np.int64)
            digest.update(str(frames.shape).encode())
            digest.update(np.ascontiguousarray(frames[chosen]).data)
        return digest.hexdigest()

    @property
    def info(self) -> dict[str, Any]:
        """What is saved in the place of the rows: source, number of transitions and fingerprint."""
        return {"source": self.source, "n_transitions": len(self), "fingerprint": self.fingerprint}

    def make_env(self, **kwargs: Any) -> gym.Env:
        """
        Make the environment that the data comes from. What a file says about it is not trusted: the code is that which is
        registered under its id, and wrappers are those of Gymnasium.

        :param kwargs: passed to ``gym.make``
        :raises ValueError: if the dataset does not name its environment, or that would need other code
        """
        if self.env_spec is None:
            raise ValueError(f"{self.source} does not name its environment: make it yourself and pass it as env.")
        registered = gym.registry.get(self.env_spec.id)
        if registered is None:
            raise ValueError(
                f"{self.source}: its environment {self.env_spec.id} is not registered, and the entry point "
                f"{self.env_spec.entry_point!r} that the dataset names could run any code. Import the package that registers "
                "it, or make it yourself and pass it as env."
            )
        for wrapper in self.env_spec.additional_wrappers:
            if not wrapper.entry_point.startswith("gymnasium.wrappers."):
                raise ValueError(
                    f"{self.source}: its environment has the wrapper {wrapper.entry_point!r}, which could run any code. "
                    "Make the environment yourself and pass it as env."
                )
        return gym.make(replace(self.env_spec, entry_point=registered.entry_point), **kwargs)

    def for_spaces(self, observation_space: spaces.Space, action_space: spaces.Space) -> "OfflineDataset":
        """
        The dataset as an environment with these spaces would give it.

        :param observation_space: the environment's, after SB3's ``VecTransposeImage`` where that applies
        :param action_space: the environment's
        :return: the dataset itself, or one whose channel-last images are transposed to channel-first (a view, no copy)
        :raises ValueError: if the spaces do not match
        """
        if not _same_space(self.action_space, action_space):
            raise ValueError(
                f"{self.source}: its action space {self.action_space} is not the environment's {action_space}. "
                "If it should be, name `action_space` in a dict of arrays; otherwise wrap the environment (RescaleAction)."
            )
        if _same_space(self.observation_space, observation_space):
            return self
        frames = _fitted(self.frames, self.observation_space, observation_space)
        if frames is None:
            raise ValueError(
                f"{self.source}: its observation space {self.observation_space} is not the environment's {observation_space}. "
                "If it should be, name `observation_space` in a dict of arrays; otherwise wrap the environment, or record "
                "the dataset with the environment's wrappers (e.g. VecFrameStack)."
            )
        return replace(self, frames=frames, observation_space=observation_space)


def normalized_score(returns: Any, ref_min_score: float, ref_max_score: float) -> Any:
    """
    D4RL's normalized score.

    :param returns: undiscounted return(s)
    :param ref_min_score: return of a random policy
    :param ref_max_score: return of an expert
    :return: of the same shape; 0 for the former, 100 for the latter
    """
    return 100.0 * (returns - ref_min_score) / (ref_max_score - ref_min_score)


def map_arrays(function: Callable[..., Any], *observations: Any) -> Any:
    """
    Apply a function to observations, key by key where they are dictionaries.

    :param function: takes one array of each of ``observations``
    :param observations: arrays, or dictionaries of arrays with the same keys
    :return: what it returns, in a dictionary where ``observations`` are
    """
    if isinstance(observations[0], Mapping):
        return {key: function(*(part[key] for part in observations)) for key in observations[0]}
    return function(*observations)


def _parts(frames: Frames) -> list[np.ndarray]:
    return list(frames.values()) if isinstance(frames, dict) else [frames]


def _n_frames(frames: Frames) -> int:
    return len(_parts(frames)[0]) if _parts(frames) else 0


def check_spaces(observation_space: spaces.Space, action_space: spaces.Space, source: str) -> None:
    """
    Check that there can be a dataset with these spaces.

    :param observation_space: of the environment
    :param action_space: of the environment
    :param source: named in errors
    :raises ValueError: if observations are not arrays or a flat dict of arrays, or actions not bounded and continuous
    """
    parts = observation_space.spaces.values() if isinstance(observation_space, spaces.Dict) else [observation_space]
    if not parts or not all(isinstance(part, spaces.Box) for part in parts):
        raise ValueError(f"{source}: observation space {observation_space} is neither a Box nor a flat Dict of Boxes.")
    if not isinstance(action_space, spaces.Box):
        raise ValueError(f"{source}: action space {action_space} is not a Box: only continuous actions are supported.")
    if not action_space.is_bounded("both"):
        raise ValueError(f"{source}: action space {action_space} is unbounded: SB3 scales actions by finite bounds.")


def _same_space(one: Any, other: Any) -> bool:
    if isinstance(one, spaces.Dict) and isinstance(other, spaces.Dict):
        return one.keys() == other.keys() and all(_same_space(one[key], other[key]) for key in one)
    return (
        isinstance(one, spaces.Box)
        and isinstance(other, spaces.Box)
        and one.shape == other.shape
        and np.dtype(one.dtype).kind == np.dtype(other.dtype).kind  # float32 or float64: stored alike
        and np.allclose(one.low, other.low)
        and np.allclose(one.high, other.high)
    )


def _fitted(frames: Any, own: Any, wanted: Any) -> Any:
    """``frames`` of the space ``own`` in the space ``wanted``, with images channel-first; None where that cannot be."""
    if isinstance(own, spaces.Dict) and isinstance(wanted, spaces.Dict) and own.keys() == wanted.keys():
        fitted = {key: _fitted(frames[key], own[key], wanted[key]) for key in own}
        return None if any(part is None for part in fitted.values()) else fitted
    if _same_space(own, wanted):
        return frames
    if isinstance(own, spaces.Box) and own.dtype == np.uint8 and len(own.shape) == 3:
        channels_first = spaces.Box(own.low.transpose(2, 0, 1), own.high.transpose(2, 0, 1), dtype=np.uint8)
        return frames.transpose(0, 3, 1, 2) if _same_space(channels_first, wanted) else None
    return None


def _checked_frames(frames: Frames, space: Any, source: str, name: str = "observations") -> Any:
    """Frames of the shape that ``space`` says and of the dtype that they are stored in."""
    if isinstance(space, spaces.Dict):
        keys = sorted(frames) if isinstance(frames, Mapping) else None
        if not isinstance(frames, Mapping) or keys != sorted(space):
            raise ValueError(f"{source}: {name} have the keys {keys}, expected {sorted(space)} as in the observation space.")
        checked = {key: _checked_frames(frames[key], space[key], source, f"{name}[{key!r}]") for key in space}
        if len({len(array) for array in checked.values()}) > 1:
            raise ValueError(f"{source}: {name} have parts of different lengths: {map_arrays(len, checked)}.")
        return checked
    array = np.asanyarray(frames)  # a memory map stays one
    if array.shape[1:] != space.shape:
        raise ValueError(f"{source}: {name} have shape {array.shape}, expected (n, *{space.shape}) as in {space}.")
    if space.dtype == np.uint8:
        if array.dtype != np.uint8:
            raise ValueError(f"{source}: {name} are {array.dtype}, expected uint8 as in {space}.")
        return array
    _check_numeric(array, f"{source}: {name}")
    with np.errstate(over="ignore"):  # becomes infinite, and is refused
        array = array.astype(np.float32, copy=False)
    _check_finite(array, f"{source}: {name}")
    return array


def _check_numeric(array: np.ndarray, what: str) -> None:
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{what} are of dtype {array.dtype}, expected numbers.")


def _check_finite(array: np.ndarray, what: str) -> None:
    for start in range(0, len(array), _CHUNK):
        bad = np.argwhere(~np.isfinite(array[start : start + _CHUNK]))
        if len(bad):
            row = start + bad[0][0]
            raise ValueError(f"{what} hold {array[(row, *bad[0][1:])]} in row {row}: repair or remove that row.")


def load_dataset(
    source: Any, *, download: bool = False, allow_pickle: bool = False, memory_map: str | os.PathLike[str] | None = None
) -> OfflineDataset:
    """
    Load offline data from anything that usually holds some.

    - a Minari id, a ``MinariDataset`` or the folder of one;
    - a D4RL file (``.hdf5``, ``.h5``), of the v0 or the v2 layout. Where the file name names a locomotion task, ``-v5`` of
      its environment is taken; note that D4RL's data was recorded with ``-v2``. Prefer v2 files: the flags of some v0 files
      (hopper-medium-expert, the medium-replay ones) are known to be wrong;
    - an SB3 ``ReplayBuffer`` or ``DictReplayBuffer`` (with its rings unrolled, its actions unscaled), or the pickle of one;
    - a dict with the keys ``observations``, ``actions``, ``rewards``, ``terminations`` (or ``terminals``) and optionally
      ``truncations`` (or ``timeouts``), ``next_observations``, ``observation_space``, ``action_space`` (default: [-1, 1]),
      ``env_id`` or ``env_spec``; observations may be a dict of arrays. Or a ``.npz`` file of the same keys, except for
      spaces, where observations of several parts are called ``observations/<part>``. Arrays are not copied where it can be
      avoided: do not change them afterwards;
    - an ``OfflineDataset``, returned as it is;
    - a list of any of these, concatenated (medium-expert = medium + expert).

    Without ``next_observations`` a row's next observation is that of the next row. A truncated row has none and is dropped,
    as is a last row without a flag; the row before ends its episode. A terminated row keeps its own observation, which
    the target never uses. With ``next_observations`` but without truncations, an episode also ends where the next
    observation is not that of the next row.

    :param source: see above
    :param download: download an unknown Minari id
    :param allow_pickle: load ``.pkl`` files. Only for files that you trust: a pickle can run any code
    :param memory_map: a folder, for the observations of a Minari dataset that do not fit into memory: they are written there
        as ``.npy`` files and read from these, batch by batch. It is needed as long as the dataset is in use
    :raises ValueError: if the source is unknown, missing or not what it should be; see also :class:`OfflineDataset`
    """
    if memory_map is not None:
        if not isinstance(source, minari.MinariDataset) and (not isinstance(source, (str, os.PathLike)) or _is_file(source)):
            raise ValueError(
                f"`memory_map` is for a Minari dataset, got a {type(source).__name__}. Arrays of "
                "np.load(..., mmap_mode='r') stay memory-mapped anyway; several datasets can be joined with "
                "minari.combine_datasets()."
            )
        memory_map = Path(memory_map)
        memory_map.mkdir(parents=True, exist_ok=True)
    if isinstance(source, OfflineDataset):
        return source
    if isinstance(source, (list, tuple)):
        return _concatenated([load_dataset(part, download=download, allow_pickle=allow_pickle) for part in source])
    if isinstance(source, minari.MinariDataset):
        return _from_minari(source, source.id, memory_map)
    if isinstance(source, ReplayBuffer):
        return _from_replay_buffer(source, type(source).__name__)
    if isinstance(source, Mapping):
        return _from_fields(source, "arrays")
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(f"Cannot load a dataset from a {type(source).__name__}. A source is {_SOURCES}.")
    path, name = Path(source), os.fspath(source)
    with _errors_name(name):
        if _is_file(path):
            return _from_file(path, allow_pickle)
        for folder in (path / "data", path):
            if (folder / "metadata.json").is_file():
                return _from_minari(minari.MinariDataset(folder), name, memory_map)
    if isinstance(source, os.PathLike) or path.is_dir():
        raise ValueError(f"No Minari dataset in the folder {name}: it has no data/metadata.json.")
    try:
        dataset = minari.load_dataset(name, download=download)
    except FileNotFoundError:
        known = ", ".join(list(minari.list_local_datasets())[:5]) or "none"
        raise ValueError(
            f"No Minari dataset {name!r} in {get_dataset_path()} (there are: {known}). Download it with "
            f"`load_dataset({name!r}, download=True)` or `minari download {name}`. Apart from an id, a source is {_SOURCES}."
        ) from None
    with _errors_name(name):
        return _from_minari(dataset, name, memory_map)


@contextmanager
def _errors_name(source: str) -> Iterator[None]:
    """
    Whatever the libraries below make of a broken file, an error that names it. Where memory or a package is missing, theirs.

    :param source: path or id
    """
    try:
        yield
    except (MemoryError, ImportError):
        raise
    except Exception as error:
        if isinstance(error, ValueError) and source in str(error):
            raise
        # HDF5's errors about what is in a file have no number, those of the system have one: a full disk, no permission
        advice = ". The file may be damaged" if getattr(error, "errno", None) is None else ""
        raise ValueError(f"{source} cannot be read: {type(error).__name__}: {error}{advice}") from error


def _is_file(source: str | os.PathLike[str]) -> bool:
    return Path(source).suffix in (".hdf5", ".h5", ".npz", ".pkl") or Path(source).is_file()


def _from_minari(dataset: minari.MinariDataset, source: str, memory_map: Path | None = None) -> OfflineDataset:
    check_spaces(dataset.observation_space, dataset.action_space, source)
    n_steps, n_episodes, start = dataset.total_steps, dataset.total_episodes, 0
    n_parts = 0

    def reserved(space: Any) -> np.ndarray:
        shape, dtype = (n_steps + n_episodes, *space.shape), np.uint8 if space.dtype == np.uint8 else np.float32
        if memory_map is None:
            return np.empty(shape, dtype)
        nonlocal n_parts
        path, n_parts = memory_map / f"observations_{n_parts}.npy", n_parts + 1
        path.unlink(missing_ok=True)  # whoever still reads an old file keeps it
        return np.lib.format.open_memmap(path, "w+", dtype, shape)

    frames = map_arrays(reserved, dataset.observation_space)
    actions, rewards = np.empty((n_steps, *dataset.action_space.shape), np.float32), np.empty(n_steps, np.float32)
    terminations, truncations, obs_index = np.empty(n_steps, bool), np.empty(n_steps, bool), np.arange(n_steps)
    # Some episodes at a time: HDF5 keeps tens of MB about the episodes that it has seen, until the file is closed
    assert dataset.episode_indices is not None
    blocks = np.array_split(dataset.episode_indices, max(n_episodes // _EPISODES_AT_ONCE, 1))
    in_order = (episode for block in blocks for episode in dataset.iterate_episodes(block))
    episodes = tqdm(in_order, f"Loading {source}", n_episodes, delay=2, disable=None)
    for number, episode in enumerate(episodes):
        name, rows = f"{source}, episode {episode.id}", slice(start, start + len(episode))
        if len(episode) == 0:
            raise ValueError(f"{name} has no steps: leave it out with dataset.filter_episodes(lambda episode: len(episode)).")
        observations = _checked_frames(episode.observations, dataset.observation_space, name)
        if _n_frames(observations) != len(episode) + 1:
            raise ValueError(f"{name} has {_n_frames(observations)} observations for {len(episode)} steps, expected one more.")
        # An episode of T steps has T + 1 observations, all of which are stored: each episode before shifts them by one
        obs_index[rows] += number
        for stored, part in zip(_parts(frames), _parts(observations), strict=True):
            stored[start + number : start + number + len(part)] = part
        actions[rows], rewards[rows] = episode.actions, episode.rewards
        terminations[rows], truncations[rows] = episode.terminations, episode.truncations
        truncations[rows.stop - 1] = True  # where the episode is open; a termination wins
        start = rows.stop
    if start != n_steps:
        raise ValueError(f"{source} has {start} steps in {n_episodes} episodes, but its metadata says {n_steps} steps.")
    if memory_map is not None:
        frames = map_arrays(lambda part: np.load(part.filename, mmap_mode="r"), frames)
    columns = (frames, obs_index, obs_index + 1, actions, rewards, terminations, truncations)
    details = (dataset.observation_space, dataset.action_space, dataset.env_spec)
    scores = (dataset.storage.metadata.get("ref_min_score"), dataset.storage.metadata.get("ref_max_score"))
    return OfflineDataset(*columns, *details, *scores, source)


def _from_file(path: Path, allow_pickle: bool) -> OfflineDataset:
    if not path.is_file():
        raise ValueError(f"The file {path} does not exist.")
    if path.suffix in (".npz", ".hdf5", ".h5"):
        return _from_fields(*_read_arrays(path))
    if path.suffix != ".pkl":
        raise ValueError(f"Cannot load a dataset from the file {path}. A source is {_SOURCES}.")
    if not allow_pickle:
        raise ValueError(
            f"{path} is a pickle, and loading one can run any code. If you trust the file, use what "
            f"`load_dataset({str(path)!r}, allow_pickle=True)` returns."
        )
    buffer = load_from_pkl(path)
    if not isinstance(buffer, ReplayBuffer):
        raise ValueError(f"{path} holds a {type(buffer).__name__}, expected an SB3 ReplayBuffer.")
    return _from_replay_buffer(buffer, str(path))


def _read_arrays(path: Path) -> tuple[dict[str, Any], str, list[str]]:
    """The arrays in a .npz or a D4RL file, its path, and the names of everything that is in it."""
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            present = list(file)
            arrays: dict[str, Any] = dict(file)
    else:
        with h5py.File(path, "r") as file:
            present = list(file)
            arrays = {name: file[name][()] for name in {*_REQUIRED_FIELDS, *_OPTIONAL_FIELDS[:2], *_D4RL_NAMES} & {*file}}
    for field in ("observations", "next_observations"):
        parts = {name: arrays.pop(name) for name in list(arrays) if name.startswith(f"{field}/")}
        if parts:
            arrays[field] = {name.removeprefix(f"{field}/"): part for name, part in parts.items()}
    for env_name in D4RL_REFERENCE_SCORES if path.suffix != ".npz" else ():
        if path.name.lower().startswith(env_name.lower()):
            arrays["env_id"] = f"{env_name}-v5"
    return arrays, str(path), present


def _from_replay_buffer(buffer: ReplayBuffer, source: str) -> OfflineDataset:
    check_spaces(buffer.observation_space, buffer.action_space, source)
    assert isinstance(buffer.action_space, spaces.Box)
    order = np.arange(buffer.pos)
    if buffer.full:
        order = (np.arange(buffer.buffer_size) + buffer.pos) % buffer.buffer_size
    if buffer.full and buffer.optimize_memory_usage:
        order = order[1:]  # the oldest row's observation is overwritten by the newest row's next observation

    def unrolled(array: np.ndarray, rows: np.ndarray = order) -> np.ndarray:
        """(buffer_size, n_envs, *shape) -> (n_envs * n_rows, *shape), one environment after the other."""
        return array[rows].swapaxes(0, 1).reshape(buffer.n_envs * len(rows), *array.shape[2:])

    if buffer.optimize_memory_usage:
        next_observations = unrolled(buffer.observations, (order + 1) % buffer.buffer_size)
    else:
        next_observations = map_arrays(unrolled, buffer.next_observations)
    dones, timeouts = unrolled(buffer.dones).astype(bool), unrolled(buffer.timeouts).astype(bool)
    truncations = dones & timeouts
    truncations.reshape(buffer.n_envs, -1)[:, -1:] = True  # each environment's stream stops here; a termination wins
    low, high = buffer.action_space.low, buffer.action_space.high
    fields = {
        "observations": map_arrays(unrolled, buffer.observations),
        "next_observations": next_observations,
        # SB3 stores actions flat and scaled to [-1, 1]
        "actions": low + 0.5 * (unrolled(buffer.actions).reshape(-1, *low.shape) + 1.0) * (high - low),
        "rewards": unrolled(buffer.rewards),
        "terminations": dones & ~timeouts,
        "truncations": truncations,
        "observation_space": buffer.observation_space,
        "action_space": buffer.action_space,
    }
    return _from_fields(fields, source)


def _from_fields(arrays: Mapping[str, Any], source: str, present: Iterable[str] | None = None) -> OfflineDataset:
    """
    A dataset of separate columns, one row a transition.

    :param arrays: see :func:`load_dataset`
    :param source: named in errors
    :param present: names to show where a field is missing, if not those of ``arrays``
    """
    fields = {_D4RL_NAMES.get(name, name): value for name, value in arrays.items() if value is not None}
    missing = " and ".join(name for name in _REQUIRED_FIELDS if name not in fields)
    if missing:
        raise ValueError(
            f"{source}: {missing} missing. Present: {', '.join(sorted(present or arrays)[:20])}. D4RL's names "
            f"({', '.join(_D4RL_NAMES)}) are understood as well."
        )
    for name in fields.keys() - {*_REQUIRED_FIELDS, *_OPTIONAL_FIELDS}:
        if not name.startswith(("infos", "metadata")):  # D4RL's extras; anything else may be a slip of the pen
            raise ValueError(f"{source}: unknown field {name!r}. Known: {', '.join(_REQUIRED_FIELDS + _OPTIONAL_FIELDS)}.")
    observations, actions = map_arrays(np.asanyarray, fields["observations"]), np.asanyarray(fields["actions"])
    if "action_space" not in fields and (actions.ndim < 2 or actions.dtype.kind != "f"):
        raise ValueError(
            f"{source}: actions have shape {actions.shape} and dtype {actions.dtype}, expected floats of shape "
            "(n, *action_shape), (n, 1) where an action is a single number."
        )
    if any(np.ndim(part) == 0 for part in _parts(observations)):
        raise ValueError(f"{source}: observations are a single value, expected shape (n, *obs_shape).")
    env_spec = fields.get("env_spec", fields.get("env_id"))
    if env_spec is not None and not isinstance(env_spec, EnvSpec):
        try:
            env_spec = gym.spec(str(env_spec))
        except gym.error.Error as error:
            raise ValueError(f"{source}: unknown environment {env_spec}: {error}") from error
    rows = np.arange(_n_frames(observations))
    # With rows as frames at first, so that all errors name the rows as the source counts them
    dataset = OfflineDataset(
        frames=observations,
        obs_index=rows,
        next_obs_index=rows,
        actions=actions,
        rewards=fields["rewards"],
        terminations=fields["terminations"],
        truncations=fields.get("truncations", np.zeros(len(rows), bool)),
        observation_space=fields.get("observation_space", _default_space(observations)),
        action_space=fields.get("action_space", spaces.Box(-1.0, 1.0, actions.shape[1:], np.float32)),
        env_spec=env_spec,
        source=source,
    )
    if "next_observations" not in fields:
        if "truncations" not in fields and not dataset.terminations.any():
            warnings.warn(
                f"{source}: nothing tells where episodes end, so all {len(rows)} rows are taken for one. If they are not, add "
                "`truncations` or `next_observations`"
            )
        return _with_next_rows(dataset)
    return _with_next_observations(dataset, fields["next_observations"], "truncations" not in fields)


def _default_space(observations: Any) -> spaces.Space:
    if isinstance(observations, dict):
        return spaces.Dict({key: _default_space(part) for key, part in observations.items()})
    if observations.dtype == np.uint8:
        return spaces.Box(0, 255, observations.shape[1:], np.uint8)
    return spaces.Box(-np.inf, np.inf, observations.shape[1:], np.float64)


def _with_next_rows(dataset: OfflineDataset) -> OfflineDataset:
    """Take the next row's observation as the next one, and drop the truncated rows, which have none."""
    keep, rows = ~dataset.truncations, dataset.obs_index
    columns: dict[str, Any] = {name: getattr(dataset, name)[keep] for name in ("actions", "rewards", "terminations")}
    before_dropped = np.append(dataset.truncations[1:], False)  # a termination wins
    return replace(
        dataset,
        obs_index=rows[keep],
        next_obs_index=np.where(dataset.terminations, rows, rows + 1)[keep],
        truncations=before_dropped[keep],
        **columns,
    )


def _with_next_observations(dataset: OfflineDataset, next_observations: Frames, breaks_end: bool) -> OfflineDataset:
    """Store a next observation only where it is not the next row's; such a break ends an episode if ``breaks_end``."""
    n, source = len(dataset), dataset.source
    next_frames = _checked_frames(next_observations, dataset.observation_space, source, "next_observations")
    if _n_frames(next_frames) != n:
        raise ValueError(f"{source}: next_observations have {_n_frames(next_frames)} rows, expected {n} as observations.")
    both = zip(_parts(dataset.frames), _parts(next_frames), strict=True)
    own = ~np.logical_and.reduce([_follows(frames, after) for frames, after in both])
    obs_index = dataset.obs_index + np.cumsum(own) - own

    def interleaved(frames: np.ndarray, after: np.ndarray) -> np.ndarray:
        stored = np.empty((n + int(own.sum()), *frames.shape[1:]), frames.dtype)
        stored[obs_index] = frames
        stored[obs_index[own] + 1] = after[own]
        return stored

    return replace(
        dataset,
        frames=map_arrays(interleaved, dataset.frames, next_frames),
        obs_index=obs_index,
        next_obs_index=obs_index + 1,
        truncations=own if breaks_end else dataset.truncations,
    )


def _follows(frames: np.ndarray, next_frames: np.ndarray) -> np.ndarray:
    """Whether ``next_frames[i]`` is ``frames[i + 1]``, shape ``(n,)``; False for the last row."""
    follows = np.zeros(len(frames), bool)
    for start in range(0, len(frames) - 1, _CHUNK):
        after = frames[start + 1 : start + 1 + _CHUNK]
        same = next_frames[start : start + len(after)] == after
        follows[start : start + len(after)] = same.reshape(len(after), -1).all(axis=1)
    return follows


def _concatenated(parts: list[OfflineDataset]) -> OfflineDataset:
    if not parts:
        raise ValueError("The list of datasets is empty.")
    first = parts[0]
    if len(parts) == 1:
        return first
    # Sources without environment or scores (a replay buffer) take them from the others
    known = next((part for part in parts if part.env_spec is not None), first)
    scored = next((part for part in parts if part.ref_max_score is not None), first)
    for part in parts[1:]:
        for name in ("observation_space", "action_space"):
            one, other = getattr(first, name), getattr(part, name)
            if not _same_space(one, other):
                raise ValueError(f"Cannot join {first.source} and {part.source}: their {name}s differ: {one} and {other}.")
        if part.env_spec is not None and known.env_spec is not None and part.env_spec.id != known.env_spec.id:
            ids = f"{known.env_spec.id} and {part.env_spec.id}"
            raise ValueError(f"Cannot join {known.source} and {part.source}: their environments differ: {ids}.")
    offsets = np.cumsum([0] + [_n_frames(part.frames) for part in parts[:-1]])
    names = ("actions", "rewards", "terminations", "truncations")
    columns: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return replace(
        first,
        frames=map_arrays(lambda *arrays: np.concatenate(arrays), *(part.frames for part in parts)),
        obs_index=np.concatenate([part.obs_index + offset for part, offset in zip(parts, offsets, strict=True)]),
        next_obs_index=np.concatenate([part.next_obs_index + offset for part, offset in zip(parts, offsets, strict=True)]),
        **columns,
        env_spec=known.env_spec,
        ref_min_score=scored.ref_min_score,
        ref_max_score=scored.ref_max_score,
        source=" + ".join(part.source for part in parts),
    )
