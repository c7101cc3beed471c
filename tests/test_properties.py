"""
Properties that hold for all inputs, searched by Hypothesis. ``PROPERTY_EXAMPLES=1000`` searches longer.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped]
import hostile_input
import numpy as np
import pytest
from gymnasium import spaces
from helpers import TinyEnv, small_kwargs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stable_baselines3.common.logger import configure
from stable_baselines3.common.save_util import load_from_pkl, save_to_pkl

from sb3_off2on import AWAC, BCQ, BalancedReplayBuffer, Off2OnSAC, load_dataset
from sb3_off2on.faults import NumericalFault

N_EXAMPLES = int(os.environ.get("PROPERTY_EXAMPLES", 0))


def searched(n_examples: int) -> Any:
    """:return: settings for so many examples, the same in each run unless ``PROPERTY_EXAMPLES`` asks for more"""
    return settings(
        max_examples=N_EXAMPLES or n_examples,
        derandomize=N_EXAMPLES == 0,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


@st.composite
def datasets(draw: st.DrawFn) -> dict[str, Any]:
    """Episodes of random lengths, ends, shapes and dtypes, with next observations."""
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    n, rng = sum(lengths), np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ends = np.isin(np.arange(1, n + 1), np.cumsum(lengths))
    terminated = ends & (rng.random(n) < 0.5)
    dtype = draw(st.sampled_from([np.float32, np.float64, np.uint8]))
    shape = (36, 36, 3) if dtype == np.uint8 else draw(st.sampled_from([(1,), (3,), (2, 2)]))
    action_shape = draw(st.sampled_from([(1,), (2,)]))

    def frames() -> Any:
        values = rng.integers(0, 256, (n, *shape)) if dtype == np.uint8 else rng.normal(size=(n, *shape))
        return values.astype(dtype)

    has_parts = draw(st.booleans())
    observations = {"one": frames(), "two": frames()} if has_parts else frames()
    next_observations = {"one": frames(), "two": frames()} if has_parts else frames()
    if draw(st.booleans()):  # a next observation is that of the next row inside of an episode
        pairs: Any = [(observations, next_observations)]
        if has_parts:
            pairs = zip(observations.values(), next_observations.values(), strict=True)
        for one, after in pairs:
            after[:-1][~ends[:-1]] = one[1:][~ends[:-1]]
    column = (n, 1) if draw(st.booleans()) else (n,)
    return {
        "observations": observations,
        "next_observations": next_observations,
        "actions": rng.uniform(-1, 1, (n, *action_shape)).astype(draw(st.sampled_from([np.float32, np.float64]))),
        "rewards": rng.normal(size=column).astype(draw(st.sampled_from([np.float16, np.float32, np.float64]))),
        "terminations": terminated.reshape(column).astype(draw(st.sampled_from([bool, np.uint8, np.float32]))),
        "truncations": (ends & ~terminated).reshape(column),
    }


def flat(data: dict[str, Any]) -> dict[str, np.ndarray]:
    return hostile_flat({name: value for name, value in data.items() if not isinstance(value, spaces.Space)})


def hostile_flat(data: dict[str, Any]) -> dict[str, np.ndarray]:
    parts: dict[str, np.ndarray] = {}
    for name, value in data.items():
        parts |= {f"{name}/{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
    return parts


def assert_holds(dataset: Any, data: dict[str, Any]) -> None:
    """Whether a dataset gives back what went in, in its own dtypes."""
    n = len(data["actions"])
    assert len(dataset) == n
    terminations = np.asarray(data["terminations"]).reshape(n).astype(bool)
    truncations = np.asarray(data["truncations"]).reshape(n) & ~terminations
    truncations[-1] |= not terminations[-1]
    np.testing.assert_array_equal(dataset.terminations, terminations)
    np.testing.assert_array_equal(dataset.truncations, truncations)
    np.testing.assert_array_equal(dataset.rewards, np.asarray(data["rewards"]).reshape(n).astype(np.float32))
    np.testing.assert_allclose(dataset.actions, data["actions"], atol=1e-6)
    for name in ("observations", "next_observations"):
        expected = hostile_flat({name: data[name]})
        for key, part in hostile_flat({name: getattr(dataset, name)}).items():
            np.testing.assert_array_equal(part, expected[key].astype(part.dtype), err_msg=key)


@searched(40)
@given(data=datasets())
def test_every_loader_gives_back_what_went_in(data: dict[str, Any], tmp_path: Path) -> None:
    dataset = load_dataset(data)
    assert_holds(dataset, data)
    np.savez(tmp_path / "data.npz", **flat(data))  # type: ignore[arg-type]
    assert_holds(load_dataset(tmp_path / "data.npz"), data)
    assert load_dataset(tmp_path / "data.npz").fingerprint == dataset.fingerprint
    if not isinstance(data["observations"], dict):
        with h5py.File(tmp_path / "data.hdf5", "w") as file:
            for name, array in data.items():
                file[name] = array
        assert load_dataset(tmp_path / "data.hdf5").fingerprint == dataset.fingerprint
    # Through a replay buffer, which scales actions: equal but for rounding
    buffer = BalancedReplayBuffer(len(dataset), dataset.observation_space, dataset.action_space)
    buffer.set_offline_data(dataset)
    batch = buffer._get_samples(np.arange(len(dataset)))
    np.testing.assert_array_equal(batch.rewards.flatten(), dataset.rewards)
    np.testing.assert_array_equal(batch.dones.flatten(), dataset.terminations)
    # Two halves of one list are the whole
    assert len(load_dataset([dataset, dataset])) == 2 * len(dataset)


class Model:
    """What the buffer should be, as simple as can be: lists of rows and priorities."""

    def __init__(self, size: int, n_offline: int) -> None:
        self.size, self.n_offline = size, n_offline
        self.rows: dict[int, float] = {}  # position -> reward
        self.priorities = {index: 1.0 for index in range(n_offline)}
        self.n_added, self.default = 0, 1.0

    def add(self, reward: float) -> None:
        position = self.n_added % self.size
        self.rows[position], self.n_added = reward, self.n_added + 1
        self.priorities[self.n_offline + position] = self.default


OPERATIONS = st.one_of(
    st.tuples(st.just("add"), st.floats(-5, 5, width=32)),
    st.tuples(st.just("add_bad"), st.sampled_from([np.nan, np.inf])),
    st.tuples(st.just("sample"), st.integers(1, 9)),
    st.tuples(st.just("update"), st.lists(st.floats(0, 1e3), min_size=1, max_size=5)),
    st.tuples(st.just("update_bad"), st.sampled_from([np.nan, -1.0, np.inf])),
    st.tuples(st.just("reset"), st.floats(0, 50)),
    st.tuples(st.just("save and load"), st.just(0)),
)


@searched(60)
@given(
    size=st.integers(1, 7),
    n_offline=st.sampled_from([0, 4, 2100]),
    operations=st.lists(OPERATIONS, max_size=40),
    seed=st.integers(0, 999),
)
def test_the_buffer_against_a_simple_model(
    size: int, n_offline: int, operations: list[Any], seed: int, tmp_path: Path
) -> None:
    """Any order of operations. With 2100 rows the sum-tree has two levels."""
    rng = np.random.default_rng(seed)
    np.random.seed(seed)
    env = TinyEnv(spaces.Box(-1, 1, (1,)), spaces.Box(-1, 1, (1,)))
    buffer, model = BalancedReplayBuffer(size, env.observation_space, env.action_space, device="cpu"), Model(size, n_offline)
    if n_offline:
        zeros = np.zeros((n_offline, 1), np.float32)
        fields = {"observations": zeros, "next_observations": zeros, "actions": zeros, "rewards": zeros}
        dataset = load_dataset({**fields, "terminations": zeros, "observation_space": env.observation_space})
        buffer.set_offline_data(dataset)
    for operation, value in operations:
        known = sorted(model.priorities)
        if operation.startswith("add"):
            row: Any = (np.zeros((1, 1)), np.zeros((1, 1)), np.zeros((1, 1)), np.array([value]), np.zeros(1), [{}])
            if operation == "add":
                buffer.add(*row)
                model.add(value)
            else:
                with pytest.raises(NumericalFault, match=r"`rewards` of environment 0"):
                    buffer.add(*row)
        elif operation == "sample" and sum(model.priorities.values()) > 0:
            batch = buffer.sample(value)
            expected = [model.rows[index - n_offline] if index >= n_offline else 0.0 for index in batch.indices]
            np.testing.assert_array_equal(batch.rewards.flatten(), np.array(expected, np.float32))
            if n_offline:
                assert all(model.priorities[index] > 0 for index in batch.indices)
        elif operation == "update" and known:
            indices = rng.choice(known, len(value))
            buffer.update_priorities(indices, np.array(value))
            model.priorities.update(zip(indices.tolist(), value, strict=True))
            model.default = max(model.default, *value)
        elif operation == "update_bad" and known:
            with pytest.raises(ValueError, match=r"Priorities must be finite and not negative"):
                buffer.update_priorities(np.array(known[:1]), np.array([value]))
        elif operation == "reset":
            buffer.reset_priorities(value)
            model.default = value
            model.priorities = {index: 1.0 if index < n_offline else value for index in known}
        elif operation == "save and load":
            save_to_pkl(tmp_path / "buffer.pkl", buffer)
            buffer = load_from_pkl(tmp_path / "buffer.pkl")
            if n_offline:
                buffer.set_offline_data(dataset)
        leaves = np.zeros(n_offline + size)
        for index, priority in model.priorities.items():
            leaves[index] = priority
        np.testing.assert_array_equal(buffer._tree.leaves, leaves)
        assert buffer._tree.total == pytest.approx(leaves.sum(), rel=1e-9)
        assert buffer.default_priority == model.default
        assert buffer.n_online == len(model.rows)


NUMBERS: Any = st.one_of(
    st.integers(-2, 6), st.floats(-2, 2), st.sampled_from([np.nan, np.inf, 1e30, 0, None, "auto", "text", [], True])
)
ARGUMENTS = {
    **dict.fromkeys(
        ["learning_rate", "tau", "gamma", "learning_starts", "train_freq", "gradient_steps", "batch_size"], NUMBERS
    ),
    **dict.fromkeys(["buffer_size", "offline_batch_size", "first_update_multiplier", "max_abs_q", "seed"], NUMBERS),
    "on_fault": st.sampled_from(["raise", "skip", "", None]),
    "policy_kwargs": st.fixed_dictionaries(
        {}, optional={"ensemble_size": NUMBERS, "n_critics": NUMBERS, "net_arch": st.sampled_from([[], [4], [0], "x"])}
    ),
}
OWN_ARGUMENTS: dict[Any, dict[str, Any]] = {
    Off2OnSAC: {
        **dict.fromkeys(["cql_alpha", "cql_n_actions", "cql_temp", "cql_alpha_online", "priority_temperature"], NUMBERS),
        **dict.fromkeys(["initial_online_fraction", "ent_coef", "target_entropy", "target_update_interval"], NUMBERS),
        "offline_ent_coef": st.one_of(NUMBERS, st.sampled_from(["auto", "auto_0.1", "auto_0", "x", None])),
        **dict.fromkeys(["qf_learning_rate", "offline_learning_rate", "cql_target_action_gap"], NUMBERS),
    },
    AWAC: {"awac_lambda": NUMBERS},
    BCQ: {"bcq_lambda": NUMBERS, "n_target_actions": NUMBERS},
}


@searched(25)
@given(data=st.data())
@pytest.mark.parametrize("cls", [Off2OnSAC, AWAC, BCQ])
@pytest.mark.filterwarnings("ignore")
def test_any_arguments_work_or_are_refused(cls: Any, data: st.DataObject) -> None:
    """One to three arguments at random: 50 steps, or an error that says something; never anything else."""
    strategies = ARGUMENTS | OWN_ARGUMENTS[cls]
    names = data.draw(st.lists(st.sampled_from(sorted(strategies)), min_size=1, max_size=3, unique=True))
    kwargs = small_kwargs(train_freq=10, gradient_steps=1, first_update_multiplier=1)
    kwargs = {
        name: value
        for name, value in kwargs.items()
        if cls is Off2OnSAC or name not in ("cql_n_actions", "density_ratio_kwargs")
    }
    kwargs |= {name: data.draw(strategies[name], name) for name in names}
    refused: list[str] = []
    try:
        model = cls("MlpPolicy", TinyEnv(spaces.Box(-1, 1, (3,))), **kwargs)
        model.set_logger(configure(None, []))
        model.learn(50)
    except (ValueError, TypeError) as error:
        refused.append(str(error))
    assert all(refused)


def test_hostile_input() -> None:
    """Two cases of each kind here; docs/reliability.md tells of more."""
    assert len(hostile_input.KINDS) >= 40
    for name, n_refused, n_harmless, crashes in hostile_input.feed(2, seed=1):
        assert not crashes, (name, crashes)
        assert n_refused + n_harmless == 2
        if any(word in name for word in ("NaN", "length", "truncated", "malicious pickles as")):
            assert n_refused == 2, name


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_soak() -> None:
    """As a process, because it starts others."""
    command = [sys.executable, str(Path(hostile_input.__file__).with_name("soak.py")), "--minutes", "0.05"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "Sum-tree against the sum of its leaves: relative difference of at most" in process.stdout
    assert "Resident size" in process.stdout
