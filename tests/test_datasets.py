"""Rows name themselves here (see ``make_rows``), and each loader is held against the plain list of what it must give."""

import errno
import os
import pickle
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import h5py  # type: ignore[import-untyped]
import minari  # type: ignore[import-untyped]
import numpy as np
import pytest
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer  # type: ignore[import-untyped]
from sb3_contrib import RecurrentPPO
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer, RolloutBuffer
from stable_baselines3.common.save_util import save_to_pkl
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize, VecTransposeImage

from sb3_off2on.collection import collect_dataset
from sb3_off2on.datasets import OfflineDataset, load_dataset

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:minari")

OBS_SPACE = spaces.Box(-np.inf, np.inf, (2,), np.float64)
ACTION_SPACE = spaces.Box(-1.0, 1.0, (1,), np.float32)
# (length, terminated, truncated) of each episode
EPISODES = [(3, True, False), (1, False, True), (4, False, True), (1, True, False), (2, True, True), (3, False, True)]


class Row(NamedTuple):
    obs: list[float]
    action: float
    reward: float
    next_obs: list[float] | None  # None: any, the target never uses it
    terminated: bool
    truncated: bool


def observation(episode: int, t: int) -> list[float]:
    return [1000.0 * episode + t, -t]


def make_rows(episodes=EPISODES) -> list[Row]:
    """All rows as the source has them, a row may carry both flags."""
    rows: list[Row] = []
    for number, (length, terminated, truncated) in enumerate(episodes):
        for t in range(length):
            last = t == length - 1
            here, there = observation(number, t), observation(number, t + 1)
            rows.append(Row(here, len(rows) / 100, len(rows) + 0.5, there, last and terminated, last and truncated))
    return rows


def make_arrays(rows: list[Row]) -> dict[str, Any]:
    return {
        "observations": np.array([row.obs for row in rows], np.float32),
        "actions": np.array([[row.action] for row in rows], np.float32),
        "rewards": np.array([row.reward for row in rows], np.float32),
        "terminations": np.array([row.terminated for row in rows]),
        "truncations": np.array([row.truncated for row in rows]),
        "next_observations": np.array([row.next_obs for row in rows], np.float32),
    }


def d4rl_arrays(rows: list[Row], *leave_out: str) -> dict[str, Any]:
    names = {"terminations": "terminals", "truncations": "timeouts"}
    arrays = {names.get(name, name): array for name, array in make_arrays(rows).items()}
    return {name: array for name, array in arrays.items() if name not in leave_out}


def write_hdf5(path: Path, arrays: dict[str, Any]) -> Path:
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
    return path


def closed(rows: list[Row]) -> list[Row]:
    """Termination wins over truncation."""
    return [row._replace(truncated=row.truncated and not row.terminated) for row in rows]


def without_next(rows: list[Row]) -> list[Row]:
    """What is left where only the next row knows the next observation: a loop over the rows, as plain as can be."""
    kept: list[Row] = []
    for i, row in enumerate(rows):
        if row.terminated:
            kept.append(row._replace(next_obs=None, truncated=False))
        elif not row.truncated and i + 1 < len(rows):
            next_row = rows[i + 1]
            next_is_dropped = not next_row.terminated and (next_row.truncated or i + 1 == len(rows) - 1)
            kept.append(row._replace(truncated=next_is_dropped))
    return kept


def one_array(frames: Any) -> np.ndarray:
    assert isinstance(frames, np.ndarray)
    return frames


def check(dataset: OfflineDataset, rows: list[Row]) -> None:
    assert len(dataset) == len(rows)
    observations, next_observations = one_array(dataset.observations), one_array(dataset.next_observations)
    assert observations.dtype == np.float32
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(observations[i], row.obs, err_msg=f"row {i}")
        if row.next_obs is not None:
            np.testing.assert_array_equal(next_observations[i], row.next_obs, err_msg=f"row {i}")
        np.testing.assert_allclose(dataset.actions[i].squeeze(), row.action, atol=1e-6, err_msg=f"row {i}")
        assert dataset.rewards[i] == row.reward, i
        assert dataset.terminations[i] == row.terminated, i
        assert dataset.truncations[i] == row.truncated, i
    assert dataset.episode_ends[-1]
    assert not (dataset.terminations & dataset.truncations).any()


