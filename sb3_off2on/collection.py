"""Collection of datasets: what a policy, or anything else, does in an environment is written as a Minari dataset."""

from collections.abc import Iterable, Iterator
from typing import Any
from warnings import catch_warnings, filterwarnings

import gymnasium as gym
import minari  # type: ignore[import-untyped]
import numpy as np
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer  # type: ignore[import-untyped]
from minari.dataset.minari_dataset import parse_dataset_id  # type: ignore[import-untyped]
from minari.storage import get_dataset_path  # type: ignore[import-untyped]
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.utils import set_random_seed
from tqdm import tqdm

from sb3_off2on.datasets import check_spaces, map_arrays

_WRITE_STEPS = 2048  # collected steps held in memory before they are written


def collect_dataset(
    model: Any,
    env: str | gym.Env,
    n_steps: int,
    dataset_id: str,
    *,
    deterministic: bool = False,
    seed: int | None = None,
    progress_bar: bool = False,
    **minari_kwargs: Any,
) -> minari.MinariDataset:
    """
    Run a policy and write what happens as a Minari dataset, which ``load_dataset`` loads by its id.

    A model with ``VecNormalize`` around its environment predicts on normalised observations, with the statistics as they are;
    observations and rewards are written as ``env`` gives them. A loaded model has them only if it was loaded with such an
    environment, and a policy has none.

    Some thousand steps at a time are written: an interrupted run leaves a dataset of those before. Images are stored
    without loss unless ``jpeg_encoding=True`` is given, so that they are those which the environment will show online.

    :param model: an SB3 or sb3-contrib model or policy, anything else with ``predict(obs, deterministic=...) ->
        (action, state)``, or None for uniform random actions
    :param env: one environment or its id; not a vectorised one
    :param n_steps: exact number of steps; the last episode is cut (truncated) there
    :param dataset_id: ``(namespace/)name-v(version)``
    :param deterministic: whether the policy acts without noise
    :param seed: of the environment, the action space and, as in SB3, of Python's, NumPy's and PyTorch's global generators
    :param progress_bar: show one
    :param minari_kwargs: for ``minari.create_dataset_from_buffers``: ``author``, ``algorithm_name``, ``description``, ...
    :raises ValueError: if the dataset exists or has no proper id, the model cannot play, the environment is vectorised or has
        unsupported spaces, or ``n_steps`` is not positive
    """
    if n_steps < 1:
        raise ValueError(f"n_steps must be at least 1, got {n_steps}.")
    if not isinstance(env, (str, gym.Env)):
        raise ValueError(f"env must be an id or one gym.Env, got a {type(env).__name__}: episodes of a vectorised one mix.")
    if model is not None and not hasattr(model, "predict"):
        raise ValueError(f"model must have a method predict(), got {model!r}: load a saved one first, e.g. with SAC.load().")
    check_new_id(dataset_id)
    one_env = gym.make(env) if isinstance(env, str) else env
    check_spaces(one_env.observation_space, one_env.action_space, str(one_env))
    details = {"algorithm_name": "random" if model is None else type(model).__name__}
    details["description"] = f"{n_steps} steps of {details['algorithm_name']}"

    def episodes() -> Iterator[EpisodeBuffer]:
        if seed is not None:
            set_random_seed(seed)
            one_env.action_space.seed(seed)
        steps = 0
        while steps < n_steps:
            episode = _run_episode(model, one_env, deterministic, seed if steps == 0 else None, n_steps - steps)
            steps += len(episode)
            yield episode

    dataset = write_episodes(dataset_id, one_env, episodes(), n_steps, progress_bar, **{**details, **minari_kwargs})
    if isinstance(env, str):
        one_env.close()
    return dataset


def check_new_id(dataset_id: str) -> None:
    """
    Check that a dataset can be written under an id.

    :param dataset_id: ``(namespace/)name-v(version)``
    :raises ValueError: if the id has no version, or is taken
    """
    try:
        parse_dataset_id(dataset_id)
    except TypeError:
        raise ValueError(f"The dataset id {dataset_id!r} has no version: call it {dataset_id}-v0.") from None
    if get_dataset_path(dataset_id).exists():
        raise ValueError(
            f"The dataset {dataset_id!r} exists. Choose another id or version, or delete it with "
            f"minari.delete_dataset({dataset_id!r})."
        )


def write_episodes(
    dataset_id: str,
    env: gym.Env,
    episodes: Iterable[EpisodeBuffer],
    n_steps: int,
    progress_bar: bool = False,
    **minari_kwargs: Any,
) -> minari.MinariDataset:
    """
    Write episodes as a Minari dataset as they come, some thousand steps at a time. Images are stored without loss.

    :param dataset_id: see :func:`check_new_id`, which is to be called before
    :param env: that the episodes are from
    :param episodes: at least one
    :param n_steps: how many steps the episodes will have, for the progress bar
    :param progress_bar: show one
    :param minari_kwargs: for ``minari.create_dataset_from_buffers``
    """
    dataset: minari.MinariDataset | None = None
    waiting: list[EpisodeBuffer] = []

    def write() -> None:
        nonlocal dataset
        if dataset is None:
            with catch_warnings():
                filterwarnings("ignore", module="minari")  # about optional details that were not given
                details = {"jpeg_encoding": False, **minari_kwargs}
                dataset = minari.create_dataset_from_buffers(dataset_id, waiting, env, **details)
        else:
            dataset.update_dataset_from_buffer(waiting)
        waiting.clear()

    with tqdm(total=n_steps, disable=not progress_bar) as bar:
        for episode in episodes:
            waiting.append(episode)
            bar.update(len(episode))
            if sum(map(len, waiting)) >= _WRITE_STEPS:
                write()
        if waiting:
            write()
    return dataset


def _run_episode(model: Any, env: gym.Env, deterministic: bool, seed: int | None, max_steps: int) -> EpisodeBuffer:
    space = env.action_space
    assert isinstance(space, spaces.Box)
    observation, _ = env.reset(seed=seed)
    observations: list[Any] = [map_arrays(np.array, observation)]
    actions: list[np.ndarray] = []
    rewards: list[float] = []
    normalizer = model.get_vec_normalize_env() if isinstance(model, BaseAlgorithm) else None
    state, terminated, truncated = None, False, False
    while not (terminated or truncated):
        if model is None:
            action = space.sample()
        elif isinstance(model, (BaseAlgorithm, BasePolicy)):
            start = np.array([not actions])
            seen = observation if normalizer is None else normalizer.normalize_obs(observation)
            action, state = model.predict(seen, state=state, episode_start=start, deterministic=deterministic)
        else:
            action, _ = model.predict(observation, deterministic=deterministic)
        action = np.clip(action, space.low, space.high).astype(space.dtype).reshape(space.shape)
        observation, reward, terminated, truncated, _ = env.step(action)
        # np.array copies: an environment may write each observation into the same memory
        observations.append(map_arrays(np.array, observation))
        actions.append(action)
        rewards.append(float(reward))
        truncated = bool(truncated) or (len(actions) == max_steps and not terminated)
    ends = np.arange(1, len(actions) + 1) == len(actions)
    return EpisodeBuffer(
        seed=seed,
        observations=map_arrays(lambda *steps: np.stack(steps), *observations),
        actions=np.stack(actions),
        rewards=rewards,
        terminations=list(ends & terminated),
        truncations=list(ends & truncated),
    )
