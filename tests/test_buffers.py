import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import assert_same
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.save_util import load_from_pkl, save_to_pkl
from stable_baselines3.common.vec_env import VecNormalize
from stable_baselines3.sac.policies import MlpPolicy

from sb3_off2on.buffers import (
    SCHEMES,
    BalancedReplayBuffer,
    BalancedReplayBufferSamples,
    initial_priority,
    to_device,
)
from sb3_off2on.datasets import OfflineDataset
from sb3_off2on.priorities import DevicePriorities, SumTree

OBSERVATION_SPACE = spaces.Box(-1e6, 1e6, (2,), np.float32)
ACTION_SPACE = spaces.Box(-2.0, 5.0, (3,), np.float32)
DICT_SPACE = spaces.Dict({"vector": OBSERVATION_SPACE, "image": spaces.Box(0, 255, (3, 4, 5), np.uint8)})
# One level, two, and three; neither a power of two nor of the fan-out
CAPACITIES = [1, 2, 7, 100, SumTree.MAX_TOP, SumTree.MAX_TOP + 1, 5003, 100_003]
CPU = th.device("cpu")


def make_dataset(n: int = 20, offset: float = 0.0, **replace: Any) -> OfflineDataset:
    """Row i says i: observation ``(i, -i)``, next ``(i + 1, -i - 1)``, reward i, action by ``offline_actions``."""
    frames = np.stack([np.arange(n + 1), -np.arange(n + 1)], axis=1).astype(np.float32) + offset
    columns: dict[str, Any] = dict(
        frames=frames,
        obs_index=np.arange(n),
        next_obs_index=np.arange(1, n + 1),
        actions=offline_actions(n),
        rewards=np.arange(n, dtype=np.float32),
        terminations=np.arange(n) % 5 == 2,
        truncations=np.arange(n) % 5 == 4,
        observation_space=OBSERVATION_SPACE,
        action_space=ACTION_SPACE,
        source="rows that name themselves",
    )
    return OfflineDataset(**{**columns, **replace})


def offline_actions(n: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(ACTION_SPACE.low, ACTION_SPACE.high, (n, 3)).astype(np.float32)


def make_buffer(buffer_size: int = 30, n_envs: int = 1, **kwargs: Any) -> BalancedReplayBuffer:
    return BalancedReplayBuffer(buffer_size, OBSERVATION_SPACE, ACTION_SPACE, device="cpu", n_envs=n_envs, **kwargs)


def add_steps(buffer: ReplayBuffer, steps: int, start: int = 0) -> None:
    """Step t of environment e says ``1000 + 10 t + e``; every third step ends, every sixth by timeout."""
    for t in range(start, start + steps):
        names = 1000.0 + 10 * t + np.arange(buffer.n_envs)
        obs = np.stack([names, -names], axis=1)
        done = np.full(buffer.n_envs, t % 3 == 2)
        infos = [{"TimeLimit.truncated": t % 6 == 5} for _ in range(buffer.n_envs)]
        buffer.add(obs, obs + 1, np.repeat(names[:, None], 3, axis=1) / 1e4, names, done, infos)


def leaves(buffer: BalancedReplayBuffer) -> np.ndarray:
    n_slots = buffer.n_offline + buffer.buffer_size * buffer.n_envs
    return buffer.priorities(np.arange(n_slots))


# ---------------------------------------------------------------------------------------------------------- sum-tree


def make_tree(capacity: int, on_device: bool) -> Any:
    return DevicePriorities(capacity, CPU) if on_device else SumTree(capacity)


def for_tree(tree: Any, values: np.ndarray) -> Any:
    return th.as_tensor(values) if isinstance(tree, DevicePriorities) else values


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("capacity", CAPACITIES)
def test_sum_tree_against_a_plain_list(capacity: int, on_device: bool) -> None:
    rng = np.random.default_rng(capacity)
    tree, twin = make_tree(capacity, on_device), [0.0] * capacity
    assert len(tree) == capacity
    assert tree.total == 0.0
    for _ in range(60):
        if rng.random() < 0.3:
            start, stop = sorted(rng.integers(0, capacity + 1, size=2))
            priority = float(rng.choice([0.0, 2.5]))
            tree.fill(start, stop, priority)
            twin[start:stop] = [priority] * (stop - start)
        else:
            indices = rng.integers(0, capacity, size=50)  # repeats are likely, or certain
            priorities = rng.exponential(size=50) * (rng.random(50) < 0.7)
            tree.update(for_tree(tree, indices), for_tree(tree, priorities))
            for index, priority in zip(indices, priorities, strict=True):
                twin[index] = priority
        assert float(tree.total) == pytest.approx(math.fsum(twin), rel=1e-12)
        np.testing.assert_array_equal(tree.leaves, twin)
        some = rng.integers(0, capacity, size=10)
        np.testing.assert_array_equal(tree.get(for_tree(tree, some)), np.array(twin)[some])


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.99])
def test_find_is_searchsorted_of_the_running_sum(capacity: int, zeros: float, on_device: bool) -> None:
    rng = np.random.default_rng(capacity)
    # Whole numbers: every sum is exact, so are values on the edge between two leaves
    priorities = rng.integers(1, 9, size=capacity) * (rng.random(capacity) >= zeros).astype(float)
    priorities[capacity // 2] = 3.0
    tree = make_tree(capacity, on_device)
    tree.fill(0, capacity, for_tree(tree, priorities))
    running_sum = np.cumsum(priorities)
    edges = np.concatenate([[0.0], running_sum[running_sum < running_sum[-1]]])
    values = np.concatenate([rng.uniform(0, running_sum[-1], 2000), edges])
    expected = np.searchsorted(running_sum, values, side="right")
    np.testing.assert_array_equal(tree.find(for_tree(tree, values)), expected)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("capacity", CAPACITIES)
def test_find_survives_rounding(capacity: int, on_device: bool) -> None:
    """Priorities of very different sizes, values at both ends and just outside: never a leaf of zero priority."""
    rng = np.random.default_rng(capacity)
    priorities = 10.0 ** rng.uniform(-12, 12, capacity) * (rng.random(capacity) < 0.3)
    priorities[rng.integers(capacity)] = 0.1
    tree = make_tree(capacity, on_device)
    tree.update(for_tree(tree, np.arange(capacity)), for_tree(tree, priorities))
    total = float(tree.total)
    ends = [0.0, -1e-9, np.nextafter(total, 0), total, total * (1 + 1e-12)]
    edges = np.cumsum(priorities)
    values = np.concatenate([ends, edges, np.nextafter(edges, 0), rng.uniform(0, total, 20_000)])
    found = np.asarray(tree.find(for_tree(tree, values)))
    assert found.min() >= 0
    assert found.max() < capacity
    assert (priorities[found] > 0).all()


def test_draws_are_as_frequent_as_those_of_numpy() -> None:
    rng = np.random.default_rng(1)
    priorities = rng.exponential(size=5003) * (rng.random(5003) < 0.8)
    tree = SumTree(5003)
    tree.fill(0, 5003, priorities)
    n, p = 1_000_000, priorities / priorities.sum()
    counts = np.bincount(tree.find(rng.random(n) * tree.total), minlength=5003)
    reference = np.bincount(rng.choice(5003, size=n, p=p), minlength=5003)

    def chi_square(counts: np.ndarray) -> float:
        return float((((counts - n * p) ** 2)[p > 0] / (n * p)[p > 0]).sum())

    assert (counts[p == 0] == 0).all()
    degrees = (p > 0).sum() - 1
    bound = degrees + 4 * np.sqrt(2 * degrees)
    assert chi_square(counts) < bound
    assert chi_square(reference) < bound


def test_no_drift_in_a_large_tree() -> None:
    rng = np.random.default_rng(2)
    tree = SumTree(2**20)
    tree.fill(0, 2**20, 1.0)
    for _ in range(400):
        tree.update(rng.integers(0, 2**20, size=250), 10.0 ** rng.uniform(-3, 3, 250))
    assert tree.total == pytest.approx(math.fsum(tree.leaves), rel=1e-12)


def test_sum_tree_refuses() -> None:
    tree = SumTree(5000)
    tree.fill(0, 5000, 1.0)
    for bad in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="Priorities must be finite and not negative"):
            tree.update(np.array([0, 1]), np.array([7.0, bad]))
        with pytest.raises(ValueError, match="Priorities must be finite and not negative"):
            tree.fill(0, 10, bad)
    for bad_index in (-1, 5000):
        with pytest.raises(ValueError, match=r"Indices must be in \[0, 5000\)"):
            tree.update(np.array([0, bad_index]), np.array([7.0, 7.0]))
        with pytest.raises(ValueError, match=r"Indices must be in \[0, 5000\)"):
            tree.get(np.array([bad_index]))
    for start, stop in ((-1, 4), (4, 3), (0, 5001)):
        with pytest.raises(ValueError, match="not within the 5000 leaves"):
            tree.fill(start, stop, 1.0)
    assert tree.total == 5000.0
    assert (tree.leaves == 1.0).all()
    with pytest.raises(ValueError, match="read-only"):
        tree.leaves[0] = 1.0
    tree.fill(0, 5000, 0.0)
    with pytest.raises(ValueError, match="all priorities are zero"):
        tree.find(np.array([0.0]))
    with pytest.raises(ValueError, match="at least one leaf, got capacity=0"):
        SumTree(0)