@pytest.fixture(autouse=True)
def minari_root(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


def make_minari(dataset_id="test/rows-v0", episodes=EPISODES, obs_space=OBS_SPACE, observe=observation, **kwargs: Any):
    rows, buffers = make_rows(episodes), []
    for number, (length, _, _) in enumerate(episodes):
        own, rows = rows[:length], rows[length:]
        frames: Any = [observe(number, t) for t in range(length + 1)]
        if isinstance(frames[0], dict):
            frames = {key: np.array([frame[key] for frame in frames]) for key in frames[0]}
        buffers.append(
            EpisodeBuffer(
                seed=number,
                options={"start": number},
                observations=frames if isinstance(frames, dict) else np.array(frames, obs_space.dtype),
                actions=np.array([[row.action] for row in own], np.float32),
                rewards=[row.reward for row in own],
                terminations=[row.terminated for row in own],
                truncations=[row.truncated for row in own],
                infos={},
            )
        )
    kwargs = {"action_space": ACTION_SPACE, "jpeg_encoding": False, **kwargs}
    return minari.create_dataset_from_buffers(dataset_id, buffers, observation_space=obs_space, **kwargs)


# Minari


@pytest.mark.parametrize("how", ["id", "dataset", "folder", "data", "str"])
def test_minari(how, minari_root):
    made = make_minari()
    folder = minari_root / "test" / "rows-v0"
    source = {"id": "test/rows-v0", "dataset": made, "folder": folder, "data": folder / "data", "str": str(folder)}[how]
    dataset = load_dataset(source)
    check(dataset, closed(make_rows()))
    assert len(dataset.frames) == len(make_rows()) + len(EPISODES)
    assert dataset.n_episodes == len(EPISODES)
    assert dataset.episode_lengths.tolist() == [3, 1, 4, 1, 2, 3]
    assert dataset.source == ("test/rows-v0" if how in ("id", "dataset") else str(source))


def test_minari_open_episode_is_truncated():
    rows = make_rows([(2, False, False), (3, True, False), (1, False, False)])
    make_minari(episodes=[(2, False, False), (3, True, False), (1, False, False)])
    expected = [row._replace(truncated=i in (1, 5)) for i, row in enumerate(rows)]
    check(load_dataset("test/rows-v0"), expected)


def test_minari_subset_and_termination_inside():
    made = make_minari()
    chosen = made.filter_episodes(lambda episode: episode.id in (2, 4))
    expected = closed(make_rows())
    check(load_dataset(chosen), expected[4:8] + expected[9:11])


def test_minari_dict_and_image_observations():
    space = spaces.Dict(
        {"state": spaces.Box(-np.inf, np.inf, (2,), np.float64), "image": spaces.Box(0, 255, (4, 5, 3), np.uint8)}
    )

    def observe(episode, t):
        return {"state": np.array(observation(episode, t)), "image": np.full((4, 5, 3), 10 * episode + t, np.uint8)}

    dataset = load_dataset(make_minari(obs_space=space, observe=observe))
    observations, next_observations = dataset.observations, dataset.next_observations
    assert isinstance(observations, dict)
    assert isinstance(next_observations, dict)
    assert observations["state"].dtype == np.float32
    assert observations["image"].dtype == np.uint8
    names = [(number, t) for number, (length, _, _) in enumerate(EPISODES) for t in range(length)]
    for i, (number, t) in enumerate(names):
        for key in space:
            np.testing.assert_array_equal(observations[key][i], observe(number, t)[key])
            np.testing.assert_array_equal(next_observations[key][i], observe(number, t + 1)[key])


@pytest.mark.parametrize("how", ["id", "dataset", "folder"])
def test_minari_memory_map(how, minari_root, tmp_path):
    """The same dataset, whose observations stay on disk."""
    space = spaces.Dict({"state": OBS_SPACE, "image": spaces.Box(0, 255, (4, 5, 3), np.uint8)})

    def observe(episode, t):
        return {"state": np.array(observation(episode, t)), "image": np.full((4, 5, 3), 10 * episode + t, np.uint8)}

    made = make_minari(obs_space=space, observe=observe)
    source = {"id": "test/rows-v0", "dataset": made, "folder": minari_root / "test" / "rows-v0"}[how]
    expected, dataset = load_dataset(source), load_dataset(source, memory_map=tmp_path / "new" / "frames")
    assert dataset.fingerprint == expected.fingerprint
    files = sorted(path.name for path in (tmp_path / "new" / "frames").iterdir())
    assert files == ["observations_0.npy", "observations_1.npy"]
    for key, part in dataset.frames.items():  # type: ignore[union-attr]
        assert isinstance(part, np.memmap)
        assert not part.flags.writeable
        np.testing.assert_array_equal(part, expected.frames[key])


def test_memory_map_in_the_same_folder(tmp_path):
    """A dataset that is in use keeps the files that another one replaces."""
    first = load_dataset(make_minari(), memory_map=tmp_path / "frames")
    load_dataset(make_minari("test/other-v0", EPISODES[2:]), memory_map=tmp_path / "frames")
    check(first, closed(make_rows()))


@pytest.mark.parametrize("kind", ["dict", "list", "file"])
def test_memory_map_is_for_minari(kind, tmp_path):
    sources = {"dict": make_arrays(make_rows()), "list": [make_minari()], "file": str(tmp_path / "a.npz")}
    with pytest.raises(ValueError, match=r"`memory_map` is for a Minari dataset, got a (dict|list|str)"):
        load_dataset(sources[kind], memory_map=tmp_path / "frames")
    assert not (tmp_path / "frames").exists()


def test_minari_reference_scores_and_environment():
    spec = gym.spec("Pendulum-v1")
    dataset = load_dataset(make_minari("a-v0", env=spec, action_space=spaces.Box(-2, 2, (1,)), obs_space=OBS_SPACE))
    assert dataset.env_spec is not None
    assert dataset.env_spec.id == "Pendulum-v1"
    assert dataset.make_env(max_episode_steps=7).spec.max_episode_steps == 7  # type: ignore[union-attr]
    assert dataset.ref_min_score is None
    made = make_minari("b-v0")
    made.storage.update_metadata({"ref_min_score": -100.0, "ref_max_score": 300.0})
    dataset = load_dataset("b-v0")
    assert dataset.normalized_score(-100.0) == 0.0
    np.testing.assert_allclose(dataset.normalized_score(np.array([100.0, 300.0, 500.0])), [50.0, 100.0, 150.0])
    # The file's own scores are used before D4RL's
    hopper = gym.spec("Hopper-v5")
    assert (replace(dataset, env_spec=hopper).ref_min_score, replace(dataset, env_spec=hopper).ref_max_score) == (
        -100.0,
        300.0,
    )
    dataset = replace(dataset, env_spec=hopper, ref_min_score=None, ref_max_score=None)
    assert (dataset.ref_min_score, dataset.ref_max_score) == (-20.272305, 3234.3)


def test_minari_errors(tmp_path, minari_root):
    make_minari()
    with pytest.raises(
        ValueError, match=r"No Minari dataset 'no/such-v0'.*test/rows-v0.*download=True.*minari download no/such-v0"
    ):
        load_dataset("no/such-v0")
    with pytest.raises(ValueError, match=r"No Minari dataset in the folder .*data/metadata.json"):
        load_dataset(tmp_path)
    made = make_minari("empty-v0")
    with h5py.File(minari_root / "empty-v0/data/main_data.hdf5", "a") as file:
        for field in ("observations", "actions", "rewards", "terminations", "truncations"):
            file[f"episode_1/{field}"].resize(int(field == "observations"), axis=0)
    with pytest.raises(ValueError, match=r"empty-v0, episode 1 has no steps.*filter_episodes"):
        load_dataset(made)
    for name, wrong in (("total_steps", 20), ("total_episodes", 3)):
        make_minari(f"{name}-v0").storage.update_metadata({name: wrong})
        with pytest.raises(ValueError, match=r"-v0 has \d+ steps in \d episodes, but its metadata says \d+ steps"):
            load_dataset(f"{name}-v0")
    discrete = make_minari("discrete-v0", action_space=spaces.Discrete(3))
    with pytest.raises(ValueError, match=r"discrete-v0: action space Discrete\(3\) is not a Box"):
        load_dataset(discrete)
    unbounded = make_minari("unbounded-v0", action_space=spaces.Box(-np.inf, np.inf, (1,)))
    with pytest.raises(ValueError, match=r"unbounded-v0: action space .* is unbounded"):
        load_dataset(unbounded)
    nested = spaces.Dict({"a": spaces.Dict({"b": OBS_SPACE})})
    made = make_minari("nested-v0", [(1, True, False)], nested, lambda episode, t: {"a": np.zeros(2)})
    with pytest.raises(ValueError, match=r"nested-v0: observation space Dict.* is neither a Box nor a flat Dict of Boxes"):
        load_dataset(made)
    with h5py.File(minari_root / "test/rows-v0/data/main_data.hdf5", "a") as file:
        file["episode_2/observations"][3, 1] = np.nan
    with pytest.raises(ValueError, match=r"test/rows-v0, episode 2: observations hold nan in row 3"):
        load_dataset("test/rows-v0")
    with h5py.File(minari_root / "test/rows-v0/data/main_data.hdf5", "a") as file:
        kept = file["episode_2/observations"][:-1]
        del file["episode_2/observations"]
        file["episode_2/observations"] = np.nan_to_num(kept)
    with pytest.raises(ValueError, match=r"episode 2 has 4 observations for 4 steps, expected one more"):
        load_dataset("test/rows-v0")


# Lists


def test_list():
    first, second = make_minari("a-v0", EPISODES[:2]), make_minari("b-v0", EPISODES)
    dataset = load_dataset([first, "b-v0", [second]])
    check(dataset, closed(make_rows(EPISODES[:2]) + 2 * make_rows()))
    assert dataset.source == "a-v0 + b-v0 + b-v0"
    assert load_dataset((dataset,)) is dataset
    assert load_dataset(dataset) is dataset


def test_list_takes_environment_and_scores_from_where_they_are():
    known = replace(load_dataset(make_arrays(make_rows())), env_spec=gym.spec("Hopper-v5"))
    dataset = load_dataset([make_arrays(make_rows()), known])
    assert dataset.env_spec is known.env_spec
    assert dataset.ref_max_score == 3234.3


def test_list_errors():
    arrays = make_arrays(make_rows())
    with pytest.raises(ValueError, match=r"list of datasets is empty"):
        load_dataset([])
    other = {**arrays, "action_space": spaces.Box(-2.0, 2.0, (1,))}
    with pytest.raises(ValueError, match=r"action_spaces differ: Box\(-1.0, 1.0.* and Box\(-2.0, 2.0"):
        load_dataset([arrays, other])
    other = {**arrays, "observation_space": spaces.Box(-1e6, 1e6, (2,))}
    with pytest.raises(ValueError, match=r"observation_spaces differ: .* and "):
        load_dataset([arrays, other])
    with pytest.raises(ValueError, match=r"environments differ: Hopper-v5 and Walker2d-v5"):
        load_dataset([arrays, {**arrays, "env_id": "Hopper-v5"}, {**arrays, "env_id": "Walker2d-v5"}])


# D4RL files


def test_d4rl_v2(tmp_path):
    arrays = d4rl_arrays(make_rows())
    arrays["rewards"] = arrays["rewards"][:, None]
    arrays |= {"infos/qpos": np.zeros(3), "metadata/algorithm": "SAC"}
    dataset = load_dataset(write_hdf5(tmp_path / "halfcheetah_medium-v2.hdf5", arrays))
    check(dataset, closed(make_rows()))
    assert len(dataset.frames) == len(make_rows()) + len(EPISODES)
    assert dataset.observation_space == OBS_SPACE
    assert dataset.action_space == ACTION_SPACE
    assert dataset.env_spec is not None
    assert dataset.env_spec.id == "HalfCheetah-v5"
    assert dataset.normalized_score(12135.0) == 100.0


@pytest.mark.parametrize("tail", [[], [(3, False, False)], [(1, False, False)], [(1, False, True), (1, True, False)]])
def test_d4rl_without_next_observations(tmp_path, tail):
    rows = make_rows([*EPISODES, *tail])
    source = write_hdf5(tmp_path / "pen.h5", d4rl_arrays(rows, "next_observations"))
    dataset = load_dataset(str(source))
    check(dataset, without_next(rows))
    assert len(dataset.frames) == len(rows)
    assert dataset.env_spec is None
    # A terminated row keeps itself
    np.testing.assert_array_equal(dataset.next_obs_index[dataset.terminations], dataset.obs_index[dataset.terminations])


def test_d4rl_without_next_observations_by_hand(tmp_path):
    rows = make_rows([(3, False, True), (1, False, True), (2, True, True), (2, False, False)])
    dataset = load_dataset(write_hdf5(tmp_path / "walker2d-expert-v2.hdf5", d4rl_arrays(rows, "next_observations")))
    assert one_array(dataset.observations)[:, 0].tolist() == [0, 1, 2000, 2001, 3000]
    assert one_array(dataset.next_observations)[:, 0].tolist() == [1, 2, 2001, 2001, 3001]
    assert dataset.terminations.tolist() == [False, False, False, True, False]
    assert dataset.truncations.tolist() == [False, True, False, False, True]
    assert dataset.env_spec is not None
    assert dataset.env_spec.id == "Walker2d-v5"


def test_nothing_tells_where_episodes_end():
    arrays = make_arrays(make_rows([(5, False, False)]))
    for name in ("truncations", "next_observations"):
        del arrays[name]
    with pytest.warns(UserWarning, match=r"arrays: nothing tells where episodes end, so all 5 rows are taken for one"):
        dataset = load_dataset(arrays)
    assert dataset.episode_lengths.tolist() == [4]  # the last row has no next one


def test_d4rl_without_timeouts(tmp_path):
    rows = [row._replace(truncated=False) for row in make_rows()]
    # With next observations the breaks are seen ...
    expected = closed(make_rows())
    check(load_dataset(write_hdf5(tmp_path / "a.hdf5", d4rl_arrays(rows, "timeouts"))), expected)
    # ... without them only terminals end an episode, and the last row has no next one
    dataset = load_dataset(write_hdf5(tmp_path / "hopper.hdf5", d4rl_arrays(rows, "timeouts", "next_observations")))
    assert dataset.episode_lengths.tolist() == [3, 6, 2, 2]
    assert len(dataset) == len(rows) - 1
    assert dataset.truncations.tolist() == [False] * 12 + [True]


@pytest.mark.parametrize(
    ("error", "expected", "match"),
    [
        (MemoryError("too large"), MemoryError, r"^too large$"),
        (ModuleNotFoundError("No module named 'x'"), ModuleNotFoundError, r"^No module named 'x'$"),
        (OSError(errno.ENOSPC, "No space left"), ValueError, r"a.npz cannot be read: OSError: \[Errno 28\] No space left$"),
        (OSError("truncated file"), ValueError, r"a.npz cannot be read: OSError: truncated file. The file may be damaged$"),
        (KeyError("x"), ValueError, r"a.npz cannot be read: KeyError: 'x'. The file may be damaged$"),
    ],
)
def test_only_what_the_file_is_to_blame_for(error, expected, match, tmp_path, monkeypatch):
    def fail(path):
        raise error

    monkeypatch.setattr("sb3_off2on.datasets._read_arrays", fail)
    (tmp_path / "a.npz").touch()
    with pytest.raises(expected, match=match):
        load_dataset(tmp_path / "a.npz")


def test_d4rl_errors(tmp_path):
    source = write_hdf5(tmp_path / "a.hdf5", d4rl_arrays(make_rows(), "rewards", "terminals") | {"infos/x": np.zeros(1)})
    with pytest.raises(
        ValueError, match=r"a.hdf5: rewards and terminations missing. Present: actions, infos, next_obs.*terminals"
    ):
        load_dataset(source)
    with pytest.raises(ValueError, match=r"The file .*no.hdf5 does not exist"):
        load_dataset(tmp_path / "no.hdf5")
    (tmp_path / "text.hdf5").write_text("no HDF5")
    with pytest.raises(ValueError, match=r"text.hdf5 cannot be read: OSError: .* The file may be damaged"):
        load_dataset(tmp_path / "text.hdf5")
    (tmp_path / "data.csv").write_text("1,2")
    with pytest.raises(ValueError, match=r"Cannot load a dataset from the file .*data.csv. A source is a Minari id"):
        load_dataset(str(tmp_path / "data.csv"))


# SB3's replay buffers


def fill(buffer: ReplayBuffer, n_steps: int, low: float, high: float) -> list[list[Row]]:
    """Play ``n_steps`` with episodes of growing length in each environment; the rows of each environment in order."""
    streams: list[list[Row]] = [[] for _ in range(buffer.n_envs)]
    episode = list(range(buffer.n_envs))
    t = [0] * buffer.n_envs
    as_dict = isinstance(buffer, DictReplayBuffer)
    for step in range(n_steps):
        rows = []
        for env in range(buffer.n_envs):
            done = t[env] == episode[env] % 4 + 1
            timeout = done and episode[env] % 2 == 0
            here, there = observation(episode[env], t[env]), observation(episode[env], t[env] + 1)
            action = low + (high - low) * ((step * 7 + env) % 20) / 19
            rows.append(Row(here, action, 100.0 * env + step, there, done and not timeout, timeout))
            t[env] += 1
            if done:
                episode[env], t[env] = episode[env] + buffer.n_envs, 0
        for stream, row in zip(streams, rows, strict=True):
            stream.append(row)
        obs, next_obs = np.array([row.obs for row in rows]), np.array([row.next_obs for row in rows])
        buffer.add(
            {"x": obs} if as_dict else obs,  # type: ignore[arg-type]
            {"x": next_obs} if as_dict else next_obs,  # type: ignore[arg-type]
            np.array([[2 * (row.action - low) / (high - low) - 1] for row in rows]),  # SB3 adds scaled actions
            np.array([row.reward for row in rows]),
            np.array([row.terminated or row.truncated for row in rows]),
            [{"TimeLimit.truncated": row.truncated} for row in rows],
        )
    return streams


def end_streams(streams: list[list[Row]]) -> list[Row]:
    return [
        row._replace(truncated=row.truncated or (row is stream[-1] and not row.terminated))
        for stream in streams
        for row in stream
    ]


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("n_steps", [7, 20, 33])
@pytest.mark.parametrize("bounds", [(-1.0, 1.0), (-2.0, 5.0)])
@pytest.mark.parametrize("as_dict", [False, True])
def test_replay_buffer(n_envs, n_steps, bounds, as_dict):
    obs_space: Any = spaces.Dict({"x": OBS_SPACE}) if as_dict else OBS_SPACE
    cls = DictReplayBuffer if as_dict else ReplayBuffer
    buffer = cls(20 * n_envs, obs_space, spaces.Box(bounds[0], bounds[1], (1,)), "cpu", n_envs)
    streams = fill(buffer, n_steps, *bounds)
    assert buffer.full == (n_steps >= 20)
    dataset = load_dataset(buffer)
    if as_dict:
        assert isinstance(dataset.frames, dict)
        dataset = replace(dataset, frames=dataset.frames["x"], observation_space=OBS_SPACE)
    expected = end_streams([stream[-20:] for stream in streams])
    check(dataset, expected)
    assert len(dataset.frames) == len(expected) + dataset.n_episodes
    assert dataset.source == cls.__name__


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("n_steps", [7, 20, 33])
def test_replay_buffer_optimized_memory(n_envs, n_steps):
    buffer = ReplayBuffer(20 * n_envs, OBS_SPACE, ACTION_SPACE, "cpu", n_envs, True, False)
    streams = fill(buffer, n_steps, -1.0, 1.0)
    kept = [stream if n_steps < 20 else stream[-19:] for stream in streams]
    # Without timeouts every end is a termination, whose next observation the ring has overwritten
    expected = [
        row._replace(terminated=True, truncated=False, next_obs=None) if row.terminated or row.truncated else row
        for stream in kept
        for row in end_streams([[row._replace(terminated=row.terminated or row.truncated, truncated=False) for row in stream]])
    ]
    last = [stream[-1] for stream in streams]
    expected = [
        row._replace(terminated=False, truncated=True, next_obs=end.next_obs)
        if (end := next((one for one in last if one.reward == row.reward), None)) and not (end.terminated or end.truncated)
        else row
        for row in expected
    ]
    check(load_dataset(buffer), expected)


def test_replay_buffer_errors():
    buffer = ReplayBuffer(30, OBS_SPACE, ACTION_SPACE, "cpu", 3)
    with pytest.raises(ValueError, match=r"ReplayBuffer: holds no transitions"):
        load_dataset(buffer)
    with pytest.raises(ValueError, match=r"ReplayBuffer: action space Discrete\(2\) is not a Box"):
        load_dataset(ReplayBuffer(30, OBS_SPACE, spaces.Discrete(2)))


class Malicious:
    def __reduce__(self):
        return os.mkdir, (os.environ["MALICIOUS_FOLDER"],)


def test_pickle_needs_consent(tmp_path, monkeypatch):
    buffer = ReplayBuffer(20, OBS_SPACE, ACTION_SPACE, "cpu")
    streams = fill(buffer, 9, -1.0, 1.0)
    save_to_pkl(tmp_path / "replay.pkl", buffer)
    check(load_dataset(tmp_path / "replay.pkl", allow_pickle=True), end_streams(streams))
    check(load_dataset([tmp_path / "replay.pkl"], allow_pickle=True), end_streams(streams))
    with pytest.raises(ValueError, match=r"replay.pkl is a pickle, .* any code. .*allow_pickle=True"):
        load_dataset(tmp_path / "replay.pkl")
    monkeypatch.setenv("MALICIOUS_FOLDER", str(tmp_path / "owned"))
    for name in ("bad.pkl", "bad.npz", "bad.hdf5", "bad"):
        (tmp_path / name).write_bytes(pickle.dumps(Malicious()))
        with pytest.raises(ValueError, match=name):
            load_dataset(tmp_path / name)
    np.savez(tmp_path / "objects.npz", **(make_arrays(make_rows()) | {"rewards": np.array([Malicious()] * 14, object)}))
    with pytest.raises(ValueError, match=r"objects.npz cannot be read: .*allow_pickle=False"):
        load_dataset(tmp_path / "objects.npz")
    assert not (tmp_path / "owned").exists()
    save_to_pkl(tmp_path / "list.pkl", [1, 2])
    with pytest.raises(ValueError, match=r"list.pkl holds a list, expected an SB3 ReplayBuffer"):
        load_dataset(tmp_path / "list.pkl", allow_pickle=True)


# Arrays


def test_arrays():
    dataset = load_dataset({**make_arrays(make_rows()), "env_id": "Pendulum-v1"})
    check(dataset, closed(make_rows()))
    assert len(dataset.frames) == len(make_rows()) + len(EPISODES)
    assert dataset.make_env().spec.id == "Pendulum-v1"  # type: ignore[union-attr]
    check(load_dataset({**make_arrays(make_rows()), "next_observations": None}), without_next(make_rows()))
    check(load_dataset(d4rl_arrays(make_rows())), closed(make_rows()))


def test_arrays_in_any_order_have_their_own_next_observations():
    rows = make_rows([(9, True, False)])
    order = [4, 0, 8, 2, 3, 7, 1, 6, 5]
    shuffled = [rows[i] for i in order]
    arrays = make_arrays(shuffled)
    expected = [row._replace(truncated=i == 8 and not row.terminated) for i, row in enumerate(shuffled)]
    dataset = load_dataset(arrays)
    check(dataset, expected)
    assert len(dataset.frames) == 9 + 8  # only 3 follows 2
    # Without truncations each break ends an episode
    dataset = load_dataset({**arrays, "truncations": None})
    assert dataset.episode_lengths.tolist() == [1, 1, 1, 2, 1, 1, 1, 1]


def test_arrays_dict_observations_and_spaces(tmp_path):
    arrays = make_arrays(make_rows())
    nested: dict[str, Any] = {
        **arrays,
        "observations": {"a": arrays["observations"], "b": 2 * arrays["observations"][:, :1]},
        "next_observations": {"a": arrays["next_observations"], "b": 2 * arrays["next_observations"][:, :1]},
    }
    dataset = load_dataset(nested)
    assert dataset.observation_space == spaces.Dict({"a": OBS_SPACE, "b": spaces.Box(-np.inf, np.inf, (1,), np.float64)})
    for field in ("observations", "next_observations"):
        for key in ("a", "b"):
            np.testing.assert_array_equal(getattr(dataset, field)[key], nested[field][key])
    flat = {f"{field}/{key}": nested[field][key] for field in ("observations", "next_observations") for key in ("a", "b")}
    rest = {key: value for key, value in arrays.items() if "observations" not in key}
    np.savez(tmp_path / "nested.npz", **flat, **rest)
    assert load_dataset(tmp_path / "nested.npz").fingerprint == dataset.fingerprint


def test_npz(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", **make_arrays(make_rows()), env_id="Hopper-v5")
    dataset = load_dataset(str(tmp_path / "a.npz"))
    check(dataset, closed(make_rows()))
    assert dataset.env_spec is not None
    assert dataset.env_spec.id == "Hopper-v5"
    np.savez(tmp_path / "b.npz", **d4rl_arrays(make_rows(), "next_observations"))
    check(load_dataset(tmp_path / "b.npz"), without_next(make_rows()))


def test_memory_map_is_not_loaded(tmp_path):
    frames = np.lib.format.open_memmap(tmp_path / "frames.npy", "w+", np.uint8, (14, 8, 9, 3))
    frames[:] = np.arange(14)[:, None, None, None]
    arrays = make_arrays(make_rows()) | {"observations": frames, "next_observations": None}
    dataset = load_dataset(arrays)
    assert isinstance(dataset.frames, np.memmap)
    assert np.shares_memory(dataset.frames, frames)
    assert one_array(dataset.observations)[:, 0, 0, 0].tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10, 11, 12]


@pytest.mark.parametrize(
    ("field", "row", "value", "match"),
    [
        ("rewards", 5, np.nan, r"arrays: rewards hold nan in row 5: repair"),
        ("actions", 6, -np.inf, r"arrays: actions hold -inf in row 6"),
        ("observations", 7, np.inf, r"arrays: observations hold inf in row 7"),
        ("next_observations", 4, np.nan, r"arrays: next_observations hold nan in row 4"),
        ("actions", 3, 1.01, r"actions are outside of Box\(-1.0, 1.0.*: row 3 holds 1.01.*action_space"),
    ],
)
def test_bad_values(field, row, value, match):
    arrays = make_arrays(make_rows())
    arrays[field][row] = value
    with pytest.raises(ValueError, match=match):
        load_dataset(arrays)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rewards": np.zeros((14, 2))}, r"rewards have shape \(14, 2\), expected \(14,\)"),
        ({"terminations": np.zeros(13)}, r"terminations have shape \(13,\), expected \(14,\)"),
        ({"truncations": np.zeros((14, 1, 1))}, r"truncations have shape \(14, 1, 1\)"),
        ({"actions": np.zeros((13, 1))}, r"actions have shape \(13, 1\), expected \(14, 1\)"),
        ({"actions": np.zeros((14, 1), int)}, r"actions have shape \(14, 1\) and dtype int64, expected floats"),
        (
            {"actions": np.zeros(14)},
            r"actions have shape \(14,\) .* expected floats of shape \(n, \*action_shape\), \(n, 1\) where",
        ),
        ({"action_space": spaces.Discrete(4)}, r"action space Discrete\(4\) is not a Box"),
        ({"action_space": spaces.Box(0, np.inf, (1,))}, r"action space .* is unbounded"),
        ({"observation_space": spaces.Discrete(4)}, r"observation space Discrete\(4\) is neither a Box"),
        ({"observation_space": spaces.Box(-1, 1, (3,))}, r"observations have shape \(14, 2\), expected \(n, \*\(3,\)\)"),
        ({"observation_space": spaces.Box(0, 255, (2,), np.uint8)}, r"observations are float32, expected uint8"),
        ({"observation_space": spaces.Dict({"a": OBS_SPACE})}, r"the keys None, expected \['a'\]"),
        ({"observations": {}}, r"observation space Dict\(\) is neither"),
        (
            {"observations": {"a": np.zeros((14, 2)), "b": np.zeros((13, 2))}, "next_observations": None},
            r"observations have parts of different lengths: {'a': 14, 'b': 13}",
        ),
        ({"next_observations": np.zeros((13, 2))}, r"next_observations have 13 rows, expected 14"),
        ({"next_observations": np.zeros((14, 3))}, r"next_observations have shape \(14, 3\)"),
        ({"rewards": None}, r"rewards missing. Present: actions"),
        ({"truncation": np.zeros(14)}, r"unknown field 'truncation'. Known: .*truncations"),
        ({"env_id": "NoSuch-v0"}, r"unknown environment NoSuch-v0"),
    ],
)
def test_bad_arrays(changes, match):
    with pytest.raises(ValueError, match=match):
        load_dataset({**make_arrays(make_rows()), **changes})


