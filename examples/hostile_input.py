"""
Feed broken data, files, arguments and environments to the package and count what happens to them: each must be refused with a
``ValueError`` or ``TypeError`` that has a message, or do no harm. Prints a table, see docs/reliability.md.

    python examples/hostile_input.py --cases 25
"""

import argparse
import json
import os
import pickle
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py  # type: ignore[import-untyped]
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.logger import configure

from sb3_off2on import AWAC, BCQ, BalancedReplayBuffer, Off2OnSAC, collect_dataset, load_dataset

Case = Callable[[np.random.Generator, Path], Any]
KINDS: dict[str, Case] = {}
N_ROWS = 24
NOT_FINITE = (np.nan, np.inf, -np.inf)


def kind(name: str) -> Callable[[Case], Case]:
    """
    :param name: of a kind of bad input, for the table
    :return: a decorator for what feeds one of that kind, drawn at random
    """

    def add(case: Case) -> Case:
        KINDS[name] = case
        return case

    return add


def arrays(rng: np.random.Generator, n: int = N_ROWS) -> dict[str, Any]:
    """:return: a dataset of Pendulum as arrays, with nothing wrong"""
    return {
        "observations": rng.normal(size=(n, 3)).astype(np.float32),
        "next_observations": rng.normal(size=(n, 3)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (n, 1)).astype(np.float32),
        "rewards": rng.normal(size=n).astype(np.float32),
        "terminations": np.arange(1, n + 1) % 8 == 0,
        "truncations": np.zeros(n, bool),
    }


class Env(gym.Env):
    """Random numbers, of which one goes wrong at step 5: ``spoilt`` gets (observation, reward) and returns them."""

    def __init__(self, spoilt: Callable[[np.ndarray, float], Any] | None = None) -> None:
        self.observation_space = spaces.Box(-1, 1, (3,))
        self.action_space = spaces.Box(-1, 1, (1,))
        self.spoilt, self.n_steps = spoilt, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return np.zeros(3, np.float32), {}

    def step(self, action: Any) -> Any:
        self.n_steps += 1
        observation, reward = self.np_random.uniform(-1, 1, 3).astype(np.float32), 0.5
        if self.spoilt is not None and self.n_steps == 5:
            observation, reward = self.spoilt(observation, reward)
        return observation, reward, False, self.n_steps % 8 == 0, {}


def model_of(rng: np.random.Generator, env: Any = None, **kwargs: Any) -> Any:
    """:return: one of the algorithms, tiny"""
    cls = kwargs.pop("cls", None) or (Off2OnSAC, AWAC, BCQ)[rng.integers(3)]
    small: dict[str, Any] = {"learning_starts": 4, "train_freq": 1, "gradient_steps": 1, "batch_size": 4, "buffer_size": 50}
    small |= {"policy_kwargs": {"net_arch": [8], "ensemble_size": 2}, "offline_batch_size": 4, "device": "cpu"}
    model = cls(kwargs.pop("policy", "MlpPolicy"), Env() if env is None else env, **{**small, **kwargs})
    model.set_logger(configure(None, []))
    return model


# ---------------------------------------------------------------------- arrays


def not_finite_kind(field: str) -> None:
    @kind(f"NaN or infinity in {field}")
    def case(rng: np.random.Generator, folder: Path) -> None:
        data = arrays(rng)
        data[field].flat[rng.integers(data[field].size)] = rng.choice(NOT_FINITE)
        load_dataset(data)


def missing_kind(field: str) -> None:
    @kind(f"no {field}")
    def case(rng: np.random.Generator, folder: Path) -> None:
        data = arrays(rng)
        del data[field]
        load_dataset(data)


def length_kind(field: str) -> None:
    @kind(f"{field} of another length")
    def case(rng: np.random.Generator, folder: Path) -> None:
        data = arrays(rng)
        data[field] = data[field][: rng.integers(N_ROWS)]
        load_dataset(data)


