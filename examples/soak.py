"""
Train for as long as one likes and watch what must not grow: both phases by turns, a small ring that wraps many times, workers
of which one is killed now and then, evaluations, logs, and models that are saved and loaded. Fails if memory, descriptors or
the rounding of the sum-tree drift. Linux only.

    python examples/soak.py --minutes 60
"""

import argparse
import gc
import math
import os
import signal
import tempfile
import time
from importlib.resources import files
from pathlib import Path

import torch as th
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

from sb3_off2on import Off2OnSAC, OfflineDataset, load_dataset

DATASET = str(files("sb3_off2on") / "data" / "inverted_double_pendulum_replay.npz")
BUFFER_SIZE = 1000
MAX_MEMORY_GROWTH = 0.05
MAX_TREE_ERROR = 1e-9


def resident_megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


class Watch(BaseCallback):
    """
    Prints a line a minute, kills a worker every ten minutes, and stops the training when time is up.

    :param minutes: how long to train
    """

    def __init__(self, minutes: float):
        super().__init__()
        self.minutes = minutes
        self.start = time.monotonic()
        self.warm_up = min(10.0, minutes / 2)  # when memory and descriptors must have reached their size
        self.next_line = 0.0
        self.n_updates = self.n_rows = self.n_rounds = self.n_killed = 0
        self.tree_error = 0.0
        self.next_kill = self.warm_up / 2

    @property
    def elapsed(self) -> float:
        """:return: minutes since the start"""
        return (time.monotonic() - self.start) / 60

    def check(self) -> None:
        """Compare the sum-tree with its leaves and print where everything stands."""
        assert isinstance(self.model, Off2OnSAC)
        tree = self.model.replay_buffer._tree
        self.tree_error = max(self.tree_error, abs(tree.total / math.fsum(tree.leaves) - 1))
        print(
            f"{self.elapsed:6.1f} min {resident_megabytes():8.1f} MB {open_descriptors():4d} descriptors  "
            f"tree {self.tree_error:.1e}  "
            f"{self.n_updates} updates, {self.n_rows} rows, {self.n_rounds} models loaded, {self.n_killed} workers killed",
            flush=True,
        )

    def _on_step(self) -> bool:
        if "gradient_steps" in self.locals:  # the offline phase
            self.n_updates += self.locals["n_updates"]
        else:
            self.n_rows += self.model.n_envs
        if self.elapsed >= min(self.next_line, self.minutes):
            self.next_line += 1
            self.check()
        if self.elapsed >= self.minutes:
            return False
        if self.elapsed >= self.next_kill and "gradient_steps" not in self.locals:
            self.next_kill += self.warm_up
            assert isinstance(self.training_env, SubprocVecEnv)
            os.kill(self.training_env.processes[-1].pid or 0, signal.SIGKILL)
        return True


def make_workers(dataset: OfflineDataset, seed: int) -> VecEnv:
    assert dataset.env_spec is not None
    return make_vec_env(dataset.env_spec.id, n_envs=2, seed=seed, vec_env_cls=SubprocVecEnv)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    th.set_num_threads(1)

    dataset = load_dataset(DATASET)
    env = make_workers(dataset, arguments.seed)
    eval_env = make_vec_env(dataset.make_env, seed=arguments.seed + 100)
    watch = Watch(arguments.minutes)
    sizes: list[tuple[float, float, int]] = []  # minutes, megabytes, descriptors between two rounds
    model = Off2OnSAC(
        "MlpPolicy",
        env,
        dataset=dataset,
        policy_kwargs={"ensemble_size": 2, "net_arch": [32, 32]},
        density_ratio_kwargs={"net_arch": [32]},
        buffer_size=BUFFER_SIZE,
        learning_starts=100,
        first_update_multiplier=1,
        train_freq=10,
        batch_size=64,
        offline_batch_size=64,
        cql_n_actions=4,
        seed=arguments.seed,
    )

    with tempfile.TemporaryDirectory() as folder:
        logger = configure(folder, ["csv"])
        model_path, replay_path = f"{folder}/model.zip", f"{folder}/replay.pkl"
        while watch.elapsed < watch.minutes or not sizes:
            n_killed = watch.n_killed
            model.set_logger(logger)
            evaluation = EvalCallback(eval_env, eval_freq=100, n_eval_episodes=2, verbose=0)
            try:
                model.learn_offline(gradient_steps=50, callback=watch)
                model.learn(400, [watch, evaluation], reset_num_timesteps=False)
                watch.n_updates += model._n_updates
            except RuntimeError as error:
                print(f"{watch.elapsed:6.1f} min {error}", flush=True)
                watch.n_killed += 1
                env = make_workers(dataset, arguments.seed + watch.n_killed)
                model.set_env(env)
            model.save(model_path)
            model.save_replay_buffer(replay_path)
            model = Off2OnSAC.load(model_path, env=env, dataset=dataset)
            model.load_replay_buffer(replay_path)
            watch.n_rounds += 1
            # After a round with a death, the callbacks still hold its environments
            if watch.n_killed == n_killed:
                gc.collect()
                sizes.append((watch.elapsed, resident_megabytes(), open_descriptors()))
        watch.model = model
        watch.check()
        logger.close()
    env.close()
    eval_env.close()

    start, first_memory, first_descriptors = next((size for size in sizes if size[0] >= watch.warm_up), sizes[-1])
    _, memory, descriptors = sizes[-1]
    print(f"\nResident size {first_memory:.1f} MB at {start:.1f} minutes, {memory:.1f} MB at the end")
    print(f"Descriptors {first_descriptors} at {start:.1f} minutes, {descriptors} at the end")
    print(f"Sum-tree against the sum of its leaves: relative difference of at most {watch.tree_error:.1e}")
    if memory > (1 + MAX_MEMORY_GROWTH) * first_memory or descriptors > first_descriptors or watch.tree_error > MAX_TREE_ERROR:
        raise SystemExit("Something grows: see above")


if __name__ == "__main__":
    main()