def test_nothing_left():
    empty = {name: array[:0] for name, array in make_arrays(make_rows()).items()}
    with pytest.raises(ValueError, match=r"arrays: holds no transitions"):
        load_dataset(empty)
    only_timeouts = make_arrays(make_rows([(1, False, True)])) | {"next_observations": None}
    with pytest.raises(ValueError, match=r"arrays: holds no transitions \(a row without a next observation"):
        load_dataset(only_timeouts)


@pytest.mark.parametrize("source", [3, None, spaces.Discrete(2)])
def test_unknown_source(source):
    with pytest.raises(ValueError, match=r"Cannot load a dataset from a \w+. A source is a Minari id"):
        load_dataset(source)
    with pytest.raises(ValueError, match=r"from a RolloutBuffer"):
        load_dataset(RolloutBuffer(4, OBS_SPACE, ACTION_SPACE))


def test_rounded_actions_are_clipped():
    arrays = make_arrays(make_rows())
    arrays["actions"][3] = 1.000001
    arrays["actions"][4] = -1.000001
    dataset = load_dataset(arrays)
    assert dataset.actions[3:5, 0].tolist() == [1.0, -1.0]
    assert arrays["actions"][3] > 1.0  # the caller's array is left alone


# The container


def test_episode_statistics():
    dataset = load_dataset(make_arrays(make_rows()))
    by_episode, start = [], 0
    for length, _, _ in EPISODES:
        by_episode.append([row.reward for row in make_rows()[start : start + length]])
        start += length
    np.testing.assert_allclose(dataset.episode_returns, [sum(rewards) for rewards in by_episode])
    for gamma in (0.0, 0.9, 1.0):
        expected = [
            sum(gamma**k * reward for k, reward in enumerate(rewards[t:]))
            for rewards in by_episode
            for t in range(len(rewards))
        ]
        returns = dataset.monte_carlo_returns(gamma)
        assert returns.dtype == np.float32
        np.testing.assert_allclose(returns, expected, rtol=1e-6)
    with pytest.raises(ValueError, match=r"gamma must be in \[0, 1\], got 1.5"):
        dataset.monte_carlo_returns(1.5)


