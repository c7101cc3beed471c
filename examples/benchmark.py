"""
How fast is it, beside SB3's SAC, a plain CQL agent and, where they are at hand, other implementations? One run on one machine,
ratios as medians and quartiles over rounds in which those compared take turns. With one thread, CPU time is taken; with two,
wall time. The data is synthetic, of HalfCheetah's sizes.

    python examples/benchmark.py
    python examples/benchmark.py --sections online offline --rounds 31
    python examples/benchmark.py --peers DIR  # times the checkouts DIR/CORL and DIR/Off2OnRL as well
"""

import argparse
import gc
import json
import math
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch
from warnings import catch_warnings, simplefilter

# Before NumPy is imported: its second thread spins on after each product, which would be on the bill of whose turn it is then
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import gymnasium as gym
import minari  # type: ignore[import-untyped]
import numpy as np
import torch as th
from benchmark_peers import authors_draw, authors_update, corl_update, d3rlpy_update
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer  # type: ignore[import-untyped]
from plain_cql import PlainCQL
from stable_baselines3 import SAC
from stable_baselines3.common.logger import Logger
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from sb3_off2on import BalancedReplayBuffer, Off2OnSAC, OfflineDataset, __version__, load_dataset, onednn
from sb3_off2on.priorities import SumTree

OBS_DIM, ACTION_DIM, EPISODE_LENGTH = 17, 6, 1000  # HalfCheetah's
NET_ARCH, BATCH_SIZE, ENSEMBLE_SIZE = [256, 256], 256, 5
N_THREADS = (1, 2)  # of the online updates and the predictions; one elsewhere
N_OFFLINE, N_ONLINE = 100_000, 5_000  # rows that the updates sample from
TREE_SIZE, PEER_TREE_SIZE = 2**21, 2**17
PRODUCTS = [(1024, 256, 256), (4096, 256, 256), (512, 512, 512), (1024, 1024, 1024), (2048, 2048, 2048)]
IMAGE_SHAPE, IMAGE_BATCH_SIZE, IMAGE_ENSEMBLE_SIZE = (64, 64, 3), 32, 2
N_REPEATS = 50  # of what takes less than a millisecond
COMPILE_MODE = "default"
WARM_UP = 2  # rounds that do not count

Row = dict[str, Any]
Tasks = dict[str, Callable[[], Any]]


def row(what: str, values: Any = (), unit: str = "x", aim: str = "", note: str = "") -> Row:
    """One line of the results: the values of all rounds and their quartiles, or in ``note`` the reason why there are none."""
    values = np.asarray(values, dtype=float)
    quartiles = np.percentile(values, [25, 50, 75]).tolist() if len(values) else []
    return {"what": what, "aim": aim, "quartiles": quartiles, "unit": unit, "note": note, "values": values.tolist()}


def take_turns(what: str, rounds: int, tasks: Tasks) -> dict[str, np.ndarray]:
    """
    Time tasks round by round (A, B, C, A, B, C, ...), so that a change of the machine's speed meets all of them.

    :param what: label of the progress bar
    :param rounds: number of rounds that count
    :param tasks: what to time, by name
    :return: seconds of each task in each round, shape ``(rounds,)``: CPU time with one thread, wall time with more
    """
    clock = time.process_time if th.get_num_threads() == 1 else time.perf_counter
    seconds = {name: np.zeros(WARM_UP + rounds) for name in tasks}
    gc.collect()
    gc.disable()
    try:
        for number in tqdm(range(WARM_UP + rounds), what, leave=False, disable=None):
            for name, task in tasks.items():
                start = clock()
                task()
                seconds[name][number] = clock() - start
    finally:
        gc.enable()
    return {name: values[WARM_UP:] for name, values in seconds.items()}


def add_peer(tasks: Tasks, name: str, make: Callable[..., Callable[[], Any]], *args: Any) -> list[Row]:
    """Add another implementation to the tasks; where it is not at hand, return a row with the reason."""
    try:
        tasks[name] = make(*args)
    except ImportError as error:
        return [row(name, note=f"skipped: {error}")]
    return []


