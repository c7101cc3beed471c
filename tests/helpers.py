"""Datasets, environments and small models that several test files share."""

import platform
from copy import deepcopy
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.logger import configure
from torch import nn

from sb3_off2on import Off2OnSAC, OfflineDataset, load_dataset, onednn
from sb3_off2on.buffers import BalancedReplayBufferSamples

needs_onednn = pytest.mark.skipif(
    onednn._ONEDNN_LINEAR is None or platform.machine().lower() not in ("x86_64", "amd64"),
    reason="PyTorch's oneDNN for x86 is not on this machine",
)
OBS_DIM, ACTION_DIM = 3, 1
IMAGE_SPACE = spaces.Box(0, 255, (36, 36, 3), np.uint8)


class TinyEnv(gym.Env):
    """Random observations and rewards. Episodes of ``length`` steps are terminated and truncated by turns."""

    def __init__(
        self,
        observation_space: spaces.Space | None = None,
        action_space: spaces.Space | None = None,
        length: int = 5,
    ) -> None:
        self.observation_space = spaces.Box(-1, 1, (OBS_DIM,)) if observation_space is None else observation_space
        self.action_space = spaces.Box(-1, 1, (2,)) if action_space is None else action_space
        self.length = length
        self.n_steps = self.n_episodes = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.n_steps = 0
        self.n_episodes += 1
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(np.asarray(action, dtype=self.action_space.dtype)), action
        self.n_steps += 1
        end, terminated = self.n_steps == self.length, self.n_episodes % 2 == 0
        return self.observation_space.sample(), float(self.np_random.normal()), end and terminated, end and not terminated, {}


def random_frames(space: Any, n: int, rng: np.random.Generator) -> Any:
    """``n`` observations of a space: images of all colours, numbers between -1 and 1, dicts of both."""
    if isinstance(space, spaces.Dict):
        return {key: random_frames(part, n, rng) for key, part in space.items()}
    if space.dtype == np.uint8:
        return rng.integers(0, 256, (n, *space.shape), dtype=np.uint8)
    return rng.uniform(-1, 1, (n, *space.shape)).astype(np.float32)