def test_monte_carlo_returns_are_fast():
    n = 1_000_000
    dataset = OfflineDataset(
        frames=np.zeros((1, 1), np.float32),
        obs_index=np.zeros(n, np.int64),
        next_obs_index=np.zeros(n, np.int64),
        actions=np.zeros((n, 1), np.float32),
        rewards=np.ones(n),
        terminations=np.arange(1, n + 1) % 1000 == 0,
        truncations=np.zeros(n, bool),
        observation_space=spaces.Box(-1, 1, (1,)),
        action_space=ACTION_SPACE,
    )
    start = time.perf_counter()
    returns = dataset.monte_carlo_returns(0.99)
    assert time.perf_counter() - start < 2.0
    np.testing.assert_allclose(returns[:1000], (1 - 0.99 ** np.arange(1000, 0, -1)) / 0.01, rtol=1e-5)


def test_no_scores_no_environment():
    dataset = load_dataset(make_arrays(make_rows()))
    with pytest.raises(ValueError, match=r"arrays has no reference scores: give ref_min_score"):
        dataset.normalized_score(1.0)
    with pytest.raises(ValueError, match=r"arrays does not name its environment"):
        dataset.make_env()


def test_fingerprint():
    rows = make_rows()
    dataset = load_dataset(make_arrays(rows))
    assert dataset.fingerprint == load_dataset(make_arrays(rows)).fingerprint
    assert dataset.fingerprint == replace(dataset, source="other").fingerprint
    assert len(dataset.fingerprint) == 64
    others = [load_dataset(make_arrays(rows) | {"action_space": spaces.Box(-2, 2, (1,))})]
    for field in ("rewards", "actions", "observations", "next_observations"):
        arrays = make_arrays(rows)
        arrays[field][7] += 0.125
        others.append(load_dataset(arrays))
    others.append(load_dataset(make_arrays([*rows[:-1], rows[-1]._replace(terminated=True)])))
    assert len({dataset.fingerprint, *(other.fingerprint for other in others)}) == 7


