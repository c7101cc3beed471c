"""
Offline to online in a few minutes on a laptop: pretrain an ensemble on the dataset that ships with the package, fine-tune it
online with balanced replay and, from the same offline agents, with online samples only; print and plot what happened.

    python examples/quickstart.py
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from importlib.resources import files
from multiprocessing import get_context
from pathlib import Path

import matplotlib
import numpy as np
import torch as th
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_off2on import Off2OnSAC, OfflineDataset, load_dataset

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DATASET = str(files("sb3_off2on") / "data" / "inverted_double_pendulum_replay.npz")
SCHEMES = {"balanced": "balanced replay (ours)", "online": "online only"}


def pretrain(dataset: OfflineDataset, gradient_steps: int, learning_starts: int, seed: int) -> Off2OnSAC:
    """Three CQL agents, smaller and with fewer sampled actions than the defaults, as the task is small."""
    return Off2OnSAC.pretrain_offline(
        dataset,
        offline_gradient_steps=gradient_steps,
        progress_bar=True,
        policy_kwargs={"ensemble_size": 3, "net_arch": [64, 64]},
        offline_learning_rate=1e-3,
        offline_qf_learning_rate=1e-3,
        offline_batch_size=64,
        cql_n_actions=4,
        learning_rate=1e-3,
        learning_starts=learning_starts,
        train_freq=100,
        batch_size=128,
        seed=seed,
    )


def fine_tune(path: Path, scheme: str, timesteps: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Load the offline agents, fine-tune them online; return online steps and evaluation returns, the offline one first."""
    th.set_num_threads(1)  # the networks are too small for more
    dataset = load_dataset(DATASET)
    model = Off2OnSAC.load(path, env=Monitor(dataset.make_env()), replay_buffer_kwargs={"scheme": scheme})
    model.set_dataset(dataset)
    model.set_random_seed(seed)
    eval_env = Monitor(dataset.make_env())
    eval_env.reset(seed=seed + 1000)
    offline_return, _ = evaluate_policy(model, eval_env, n_eval_episodes=10)
    callback = EvalCallback(eval_env, eval_freq=250, n_eval_episodes=3, verbose=0, log_path=str(path.parent / scheme))
    offline_steps = model.num_timesteps
    # Two runs at once, one bar: that of the slower
    model.learn(timesteps, callback=callback, progress_bar=scheme == "balanced")
    steps = np.array([0, *(timestep - offline_steps for timestep in callback.evaluations_timesteps)])
    return steps, np.array([offline_return, *np.mean(callback.evaluations_results, axis=1)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--offline-steps", type=int, default=4_000, help="gradient steps of the offline phase")
    parser.add_argument("--online-steps", type=int, default=2_000, help="environment steps of the online phase")
    parser.add_argument("--learning-starts", type=int, default=300, help="online steps before the first update")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("logs/quickstart"), help="folder for the model, logs and the plot")
    arguments = parser.parse_args()
    th.set_num_threads(1)

    dataset = load_dataset(DATASET)
    print(dataset)
    behaviour = dataset.episode_returns.mean()

    print(f"\nOffline phase: {arguments.offline_steps} updates of 3 CQL agents")
    model = pretrain(dataset, arguments.offline_steps, arguments.learning_starts, arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "offline.zip"
    model.save(path)

    figure, axes = plt.subplots(figsize=(7, 4.2))
    print(f"\nOnline phase: {arguments.online_steps} environment steps\n")
    with ProcessPoolExecutor(len(SCHEMES), get_context("spawn")) as pool:
        runs = {scheme: pool.submit(fine_tune, path, scheme, arguments.online_steps, arguments.seed) for scheme in SCHEMES}
    rows = []
    for scheme, label in SCHEMES.items():
        steps, returns = runs[scheme].result()
        rows.append((label, behaviour, returns[0], returns.min(), returns[-3:].mean()))
        axes.plot(steps, returns, marker=".", label=label)
    axes.axhline(behaviour, color="grey", linestyle="--", label="behaviour (mean of the dataset)")
    axes.axvline(arguments.learning_starts, color="grey", linewidth=0.8, linestyle=":", label="first online update")
    axes.set(
        xlabel="environment steps after the hand-over",
        ylabel="return",
        title=f"InvertedDoublePendulum-v5, seed {arguments.seed}",
    )
    axes.legend()
    figure.tight_layout()
    figure.savefig(arguments.out / "learning_curve.png", dpi=150)

    print(f"\n{'replay':<24}{'behaviour':>10}{'offline':>10}{'worst':>10}{'final':>10}")
    for label, *figures in rows:
        print(f"{label:<24}" + "".join(f"{value:10.0f}" for value in figures))
    print("\nworst: lowest evaluation; final: mean of the last three. One seed, so no verdict.")
    print(f"Plot: {arguments.out}/learning_curve.png")


if __name__ == "__main__":
    main()