def dtype_kind(field: str) -> None:
    @kind(f"{field} of objects, text or complex numbers")
    def case(rng: np.random.Generator, folder: Path) -> None:
        data = arrays(rng)
        dtype = rng.choice(np.array(["O", "U8", "S3", "c8", "M8[s]", "V4"]))
        data[field] = np.empty(data[field].shape, dtype)
        load_dataset(data)


def dims_kind(field: str) -> None:
    @kind(f"{field} with wrong dimensions")
    def case(rng: np.random.Generator, folder: Path) -> None:
        data = arrays(rng)
        array = data[field]
        wrong = (array[..., None, None], np.float32(1.0), array[0].sum(), array.reshape(1, *array.shape))
        data[field] = wrong[rng.integers(4)]
        load_dataset(data)


for _field in ("observations", "next_observations", "actions", "rewards"):
    not_finite_kind(_field)
for _field in ("observations", "actions", "rewards", "terminations"):
    missing_kind(_field)
for _field in ("observations", "next_observations", "actions", "rewards", "terminations", "truncations"):
    length_kind(_field)
    dtype_kind(_field)
    dims_kind(_field)


@kind("actions outside of their bounds")
def _(rng: np.random.Generator, folder: Path) -> None:
    data = arrays(rng)
    data["actions"][rng.integers(N_ROWS)] = rng.choice([-1, 1]) * rng.uniform(1.01, 1e6)
    load_dataset(data)


@kind("unknown fields")
def _(rng: np.random.Generator, folder: Path) -> None:
    load_dataset({**arrays(rng), rng.choice(np.array(["reward", "obs", "done", "next_obs", "0", ""])): np.zeros(N_ROWS)})


@kind("no rows")
def _(rng: np.random.Generator, folder: Path) -> None:
    load_dataset({name: array[:0] for name, array in arrays(rng).items()})


@kind("spaces that do not fit, or are not spaces")
def _(rng: np.random.Generator, folder: Path) -> None:
    wrong: list[Any] = [spaces.Discrete(3), spaces.Box(-1, 1, (7,)), spaces.Box(0, 255, (2, 2, 3), np.uint8), "Box", 3.0]
    wrong += [spaces.Box(-np.inf, np.inf, (1,)), spaces.Dict({"a": spaces.Box(-1, 1, (3,))}), spaces.Tuple([])]
    name = rng.choice(np.array(["observation_space", "action_space"]))
    load_dataset({**arrays(rng), str(name): wrong[rng.integers(len(wrong))]})


@kind("unknown environments")
def _(rng: np.random.Generator, folder: Path) -> None:
    wrong = ["Nonsense-v0", "Pendulum-v99", "a/b/c", "", 5, "os:system", "nowhere:Env-v0", b"Pendulum-v1"]
    load_dataset({**arrays(rng), "env_id": wrong[rng.integers(len(wrong))]})


@kind("sources of an unknown kind")
def _(rng: np.random.Generator, folder: Path) -> None:
    wrong: list[Any] = [None, 5, 2.5, object(), [], (), [None], {1, 2}, np.zeros(3), lambda: 0, b"abc", "", ".", "no-such-v0"]
    wrong += ["/nonexistent/file.npz", str(folder), "a" * 300, "x\0y", "file.txt", "http://example.invalid/x.hdf5"]
    load_dataset(wrong[rng.integers(len(wrong))])


@kind("datasets that cannot be joined")
def _(rng: np.random.Generator, folder: Path) -> None:
    other = arrays(rng)
    name = ("observations", "actions")[rng.integers(2)]
    other[name] = np.zeros((N_ROWS, 5), np.float32)
    other["next_observations"] = other["observations"]
    load_dataset([arrays(rng), other])


# ---------------------------------------------------------------------- files


class Malicious:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def broken(path: Path, rng: np.random.Generator, how: str) -> Path:
    """Truncate a file, flip some of its bits, or put others in its place."""
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[: rng.integers(len(content))]
    elif how == "replaced":
        content = bytearray(rng.bytes(int(rng.integers(2000))))
    else:
        for place in rng.integers(len(content), size=rng.integers(1, 9)):
            content[place] ^= 1 << rng.integers(8)
    path.write_bytes(content)
    return path


