"""Every block of the hyperparameter files builds a model."""

from importlib.resources import files
from typing import Any

import pytest
import yaml
from gymnasium.envs.registration import registry

from sb3_off2on import AWAC, BCQ, Off2OnSAC

FOLDER = files("sb3_off2on") / "hyperparams"
ALGORITHMS: dict[str, Any] = {"off2on_sac": Off2OnSAC, "awac": AWAC, "bcq": BCQ}
FILES = {algo: yaml.safe_load((FOLDER / f"{algo}.yml").read_text()) for algo in ALGORITHMS}
OVERLAY = yaml.safe_load((FOLDER / "off2on_sac_datasets.yml").read_text())


def build(algo: str, hyperparams: dict[str, Any], env_id: str) -> Any:
    """As RL Zoo does: strings of keyword arguments are evaluated, ``n_timesteps`` goes to learn()."""
    hyperparams = dict(hyperparams)
    assert hyperparams.pop("n_timesteps") > 0
    hyperparams["policy_kwargs"] = eval(hyperparams["policy_kwargs"])
    return ALGORITHMS[algo](env=env_id, **hyperparams)


@pytest.mark.parametrize(("algo", "env_id"), [(algo, env_id) for algo, blocks in FILES.items() for env_id in blocks])
def test_every_block_builds_a_model(algo: str, env_id: str) -> None:
    block = FILES[algo][env_id]
    model = build(algo, block, "Pendulum-v1" if env_id == "default" else env_id)
    assert model.offline_gradient_steps == block["offline_gradient_steps"]
    assert env_id == "default" or env_id in registry


@pytest.mark.parametrize("dataset_id", OVERLAY)
def test_every_overlay_builds_a_model(dataset_id: str) -> None:
    model = build("off2on_sac", {**FILES["off2on_sac"]["HalfCheetah-v5"], **OVERLAY[dataset_id]}, "HalfCheetah-v5")
    for name in set(OVERLAY[dataset_id]) - {"policy_kwargs"}:
        assert getattr(model, name) == OVERLAY[dataset_id][name]


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_defaults_of_the_constructor_are_those_of_the_file(algo: str) -> None:
    """The file's default block spells out the published values; the constructor has the same where it has a default."""
    block = FILES[algo]["default"]
    model = ALGORITHMS[algo]("MlpPolicy", "Pendulum-v1")
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
    assert model.train_freq.frequency == block["train_freq"]
    assert model.policy.ensemble_size == 5
