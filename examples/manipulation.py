"""
Section E.2 on one of the manipulation tasks: N offline agents, fine-tuned as one ensemble or only the first of them, with
balanced replay or with online samples only. Writes a table of each run, and a plot with the share of random data (Fig. 5b).

    python examples/manipulation.py pick-place --seeds 0 1 2

What is there already is not done again: several processes can share the work by --seeds and --rows, and the last one plots.
"""

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import matplotlib
import minari  # type: ignore[import-untyped]
import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from sb3_off2on import Off2OnSAC, OfflineDataset, load_dataset
from sb3_off2on.callbacks import OfflineShareCallback
from sb3_off2on.envs import TASKS, env_id
from sb3_off2on.envs.make_dataset import make_dataset, random_rows
from sb3_off2on.images import StridedCNN

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Whether with the ensemble, the scheme of the replay, and the name in the plot
ROWS = {
    "ensemble-balanced": (True, "balanced", "ensemble, balanced replay (ours)"),
    "ensemble-online": (True, "online", "ensemble, online only"),
    "sac-balanced": (False, "balanced", "one agent, balanced replay"),
    "sac-online": (False, "online", "one agent, online only"),
}
FIELDS = ("step", "success", "success_sampling", "return", "random_share")
N_EVAL_ENVS = 10
# Why they are as they are: docs/envs.md. Those for states are in hyperparams/off2on_sac.yml, too
COMMON: dict[str, Any] = {
    "gamma": 0.95,
    "tau": 0.02,
    "offline_ent_coef": "auto_0.05",
    "offline_learning_rate": LinearSchedule(1e-3, 0.0, 1.0),
    "offline_qf_learning_rate": LinearSchedule(1e-3, 0.0, 1.0),
    "calql": True,
    "cql_alpha": 1.0,
    "cql_n_actions": 4,
    "ent_coef": 0.01,
    "learning_rate": 5e-5,
    "qf_learning_rate": 3e-4,
    "learning_starts": 400,
    "train_freq": 40,
    "first_update_multiplier": 1,
    "initial_online_fraction": 0.5,
    "buffer_size": 100_000,
    "priority_temperature": 2.5,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "state": {
        **COMMON,
        "policy": "MlpPolicy",
        "offline_gradient_steps": 12_000,
        "offline_bc_steps": 6_000,
        "offline_batch_size": 128,
        "batch_size": 128,
        "policy_kwargs": {"net_arch": [128, 128], "critic_layer_norm": True},
        "density_ratio_kwargs": {"net_arch": [64, 64]},
    },
    "image": {
        **COMMON,
        "policy": "CnnPolicy",
        "offline_gradient_steps": 16_000,
        "offline_bc_steps": 16_000,
        "offline_batch_size": 64,
        "learning_rate": 1e-5,
        "qf_learning_rate": 1e-4,
        "cql_alpha_online": 1.0,
        "batch_size": 64,
        "policy_kwargs": {"net_arch": [256, 256], "critic_layer_norm": True, "features_extractor_class": StridedCNN},
        "density_ratio_kwargs": {"net_arch": [64, 64]},
        "replay_buffer_kwargs": {"random_shift": 2},
    },
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--observation", choices=SETTINGS, default="state", help="default: state")
    parser.add_argument("--n-scripted", type=int, default=20_000, help="scripted steps of the dataset (the paper: 100,000)")
    parser.add_argument("--n-random", type=int, default=1_000, help="random steps of the dataset (the paper: 100,000)")
    parser.add_argument("--ensemble-size", type=int, default=4)
    parser.add_argument("--offline-steps", type=int, help="updates of the offline phase (default: as set above)")
    parser.add_argument("--online-episodes", type=int, default=200, help="episodes of fine-tuning (the paper: 1000)")
    parser.add_argument("--eval-freq", type=int, default=1_000, help="environment steps between two evaluations")
    parser.add_argument("--eval-episodes", type=int, default=40)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("logs/manipulation"), help="folder for models, tables and the plot")
    return parser.parse_args()


def get_dataset(arguments: argparse.Namespace) -> tuple[OfflineDataset, np.ndarray]:
    """The dataset, made if it is not there, and which of its rows are random."""
    sizes = f"{arguments.n_scripted}-{arguments.n_random}"
    dataset_id = f"off2on/{arguments.task}/{arguments.observation}-{sizes}-v0"
    if dataset_id not in minari.list_local_datasets():
        make_dataset(
            arguments.task,
            arguments.n_scripted,
            arguments.n_random,
            observation=arguments.observation,
            dataset_id=dataset_id,
            progress_bar=True,
        )
    return load_dataset(dataset_id), random_rows(dataset_id)