def write_npz(rng: np.random.Generator, folder: Path, **more: Any) -> Path:
    path = folder / "data.npz"
    save: Any = np.savez_compressed if rng.integers(2) else np.savez
    save(path, **{**arrays(rng), **more})
    return path


def write_hdf5(rng: np.random.Generator, folder: Path, **more: Any) -> Path:
    path = folder / "data.hdf5"
    with h5py.File(path, "w") as file:
        for name, array in {**arrays(rng), **more}.items():
            file.create_dataset(name, data=array)
    return path


def write_minari(folder: Path) -> Path:
    """:return: a copy of a Minari dataset, which is collected the first time"""
    original = folder.parent / "minari"
    if not original.exists():
        os.environ["MINARI_DATASETS_PATH"] = str(original)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            collect_dataset(None, gym.make("Pendulum-v1", max_episode_steps=8), N_ROWS, "hostile-v0", seed=0)
    return Path(shutil.copytree(original / "hostile-v0", folder / "minari"))


def write_pickle(rng: np.random.Generator, folder: Path) -> Path:
    buffer = ReplayBuffer(N_ROWS, spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (1,)), device="cpu")
    for _ in range(N_ROWS):
        obs, next_obs = rng.uniform(-1, 1, (2, 1, 3))
        buffer.add(obs, next_obs, rng.uniform(-1, 1, (1, 1)), np.zeros(1), np.zeros(1), [{}])
    path = folder / "data.pkl"
    path.write_bytes(pickle.dumps(buffer))
    return path


def file_kinds(how: str) -> None:
    @kind(f".npz files, {how}")
    def npz(rng: np.random.Generator, folder: Path) -> None:
        load_dataset(broken(write_npz(rng, folder), rng, how))

    @kind(f"D4RL files, {how}")
    def hdf5(rng: np.random.Generator, folder: Path) -> None:
        load_dataset(broken(write_hdf5(rng, folder), rng, how))

    @kind(f"Minari main_data.hdf5, {how}")
    def minari_data(rng: np.random.Generator, folder: Path) -> None:
        path = write_minari(folder)
        broken(path / "data" / "main_data.hdf5", rng, how)
        load_dataset(path)

    @kind(f"Minari metadata.json, {how}")
    def minari_metadata(rng: np.random.Generator, folder: Path) -> None:
        path = write_minari(folder)
        broken(path / "data" / "metadata.json", rng, how)
        load_dataset(path)


for _how in ("truncated", "with flipped bits", "replaced"):
    file_kinds(_how)


@kind("pickles of replay buffers, truncated")
def _(rng: np.random.Generator, folder: Path) -> None:
    load_dataset(broken(write_pickle(rng, folder), rng, "truncated"), allow_pickle=True)


@kind("pickles of something else")
def _(rng: np.random.Generator, folder: Path) -> None:
    path = folder / "data.pkl"
    path.write_bytes(pickle.dumps([None, {}, 5, "text", arrays(rng), np.zeros(3)][rng.integers(6)]))
    load_dataset(path, allow_pickle=True)


@kind("malicious pickles as .pkl, .npz, .npy inside .npz, or renamed")
def _(rng: np.random.Generator, folder: Path) -> None:
    """None of them may run."""
    trace, place = folder / "trace", rng.integers(4)
    content = np.array([Malicious(trace)] * N_ROWS, dtype=object)
    path = folder / ("data.pkl", "data.npz", "data.npz", "data.hdf5")[place]
    if place == 1:
        path = write_npz(rng, folder, **{str(rng.choice(list(arrays(rng)))): content})
    else:
        path.write_bytes(pickle.dumps(Malicious(trace)))
    try:
        load_dataset(path)
    finally:
        assert not trace.exists(), "a pickle ran"


@kind("malicious pickles in the attributes and columns of HDF5 files")
def _(rng: np.random.Generator, folder: Path) -> None:
    trace = folder / "trace"
    content = np.void(pickle.dumps(Malicious(trace)))
    path = write_hdf5(rng, folder, infos=content)
    with h5py.File(path, "a") as file:
        file.attrs["pickle"] = content
        file["rewards"].attrs["pickle"] = content
        if rng.integers(2):
            del file["rewards"]
            file["rewards"] = content
    try:
        load_dataset(path)
    finally:
        assert not trace.exists(), "a pickle ran"


