"""
Pretrain on a dataset, fine-tune online, and report what happened at the hand-over.

    python examples/offline_to_online.py mujoco/halfcheetah/medium-v0 --ensemble-size 5
"""

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_off2on import Off2OnSAC, OfflineDataset, load_dataset


def learned_ent_coef(text: str) -> str:
    """It must be learned online, as it is offline."""
    if not re.fullmatch(r"auto(_(?=.*[1-9])\d*\.?\d+)?", text):
        raise argparse.ArgumentTypeError(f"must be auto, or auto_ and a number above 0, got {text!r}")
    return text


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", nargs="+", help="Minari id(s) or path(s); several are joined")
    parser.add_argument("--ensemble-size", type=int, default=5)
    parser.add_argument("--offline-steps", type=int, default=1_000_000)
    parser.add_argument("--offline-batch-size", type=int, default=256)
    parser.add_argument("--cql-n-actions", type=int, default=10)
    parser.add_argument("--online-steps", type=int, default=250_000)
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="of the actor, online")
    parser.add_argument("--qf-learning-rate", type=float, default=3e-4, help="of the critics, online")
    parser.add_argument("--ent-coef", type=learned_ent_coef, default="auto", help="online: auto, or auto_0.1 to start at 0.1")
    parser.add_argument("--rho", type=float, default=0.75, help="share of online samples in the first update")
    parser.add_argument("--schemes", nargs="+", default=["balanced"], help="replay schemes, each from the same offline agents")
    parser.add_argument("--eval-freq", type=int, default=1000, help="online steps between two evaluations")
    parser.add_argument("--eval-episodes", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--out", type=Path, default=Path("logs/offline_to_online"), help="folder for the model and the results"
    )
    return parser.parse_args()


def make_env(dataset: OfflineDataset) -> gym.Env:
    return Monitor(dataset.make_env())


def pretrain(dataset: OfflineDataset, arguments: argparse.Namespace, path: Path) -> float:
    """Train the ensemble offline and save it, unless that was done before; return the seconds it took."""
    names = ("dataset", "ensemble_size", "offline_steps", "offline_batch_size", "cql_n_actions", "seed")
    settings = {name: getattr(arguments, name) for name in names}
    record = path.with_suffix(".json")
    if path.exists():
        done = json.loads(record.read_text())
        if done["settings"] != settings:
            raise SystemExit(f"{path} was trained with {done['settings']}, not {settings}: choose another --out")
        return done["seconds"]
    start = time.time()
    model = Off2OnSAC.pretrain_offline(
        dataset,
        offline_gradient_steps=arguments.offline_steps,
        offline_batch_size=arguments.offline_batch_size,
        cql_n_actions=arguments.cql_n_actions,
        policy_kwargs={"ensemble_size": arguments.ensemble_size},
        seed=arguments.seed,
        verbose=1,
        log_interval=max(arguments.offline_steps // 20, 1),
    )
    model.save(path)
    seconds = time.time() - start
    record.write_text(json.dumps({"settings": settings, "seconds": seconds}))
    return seconds


def fine_tune(dataset: OfflineDataset, arguments: argparse.Namespace, path: Path, scheme: str) -> dict[str, Any]:
    """Fine-tune the saved ensemble with one replay scheme; return its learning curve."""
    model = Off2OnSAC.load(
        path,
        env=make_env(dataset),
        learning_rate=arguments.learning_rate,
        qf_learning_rate=arguments.qf_learning_rate,
        ent_coef=arguments.ent_coef,
        initial_online_fraction=arguments.rho,
        replay_buffer_kwargs={"scheme": scheme},
    )
    model.set_dataset(dataset)
    model.set_random_seed(arguments.seed)
    eval_env = make_env(dataset)
    eval_env.reset(seed=arguments.seed + 1000)
    offline_return, _ = evaluate_policy(model, eval_env, arguments.eval_episodes)
    out = path.parent / scheme
    evaluation = EvalCallback(
        eval_env, eval_freq=arguments.eval_freq, n_eval_episodes=arguments.eval_episodes, log_path=str(out), verbose=0
    )
    start, offline_steps = time.time(), model.num_timesteps
    model.learn(arguments.online_steps, callback=evaluation)
    steps = np.array(evaluation.evaluations_timesteps) - offline_steps
    returns = np.mean(evaluation.evaluations_results, axis=1)
    return {
        "scheme": scheme,
        "offline": offline_return,
        "worst_first_5k": min([offline_return, *returns[steps <= 5000]]),
        "final": returns[-3:].mean(),
        "steps": steps.tolist(),
        "returns": returns.tolist(),
        "online_seconds": time.time() - start,
    }


def main() -> None:
    arguments = parse_arguments()
    th.set_num_threads(arguments.threads)
    dataset = load_dataset(arguments.dataset)
    print(dataset)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "offline.zip"
    offline_seconds = pretrain(dataset, arguments, path)
    print(f"offline phase: {offline_seconds:.0f} s")
    print(f"{'scheme':>10} {'behaviour':>10} {'offline':>10} {'worst 5K':>10} {'final':>10} {'online s':>10}")
    for scheme in arguments.schemes:
        result = fine_tune(dataset, arguments, path, scheme)
        figures = [dataset.episode_returns.mean(), *(result[key] for key in ("offline", "worst_first_5k", "final"))]
        print(f"{scheme:>10} " + " ".join(f"{figure:10.0f}" for figure in [*figures, result["online_seconds"]]), flush=True)
        result.update(vars(arguments), out=str(arguments.out), behaviour=figures[0], offline_seconds=offline_seconds)
        (arguments.out / f"{scheme}.json").write_text(json.dumps(result, indent=1, default=str))


if __name__ == "__main__":
    main()
