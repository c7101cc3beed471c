"""The paper's manipulation datasets, made from seeds: scripted attempts, half of them replaced by uniform random actions."""

import shutil
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import replace
from inspect import signature
from itertools import count, islice
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import minari  # type: ignore[import-untyped]
import numpy as np
from minari.data_collector import EpisodeBuffer  # type: ignore[import-untyped]
from minari.storage import get_dataset_path  # type: ignore[import-untyped]

from sb3_off2on.collection import check_new_id, write_episodes
from sb3_off2on.datasets import map_arrays
from sb3_off2on.envs import ID_SUFFIXES, TASKS, env_id

if TYPE_CHECKING:  # MuJoCo is imported only where episodes are run: the help of the command line must not need it
    from sb3_off2on.envs.scripts import Script

# Name in the dataset's id, and steps of the scripted and of the random half
PRESETS = {"paper": ("mixed", 100_000), "small": ("small", 4_000)}
_MAX_SCRIPTED_ACTION = 0.9  # as in COG: a policy squashed by tanh reaches 1 only with an infinite mean


def make_dataset(
    task: str,
    n_scripted: int | None = None,
    n_random: int | None = None,
    *,
    preset: str = "paper",
    seed: int = 0,
    noise: float = 0.1,
    observation: str = "image",
    image_size: int = 48,
    dataset_id: str | None = None,
    progress_bar: bool = False,
) -> minari.MinariDataset:
    """
    Run scripts and random actions and write a Minari dataset, which ``load_dataset`` loads by its id.

    It holds, in this order: ``n_scripted // 2`` steps of prior data (attempts at parts of the task and at other things, by
    turns; their rewards are zeroed), the rest of ``n_scripted`` as task data (attempts at the task's last part, from a start
    where the rest is done; with rewards), and ``n_random`` steps of uniform random actions from the task's own start. See
    ``scripts.PRIOR`` and ``scripts.TASK``. The last episode of each part is cut where the number of steps is reached.

    The Minari infos hold ``is_random``, see :func:`random_rows`. The same arguments give the same arrays, on the same platform
    and with the same versions of MuJoCo and, for images, of the graphics library. An interrupted run leaves nothing behind.

    :param task: ``"pick-place"``, ``"closed-drawer"`` or ``"blocked-drawer"``
    :param n_scripted: steps of the scripted half, by default those of the preset
    :param n_random: steps of the random half, by default those of the preset
    :param preset: ``"paper"`` (100,000 steps each) or ``"small"`` (4,000 each)
    :param seed: determines everything
    :param noise: standard deviation of the noise on scripted actions
    :param observation: ``"image"``, ``"dict"`` or ``"state"``
    :param image_size: height and width of images, pixels
    :param dataset_id: by default ``off2on/{task}/mixed-v0`` (``small-v0`` of the small preset), ``mixed-dict-v0`` or
        ``mixed-state-v0``
    :param progress_bar: show one
    :raises ValueError: if an argument is out of its range, or the dataset exists
    """
    gym_id = env_id(task, observation)
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}.")
    name, n_default = PRESETS[preset]
    n_scripted = n_default if n_scripted is None else n_scripted
    n_random = n_default if n_random is None else n_random
    if min(n_scripted, n_random) < 0 or n_scripted + n_random == 0:
        raise ValueError(f"n_scripted and n_random must not be negative, nor both be 0, got {n_scripted} and {n_random}.")
    if noise < 0:
        raise ValueError(f"noise must not be negative, got {noise}.")
    if dataset_id is None:
        dataset_id = f"off2on/{task}/{name}{ID_SUFFIXES[observation].lower()}-v0"
    check_new_id(dataset_id)
    env = gym.make(gym_id, image_size=image_size)
    description = f"{n_scripted} steps of scripts (noise {noise}) and {n_random} of uniform random actions, seed {seed}"
    try:
        return write_episodes(
            dataset_id,
            env,
            _episodes(env, task, n_scripted, n_random, seed, noise),
            n_scripted + n_random,
            progress_bar,
            algorithm_name="scripts and uniform random actions",
            description=description,
        )
    except BaseException:  # also Ctrl-C: what is there by now has not the composition that its name promises
        shutil.rmtree(get_dataset_path(dataset_id), ignore_errors=True)
        raise
    finally:
        env.close()