@kind("HDF5 groups, links and text where columns should be")
def _(rng: np.random.Generator, folder: Path) -> None:
    path = write_hdf5(rng, folder)
    with h5py.File(path, "a") as file:
        name = str(rng.choice(list(arrays(rng))))
        del file[name]
        wrong: list[Any] = [h5py.SoftLink("/nowhere"), h5py.ExternalLink("no.hdf5", "/x"), "text", h5py.Empty("f")]
        if (place := rng.integers(5)) == 4:
            file.create_group(name)
        else:
            file[name] = wrong[place]
    load_dataset(path)


@kind("Minari metadata with wrong entries")
def _(rng: np.random.Generator, folder: Path) -> None:
    path = write_minari(folder)
    file = path / "data" / "metadata.json"
    metadata = json.loads(file.read_text())
    name = str(rng.choice(["total_episodes", "total_steps", "observation_space", "action_space", "env_spec", "data_format"]))
    wrong: list[Any] = [None, -1, 10**6, "nonsense", {}, [], '{"type": "Box"}', 2.5]
    metadata[name] = wrong[rng.integers(len(wrong))]
    if rng.integers(4) == 0:
        del metadata[name]
    file.write_text(json.dumps(metadata))
    load_dataset(path)


@kind("Minari episodes with wrong columns")
def _(rng: np.random.Generator, folder: Path) -> None:
    path = write_minari(folder)
    with h5py.File(path / "data" / "main_data.hdf5", "a") as file:
        episode = file[str(rng.choice(list(file)))]
        name = str(rng.choice(["observations", "actions", "rewards", "terminations", "truncations"]))
        column = episode[name][()]
        del episode[name]
        wrong: list[Any] = [
            None,
            column[:-1],
            np.zeros(0),
            np.full(column.shape, np.nan),
            column.astype("S8"),
            column[..., None],
        ]
        if (value := wrong[rng.integers(len(wrong))]) is not None:
            episode[name] = value
    load_dataset(path)


# ---------------------------------------------------------------------- arguments


def argument_kind(name: str, values: dict[str, list[Any]]) -> None:
    @kind(name)
    def case(rng: np.random.Generator, folder: Path) -> None:
        argument = str(rng.choice(list(values)))
        model = model_of(rng, cls=Off2OnSAC, **{argument: values[argument][rng.integers(len(values[argument]))]})
        model.learn(50)


