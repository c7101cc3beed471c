"""
Does CQL's sampled gradient cost quality? Independent agents, trained once with it and once with the gradient at all sampled
actions, and the difference of their returns with its 95% interval. What is finished is not run again.

    python examples/sampled_gradient.py mujoco/halfcheetah/medium-v0 --offline-steps 40000 --offline-batch-size 64

The agents of one form are the members of one ensemble: nothing connects them offline but the process they run in.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from scipy import stats
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_off2on import Off2OnSAC, OfflineDataset, load_dataset

FORMS = {"sampled": True, "full": False}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", nargs="+", help="Minari id(s) or path(s); several are joined")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--n-seeds", type=int, default=3, help="independent agents of each form")
    parser.add_argument("--offline-steps", type=int, default=40_000)
    parser.add_argument("--offline-batch-size", type=int, default=256)
    parser.add_argument("--cql-n-actions", type=int, default=10)
    parser.add_argument("--n-evaluations", type=int, default=5, help="over the last quarter of the updates; averaged")
    parser.add_argument("--eval-episodes", type=int, default=10, help="each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("logs/sampled_gradient"))
    return parser.parse_args()


def member_returns(model: Off2OnSAC, dataset: OfflineDataset, arguments: argparse.Namespace) -> list[float]:
    """Mean return of each member's own deterministic policy."""
    env = Monitor(dataset.make_env())
    agent = Off2OnSAC("MlpPolicy", env, policy_kwargs={"ensemble_size": 1})
    returns = []
    for index in range(arguments.n_seeds):
        agent.set_member(0, model.get_member(index))
        env.reset(seed=arguments.seed + 1000)
        returns.append(float(np.mean(evaluate_policy(agent, env, arguments.eval_episodes)[0])))
    return returns


def train(dataset: OfflineDataset, arguments: argparse.Namespace, form: str) -> dict[str, Any]:
    evaluations: list[list[float]] = []
    freq = max(arguments.offline_steps // (4 * arguments.n_evaluations), 1)
    first = arguments.offline_steps - freq * arguments.n_evaluations

    def evaluate(locals_: dict[str, Any], globals_: dict[str, Any]) -> bool:
        model = locals_["self"]
        if model.num_timesteps > first and (arguments.offline_steps - model.num_timesteps) % freq == 0:
            evaluations.append(member_returns(model, dataset, arguments))
            print(f"{form} {model.num_timesteps}: {np.round(evaluations[-1])}", flush=True)
        return True

    start = time.process_time()
    Off2OnSAC.pretrain_offline(
        dataset,
        offline_gradient_steps=arguments.offline_steps,
        offline_batch_size=arguments.offline_batch_size,
        cql_n_actions=arguments.cql_n_actions,
        cql_sampled_gradient=FORMS[form],
        policy_kwargs={"ensemble_size": arguments.n_seeds},
        seed=arguments.seed,
        callback=evaluate,
        log_interval=None,
    )
    return {"returns": np.mean(evaluations, axis=0).tolist(), "evaluations": evaluations, "cpu_s": time.process_time() - start}


def main() -> None:
    arguments = parse_arguments()
    th.set_num_threads(arguments.threads)
    dataset = load_dataset(arguments.dataset)
    print(dataset)
    arguments.out.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in vars(arguments).items() if name not in ("forms", "out", "threads")}
    returns = {}
    for form in arguments.forms:
        path = arguments.out / f"{form}.json"
        if not path.exists():
            path.write_text(json.dumps({**train(dataset, arguments, form), "settings": settings}, indent=1))
        result = json.loads(path.read_text())
        if result["settings"] != settings:
            raise SystemExit(f"{path} was made with {result['settings']}, not {settings}: choose another --out")
        returns[form] = np.array(result["returns"])

    behaviour = dataset.episode_returns
    behaviour_error = stats.sem(behaviour)
    print(f"behaviour: {behaviour.mean():.0f} +- {behaviour_error:.0f} (standard error)")
    for form, values in returns.items():
        excess = (values.mean() - behaviour.mean()) / np.hypot(stats.sem(values), behaviour_error)
        print(f"{form}: {values.mean():.0f} +- {stats.sem(values):.0f}, {excess:.1f} standard errors above behaviour")
    if len(returns) == len(FORMS):
        test = stats.ttest_ind(returns["sampled"], returns["full"], equal_var=False)
        low, high = test.confidence_interval()
        difference = returns["sampled"].mean() - returns["full"].mean()
        print(f"sampled - full: {difference:.0f}, 95% interval {low:.0f} to {high:.0f} (Welch)")


if __name__ == "__main__":
    main()
