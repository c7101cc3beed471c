"""Every block of the hyperparameter files builds a model, as RL Zoo does it."""

import argparse
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import rl_zoo3.exp_manager
import yaml
from gymnasium.envs.registration import registry
from helpers import make_dataset
from stable_baselines3.common.type_aliases import TrainFreq

import sb3_off2on.envs  # noqa: F401 (registers the manipulation tasks)
from sb3_off2on.zoo import ALGORITHMS, HYPERPARAMS_FOLDER, OfflineToOnlineExperimentManager

FILES = {algo: yaml.safe_load((HYPERPARAMS_FOLDER / f"{algo}.yml").read_text()) for algo in ALGORITHMS}
OVERLAY = yaml.safe_load((HYPERPARAMS_FOLDER / "off2on_sac_datasets.yml").read_text())


def build(folder: Path, algo: str, env_id: str, dataset: list[str] | None = None, **hyperparams: Any) -> Any:
    manager = OfflineToOnlineExperimentManager(
        argparse.Namespace(dataset=dataset), algo, env_id, str(folder), eval_freq=-1, hyperparams=hyperparams
    )
    results = manager.setup_experiment()
    assert results is not None
    assert manager.n_timesteps > 0
    return results[0]


def evaluated(text: str) -> dict[str, Any]:
    """As RL Zoo does it, with the names that its module knows."""
    return eval(text, vars(rl_zoo3.exp_manager))


@pytest.mark.parametrize(("algo", "env_id"), [(algo, env_id) for algo, blocks in FILES.items() for env_id in blocks])
def test_every_block_builds_a_model(algo: str, env_id: str, tmp_path: Path) -> None:
    block = FILES[algo][env_id]
    model = build(tmp_path, algo, "Pendulum-v1" if env_id == "default" else env_id, offline_gradient_steps=0)
    assert env_id == "default" or env_id in registry
    policy_kwargs = evaluated(block["policy_kwargs"])
    assert model.policy.ensemble_size == policy_kwargs["ensemble_size"]
    if "features_extractor_class" in policy_kwargs:
        assert model.policy.features_extractor_class is policy_kwargs["features_extractor_class"]
    assert (model.get_vec_normalize_env() is not None) == ("normalize" in block)
    elsewhere = {"n_timesteps", "policy", "policy_kwargs", "train_freq", "offline_gradient_steps", "normalize"}
    for name in set(block) - elsewhere:
        value = getattr(model, name)
        if name == "replay_buffer_kwargs":
            assert value == evaluated(block[name])
            continue
        if str(block[name]).startswith("lin_"):
            assert [value(progress) for progress in (1.0, 0.5, 0.0)] == [float(block[name][4:]) * x for x in (1.0, 0.5, 0.0)]
            continue
        assert (value(1.0) if callable(value) else value) == block[name], name


@pytest.mark.parametrize("name", OVERLAY)
def test_every_overlay_builds_a_model(name: str, tmp_path: Path) -> None:
    """From a file with D4RL's name."""
    dataset = make_dataset(n_episodes=1, env=gym.make("HalfCheetah-v5"))
    columns = {key: getattr(dataset, key) for key in ("observations", "actions", "rewards", "terminations")}
    np.savez(tmp_path / f"{name}-v2.npz", **columns)
    model = build(tmp_path, "off2on_sac", "HalfCheetah-v5", [str(tmp_path / f"{name}-v2.npz")])
    assert model.dataset is not None
    assert model.offline_gradient_steps == FILES["off2on_sac"]["HalfCheetah-v5"]["offline_gradient_steps"]
    for key in OVERLAY[name]:
        value, expected = getattr(model, key), OVERLAY[name][key]
        if key == "policy_kwargs":
            assert {**eval(expected), **value} == value
        else:
            assert (value(1.0) if callable(value) else value) == expected


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_defaults_of_the_constructor_are_those_of_the_file(algo: str) -> None:
    """The file's default block spells out the published values; the constructor has the same where it has a default."""
    block = FILES[algo]["default"]
    model = ALGORITHMS[algo].algorithm_class("MlpPolicy", "Pendulum-v1")  # type: ignore[call-arg]
    differs = {
        "offline_gradient_steps",
        "buffer_size",
        "qf_learning_rate",
        "train_freq",
        "n_timesteps",
        "policy",
        "policy_kwargs",
    }
    for name in set(block) - differs:
        assert getattr(model, name) == block[name], name
    assert isinstance(model.train_freq, TrainFreq)
    assert model.train_freq.frequency == block["train_freq"]
    assert model.policy.ensemble_size == 5