_COUNTS = ("buffer_size", "batch_size", "train_freq", "offline_batch_size", "cql_n_actions", "first_update_multiplier")
_RATES = ("learning_rate", "qf_learning_rate", "offline_learning_rate", "offline_qf_learning_rate", "tau", "gamma", "cql_temp")
_WRONG_TYPES: list[Any] = ["text", None, [], {}, object(), b"1"]
argument_kind("counts below 1", {name: [0, -1, -100] for name in (*_COUNTS, "target_update_interval")})
argument_kind("counts with a fraction", {name: [1.5, 2.25] for name in (*_COUNTS, "learning_starts", "gradient_steps")})
argument_kind("counts of a wrong type", {name: _WRONG_TYPES for name in (*_COUNTS, "learning_starts", "gradient_steps")})
argument_kind("NaN or infinity as an argument", {name: [np.nan, np.inf, -np.inf] for name in (*_RATES, *_COUNTS)})
argument_kind(
    "rates and factors below 0", {name: [-1e-3, -1.0, -1e6] for name in (*_RATES, "priority_temperature", "cql_alpha")}
)
argument_kind(
    "rates and factors of a wrong type", {name: _WRONG_TYPES[:1] + _WRONG_TYPES[2:] for name in (*_RATES, "cql_alpha")}
)
argument_kind("gamma, tau and rho beyond 1", {name: [1.0001, 2, 1e9] for name in ("gamma", "tau", "initial_online_fraction")})
argument_kind(
    "learning rates that let Q-values explode", {"learning_rate": [1e3, 1e10, 1e30, 1e38], "qf_learning_rate": [1e10]}
)
argument_kind(
    "unknown names",
    {
        "policy": ["NoPolicy", "", None, 5, dict],
        "ent_coef": ["automatic", "", "auto_x", "auto_0", "auto_-1"],
        "target_entropy": ["automatic", ""],
        "target_q": ["max", "", None, 1],
        "on_fault": ["ignore", "", None, 1],
        "device": ["nonsense", "cuda:99", ""],
        "train_freq": [(1, "epoch"), (1,), (1, "step", 2), ("step", 1), (0, "step")],
        "replay_buffer_kwargs": [{"scheme": "none"}, {"no_such_argument": 1}, {"scheme": None}],
        "replay_buffer_class": [ReplayBuffer, dict],
    },
)
argument_kind(
    "wrong arguments of the networks",
    {
        "policy_kwargs": [
            {"ensemble_size": 0},
            {"ensemble_size": -3},
            {"ensemble_size": 1.5},
            {"ensemble_size": "two"},
            {"n_critics": 0},
            {"net_arch": [0]},
            {"net_arch": [-1]},
            {"net_arch": "big"},
            {"no_such_argument": 1},
            {"activation_fn": "relu"},
            {"optimizer_class": "adam"},
            [],
            "text",
        ],
        "density_ratio_kwargs": [
            {"net_arch": [0]},
            {"net_arch": "big"},
            {"no_such_argument": 1},
            {"reference": "x"},
            "text",
            5,
        ],
    },
)
argument_kind("what is not supported", {"n_steps": [0, 2, 3], "use_sde": [True], "optimize_memory_usage": [True]})


@kind("environments with unsupported spaces")
def _(rng: np.random.Generator, folder: Path) -> None:
    env = Env()
    wrong: list[Any] = [
        spaces.Discrete(2),
        spaces.MultiBinary(3),
        spaces.Box(-np.inf, 1, (1,)),
        spaces.Dict({}),
        spaces.Tuple([]),
    ]
    wrong += [spaces.Box(0, 0, (0,)), spaces.Text(3)]
    env.action_space = wrong[rng.integers(len(wrong))]
    model_of(rng, env).learn(50)


@kind("arguments of learn_offline() and pretrain_offline()")
def _(rng: np.random.Generator, folder: Path) -> None:
    model = model_of(rng)
    wrong: list[dict[str, Any]] = [{"gradient_steps": n} for n in (0, -1, 1.5, np.nan, "two", None)]
    wrong += [{"gradient_steps": 1, "log_interval": n} for n in (0, -1, "two")]
    wrong += [{"gradient_steps": 1, "dataset": value} for value in (None, 5, "no-such-v0")]
    model.learn_offline(**{"dataset": arrays(rng), **wrong[rng.integers(len(wrong))]})


@kind("datasets of another environment")
def _(rng: np.random.Generator, folder: Path) -> None:
    model = model_of(rng)
    other = arrays(rng)
    name = ("observations", "actions")[rng.integers(2)]
    other[name] = rng.uniform(-1, 1, (N_ROWS, rng.integers(4, 9))).astype(np.float32)
    other["next_observations"] = other["observations"]
    model.learn_offline(other, gradient_steps=1)


@kind("another dataset than the model was trained with")
def _(rng: np.random.Generator, folder: Path) -> None:
    data = arrays(rng)
    data |= {"observation_space": Env().observation_space, "observations": np.clip(data["observations"], -1, 1)}
    model = model_of(rng, dataset=data)
    changed = {**data, "rewards": data["rewards"].copy()}
    changed["rewards"].view(np.int32)[rng.integers(N_ROWS)] ^= 1 << rng.integers(23)  # a bit that HDF5 would not miss
    model.set_dataset(changed)


# ---------------------------------------------------------------------- environments and the replay


@kind("observations of an environment that are not finite")
def _(rng: np.random.Generator, folder: Path) -> None:
    value, place = rng.choice(NOT_FINITE), rng.integers(3)
    model_of(rng, Env(lambda obs, reward: (np.where(np.arange(3) == place, value, obs).astype(np.float32), reward))).learn(50)