def repeat(times: int, task: Callable[[], Any]) -> None:
    for _ in range(times):
        task()


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def proc(name: str) -> str:
    """A file of Linux's ``/proc``; empty on other systems."""
    path = Path("/proc") / name
    return path.read_text() if path.exists() else ""


def memory() -> dict[str, float]:
    """This process's memory in MiB: resident, its peak, and of the resident the anonymous part and the files'."""
    fields = dict(line.split(":", 1) for line in proc("self/status").splitlines())
    return {name: int(fields[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM", "RssAnon", "RssFile")}


# ------------------------------------------------------------------ synthetic data, and agents


class SyntheticEnv(gym.Env):
    """Random observations, of HalfCheetah's sizes unless told otherwise."""

    def __init__(self, observation_space: spaces.Box | None = None) -> None:
        self.observation_space = observation_space or spaces.Box(-np.inf, np.inf, (OBS_DIM,), np.float64)
        self.action_space = spaces.Box(-1.0, 1.0, (ACTION_DIM,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.observation_space.sample(), float(self.np_random.normal()), False, False, {}


def synthetic_columns(n: int) -> dict[str, np.ndarray]:
    """Everything but the observations of ``n`` transitions."""
    rng = np.random.default_rng(0)
    return {
        "actions": rng.uniform(-1, 1, (n, ACTION_DIM)).astype(np.float32),
        "rewards": rng.normal(size=n).astype(np.float32),
        "terminations": np.zeros(n, bool),
        "truncations": np.arange(1, n + 1) % EPISODE_LENGTH == 0,
    }


def synthetic_dataset() -> OfflineDataset:
    observations = np.random.default_rng(1).normal(size=(N_OFFLINE, OBS_DIM)).astype(np.float32)
    return load_dataset({"observations": observations, **synthetic_columns(N_OFFLINE)})


def make_agent(cls: type[SAC] = Off2OnSAC, **kwargs: Any) -> Any:
    """An agent whose buffer ``learn(N_ONLINE)`` fills, with at most one update at the end."""
    ensemble = {"ensemble_size": ENSEMBLE_SIZE} if cls is Off2OnSAC else {}
    policy_kwargs = {"net_arch": NET_ARCH, **ensemble, **kwargs.pop("policy_kwargs", {})}
    kwargs = {"learning_starts": N_ONLINE, "gradient_steps": 1, "seed": 0, "device": "cpu", **kwargs}
    agent = cls("MlpPolicy", SyntheticEnv(), policy_kwargs=policy_kwargs, **kwargs)
    agent.set_logger(Logger(None, []))
    return agent


# ------------------------------------------------------------------ the sections


def online(options: argparse.Namespace) -> list[Row]:
    """An update of the online phase, density ratio and priorities included, beside SAC's."""
    dataset = synthetic_dataset()
    ours, sac = make_agent(dataset=dataset), make_agent(SAC)
    for agent in (ours, sac):
        agent.learn(N_ONLINE)
    tasks: Tasks = {"ours": partial(ours.train, 1, BATCH_SIZE), "SAC": partial(sac.train, 1, BATCH_SIZE)}
    rows = add_peer(tasks, "authors' code", authors_update, options.peers, dataset, ENSEMBLE_SIZE, BATCH_SIZE)
    for n_threads in N_THREADS:
        th.set_num_threads(n_threads)
        seconds = take_turns("online", options.rounds, tasks)
        suffix = f", threads: {n_threads}"
        rows.append(row(f"ours{suffix}", 1e3 * seconds["ours"], "ms"))
        rows.append(row(f"ours / SAC{suffix}", seconds["ours"] / seconds["SAC"], aim="<= 3.5"))
        if "authors' code" in seconds:
            rows.append(row(f"authors' code / ours{suffix}", seconds["authors' code"] / seconds["ours"]))
    th.set_num_threads(1)
    return rows


def offline(options: argparse.Namespace) -> list[Row]:
    """An update of the offline phase, per member, beside CQL with all sampled actions in the graph."""
    dataset = synthetic_dataset()
    plain = make_agent(PlainCQL, replay_buffer_class=BalancedReplayBuffer, replay_buffer_kwargs={"scheme": "offline"})
    plain.replay_buffer.set_offline_data(dataset)
    ours, full = (make_agent(dataset=dataset, cql_sampled_gradient=sampled) for sampled in (True, False))
    tasks: Tasks = {
        "ours": partial(ours.train_offline, 1, BATCH_SIZE),
        "ours with cql_sampled_gradient=False": partial(full.train_offline, 1, BATCH_SIZE),
        "plain CQL": partial(plain.train, 1, BATCH_SIZE),
    }
    rows = add_peer(tasks, "d3rlpy", d3rlpy_update, dataset, BATCH_SIZE)
    rows += add_peer(tasks, "CORL", corl_update, options.peers, dataset, BATCH_SIZE)
    seconds = take_turns("offline", options.rounds, tasks)
    per_member = {name: x / ENSEMBLE_SIZE if name.startswith("ours") else x for name, x in seconds.items()}
    one = per_member.pop("ours")
    aims = {"plain CQL": ">= 3", "d3rlpy": ">= 2.5"}
    ratios = [row(f"{name} / ours, per member", x / one, aim=aims.get(name, "")) for name, x in per_member.items()]
    return [row("ours, per member", 1e3 * one, "ms"), *ratios, *rows]


def critics_part(agent: Any) -> Callable[[], None]:
    """What the offline update computes for the critics' loss and its gradient, on inputs prepared here."""
    replay_data = agent.replay_buffer.sample_offline(ENSEMBLE_SIZE * BATCH_SIZE)
    actions = replay_data.actions.view(ENSEMBLE_SIZE, BATCH_SIZE, ACTION_DIM)
    target_q_values = th.randn(ENSEMBLE_SIZE, 1, BATCH_SIZE)
    with th.no_grad():
        dist_params = agent.actor.member_action_dist_params(replay_data.observations, per_member=True)
        cql_actions, cql_log_density = agent._sample_cql_actions(dist_params, dist_params)

    def critics() -> None:
        features = agent.critic.extract_member_features(replay_data.observations, per_member=True)
        q_values, gap = agent._q_values_and_gap(features, actions, cql_actions, cql_log_density)
        critic_loss = ((q_values - target_q_values).pow(2) + agent.cql_alpha * gap).mean(dim=2).sum()
        agent.critic.optimizer.zero_grad()
        critic_loss.backward()

    return critics


def arithmetic(options: argparse.Namespace) -> list[Row]:
    """The critics' part of the offline update, beside the rate at which this machine multiplies matrices."""
    tasks: Tasks = {"critics": critics_part(make_agent(dataset=synthetic_dataset()))}
    # PyTorch does not count what oneDNN multiplies
    with FlopCounterMode(display=False) as counter, patch.object(onednn, "MIN_MULTIPLICATIONS", math.inf):
        tasks["critics"]()
    flops = {"critics": counter.get_total_flops()}
    for m, k, n in PRODUCTS:
        x, weight = th.randn(m, k), th.randn(n, k)
        products = {"sgemm": partial(th.mm, x, weight.T)}
        if onednn._ONEDNN_LINEAR is not None:
            products["oneDNN"] = partial(onednn.product, x, weight)
        for how, product in products.items():
            # As many products as it takes for about the critics' arithmetic
            name, times = f"{how} {m} x {k} x {n}", max(flops["critics"] // (2 * m * k * n), 1)
            tasks[name] = partial(repeat, times, product)
            flops[name] = times * 2 * m * k * n
    rates = {name: flops[name] / x / 1e9 for name, x in take_turns("arithmetic", options.rounds, tasks).items()}
    best = max(list(rates)[1:], key=lambda name: float(np.median(rates[name])))
    note = f"{flops['critics'] / 1e9:.3g} GFLOP an update"
    rows = [row(name, rate, "GFLOP/s") for name, rate in rates.items()]
    return [*rows, row(f"critics / {best}", 100 * rates["critics"] / rates[best], "%", ">= 70", note)]


def sum_tree(options: argparse.Namespace) -> list[Row]:
    """Draws by priority, and their priorities written back."""

    def make_tree(n_leaves: int) -> tuple[SumTree, np.ndarray]:
        tree, priorities = SumTree(n_leaves), np.random.default_rng(0).uniform(0.1, 10.0, n_leaves)
        tree.fill(0, n_leaves, priorities)
        return tree, priorities

    def draw(tree: SumTree) -> np.ndarray:
        return tree.find(tree.total / BATCH_SIZE * (np.arange(BATCH_SIZE) + np.random.random_sample(BATCH_SIZE)))

    def draw_and_write() -> None:
        leaves = draw(large)
        large.update(leaves, large_priorities[leaves])

    large, large_priorities = make_tree(TREE_SIZE)
    small, priorities = make_tree(PEER_TREE_SIZE)
    tasks: Tasks = {"large": draw_and_write, "ours": partial(draw, small)}
    rows = add_peer(tasks, "authors' code", authors_draw, options.peers, priorities, BATCH_SIZE)
    seconds = take_turns("sum_tree", options.rounds, {name: partial(repeat, N_REPEATS, task) for name, task in tasks.items()})
    if "authors' code" in seconds:
        what = f"authors' code / ours, draw {BATCH_SIZE} of {PEER_TREE_SIZE}"
        rows.append(row(what, seconds["authors' code"] / seconds["ours"]))
    return [row(f"draw {BATCH_SIZE} of {TREE_SIZE}, write back", 1e3 * seconds["large"] / N_REPEATS, "ms", "<= 0.5"), *rows]


def predict(options: argparse.Namespace) -> list[Row]:
    """Actions for one observation and for 64 at once, beside SAC's."""
    agents = {"ours": make_agent(), "SAC": make_agent(SAC)}
    rows = []
    for n, aim in ((1, "<= 1.5"), (64, "<= 2")):
        observations = np.random.default_rng(0).normal(size=(n, OBS_DIM)).squeeze()
        for deterministic in (True, False):
            tasks: Tasks = {
                name: partial(repeat, N_REPEATS, partial(agent.predict, observations, deterministic=deterministic))
                for name, agent in agents.items()
            }
            what = f"ours / SAC, {n} at once, {'deterministic' if deterministic else 'stochastic'}"
            for n_threads in N_THREADS:
                th.set_num_threads(n_threads)
                seconds = take_turns("predict", options.rounds, tasks)
                rows.append(row(f"{what}, threads: {n_threads}", seconds["ours"] / seconds["SAC"], aim=aim))
    th.set_num_threads(1)
    return rows


def write_minari(folder: str, transitions: int, dataset_id: str | None) -> Path:
    """Write at least so many transitions: a dataset, or a random episode, as often as it takes."""
    source: Any = SyntheticEnv()
    observations = np.random.default_rng(0).normal(size=(EPISODE_LENGTH + 1, OBS_DIM))
    episodes = [EpisodeBuffer(observations=observations, **synthetic_columns(EPISODE_LENGTH))]
    if dataset_id is not None:
        source = minari.load_dataset(dataset_id)
        names = ("observations", "actions", "rewards", "terminations", "truncations")
        episodes = [EpisodeBuffer(**{name: getattr(x, name) for name in names}) for x in source.iterate_episodes()]
    tiled: list[EpisodeBuffer] = []
    while sum(map(len, tiled)) < transitions:
        tiled += episodes
    with patch.dict(os.environ, MINARI_DATASETS_PATH=folder), catch_warnings():
        simplefilter("ignore")  # about optional details that are not given
        spaces_of = {"observation_space": source.observation_space, "action_space": source.action_space}
        minari.create_dataset_from_buffers("loading-v0", tiled, **spaces_of)
    return Path(folder) / "loading-v0"


def load_and_measure(path: Path) -> dict[str, float]:
    """Load a dataset in this process: seconds, and memory as a multiple of the plain arrays."""
    before, start = memory(), time.perf_counter()
    dataset = load_dataset(path)
    seconds, after = time.perf_counter() - start, memory()
    columns: Any = (dataset.frames, dataset.actions, dataset.rewards, dataset.terminations, dataset.truncations)
    plain = sum(column.nbytes for column in columns) / 2**20
    resident, peak = ((after[name] - before["VmRSS"]) / plain for name in ("VmRSS", "VmHWM"))
    return {"transitions": len(dataset), "seconds": seconds, "resident": resident, "peak": peak}


def loading(options: argparse.Namespace) -> list[Row]:
    """A Minari dataset that was just written, and so is in the page cache, loaded in fresh processes."""
    if not proc("self/status"):
        return [row("loading", note="skipped: the memory is read in Linux's /proc")]
    with TemporaryDirectory() as folder:
        path = write_minari(folder, options.transitions, options.dataset)
        runs = [in_fresh_process(load_and_measure, path) for _ in range(min(options.rounds, 3))]
    seconds, resident, peak = ([run[name] for run in runs] for name in ("seconds", "resident", "peak"))
    return [
        row(f"{runs[0]['transitions']} transitions", seconds, "s", "<= 10"),
        row("resident memory / arrays in float32, observations once", resident, aim="<= 1.3"),
        row("peak memory / the same", peak),
    ]


def train_on_images(path: Path, limit_gb: float, updates: int) -> list[dict[str, float]]:
    """Train on images in a file, with an upper limit for all other memory; memory before, and after each update."""
    import resource  # not on every system

    resource.setrlimit(resource.RLIMIT_DATA, (int(limit_gb * 2**30),) * 2)
    th.set_num_threads(1)
    images = np.load(path, mmap_mode="r")
    agent = Off2OnSAC(
        "CnnPolicy",
        SyntheticEnv(spaces.Box(0, 255, IMAGE_SHAPE, np.uint8)),
        buffer_size=1,
        dataset={"observations": images, **synthetic_columns(len(images))},
        policy_kwargs={"ensemble_size": IMAGE_ENSEMBLE_SIZE, "net_arch": NET_ARCH},
        seed=0,
        device="cpu",
    )
    agent.set_logger(Logger(None, []))
    points = [memory()]
    for _ in range(updates):
        agent.train_offline(1, IMAGE_BATCH_SIZE)
        points.append(memory())
    return points


def larger_than_memory(options: argparse.Namespace) -> list[Row]:
    """An ensemble of CNNs learns from a memory-mapped file, in a process that may not allocate as much."""
    if platform.system() != "Linux":
        return [row("larger than memory", note="skipped: the limit is one of Linux")]
    with TemporaryDirectory() as folder:
        path, n = Path(folder) / "observations.npy", int(options.image_gb * 2**30 / np.prod(IMAGE_SHAPE))
        images = np.lib.format.open_memmap(path, "w+", np.uint8, (n, *IMAGE_SHAPE))
        for start in tqdm(range(0, n, 1024), "writing images", leave=False, disable=None):
            images[start : start + 1024] = np.random.default_rng(start).integers(0, 256, IMAGE_SHAPE, np.uint8)
        del images
        points = in_fresh_process(train_on_images, path, options.limit_gb, options.image_updates)
    rows = [row("size of the dataset / memory limit", [options.image_gb / options.limit_gb], note=f"{n} images")]
    shown = [0, 1, *(quarter * options.image_updates // 4 for quarter in (1, 2, 3, 4))]
    for what, name in (("anonymous memory", "RssAnon"), ("resident pages of files", "RssFile")):
        values = [point[name] for point in points]
        note = ", ".join(f"{values[update]:.0f}" for update in shown) + f" after {', '.join(map(str, shown))} updates"
        rows.append(row(f"{what}, after each update", values[1:], "MiB", "flat" if name == "RssAnon" else "", note))
    return rows


def compilation(options: argparse.Namespace) -> list[Row]:
    """Updates with and without ``th.compile``."""
    dataset = synthetic_dataset()
    start = time.perf_counter()
    try:
        compiled = make_agent(dataset=dataset, policy_kwargs={"compile_mode": COMPILE_MODE})
        compiled.train_offline(1, BATCH_SIZE)
        compiled.learn(N_ONLINE)
    except (TypeError, ValueError, RuntimeError) as error:  # no such argument, or no compiler
        return [row("compiled updates", note=f"skipped: {type(error).__name__}: {error}".splitlines()[0])]
    rows = [row("first offline and online update, compiled", [time.perf_counter() - start], "s")]
    plain = make_agent(dataset=dataset)
    plain.learn(N_ONLINE)
    for phase, name in (("offline", "train_offline"), ("online", "train")):
        tasks: Tasks = {
            kind: partial(getattr(agent, name), 1, BATCH_SIZE) for kind, agent in (("plain", plain), ("compiled", compiled))
        }
        seconds = take_turns(f"compilation, {phase}", options.rounds, tasks)
        rows.append(row(f"plain / compiled, {phase}", seconds["plain"] / seconds["compiled"]))
    return rows


SECTIONS = {
    section.__name__: section
    for section in (online, offline, arithmetic, sum_tree, predict, loading, larger_than_memory, compilation)
}


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    versions = {"python": platform.python_version(), "sb3_off2on": __version__}
    for package in ("torch", "numpy", "stable_baselines3", "gymnasium", "minari", "d3rlpy"):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    models = [line.split(": ")[1] for line in proc("cpuinfo").splitlines() if line.startswith("model name")]
    cpu = f"{os.cpu_count()} x {models[0] if models else platform.processor()}, {th.backends.cpu.get_cpu_capability()}"
    return {"cpu": cpu, "versions": versions, "load average before": proc("loadavg").strip()}


def print_table(results: dict[str, list[Row]]) -> None:
    """All results, as a table in Markdown."""
    lines = [["section", "what", "aim", "median (quartiles)", "note"]]
    for section, rows in results.items():
        for x in rows:
            low, median, high = (f"{quartile:.3g}" for quartile in x["quartiles"] or [np.nan] * 3)
            measured = f"{median} {x['unit']} ({low} to {high})" if x["quartiles"] else "-"
            lines.append([section, x["what"], x["aim"], measured, x["note"]])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--rounds", type=int, help="15, or 3 if --quick")
    parser.add_argument("--quick", action="store_true", help="few rounds and little data: to see that everything runs")
    parser.add_argument("--peers", type=Path, help="folder with checkouts of tinkoff-ai/CORL and shlee94/Off2OnRL")
    parser.add_argument("--dataset", help="Minari id whose episodes the loading section repeats, instead of random ones")
    parser.add_argument("--transitions", type=int, help="to load; 1,000,000, or 20,000 if --quick")
    parser.add_argument("--image-gb", type=float, help="size of the image dataset, a temporary file; 4, or 0.1 if --quick")
    parser.add_argument("--image-updates", type=int, help="updates on the image dataset; 40, or 8 if --quick")
    parser.add_argument("--limit-gb", type=float, default=1.0, help="memory that training on the images may allocate")
    parser.add_argument("--out", type=Path, default=Path("logs/benchmark.json"))
    options = parser.parse_args(arguments)
    sizes = {"rounds": (15, 3), "transitions": (1_000_000, 20_000), "image_gb": (4.0, 0.1), "image_updates": (40, 8)}
    for name, (full, quick) in sizes.items():
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else full)
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    th.set_num_threads(1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[Row]] = {}
    record = {"machine": machine(), "options": vars(options), "results": results}
    for name in tqdm(options.sections, "sections", disable=None):
        results[name] = SECTIONS[name](options)
        # Already here, so that nothing is lost where a later section fails
        options.out.write_text(json.dumps(record, indent=1, default=str))
    for name, value in record["machine"].items():
        print(f"{name}: {value}")
    print_table(results)


if __name__ == "__main__":
    main()
