"""Every block of the hyperparameter files builds a model, as RL Zoo does it."""

import argparse
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import yaml
from gymnasium.envs.registration import registry
from helpers import make_dataset

from sb3_off2on import Off2OnSAC
from sb3_off2on.zoo import HYPERPARAMS_FOLDER, OfflineToOnlineExperimentManager

BLOCKS = yaml.safe_load((HYPERPARAMS_FOLDER / "off2on_sac.yml").read_text())
OVERLAY = yaml.safe_load((HYPERPARAMS_FOLDER / "off2on_sac_datasets.yml").read_text())


def build(folder: Path, env_id: str, dataset: list[str] | None = None, **hyperparams: Any) -> Off2OnSAC:
    manager = OfflineToOnlineExperimentManager(
        argparse.Namespace(dataset=dataset), "off2on_sac", env_id, str(folder), eval_freq=-1, hyperparams=hyperparams
    )
    results = manager.setup_experiment()
    assert results is not None
    assert manager.n_timesteps > 0
    return results[0]  # type: ignore[return-value]


@pytest.mark.parametrize("env_id", BLOCKS)
def test_every_block_builds_a_model(env_id: str, tmp_path: Path) -> None:
    model = build(tmp_path, "Pendulum-v1" if env_id == "default" else env_id, offline_gradient_steps=0)
    assert model.policy.ensemble_size == eval(BLOCKS[env_id]["policy_kwargs"])["ensemble_size"]
    assert env_id == "default" or env_id in registry
    for name in set(BLOCKS[env_id]) - {"n_timesteps", "policy", "policy_kwargs", "train_freq", "offline_gradient_steps"}:
        value = getattr(model, name)
        assert (value(1.0) if callable(value) else value) == BLOCKS[env_id][name], name


@pytest.mark.parametrize("name", OVERLAY)
def test_every_overlay_builds_a_model(name: str, tmp_path: Path) -> None:
    """From a file with D4RL's name."""
    dataset = make_dataset(n_episodes=1, env=gym.make("HalfCheetah-v5"))
    columns = {key: getattr(dataset, key) for key in ("observations", "actions", "rewards", "terminations")}
    np.savez(tmp_path / f"{name}-v2.npz", **columns)
    model = build(tmp_path, "HalfCheetah-v5", [str(tmp_path / f"{name}-v2.npz")])
    assert model.dataset is not None
    assert model.offline_gradient_steps == BLOCKS["HalfCheetah-v5"]["offline_gradient_steps"]
    for key in OVERLAY[name]:
        value, expected = getattr(model, key), OVERLAY[name][key]
        if key == "policy_kwargs":
            assert {**eval(expected), **value} == value
        else:
            assert (value(1.0) if callable(value) else value) == expected


def test_defaults_of_the_constructor_are_those_of_the_file() -> None:
    """The file's default block spells out the published values; the constructor has the same where it has a default."""
    model = Off2OnSAC("MlpPolicy", "Pendulum-v1")
    differs = {
        "offline_gradient_steps",
        "buffer_size",
        "qf_learning_rate",
        "train_freq",
        "n_timesteps",
        "policy",
        "policy_kwargs",
    }
    for name in set(BLOCKS["default"]) - differs:
        assert getattr(model, name) == BLOCKS["default"][name], name
    assert model.train_freq.frequency == BLOCKS["default"]["train_freq"]  # type: ignore[union-attr]
    assert model.policy.ensemble_size == 5