def test_repr():
    dataset = replace(load_dataset(make_arrays(make_rows())), env_spec=gym.spec("HalfCheetah-v5"), source="some-v0")
    text = repr(dataset)
    for part in ("some-v0", "HalfCheetah-v5", "14 in 6 episodes", "normalized score 2.", str(OBS_SPACE), str(ACTION_SPACE)):
        assert part in text
    returns = dataset.episode_returns
    assert f"{returns.mean():.1f} +/- {returns.std():.1f}" in text
    assert "score" not in repr(load_dataset(make_arrays(make_rows())))


def image_arrays(as_dict: bool) -> dict[str, Any]:
    arrays = make_arrays(make_rows())
    images = np.random.randint(0, 256, (15, 36, 40, 3), np.uint8)
    observations: Any = images[:-1]
    next_observations: Any = images[1:]
    if as_dict:
        observations = {"image": observations, "state": arrays["observations"]}
        next_observations = {"image": next_observations, "state": arrays["next_observations"]}
    return arrays | {"observations": observations, "next_observations": next_observations}


@pytest.mark.parametrize("as_dict", [False, True])
def test_for_spaces_transposes_as_a_view(as_dict):
    arrays = image_arrays(as_dict)
    dataset = load_dataset(arrays)
    assert dataset.for_spaces(dataset.observation_space, ACTION_SPACE) is dataset
    env: Any = gym.Env()
    env.observation_space, env.action_space = dataset.observation_space, ACTION_SPACE
    wanted = VecTransposeImage(DummyVecEnv([lambda: env])).observation_space
    fitted = dataset.for_spaces(wanted, ACTION_SPACE)
    before: Any = dataset.frames["image"] if isinstance(dataset.frames, dict) else dataset.frames
    after: Any = fitted.frames["image"] if isinstance(fitted.frames, dict) else fitted.frames
    assert fitted.observation_space is wanted
    assert after.shape[1:] == (3, 36, 40)
    assert np.shares_memory(before, after)
    for i in range(len(fitted)):
        for index, field in ((fitted.obs_index, "observations"), (fitted.next_obs_index, "next_observations")):
            image = arrays[field]["image"][i] if as_dict else arrays[field][i]
            np.testing.assert_array_equal(after[index[i]], VecTransposeImage.transpose_image(image))