def make_dataset(
    n_episodes: int = 6, length: int = 50, seed: int = 0, reward_scale: float = 1.0, env: gym.Env | None = None
) -> OfflineDataset:
    """Random walks with the spaces of an environment (Pendulum's by default), every other episode terminated."""
    rng = np.random.default_rng(seed)
    n = n_episodes * length
    pendulum = {} if env is not None else {"env_id": "Pendulum-v1"}
    env = gym.make("Pendulum-v1") if env is None else env
    action_space: Any = env.action_space
    ends = np.arange(1, n + 1) % length == 0
    terminated = (np.arange(n) // length) % 2 == 0
    return load_dataset(
        {
            "observations": random_frames(env.observation_space, n, rng),
            "next_observations": random_frames(env.observation_space, n, rng),
            "actions": rng.uniform(action_space.low, action_space.high, (n, *action_space.shape)).astype(np.float32),
            "rewards": (reward_scale * rng.normal(size=n)).astype(np.float32),
            "terminations": ends & terminated,
            "truncations": ends & ~terminated,
            "observation_space": env.observation_space,
            "action_space": action_space,
            **pendulum,
        }
    )


def make_model(cls: type[SAC] = Off2OnSAC, double: bool = False, **kwargs: Any) -> Any:
    """A model for Pendulum without log outputs."""
    kwargs = {"seed": 0, "learning_starts": 50, "train_freq": 1, "gradient_steps": 1, "batch_size": 32, **kwargs}
    kwargs["policy_kwargs"] = {"net_arch": [32, 24], **kwargs.get("policy_kwargs", {})}
    model = cls("MlpPolicy", "Pendulum-v1", **kwargs)
    model.set_logger(configure(None, []))
    if double:
        to_double(model)
    return model


def to_double(model: Any) -> None:
    """Put networks, optimizers and batches in float64, to compare beyond float32's rounding."""
    model.policy.double()
    for name in ("log_ent_coef", "offline_log_ent_coef", "log_cql_lagrange", "ent_coef_tensor"):
        if getattr(model, name, None) is not None:
            getattr(model, name).data = getattr(model, name).data.double()


def small_kwargs(**kwargs: Any) -> dict[str, Any]:
    """Arguments of a model whose updates take a few milliseconds, and whose first update (of 8) is at 4 environment steps."""
    small: dict[str, Any] = {
        "seed": 0,
        "device": "cpu",
        "buffer_size": 400,
        "learning_starts": 4,
        "train_freq": 1,
        "gradient_steps": 1,
        "batch_size": 8,
        "offline_batch_size": 8,
        "cql_n_actions": 2,
        "first_update_multiplier": 2,
    }
    policy_kwargs = {"net_arch": [16], "ensemble_size": 2, **kwargs.pop("policy_kwargs", {})}
    density_ratio_kwargs = {"net_arch": [16], **kwargs.pop("density_ratio_kwargs", {})}
    return {**small, "policy_kwargs": policy_kwargs, "density_ratio_kwargs": density_ratio_kwargs, **kwargs}


def small_model(env: Any = "Pendulum-v1", policy: str = "MlpPolicy", **kwargs: Any) -> Off2OnSAC:
    """An ``Off2OnSAC`` with ``small_kwargs``."""
    return Off2OnSAC(policy, env, **small_kwargs(**kwargs))


def parameters_of(module: nn.Module) -> dict[str, th.Tensor]:
    """Copies of a network's parameters and buffers."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_same(one: Any, other: Any, name: str = "") -> None:
    """Whether nested state dicts, of networks or optimizers, are equal to the last bit."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), name
        for key in one:
            assert_same(one[key], other[key], f"{name}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), name
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{name}[{index}]")
    elif isinstance(one, (th.Tensor, np.ndarray)):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other), err_msg=name)
    else:
        assert one == other, name


def saved_state(model: Off2OnSAC) -> dict[str, Any]:
    """Copies of everything that training changes and that a saved model must bring back."""
    counters = ("num_timesteps", "_n_updates", "_n_offline_updates", "_episode_num", "pretrained", "_handed_over")
    names = [name for name in ("log_ent_coef", "offline_log_ent_coef", "log_cql_lagrange") if getattr(model, name) is not None]
    return deepcopy(
        {
            "networks and optimizers": model.get_parameters(),
            "variables": {name: getattr(model, name).detach() for name in names},
            "counters": {name: getattr(model, name) for name in counters},
            "dataset": model.dataset_info,
        }
    )


def random_batch(n: int, seed: int = 0) -> Any:
    """Rows of no environment, in float64."""
    rng = np.random.default_rng(seed)

    def uniform(*shape: int) -> th.Tensor:
        return th.as_tensor(rng.uniform(-1, 1, shape))

    return BalancedReplayBufferSamples(
        observations=uniform(n, OBS_DIM),
        actions=uniform(n, ACTION_DIM),
        next_observations=uniform(n, OBS_DIM),
        dones=(uniform(n, 1) > 0.5).double(),
        rewards=uniform(n, 1),
        indices=np.arange(n),
    )


def batch_of_member(batch: Any, member: int, batch_size: int) -> Any:
    """The rows of a minibatch of several members that one of them gets."""
    rows = slice(member * batch_size, (member + 1) * batch_size)
    return batch._replace(**{name: x[rows] for name, x in batch._asdict().items() if x is not None})


def assert_close_members(one: dict[str, dict[str, th.Tensor]], other: dict[str, dict[str, th.Tensor]]) -> None:
    """Of two members of policies, in float64."""
    assert one.keys() >= other.keys()
    for network, state in other.items():
        for name, value in state.items():
            np.testing.assert_allclose(one[network][name], value, rtol=0, atol=1e-9, err_msg=f"{network} {name}")