def _episodes(env: gym.Env, task: str, n_scripted: int, n_random: int, seed: int, noise: float) -> Iterator[EpisodeBuffer]:
    from sb3_off2on.envs.scripts import PRIOR, TASK

    n_prior = n_scripted // 2
    parts: list[tuple[int, Any]] = [(n_prior, PRIOR[task]), (n_scripted - n_prior, [TASK[task]]), (n_random, [(None, "task")])]
    for part, (n_steps, scripts) in enumerate(parts):
        steps = 0
        for number in count():
            if steps == n_steps:
                break
            script, start = scripts[number % len(scripts)]
            rng = np.random.default_rng([seed, part, number])
            episode = run_episode(env, script, rng, noise, start, n_steps - steps)
            rewards = np.zeros(len(episode)) if part == 0 else episode.rewards
            # As Minari's collector has it: an info for each observation
            is_random = np.full(len(episode) + 1, script is None)
            yield replace(episode, rewards=rewards, infos={"is_random": is_random})
            steps += len(episode)


def run_episode(
    env: gym.Env,
    script: "Script | None",
    rng: np.random.Generator,
    noise: float = 0.1,
    start: str = "task",
    max_steps: int | None = None,
) -> EpisodeBuffer:
    """
    Run one attempt, until the script or the environment ends it.

    :param env: one of ``TASKS``, as ``gym.make`` gives it
    :param script: a script, or None for uniform random actions
    :param rng: of the episode's seed, the script and the noise
    :param noise: standard deviation of what is added to the script's actions
    :param start: where the episode begins, see the environment
    :param max_steps: cut the episode there
    :return: its seed, start, observations (one more than steps), actions, rewards and flags
    """
    seed = int(rng.integers(2**31))
    observation, _ = env.reset(seed=seed, options={"start": start})
    observations, actions, rewards = [observation], [], []
    terminated = truncated = False
    source = _uniform(rng) if script is None else _noisy(script(env.unwrapped, rng), rng, noise)
    for action in islice(source, max_steps):
        observation, reward, terminated, truncated, _ = env.step(action)
        observations.append(observation)
        actions.append(action)
        rewards.append(float(reward))
        if terminated or truncated:
            break
    ends = np.arange(len(actions)) == len(actions) - 1
    return EpisodeBuffer(
        seed=seed,
        options={"start": start},
        observations=map_arrays(lambda *steps: np.stack(steps), *observations),
        actions=np.stack(actions),
        rewards=rewards,
        terminations=ends & terminated,
        truncations=ends & (not terminated),
    )


def _uniform(rng: np.random.Generator) -> Iterator[np.ndarray]:
    while True:
        yield rng.uniform(-1.0, 1.0, 8).astype(np.float32)


def _noisy(actions: Iterator[np.ndarray], rng: np.random.Generator, noise: float) -> Iterator[np.ndarray]:
    for action in actions:
        noisy = action + rng.normal(0.0, noise, action.shape)
        yield np.clip(noisy, -_MAX_SCRIPTED_ACTION, _MAX_SCRIPTED_ACTION).astype(np.float32)


def random_rows(dataset: str | minari.MinariDataset) -> np.ndarray:
    """
    Which transitions come from the random half (Fig. 5b), in the order of ``load_dataset``.

    :param dataset: a Minari id or dataset, made by :func:`make_dataset`
    :return: bool, shape ``(n_transitions,)``
    """
    dataset = minari.load_dataset(dataset) if isinstance(dataset, str) else dataset
    return np.concatenate([episode.infos["is_random"][1:] for episode in dataset.iterate_episodes()])


def add_arguments(parser: ArgumentParser) -> None:
    """
    Add the arguments of :func:`main`.

    :param parser: of ``sb3-off2on datasets make``
    """
    parser.add_argument("task", choices=TASKS)
    parser.add_argument(
        "--preset", choices=PRESETS, default="paper", help="100,000 or 4,000 steps of each half (default: the former)"
    )
    parser.add_argument("--n-scripted", type=int, help="steps of the scripted half, in the place of the preset's")
    parser.add_argument("--n-random", type=int, help="steps of the random half, in the place of the preset's")
    parser.add_argument("--seed", type=int, default=0, help="determines everything (default: 0)")
    parser.add_argument("--noise", type=float, default=0.1, help="standard deviation on scripted actions (default: 0.1)")
    parser.add_argument("--observation", choices=ID_SUFFIXES, default="image", help="default: image")
    parser.add_argument("--image-size", type=int, default=48, help="height and width in pixels (default: 48)")
    parser.add_argument("--dataset-id", help="default: off2on/TASK/mixed-v0 and so on")


def main(args: Namespace) -> None:
    """
    Make a dataset and say where it is.

    :param args: those of :func:`add_arguments`, maybe among others
    """
    names = signature(make_dataset).parameters.keys() - {"progress_bar"}
    dataset = make_dataset(**{name: getattr(args, name) for name in names}, progress_bar=True)
    print(f"{dataset.id}: {dataset.total_steps} steps in {dataset.total_episodes} episodes, in {get_dataset_path(dataset.id)}")