def make_env(arguments: argparse.Namespace, statistics: Path | None = None, n_envs: int = 1) -> VecEnv:
    """
    The task. States, whose parts differ in scale by a factor of 30, are normalized: by the dataset's statistics, which stay as
    the offline phase had them.
    """
    env = DummyVecEnv([lambda: Monitor(gym.make(env_id(arguments.task, arguments.observation)))] * n_envs)
    if arguments.observation != "state":
        return env
    if statistics is None:
        return VecNormalize(env, norm_reward=False)
    normalized = VecNormalize.load(str(statistics), env)
    normalized.training = False
    return normalized


def pretrain(dataset: OfflineDataset, arguments: argparse.Namespace, path: Path, seed: int) -> None:
    """Train N offline agents, and save them."""
    env = make_env(arguments)
    model = Off2OnSAC(env=env, dataset=dataset, seed=seed, verbose=1, **settings_of(arguments, arguments.ensemble_size))
    if isinstance(env, VecNormalize):  # which the dataset has filled
        env.save(str(path.with_suffix(".pkl")))
    n_updates = arguments.offline_steps or SETTINGS[arguments.observation]["offline_gradient_steps"]
    model.learn_offline(gradient_steps=n_updates, log_interval=max(n_updates // 10, 1))
    model.save(path)


def settings_of(arguments: argparse.Namespace, ensemble_size: int, **changes: Any) -> dict[str, Any]:
    """Arguments of the model."""
    settings = SETTINGS[arguments.observation]
    return {**settings, "policy_kwargs": {**settings["policy_kwargs"], "ensemble_size": ensemble_size}, **changes}


def fine_tune(
    dataset: OfflineDataset, is_random: np.ndarray, arguments: argparse.Namespace, path: Path, row: str, seed: int
) -> list[dict[str, float]]:
    """Fine-tune offline agents as one of the rows, and return what every evaluation found, the first before fine-tuning."""
    with_ensemble, scheme, _ = ROWS[row]
    statistics = path.with_suffix(".pkl")
    model = Off2OnSAC(
        env=make_env(arguments, statistics),
        dataset=dataset,
        seed=seed,
        **settings_of(
            arguments,
            arguments.ensemble_size if with_ensemble else 1,
            offline_gradient_steps=0,
            replay_buffer_kwargs={**SETTINGS[arguments.observation].get("replay_buffer_kwargs", {}), "scheme": scheme},
        ),
    )
    offline = Off2OnSAC.load(path)
    for index in range(model.policy.ensemble_size):
        model.set_member(index, offline.get_member(index))

    share = OfflineShareCallback(is_random, "random")
    eval_env = make_env(arguments, statistics, N_EVAL_ENVS)
    evaluation = Evaluation(share, eval_env, arguments.eval_freq, arguments.eval_episodes, seed)
    max_steps = TASKS[arguments.task][3]
    model.learn(arguments.online_episodes * max_steps, callback=[share, evaluation])
    return evaluation.table


class Evaluation(BaseCallback):
    """
    Play some episodes before training and every ``eval_freq`` steps, from the same starts each time: with the mean action, and
    with sampled ones.

    :param share: tells the share of random data
    :param env: to play in
    :param eval_freq: environment steps between two evaluations
    :param n_episodes: of each evaluation, in both ways
    :param seed: of the starts
    """

    def __init__(self, share: OfflineShareCallback, env: VecEnv, eval_freq: int, n_episodes: int, seed: int) -> None:
        super().__init__()
        self.share, self.env, self.eval_freq, self.n_episodes, self.seed = share, env, eval_freq, n_episodes, seed
        self.table: list[dict[str, float]] = []

    def _on_training_start(self) -> None:
        self._evaluate(0)

    def _on_step(self) -> bool:
        if self.n_calls % self.eval_freq == 0:
            self._evaluate(self.n_calls)
        return True

    def _evaluate(self, step: int) -> None:
        success, mean_return = self._play(deterministic=True)
        success_sampling, _ = self._play(deterministic=False)
        figures = (step, success, success_sampling, mean_return, self.share.share())
        self.table.append(dict(zip(FIELDS, figures, strict=True)))
        print("  " + "  ".join(f"{name} {value:.2f}" for name, value in self.table[-1].items()), flush=True)

    def _play(self, deterministic: bool) -> tuple[float, float]:
        """:return: success rate and mean return"""
        successes: list[bool] = []

        def look(local_variables: dict[str, Any], _: dict[str, Any]) -> None:
            if local_variables["done"]:
                successes.append(local_variables["info"]["is_success"])

        self.env.seed(self.seed + 1000)
        mean_return, _ = evaluate_policy(self.model, self.env, self.n_episodes, deterministic=deterministic, callback=look)
        return float(np.mean(successes)), float(mean_return)  # type: ignore[arg-type]


def plot(arguments: argparse.Namespace, tables: dict[str, list[list[dict[str, float]]]], path: Path) -> None:
    """Success rates and, where balanced replay chooses, shares of random data: every seed's line, and their mean."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5))
    for row, seeds in tables.items():
        color = f"C{list(ROWS).index(row)}"
        n_evaluations = min(len(table) for table in seeds)
        steps = [entry["step"] for entry in seeds[0][:n_evaluations]]
        for axis, name in zip(axes, ("success", "success_sampling", "random_share"), strict=True):
            if name == "random_share" and ROWS[row][1] != "balanced":
                continue
            values = np.array([[entry[name] for entry in table[:n_evaluations]] for table in seeds])
            axis.plot(steps, values.T, color=color, alpha=0.35, linewidth=0.8)
            axis.plot(steps, values.mean(axis=0), marker=".", color=color, label=ROWS[row][2])
    axes[0].set(ylabel="success rate", ylim=(-0.02, 1.02))
    axes[1].set(ylabel="success rate with sampled actions", ylim=(-0.02, 1.02))
    axes[2].set(ylabel="share of random data in the updates")
    axes[2].set_ylim(bottom=0)
    for axis in axes:
        axis.set_xlabel("environment steps")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=len(tables))
    n_seeds = max(len(seeds) for seeds in tables.values())
    figure.suptitle(f"{env_id(arguments.task, arguments.observation)}, {n_seeds} seed(s)")
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def check_settings(arguments: argparse.Namespace, path: Path) -> None:
    """Runs of other settings are not mixed with those in the folder."""
    elsewhere = ("rows", "seeds", "threads", "out")
    settings = {name: value for name, value in vars(arguments).items() if name not in elsewhere}
    if not path.exists():
        path.write_text(json.dumps(settings, indent=1))
    elif settings != (done := json.loads(path.read_text())):
        raise SystemExit(f"The runs in {path.parent} are those of {done}, not {settings}: choose another --out")


def read(path: Path) -> list[dict[str, float]]:
    with path.open() as file:
        return [{name: float(value) for name, value in entry.items()} for entry in csv.DictReader(file)]


def write(path: Path, table: list[dict[str, float]]) -> None:
    unfinished = path.with_suffix(".part")
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(table)
    unfinished.rename(path)


def main() -> None:
    arguments = parse_arguments()
    th.set_num_threads(arguments.threads)
    folder = arguments.out / arguments.task / arguments.observation
    folder.mkdir(parents=True, exist_ok=True)
    check_settings(arguments, folder / "settings.json")
    dataset, is_random = get_dataset(arguments)
    print(dataset)
    for seed in arguments.seeds:
        path = folder / f"offline_{seed}.zip"
        if not path.exists():
            print(f"Seed {seed}: offline phase")
            pretrain(dataset, arguments, path, seed)
        for row in arguments.rows:
            table_path = folder / f"{row}_{seed}.csv"
            if not table_path.exists():
                print(f"Seed {seed}: {ROWS[row][2]}")
                write(table_path, fine_tune(dataset, is_random, arguments, path, row, seed))

    tables = {row: [read(path) for path in sorted(folder.glob(f"{row}_*.csv"))] for row in ROWS}
    tables = {row: seeds for row, seeds in tables.items() if seeds}
    for field in ("success", "success_sampling"):
        print(f"\n{field:<36}{'seeds':>6}{'offline':>10}{'worst':>10}{'final':>10}")
        for row, seeds in tables.items():
            rates = [[entry[field] for entry in table] for table in seeds]
            figures = np.array([(x[0], min(x), np.mean(x[-3:])) for x in rates]).mean(axis=0)
            print(f"{ROWS[row][2]:<36}{len(seeds):6}" + "".join(f"{figure:10.2f}" for figure in figures))
    plot(arguments, tables, folder / "success.png")
    print("\nworst: lowest evaluation; final: mean of the last three; all as means over the seeds.")
    print(f"Plot: {folder}/success.png")


if __name__ == "__main__":
    main()