def test_for_spaces_float_kinds_match():
    dataset = load_dataset(make_arrays(make_rows()))
    assert dataset.for_spaces(spaces.Box(-np.inf, np.inf, (2,), np.float32), spaces.Box(-1, 1, (1,), np.float64)) is dataset


@pytest.mark.parametrize(
    ("observation_space", "action_space", "match"),
    [
        (OBS_SPACE, spaces.Box(-2, 2, (1,)), r"its action space Box\(-1.0, 1.0.* is not the environment's Box\(-2.0, 2.0"),
        (OBS_SPACE, spaces.Discrete(2), r"is not the environment's Discrete\(2\)"),
        (spaces.Box(-np.inf, np.inf, (3,)), ACTION_SPACE, r"its observation space .*\(2,\).* is not the .*\(3,\)"),
        (spaces.Box(0, 255, (2,), np.uint8), ACTION_SPACE, r"is not the environment's Box\(0, 255"),
        (spaces.Dict({"a": OBS_SPACE}), ACTION_SPACE, r"is not the environment's Dict"),
    ],
)
def test_for_spaces_errors(observation_space, action_space, match):
    with pytest.raises(ValueError, match=match):
        load_dataset(make_arrays(make_rows())).for_spaces(observation_space, action_space)


@pytest.mark.parametrize("shape", [(4, 36, 40), (3, 40, 36), (36, 40, 4)])
def test_for_spaces_refuses_other_images(shape):
    dataset = load_dataset(image_arrays(as_dict=False))
    with pytest.raises(ValueError, match=r"its observation space .*\(36, 40, 3\).* is not the environment's"):
        dataset.for_spaces(spaces.Box(0, 255, shape, np.uint8), ACTION_SPACE)