# ---------------------------------------------------------------------------------------------- rows and composition


def check_rows(buffer: BalancedReplayBuffer, batch: BalancedReplayBufferSamples, dataset: OfflineDataset) -> None:
    """Every field of every row belongs to the row's index."""
    n_offline = len(dataset)
    assert isinstance(batch.observations, th.Tensor)
    assert isinstance(batch.next_observations, th.Tensor)
    assert batch.observations.dtype == batch.actions.dtype == batch.dones.dtype == batch.rewards.dtype == th.float32
    assert batch.dones.shape == batch.rewards.shape == (len(batch.indices), 1)
    for k, index in enumerate(batch.indices):
        if index < n_offline:
            name, done = float(index), dataset.terminations[index]
            action = 2.0 * (dataset.actions[index] - ACTION_SPACE.low) / (ACTION_SPACE.high - ACTION_SPACE.low) - 1.0
        else:
            position, env = divmod(index - n_offline, buffer.n_envs)
            name = float(buffer.rewards[position, env])
            t = (int(name) - 1000) // 10
            assert (int(name) - 1000) % 10 == env
            done, action = t % 6 == 2, np.full(3, name / 1e4)
        assert batch.observations[k].tolist() == [name, -name]
        shift = np.array([1, -1]) if index < n_offline else 1
        np.testing.assert_array_equal(batch.next_observations[k], np.array([name, -name]) + shift)
        assert batch.rewards[k].item() == name
        assert batch.dones[k].item() == done
        np.testing.assert_allclose(batch.actions[k], action, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("steps", [4, 10, 27])  # partly full, just full, overwritten twice
@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_belong_to_their_indices(scheme: str, steps: int, n_envs: int) -> None:
    buffer, dataset = make_buffer(10 * n_envs, n_envs, scheme=scheme), make_dataset()
    assert isinstance(buffer, ReplayBuffer)
    buffer.set_offline_data(dataset)
    add_steps(buffer, steps)
    assert (buffer.n_offline, buffer.n_online) == (20, min(steps, 10) * n_envs)
    seen = []
    for batch in (buffer.sample(65), buffer.sample(64), buffer.sample_offline(31), buffer.sample_online(31)):
        assert batch.discounts is None
        check_rows(buffer, batch, dataset)
        seen.append(batch.indices < 20)
    odd, even, offline, online = seen
    assert offline.all()
    assert not online.any()
    if scheme == "symmetric":
        assert odd.tolist() == [True] * 32 + [False] * 33
        assert even.tolist() == [True] * 32 + [False] * 32
    elif scheme in ("online", "offline"):
        assert odd.tolist() == [scheme == "offline"] * 65
    else:
        assert odd.any()
        assert not odd.all()


@pytest.mark.parametrize("n_envs", [1, 3])
def test_uniform_draws_every_row_alike(n_envs: int) -> None:
    np.random.seed(0)
    buffer = make_buffer(30 * n_envs, n_envs, scheme="uniform")
    buffer.set_offline_data(make_dataset(20))
    add_steps(buffer, 10)
    n_rows = 20 + 10 * n_envs
    counts = np.bincount(buffer.sample(20_000 * n_rows // 20).indices, minlength=n_rows)
    assert len(counts) == n_rows
    assert ((counts - 1000) ** 2 / 1000).sum() < n_rows + 4 * np.sqrt(2 * n_rows)


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("scheme", ["balanced", "uniform", "online"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_without_dataset_draws_the_same_rows_as_sb3(scheme: str, n_envs: int, dtype: Any) -> None:
    space = spaces.Box(-1e6, 1e6, (2,), dtype)
    ours = BalancedReplayBuffer(30, space, ACTION_SPACE, "cpu", n_envs, scheme=scheme)
    theirs = ReplayBuffer(30, space, ACTION_SPACE, "cpu", n_envs)
    for steps in (4, 5, 40):
        for buffer in (ours, theirs):
            add_steps(buffer, steps)
        samples = []
        for draw in (ours.sample, theirs.sample, ours.sample_online):
            np.random.seed(steps)
            samples.append([draw(17) for _ in range(3)])
        for mine, reference, online in zip(*samples, strict=True):
            for field in ("observations", "actions", "next_observations", "dones", "rewards"):
                expected = getattr(reference, field)
                for batch in (mine, online):
                    assert getattr(batch, field).dtype == expected.dtype
                    assert th.equal(getattr(batch, field), expected), field


def test_offline_rows_are_cast_to_the_ring() -> None:
    space = spaces.Box(-1e6, 1e6, (2,), np.float64)
    buffer = BalancedReplayBuffer(10, space, ACTION_SPACE, "cpu", scheme="symmetric")
    buffer.set_offline_data(make_dataset())
    add_steps(buffer, 3)
    for batch in (buffer.sample(8), buffer.sample_offline(8)):
        assert isinstance(batch.observations, th.Tensor)
        assert batch.observations.dtype == th.float64


def test_actions_are_scaled_as_sb3_scales_them() -> None:
    dataset, buffer = make_dataset(), make_buffer()
    buffer.set_offline_data(dataset)
    policy = MlpPolicy(OBSERVATION_SPACE, ACTION_SPACE, lambda _: 1e-3)
    batch = buffer.sample_offline(50)
    np.testing.assert_array_equal(batch.actions, policy.scale_action(dataset.actions[batch.indices]))
    assert batch.actions.min() < -0.5
    assert batch.actions.max() > 0.5
    # Nothing is copied, so nothing can change what it was taken from
    assert buffer.dataset is dataset
    np.testing.assert_array_equal(dataset.actions, offline_actions(20))


@pytest.mark.parametrize("handle_timeouts", [True, False])
def test_timeouts_end_the_task_only_if_asked(handle_timeouts: bool) -> None:
    dataset = make_dataset()
    buffer = make_buffer(scheme="symmetric", handle_timeout_termination=handle_timeouts)
    buffer.set_offline_data(dataset)
    add_steps(buffer, 12)
    batch = buffer.sample(400)
    offline, online = batch.indices[:200], batch.indices[200:] - 20
    timeouts = not handle_timeouts
    assert dataset.truncations[offline].any()
    expected = np.concatenate(
        [np.isin(offline % 5, [2, 4] if timeouts else [2]), (online % 6 == 2) | timeouts & (online % 6 == 5)]
    )
    np.testing.assert_array_equal(batch.dones.flatten(), expected)


# ------------------------------------------------------------------------------------- dictionaries, images, statistics


def dict_dataset(n: int = 20) -> OfflineDataset:
    rng = np.random.default_rng(0)
    # Channels last on disk, and a view of it that has them first
    images = rng.integers(0, 256, (n + 1, 4, 5, 3)).astype(np.uint8).transpose(0, 3, 1, 2)
    assert not images.flags.c_contiguous
    frames: Any = {"vector": make_dataset(n).frames, "image": images}
    return make_dataset(n, frames=frames, observation_space=DICT_SPACE)


@pytest.mark.parametrize("n_envs", [1, 3])
def test_dict_observations(n_envs: int) -> None:
    dataset = dict_dataset()
    ours = BalancedReplayBuffer(9 * n_envs, DICT_SPACE, ACTION_SPACE, "cpu", n_envs, scheme="symmetric")
    theirs = DictReplayBuffer(9 * n_envs, DICT_SPACE, ACTION_SPACE, "cpu", n_envs)
    rng = np.random.default_rng(1)
    for _ in range(15):
        obs, next_obs = (
            {
                "vector": rng.normal(size=(n_envs, 2)).astype(np.float32),
                "image": rng.integers(0, 256, (n_envs, 3, 4, 5)).astype(np.uint8),
            }
            for _ in range(2)
        )
        infos: list[dict[str, Any]] = [{} for _ in range(n_envs)]
        reward = rng.normal(size=n_envs)
        for buffer in (ours, theirs):
            buffer.add(obs, next_obs, np.zeros((n_envs, 3)), reward, np.ones(n_envs), infos)  # type: ignore[arg-type]
    ours.set_offline_data(dataset)
    batch = ours.sample(40)
    offline, (positions, envs) = batch.indices[:20], np.divmod(batch.indices[20:] - 20, n_envs)
    for key, dtype in (("vector", th.float32), ("image", th.uint8)):
        for observations, index, ring in (
            (batch.observations, offline, theirs.observations),
            (batch.next_observations, offline + 1, theirs.next_observations),
        ):
            assert isinstance(observations, dict)
            assert observations[key].dtype == dtype
            assert observations[key].is_contiguous()
            np.testing.assert_array_equal(observations[key][:20], dataset.frames[key][index])
            np.testing.assert_array_equal(observations[key][20:], ring[key][positions, envs])


def test_image_observations() -> None:
    dataset = dict_dataset()
    assert isinstance(dataset.frames, dict)
    space = DICT_SPACE["image"]
    buffer = BalancedReplayBuffer(10, space, ACTION_SPACE, "cpu")
    buffer.set_offline_data(make_dataset(frames=dataset.frames["image"], observation_space=space))
    batch = buffer.sample(30)
    assert isinstance(batch.observations, th.Tensor)
    assert batch.observations.dtype == th.uint8
    np.testing.assert_array_equal(batch.observations, dataset.frames["image"][batch.indices])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_normalizes_both_parts_alike(scheme: str) -> None:
    env = VecNormalize(make_vec_env("Pendulum-v1"), clip_obs=1e6, clip_reward=1e6)
    assert not isinstance(env.obs_rms, dict)
    env.obs_rms.mean, env.obs_rms.var = np.array([3.0, -5.0]), np.array([4.0, 0.25])
    env.ret_rms.var = np.array(16.0)
    buffer = make_buffer(scheme=scheme)
    buffer.set_offline_data(make_dataset())
    add_steps(buffer, 10)
    for draw in (buffer.sample, buffer.sample_offline, buffer.sample_online):
        np.random.seed(3)
        raw = draw(40)
        np.random.seed(3)
        normalized = draw(40, env=env)
        np.testing.assert_array_equal(raw.indices, normalized.indices)
        for field in ("observations", "next_observations"):
            expected = (getattr(raw, field).numpy() - [3.0, -5.0]) / [2.0, 0.5]
            assert getattr(normalized, field).dtype == th.float32
            np.testing.assert_allclose(getattr(normalized, field), expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(normalized.rewards, raw.rewards / 4.0, rtol=1e-5)
        assert th.equal(normalized.actions, raw.actions)
    env.close()


def test_normalizes_the_named_keys_of_dict_observations() -> None:
    env = VecNormalize(make_vec_env("Pendulum-v1"), clip_obs=1e6)
    env.norm_obs_keys = ["vector"]
    assert not isinstance(env.obs_rms, dict)
    env.obs_rms.mean, env.obs_rms.var = np.array([3.0, -5.0]), np.array([4.0, 0.25])
    env.obs_rms = {"vector": env.obs_rms}
    dataset = dict_dataset()
    buffer = BalancedReplayBuffer(10, DICT_SPACE, ACTION_SPACE, "cpu")
    buffer.set_offline_data(dataset)
    batch = buffer.sample(30, env=env)
    assert isinstance(batch.observations, dict)
    expected = (dataset.frames["vector"][batch.indices] - [3.0, -5.0]) / [2.0, 0.5]
    np.testing.assert_allclose(batch.observations["vector"], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(batch.observations["image"], dataset.frames["image"][batch.indices])
    env.close()


# --------------------------------------------------------------------------------------------------------- priorities


def test_each_stratum_gets_one_draw() -> None:
    buffer = make_buffer(100)
    buffer.set_offline_data(make_dataset(64))
    for _ in range(20):  # 64 rows alike, 64 draws: each row once
        np.testing.assert_array_equal(buffer.sample(64).indices, np.arange(64))
    buffer.update_priorities(np.arange(64), np.arange(64) % 4)
    for _ in range(20):  # rows of priority p cover exactly p strata of width 1
        np.testing.assert_array_equal(np.bincount(buffer.sample(96).indices, minlength=64), np.arange(64) % 4)


@pytest.mark.parametrize("n_envs", [1, 3])
def test_overwritten_rows_get_the_default_priority(n_envs: int) -> None:
    buffer = make_buffer(10 * n_envs, n_envs)
    buffer.set_offline_data(make_dataset())
    buffer.reset_priorities(5.0)
    add_steps(buffer, 4)
    expected = np.concatenate([np.ones(20), np.full(4 * n_envs, 5.0), np.zeros(6 * n_envs)])
    np.testing.assert_array_equal(leaves(buffer), expected)
    rng = np.random.default_rng(0)
    for step in range(4, 45):
        present = np.arange(20 + buffer.n_online)
        indices = rng.choice(present, size=8, replace=False)
        expected[indices] = rng.exponential(size=8)
        buffer.update_priorities(indices, expected[indices])
        default = buffer.default_priority
        first = 20 + step % 10 * n_envs
        add_steps(buffer, 1, start=step)
        expected[first : first + n_envs] = default
        np.testing.assert_array_equal(leaves(buffer), expected)
    assert buffer.full
    assert buffer.effective_sample_size() == pytest.approx(expected.sum() ** 2 / (expected**2).sum(), rel=1e-12)
    buffer.reset()
    assert buffer.n_online == 0
    np.testing.assert_array_equal(leaves(buffer), np.concatenate([expected[:20], np.zeros(10 * n_envs)]))
    assert (buffer.sample(50).indices < 20).all()


def test_initial_priority_gives_the_online_share() -> None:
    for n_offline, n_online, fraction in ((1_000_000, 1000, 0.75), (1_000_000, 1000, 0.5), (37, 12, 0.1)):
        p0 = initial_priority(n_offline, n_online, fraction)
        assert n_online * p0 / (n_offline + n_online * p0) == pytest.approx(fraction, rel=1e-12)
    assert initial_priority(1_000_000, 1000, 0.75) == 3000.0
    assert initial_priority(10, 10, 0.0) == 0.0
    for fraction in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\), got"):
            initial_priority(10, 10, fraction)
    with pytest.raises(ValueError, match="n_online must be at least 1, got 0"):
        initial_priority(10, 0, 0.5)


@pytest.mark.parametrize("n_envs", [1, 3])
def test_online_share_of_the_first_batches(n_envs: int) -> None:
    buffer = make_buffer(300, n_envs)
    buffer.set_offline_data(make_dataset(1000))
    buffer.reset_priorities(initial_priority(1000, 30, 0.75))
    add_steps(buffer, 30 // n_envs)
    online = leaves(buffer)[1000:].sum()
    assert online / leaves(buffer).sum() == pytest.approx(0.75, rel=1e-12)
    # Strata turn the expectation into the count itself
    assert (buffer.sample(400).indices >= 1000).sum() == 300


def test_no_online_rows_at_first_with_fraction_zero() -> None:
    buffer = make_buffer()
    buffer.set_offline_data(make_dataset())
    buffer.reset_priorities(initial_priority(20, 10, 0.0))
    add_steps(buffer, 10)
    assert (buffer.sample(200).indices < 20).all()


def test_reset_priorities_covers_the_rows_present() -> None:
    buffer = make_buffer(10)
    buffer.set_offline_data(make_dataset())
    add_steps(buffer, 4)
    buffer.update_priorities(np.arange(24), np.linspace(1, 2, 24))
    buffer.reset_priorities(7.0)
    np.testing.assert_array_equal(leaves(buffer), [1.0] * 20 + [7.0] * 4 + [0.0] * 6)
    assert buffer.default_priority == 7.0
    buffer.set_default_priority(0.5)
    add_steps(buffer, 1)
    np.testing.assert_array_equal(leaves(buffer), [1.0] * 20 + [7.0] * 4 + [0.5] + [0.0] * 5)


@pytest.mark.parametrize("first", [0.5, 1.5, 1000.0])
def test_update_rule_of_algorithm_2(first: float) -> None:
    rng = np.random.default_rng(4)
    buffer = make_buffer(10)
    buffer.set_offline_data(make_dataset())
    buffer.reset_priorities(first)
    add_steps(buffer, 10)
    priority, p0 = dict.fromkeys(range(20), 1.0) | dict.fromkeys(range(20, 30), first), first
    for _ in range(30):
        indices = buffer.sample(16).indices
        normalized_ratio = {j: rng.exponential() for j in indices}
        for j in indices:  # line 19
            priority[j] = normalized_ratio[j]  # line 20
            p0 = max(p0, normalized_ratio[j])  # line 21
        buffer.update_priorities(indices, np.array([normalized_ratio[j] for j in indices]))
        assert buffer.default_priority == p0
        np.testing.assert_array_equal(leaves(buffer), list(priority.values()))
    assert (p0 == first) == (first == 1000.0)


def test_update_priorities_refuses_and_writes_nothing() -> None:
    buffer = make_buffer(10)
    buffer.set_offline_data(make_dataset())
    add_steps(buffer, 3)
    before = leaves(buffer)
    for indices, priorities, message in (
        ([0, 1], [9.0], r"indices \(2,\) and priorities \(1,\) must have the same shape"),
        ([0, 1], [[9.0], [9.0]], r"must have the same shape"),
        ([0, 23], [9.0, 9.0], "below the 23 rows present, got 23"),
        ([0, -1], [9.0, 9.0], r"Indices must be in \[0, 30\), got -1"),
        ([0, 1], [9.0, -1.0], "must be finite and not negative"),
        ([0, 1], [9.0, np.nan], "must be finite and not negative"),
        ([0, 1], [9.0, np.inf], "must be finite and not negative"),
    ):
        with pytest.raises(ValueError, match=message):
            buffer.update_priorities(np.array(indices), np.array(priorities))
    for bad in (-1.0, np.nan):
        with pytest.raises(ValueError, match="must be finite and not negative"):
            buffer.set_default_priority(bad)
        with pytest.raises(ValueError, match="must be finite and not negative"):
            buffer.reset_priorities(bad)
    with pytest.raises(ValueError, match=r"Indices must be in \[0, 30\)"):
        buffer.priorities(np.array([30]))
    np.testing.assert_array_equal(leaves(buffer), before)
    assert buffer.default_priority == 1.0
    buffer.update_priorities(np.array([], dtype=np.int64), np.array([]))
    np.testing.assert_array_equal(leaves(buffer), before)


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme != "balanced"])
def test_other_schemes_keep_no_priorities(scheme: str) -> None:
    buffer = make_buffer(scheme=scheme)
    buffer.set_offline_data(make_dataset())
    one = np.zeros(1, dtype=np.int64)
    for call in (
        lambda: buffer.update_priorities(one, np.ones(1)),
        lambda: buffer.priorities(one),
        lambda: buffer.set_default_priority(1.0),
        lambda: buffer.reset_priorities(1.0),
        lambda: buffer.effective_sample_size(),
    ):
        with pytest.raises(ValueError, match=f"scheme='{scheme}' keeps no priorities"):
            call()


def test_effective_sample_size_of_an_empty_buffer() -> None:
    assert make_buffer().effective_sample_size() == 0.0


# ------------------------------------------------------------------------------------------- attaching and detaching


def test_a_dataset_can_come_after_online_rows() -> None:
    buffer = make_buffer(10)
    add_steps(buffer, 3)
    buffer.update_priorities(np.arange(3), np.array([2.0, 3.0, 4.0]))
    for n in (20, 50):  # another dataset takes the first one's place
        buffer.set_offline_data(make_dataset(n))
        np.testing.assert_array_equal(leaves(buffer), [1.0] * n + [2.0, 3.0, 4.0] + [0.0] * 7)
        check_rows(buffer, buffer.sample(60), make_dataset(n))
    buffer.update_priorities(np.array([0]), np.array([9.0]))
    buffer.set_offline_data(make_dataset(50))  # the same again: nothing is forgotten
    assert leaves(buffer)[0] == 9.0


@pytest.mark.parametrize("n_envs", [1, 3])
def test_pickling_keeps_all_but_the_dataset(tmp_path: Any, n_envs: int) -> None:
    buffer = make_buffer(10 * n_envs, n_envs)
    buffer.set_offline_data(make_dataset())
    buffer.reset_priorities(5.0)
    add_steps(buffer, 13)
    buffer.update_priorities(np.arange(25), np.linspace(0, 8, 25))
    save_to_pkl(tmp_path / "buffer.pkl", buffer)
    np.random.seed(5)
    expected = buffer.sample(32)
    for restored in (load_from_pkl(tmp_path / "buffer.pkl"), copy.deepcopy(buffer)):
        assert isinstance(restored, BalancedReplayBuffer)
        assert not restored.has_offline
        assert restored.dataset_info == {
            "source": "rows that name themselves",
            "fingerprint": make_dataset().fingerprint,
            "n_transitions": 20,
        }
        assert (restored.n_offline, restored.n_online, restored.pos, restored.full) == (20, 10 * n_envs, 3, True)
        assert restored.default_priority == 8.0
        np.testing.assert_array_equal(leaves(restored), leaves(buffer))
        np.testing.assert_array_equal(restored.observations, buffer.observations)
        assert (restored.sample_online(10).indices >= 20).all()
        with pytest.raises(
            ValueError, match="'rows that name themselves', which is not saved with the buffer: call set_dataset"
        ):
            restored.sample(10)
        with pytest.raises(
            ValueError, match=r"saved with the dataset 'rows that .* \(fingerprint .*, which is not 'another' \("
        ):
            restored.set_offline_data(make_dataset(offset=1.0, source="another"))
        restored.set_offline_data(make_dataset())
        assert restored.has_offline
        np.testing.assert_array_equal(leaves(restored), leaves(buffer))
        np.random.seed(5)
        batch = restored.sample(32)
        np.testing.assert_array_equal(batch.indices, expected.indices)
        assert th.equal(batch.observations, expected.observations)
    assert buffer.has_offline


def test_a_pickle_does_not_grow_with_the_dataset() -> None:
    def size(n_frames: int) -> int:
        frames = np.zeros((n_frames, 2), dtype=np.float32)
        buffer = make_buffer()
        buffer.set_offline_data(make_dataset(20, frames=frames))
        return len(pickle.dumps(buffer))

    assert abs(size(100_000) - size(100)) < 100


@pytest.mark.parametrize("scheme", SCHEMES)
def test_drawing_while_detached(scheme: str) -> None:
    buffer = make_buffer(scheme=scheme)
    buffer.set_offline_data(make_dataset())
    add_steps(buffer, 3)
    detached = copy.deepcopy(buffer)
    add_steps(detached, 3, start=3)
    assert detached.n_online == 6
    if scheme == "online":
        assert (detached.sample(10).indices >= 20).all()
    else:
        with pytest.raises(ValueError, match=rf"scheme='{scheme}' needs the dataset 'rows.* call set_dataset\(\) with it"):
            detached.sample(10)
    for draw in ("sample_offline", "sample_uniform"):
        with pytest.raises(ValueError, match=rf"{draw}\(\) needs the dataset 'rows"):
            getattr(detached, draw)(10)


# ------------------------------------------------------------------------------------------------------ buffer_device


def random_rows(buffer: BalancedReplayBuffer, rng: np.random.Generator) -> None:
    """Rows for any of the spaces, whose episodes end at random."""
    for _ in range(rng.integers(1, 8)):
        vectors = rng.normal(size=(2, buffer.n_envs, 2)).astype(np.float32)
        obs, next_obs = vectors
        if isinstance(buffer.observation_space, spaces.Dict):
            images = rng.integers(0, 256, (2, buffer.n_envs, 3, 4, 5)).astype(np.uint8)
            obs, next_obs = ({"vector": vector, "image": image} for vector, image in zip(vectors, images, strict=True))
        done = rng.random(buffer.n_envs) < 0.5
        infos: list[dict[str, Any]] = [{"TimeLimit.truncated": bool(timeout)} for timeout in done & (rng.random() < 0.5)]
        buffer.add(obs, next_obs, rng.uniform(-1, 1, (buffer.n_envs, 3)), rng.normal(size=buffer.n_envs), done, infos)


def normalizing_env(is_dict: bool) -> VecNormalize:
    env = VecNormalize(make_vec_env("Pendulum-v1"), clip_obs=1.5, clip_reward=0.7)
    obs_rms: Any = env.obs_rms
    obs_rms.mean, obs_rms.var = np.array([3.0, -5.0]), np.array([4.0, 0.25])
    env.ret_rms.var = np.array(3.0)
    if is_dict:
        env.norm_obs_keys, env.obs_rms = ["vector"], {"vector": obs_rms}
    return env


@pytest.mark.parametrize(("norm_obs", "norm_reward"), [(True, False), (False, True)])
def test_a_device_normalizes_only_what_it_is_asked_to(norm_obs: bool, norm_reward: bool) -> None:
    batches = []
    env = normalizing_env(is_dict=False)
    env.norm_obs, env.norm_reward = norm_obs, norm_reward
    for buffer_device in (None, "cpu"):
        buffer = make_buffer(scheme="offline", buffer_device=buffer_device)
        buffer.set_offline_data(make_dataset())
        np.random.seed(0)
        batches.append(buffer.sample(30, env))
    assert_same(batches[0], batches[1])
    env.close()


def random_operation(buffer: BalancedReplayBuffer, seed: int, env: VecNormalize, datasets: list[OfflineDataset]) -> Any:
    """Something that happens to a buffer. Returns it (or what it was unpickled to) and a batch, or an error's message."""
    np.random.seed(seed)
    rng = np.random.default_rng(seed)
    result: Any = None
    try:
        match rng.integers(13):
            case 0:
                buffer.reset()
            case 1:
                buffer.set_scheme(str(rng.choice([*SCHEMES, "balanced", "balanced"])))
            case 2:
                buffer = pickle.loads(pickle.dumps(buffer))
                result = buffer.sample_online(5)
                for dataset in datasets:
                    if len(dataset) == buffer.n_offline and rng.random() < 0.8:
                        buffer.set_offline_data(dataset)
            case 3:
                buffer.set_offline_data(datasets[rng.integers(len(datasets))])
            case 4:
                buffer.reset_priorities(rng.exponential())
            case 5:
                buffer.set_default_priority(rng.exponential())
            case 6 | 7:
                random_rows(buffer, rng)
            case 8 | 9:
                result = buffer.sample(33, env)
                if buffer.scheme == "balanced":
                    priorities = rng.exponential(size=33).astype(np.float32)
                    as_tensor = rng.random() < 0.5
                    buffer.update_priorities(result.indices, th.as_tensor(priorities) if as_tensor else priorities)
            case number:
                draw = (buffer.sample_offline, buffer.sample_online, buffer.sample_uniform)[number - 10]
                result = draw(17)
    except ValueError as error:
        result = str(error)
    return buffer, result


def dtypes(result: Any) -> list[Any]:
    """Of the fields of a batch, but for ``indices``."""
    fields = [] if not isinstance(result, BalancedReplayBufferSamples) else list(result[:-2])
    return [{key: x.dtype for key, x in field.items()} if isinstance(field, dict) else field.dtype for field in fields]


@pytest.mark.parametrize("handle_timeouts", [True, False])
@pytest.mark.parametrize("is_dict", [False, True])
@pytest.mark.parametrize("n_envs", [1, 3])
def test_rows_on_a_device_are_those_of_the_host(
    n_envs: int, is_dict: bool, handle_timeouts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever happens to both: the same seed draws the same rows, to the last bit."""
    monkeypatch.setattr("sb3_off2on.buffers.UPLOAD_ROWS", 7)
    space, dataset_of = (DICT_SPACE, dict_dataset) if is_dict else (OBSERVATION_SPACE, make_dataset)
    datasets, env = [dataset_of(20), dataset_of(33)], normalizing_env(is_dict)
    host, device = (
        BalancedReplayBuffer(
            10 * n_envs, space, ACTION_SPACE, "cpu", n_envs, False, handle_timeouts, buffer_device=buffer_device
        )
        for buffer_device in (None, "cpu")
    )
    batches, was_full = [], False
    for seed in range(300):
        host, expected = random_operation(host, seed, env, datasets)
        device, result = random_operation(device, seed, env, datasets)
        assert_same(expected, result)
        assert dtypes(expected) == dtypes(result)
        assert device.default_priority == host.default_priority
        assert (device.n_online, device.pos, device.scheme) == (host.n_online, host.pos, host.scheme)
        assert (host.buffer_device, device.buffer_device) == (None, CPU)
        if device.scheme == "balanced":
            np.testing.assert_array_equal(leaves(device), leaves(host))
            assert device.effective_sample_size() == pytest.approx(host.effective_sample_size(), rel=1e-12)
        was_full |= device.full
        if isinstance(result, BalancedReplayBufferSamples):
            assert isinstance(result.indices, th.Tensor)
            batches.append(device.scheme)
    assert was_full
    assert len(batches) > 80
    assert set(batches) == set(SCHEMES)
    env.close()


def test_only_new_rows_are_copied_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = make_buffer(30, n_envs=3, buffer_device="cpu")
    buffer.set_offline_data(make_dataset())
    add_steps(buffer, 4)
    copied: list[np.ndarray] = []
    host_rows = buffer._host_rows

    def spied(rows: np.ndarray) -> Any:
        copied.append(rows)
        return host_rows(rows)

    monkeypatch.setattr(buffer, "_host_rows", spied)
    for steps, expected in ((0, np.arange(32)), (0, []), (2, np.arange(32, 38)), (5, [*range(38, 50), *range(20, 23)])):
        add_steps(buffer, steps)
        copied.clear()
        buffer.sample(8)
        np.testing.assert_array_equal(np.concatenate([[], *copied]), expected)
    add_steps(buffer, 27)  # more than the ring
    copied.clear()
    buffer.sample(8)
    np.testing.assert_array_equal(np.sort(np.concatenate(copied)), np.arange(20, 50))


def test_moving_to_a_device_and_back() -> None:
    buffer = make_buffer(10)
    buffer.set_offline_data(make_dataset())
    add_steps(buffer, 13)
    buffer.update_priorities(np.arange(30), np.linspace(0, 8, 30))
    batches, priorities = [], leaves(buffer)
    for buffer_device in (None, "cpu", None, CPU):
        buffer.set_buffer_device(buffer_device)
        np.testing.assert_array_equal(leaves(buffer), priorities)
        assert buffer.default_priority == 8.0
        np.random.seed(0)
        batches.append(buffer.sample(40))
    for batch in batches[1:]:
        assert_same(batches[0], batch)
    buffer.rewards[:] = 7.0  # by hand
    buffer.set_buffer_device("cpu")
    assert (buffer.sample_online(40).rewards == 7.0).all()


def test_a_device_that_rounds_draws_no_slot_without_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = make_buffer(10, buffer_device="cpu")
    buffer.set_offline_data(make_dataset())
    add_steps(buffer, 3)
    monkeypatch.setattr(DevicePriorities, "find", lambda tree, values: th.arange(20, 26))
    assert buffer.sample(6).indices.tolist() == [20, 21, 22, 22, 22, 22]


def test_bad_priorities_on_a_device_are_found_when_they_are_read() -> None:
    for bad in (np.nan, np.inf, -1.0):
        buffer = make_buffer(10, buffer_device="cpu")
        buffer.set_offline_data(make_dataset())
        buffer.update_priorities(np.array([0, 1]), np.array([9.0, bad]))
        buffer.update_priorities(np.array([0, 1]), np.array([9.0, 3.0]))  # the highest remembers
        with pytest.raises(ValueError, match="Priorities must be finite and not negative"):
            _ = buffer.default_priority
        buffer.reset_priorities(2.0)
        assert buffer.default_priority == 2.0
        assert (leaves(buffer)[:20] == 1.0).all()
    with pytest.raises(ValueError, match=r"indices \(2,\) and priorities \(1,\) must have the same shape"):
        buffer.update_priorities(np.array([0, 1]), np.array([9.0]))
    buffer.update_priorities(np.array([], dtype=np.int64), np.array([]))
    assert buffer.default_priority == 2.0


def test_a_pickle_is_read_where_the_device_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = make_buffer(10, buffer_device="cpu")
    buffer.set_offline_data(make_dataset())
    add_steps(buffer, 13)
    buffer.sample(8)
    buffer.update_priorities(np.arange(30), np.linspace(0, 8, 30))
    np.random.seed(0)
    expected, priorities = buffer.sample(20), leaves(buffer)
    pickled = pickle.dumps(buffer)
    assert b"torch._utils" not in pickled  # no tensors

    def unusable(buffer_device: Any) -> th.device:
        raise ValueError("no such device")

    monkeypatch.setattr("sb3_off2on.buffers._usable_device", unusable)
    restored = pickle.loads(pickled)
    assert restored.buffer_device is None
    restored.set_offline_data(make_dataset())
    np.testing.assert_array_equal(leaves(restored), priorities)
    np.random.seed(0)
    assert_same(restored.sample(20), expected)


@pytest.mark.parametrize("buffer_device", ["nonsense", "cuda:99", "meta", 2.5])
def test_devices_that_cannot_be_used(buffer_device: Any) -> None:
    message = rf"buffer_device='{buffer_device}' cannot be used here: .*Choose another, or None to keep the rows on the host"
    with pytest.raises(ValueError, match=message):
        make_buffer(buffer_device=buffer_device)
    buffer = make_buffer(buffer_device="cpu")
    with pytest.raises(ValueError, match=message):
        buffer.set_buffer_device(buffer_device)
    assert buffer.buffer_device == CPU


def test_copies_to_cuda_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """No such device here: what is asked of PyTorch."""
    calls: list[Any] = []

    def pin_memory(tensor: th.Tensor) -> th.Tensor:
        calls.append("pin_memory")
        return tensor

    def to(tensor: th.Tensor, *args: Any, **kwargs: Any) -> th.Tensor:
        calls.append((args, kwargs))
        return tensor

    monkeypatch.setattr(th.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(th.Tensor, "to", to)
    cuda, array = th.device("cuda"), np.arange(3.0)
    np.testing.assert_array_equal(to_device(array, cuda), array)
    assert calls == ["pin_memory", ((cuda,), {"non_blocking": True})]
    calls.clear()
    to_device(array, CPU)
    assert calls == [((CPU,), {})]


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("scheme", ["offline", "symmetric"])
def test_schemes_that_need_a_dataset(scheme: str) -> None:
    buffer = make_buffer(scheme=scheme)
    add_steps(buffer, 3)
    message = r"needs a dataset: pass dataset=\.\.\. or call set_dataset\(\)"
    with pytest.raises(ValueError, match=f"scheme='{scheme}' {message}"):
        buffer.sample(10)
    with pytest.raises(ValueError, match=rf"sample_offline\(\) {message}"):
        buffer.sample_offline(10)


def test_drawing_from_an_empty_online_part() -> None:
    for scheme in ("online", "symmetric"):
        buffer = make_buffer(scheme=scheme)
        buffer.set_offline_data(make_dataset())
        with pytest.raises(ValueError, match=f"scheme='{scheme}' needs online transitions, but none"):
            buffer.sample(10)
    with pytest.raises(ValueError, match="scheme='balanced' needs online transitions, but none"):
        make_buffer().sample(10)
    with pytest.raises(ValueError, match=r"sample_online\(\) needs online transitions, but none"):
        make_buffer().sample_online(10)
    for scheme in ("balanced", "uniform"):
        buffer = make_buffer(scheme=scheme)
        buffer.set_offline_data(make_dataset())
        assert len(buffer.sample(10).indices) == 10


def test_constructor_refuses() -> None:
    with pytest.raises(ValueError, match="Unknown scheme='prioritized', it must be one of 'balanced', 'uniform', 'online'"):
        make_buffer(scheme="prioritized")
    with pytest.raises(ValueError, match="does not support optimize_memory_usage=True: it would"):
        make_buffer(optimize_memory_usage=True)


@pytest.mark.parametrize(
    ("observation_space", "action_space"),
    [
        (spaces.Box(-1, 1, (3,)), ACTION_SPACE),
        (DICT_SPACE, ACTION_SPACE),
        (OBSERVATION_SPACE, spaces.Box(-1, 1, (2,))),
        (OBSERVATION_SPACE, spaces.MultiBinary(3)),
    ],
)
def test_spaces_must_match(observation_space: spaces.Space, action_space: spaces.Space) -> None:
    buffer = BalancedReplayBuffer(10, observation_space, action_space, "cpu")
    with pytest.raises(ValueError, match=r"has Box\(-1e\+06.* and Box\(-2\.0.*, but the buffer has .* and "):
        buffer.set_offline_data(make_dataset())
    assert not buffer.has_offline
    assert buffer.n_offline == 0
