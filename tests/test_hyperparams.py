"""Every block of the hyperparameter files builds a model."""

from importlib.resources import files
from typing import Any

import pytest
import yaml
from gymnasium.envs.registration import registry

from sb3_off2on import Off2OnSAC

FOLDER = files("sb3_off2on") / "hyperparams"
BLOCKS = yaml.safe_load((FOLDER / "off2on_sac.yml").read_text())
OVERLAY = yaml.safe_load((FOLDER / "off2on_sac_datasets.yml").read_text())


def build(hyperparams: dict[str, Any], env_id: str) -> Off2OnSAC:
    """As RL Zoo does: strings of keyword arguments are evaluated, ``n_timesteps`` goes to learn()."""
    hyperparams = dict(hyperparams)
    assert hyperparams.pop("n_timesteps") > 0
    hyperparams["policy_kwargs"] = eval(hyperparams["policy_kwargs"])
    return Off2OnSAC(env=env_id, **hyperparams)


@pytest.mark.parametrize("env_id", BLOCKS)
def test_every_block_builds_a_model(env_id: str) -> None:
    model = build(BLOCKS[env_id], "Pendulum-v1" if env_id == "default" else env_id)
    assert model.offline_gradient_steps == BLOCKS[env_id]["offline_gradient_steps"]
    assert env_id == "default" or env_id in registry


@pytest.mark.parametrize("dataset_id", OVERLAY)
def test_every_overlay_builds_a_model(dataset_id: str) -> None:
    model = build({**BLOCKS["HalfCheetah-v5"], **OVERLAY[dataset_id]}, "HalfCheetah-v5")
    for name in set(OVERLAY[dataset_id]) - {"policy_kwargs"}:
        assert getattr(model, name) == OVERLAY[dataset_id][name]


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