@kind("rewards of an environment that are not finite")
def _(rng: np.random.Generator, folder: Path) -> None:
    value = rng.choice([*NOT_FINITE, 1e39, -1e300])
    model_of(rng, Env(lambda obs, reward: (obs, value))).learn(50)


@kind("rewards of an environment that let Q-values explode")
def _(rng: np.random.Generator, folder: Path) -> None:
    value = rng.choice([-1, 1]) * 10.0 ** rng.uniform(9, 38)
    model_of(rng, Env(lambda obs, reward: (obs, value)), learning_starts=2).learn(50)


@kind("rows of the replay that went bad")
def _(rng: np.random.Generator, folder: Path) -> None:
    model = model_of(rng)
    model.learn(10)
    name = str(rng.choice(["observations", "next_observations", "actions", "rewards"]))
    getattr(model.replay_buffer, name)[rng.integers(10)] = rng.choice(NOT_FINITE)
    model.learn(200, reset_num_timesteps=False)


@kind("parameters that went bad")
def _(rng: np.random.Generator, folder: Path) -> None:
    model = model_of(rng)
    parameters = [parameter for parameter in model.critic.parameters() if parameter.requires_grad]
    parameters[rng.integers(len(parameters))].data.view(-1)[0] = rng.choice(NOT_FINITE)
    model.learn(50)


@kind("priorities that are negative or not finite, or of rows that are not there")
def _(rng: np.random.Generator, folder: Path) -> None:
    buffer = BalancedReplayBuffer(10, Env().observation_space, Env().action_space)
    buffer.add(np.zeros((1, 3)), np.zeros((1, 3)), np.zeros((1, 1)), np.zeros(1), np.zeros(1), [{}])
    wrong: list[Any] = [([0], [value]) for value in (*NOT_FINITE, -1.0)]
    wrong += [([1], [1.0]), ([-1], [1.0]), ([10**9], [1.0]), ([0, 0], [1.0]), ([0], [[1.0]])]
    indices, priorities = wrong[rng.integers(len(wrong))]
    buffer.update_priorities(np.array(indices), np.array(priorities))


def feed(n_cases: int, seed: int, kinds: list[str] | None = None) -> Iterator[tuple[str, int, int, list[BaseException]]]:
    """
    :param n_cases: of each kind
    :param seed: of the first case
    :param kinds: names, all by default
    :return: for each kind its name, how many were refused, how many did no harm, and what else was raised
    """
    with tempfile.TemporaryDirectory() as parent, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in kinds or KINDS:
            n_refused, n_harmless = 0, 0
            crashes: list[BaseException] = []
            for number in range(n_cases):
                folder = Path(parent) / "case"
                folder.mkdir()
                try:
                    KINDS[name](np.random.default_rng([seed, number]), folder)
                    n_harmless += 1
                except (ValueError, TypeError) as error:
                    n_refused += bool(str(error))
                    crashes += [] if str(error) else [error]
                except BaseException as error:
                    if isinstance(error, KeyboardInterrupt):
                        raise
                    crashes.append(error)
                shutil.rmtree(folder)
            yield name, n_refused, n_harmless, crashes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=25, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), metavar="KIND", help="only these")
    arguments = parser.parse_args()
    th.set_num_threads(1)

    print("| kind of input | tried | refused | harmless | crashed |\n|---|---:|---:|---:|---:|")
    totals, failures = np.zeros(4, int), []
    for name, n_refused, n_harmless, crashes in feed(arguments.cases, arguments.seed, arguments.kinds):
        row = np.array([arguments.cases, n_refused, n_harmless, len(crashes)])
        print(f"| {name} | " + " | ".join(map(str, row)) + " |", flush=True)
        totals += row
        failures += [f"{name}: {type(error).__name__}: {error}" for error in crashes]
    print("| **all** | " + " | ".join(f"**{number}**" for number in totals) + " |")
    if failures:
        raise SystemExit("\n" + "\n".join(failures))


if __name__ == "__main__":
    main()