# Collecting


class NamedSteps(gym.Env):
    """Observations name episode and step, always in the same memory; episodes end by turns in both ways."""

    def __init__(self, as_dict: bool = False) -> None:
        self.as_dict = as_dict
        self.observation_space: Any = spaces.Dict({"x": OBS_SPACE}) if as_dict else OBS_SPACE
        self.action_space = spaces.Box(-2.0, 5.0, (1,), np.float32)
        self.episode, self.t = -1, 0
        self.memory = np.zeros(2)

    def observe(self):
        self.memory[:] = observation(self.episode, self.t)
        return {"x": self.memory} if self.as_dict else self.memory

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return self.observe(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.t += 1
        end = self.t == 3 + self.episode % 3
        return self.observe(), float(10 * action[0]), end and self.episode % 2 == 0, end and self.episode % 2 == 1, {}


def check_named_steps(dataset: OfflineDataset, n_steps: int) -> None:
    assert len(dataset) == n_steps
    observations, next_observations = one_array(dataset.observations), one_array(dataset.next_observations)
    episode, t = 0, 0
    for i in range(n_steps):
        np.testing.assert_array_equal(observations[i], observation(episode, t))
        np.testing.assert_array_equal(next_observations[i], observation(episode, t + 1))
        assert dataset.rewards[i] == pytest.approx(10 * dataset.actions[i, 0], rel=1e-5)
        end = t + 1 == 3 + episode % 3
        assert dataset.terminations[i] == (end and episode % 2 == 0)
        assert dataset.truncations[i] == ((end and episode % 2 == 1) or (i == n_steps - 1 and not end))
        episode, t = (episode + 1, 0) if end else (episode, t + 1)


@pytest.mark.parametrize("n_steps", [1, 3, 23, 300])
def test_collect_random(n_steps, monkeypatch):
    monkeypatch.setattr("sb3_off2on.collection._WRITE_STEPS", 20)  # written in several pieces
    made = collect_dataset(None, NamedSteps(), n_steps, "own/random-v0", seed=3, author="somebody")
    assert made.total_steps == n_steps
    assert made.storage.metadata["algorithm_name"] == "random"
    assert made.storage.metadata["author"] == {"somebody"}
    dataset = load_dataset("own/random-v0")
    check_named_steps(dataset, n_steps)
    if n_steps == 300:  # uniform over the whole range
        np.testing.assert_allclose(np.histogram(dataset.actions, 3, (-2, 5))[0], 100, atol=25)
    again = collect_dataset(None, NamedSteps(), n_steps, "own/random-v1", seed=3, algorithm_name="mine", description="x")
    assert again.storage.metadata["algorithm_name"] == "mine"
    assert load_dataset(again).fingerprint == dataset.fingerprint


def test_collect_sac():
    env = NamedSteps()
    model = SAC("MlpPolicy", env, buffer_size=1, policy_kwargs=dict(net_arch=[4]), device="cpu")
    dataset = load_dataset(collect_dataset(model, NamedSteps(), 30, "sac-v0", deterministic=True))
    check_named_steps(dataset, 30)
    # Actions are those of the policy, in the environment's own range
    np.testing.assert_allclose(dataset.actions, model.predict(dataset.observations, deterministic=True)[0], atol=1e-5)
    noisy = [load_dataset(collect_dataset(model, NamedSteps(), 30, f"noisy-v{seed}", seed=seed % 2)) for seed in range(3)]
    assert noisy[0].fingerprint == noisy[2].fingerprint != noisy[1].fingerprint


@pytest.mark.parametrize("as_dict", [False, True])
def test_collect_under_vec_normalize(as_dict):
    """The policy sees what it was trained on, the dataset holds what the environment gave."""
    env = VecNormalize(DummyVecEnv([lambda: NamedSteps(as_dict)]))
    rms: Any = env.obs_rms["x"] if as_dict else env.obs_rms
    rms.mean, rms.var = np.array([3000.0, -2.0]), np.array([1e6, 4.0])
    policy = "MultiInputPolicy" if as_dict else "MlpPolicy"
    model = SAC(policy, env, buffer_size=1, policy_kwargs=dict(net_arch=[4]), device="cpu")
    dataset = load_dataset(collect_dataset(model, NamedSteps(as_dict), 30, "normalized-v0", deterministic=True))
    raw = one_array(dataset.observations["x"] if as_dict else dataset.observations)
    check_named_steps(replace(dataset, frames=dataset.frames["x"], observation_space=OBS_SPACE) if as_dict else dataset, 30)
    scaled = (raw - [3000.0, -2.0]) / [1000.0, 2.0]
    expected, _ = model.predict({"x": scaled} if as_dict else scaled, deterministic=True)
    np.testing.assert_allclose(dataset.actions, expected, atol=1e-4)
    np.testing.assert_array_equal(rms.mean, [3000.0, -2.0])


def test_collect_pendulum_by_id():
    model = SAC("MlpPolicy", "Pendulum-v1", buffer_size=1, policy_kwargs=dict(net_arch=[4]), device="cpu")
    dataset = load_dataset(collect_dataset(model, "Pendulum-v1", 250, "pendulum/sac-v0", seed=0, progress_bar=True))
    assert dataset.episode_lengths.tolist() == [200, 50]
    assert dataset.env_spec is not None
    assert dataset.env_spec.id == "Pendulum-v1"
    env = dataset.make_env()
    dataset.for_spaces(env.observation_space, env.action_space)
    # The environment itself agrees with every row
    observed = [env.reset(seed=0)[0]] + [env.step(action)[0] for action in dataset.actions[:200]]
    np.testing.assert_allclose(one_array(dataset.frames)[:201], observed, atol=1e-4)


def test_collect_dict_observations_and_own_policy():
    class Policy:
        def predict(self, obs, deterministic=False):
            assert deterministic
            return np.array([obs["x"][1] * 100]), None  # clipped to the bounds

    dataset = load_dataset(collect_dataset(Policy(), NamedSteps(as_dict=True), 11, "dict-v0", deterministic=True))
    assert isinstance(dataset.frames, dict)
    assert set(dataset.actions[:, 0].tolist()) == {0.0, -2.0}
    check_named_steps(replace(dataset, frames=dataset.frames["x"], observation_space=OBS_SPACE), 11)


def test_collect_images_without_loss():
    class Images(NamedSteps):
        def __init__(self) -> None:
            super().__init__()
            self.observation_space = spaces.Box(0, 255, (36, 36, 3), np.uint8)
            self.shown: list[np.ndarray] = []

        def observe(self):
            self.shown.append(self.observation_space.sample())
            return self.shown[-1]

    env = Images()
    dataset = load_dataset(collect_dataset(None, env, 10, "images-v0"))
    np.testing.assert_array_equal(dataset.frames, env.shown)


def test_collect_recurrent(monkeypatch):
    model = RecurrentPPO(
        "MlpLstmPolicy", NamedSteps(), n_steps=8, batch_size=8, policy_kwargs=dict(lstm_hidden_size=4), device="cpu"
    )
    given, given_back = [], []
    predict = model.predict

    def recorded(obs, state=None, episode_start=None, deterministic=False):
        action, new_state = predict(obs, state, episode_start, deterministic)
        given.append((state, bool(episode_start[0])))
        given_back.append(new_state)
        return action, new_state

    monkeypatch.setattr(model, "predict", recorded)
    collect_dataset(model, NamedSteps(), 9, "recurrent-v0")  # episodes of 3, 4 and (cut) 2 steps
    assert [start for _, start in given] == [i in (0, 3, 7) for i in range(9)]
    for i, (state, start) in enumerate(given):
        assert state is (None if start else given_back[i - 1])


def test_collect_errors():
    with pytest.raises(ValueError, match=r"n_steps must be at least 1, got 0"):
        collect_dataset(None, NamedSteps(), 0, "a-v0")
    with pytest.raises(ValueError, match=r"env must be an id or one gym.Env, got a DummyVecEnv"):
        collect_dataset(None, DummyVecEnv([NamedSteps]), 5, "a-v0")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'no-version' has no version: call it no-version-v0"):
        collect_dataset(None, NamedSteps(), 5, "no-version")
    with pytest.raises(ValueError, match=r"action space Discrete\(2\) is not a Box"):
        collect_dataset(None, "CartPole-v1", 5, "a-v0")
    with pytest.raises(ValueError, match=r"model must have a method predict\(\), got 'model.zip': load a saved one first"):
        collect_dataset("model.zip", NamedSteps(), 5, "a-v0")
    collect_dataset(None, NamedSteps(), 5, "a-v0")  # nothing was left behind
    with pytest.raises(ValueError, match=r"'a-v0' exists. .*minari.delete_dataset\('a-v0'\)"):
        collect_dataset(None, NamedSteps(), 5, "a-v0")


# Real data, where there is some

REAL = Path(os.environ.get("MINARI_DATASETS_PATH", ""), "off2on", "halfcheetah", "medium-replay-v0")


@pytest.mark.skipif(not REAL.is_dir(), reason="no off2on/halfcheetah/medium-replay-v0 in MINARI_DATASETS_PATH")
def test_real_data():
    start = time.perf_counter()
    dataset = load_dataset(REAL)
    assert time.perf_counter() - start < 10.0
    assert dataset.normalized_score(12135.0) == 100.0
    assert isinstance(dataset.frames, np.ndarray)
    assert len(dataset.frames) == len(dataset) + dataset.n_episodes
    made, row = minari.MinariDataset(REAL / "data"), 0
    observations: Any = dataset.observations
    next_observations: Any = dataset.next_observations
    for episode in made.iterate_episodes():
        rows = slice(row, row + len(episode))
        np.testing.assert_array_equal(observations[rows], episode.observations[:-1].astype(np.float32))
        np.testing.assert_array_equal(next_observations[rows], episode.observations[1:].astype(np.float32))
        np.testing.assert_array_equal(dataset.actions[rows], episode.actions)
        row += len(episode)
    assert row == len(dataset)
