"""Fitted Q evaluation against its formula in NumPy, against values that are known, and as a phase of its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import (
    ACTION_DIM,
    TinyEnv,
    assert_same,
    make_dataset,
    parameters_of,
    random_batch,
    saved_state,
    small_model,
    to_double,
)
from stable_baselines3.common.callbacks import CheckpointCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.torch_layers import FlattenExtractor

from sb3_off2on import Off2OnSAC, load_dataset
from sb3_off2on.fqe import fqe_errors, reset_critics

N_MEMBERS, BATCH_SIZE = 3, 7


class Encoder(FlattenExtractor):
    """A linear encoder; ``frozen`` as a pretrained one, ``dropout`` so that the mode matters."""

    def __init__(self, observation_space: spaces.Box, frozen: bool = False, dropout: float = 0.0) -> None:
        super().__init__(observation_space)
        self.linear = th.nn.Linear(self.features_dim, self.features_dim).requires_grad_(not frozen)
        self.dropout = th.nn.Dropout(dropout)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.dropout(self.linear(super().forward(observations)))


@pytest.fixture(scope="module")
def dataset() -> Any:
    return make_dataset(2, 30)


def pretrained(dataset: Any, **kwargs: Any) -> Off2OnSAC:
    model = small_model(**kwargs)
    model.set_logger(configure(None, []))
    return model.learn_offline(dataset, gradient_steps=2)


def numpy_layers(state: dict[str, Any], name: str, x: np.ndarray) -> np.ndarray:
    """One hidden layer and one output layer."""
    hidden = np.maximum(x @ state[f"{name}.0.weight"].numpy().T + state[f"{name}.0.bias"].numpy(), 0)
    return hidden @ state[f"{name}.2.weight"].numpy().T + state[f"{name}.2.bias"].numpy()


class TestErrors:
    def test_against_numpy(self, dataset: Any, float64_preprocessing: None, monkeypatch: pytest.MonkeyPatch) -> None:
        """Every network against its own target network: no minimum, no entropy, no other member."""
        model = pretrained(dataset, policy_kwargs={"ensemble_size": N_MEMBERS})
        to_double(model)
        with th.no_grad():  # targets that differ from the critics
            for parameter in model.critic_target.parameters():
                parameter.add_(0.3 * th.randn_like(parameter))
        rows = random_batch(N_MEMBERS * BATCH_SIZE)
        noise = np.random.default_rng(1).normal(size=(N_MEMBERS * BATCH_SIZE, ACTION_DIM))
        monkeypatch.setattr("torch.distributions.Normal.rsample", lambda self: self.loc + self.scale * th.as_tensor(noise))
        q_values, errors = fqe_errors(model.policy, rows, gamma=0.9)
        assert q_values.shape == errors.shape == (N_MEMBERS, 2, BATCH_SIZE)
        for index in range(N_MEMBERS):
            member = model.get_member(index)
            own = slice(index * BATCH_SIZE, (index + 1) * BATCH_SIZE)
            obs, actions, next_obs, dones, rewards = (field[own].numpy() for field in rows[:5])
            latent = next_obs @ member["actor"]["latent_pi.0.weight"].numpy().T + member["actor"]["latent_pi.0.bias"].numpy()
            latent = np.maximum(latent, 0)
            mean, log_std = (
                latent @ member["actor"][f"{name}.weight"].numpy().T + member["actor"][f"{name}.bias"].numpy()
                for name in ("mu", "log_std")
            )
            next_actions = np.tanh(mean + np.exp(log_std) * noise[own])
            for network in range(2):
                next_q = numpy_layers(member["critic_target"], f"qf{network}", np.hstack([next_obs, next_actions]))
                target = rewards + 0.9 * (1 - dones) * next_q
                q = numpy_layers(member["critic"], f"qf{network}", np.hstack([obs, actions]))
                np.testing.assert_allclose(q_values[index, network], q[:, 0], rtol=1e-9)
                np.testing.assert_allclose(errors[index, network].detach(), (q - target)[:, 0], rtol=1e-9, atol=1e-12)

    def test_update_is_adam_on_the_squared_error(self, dataset: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """The first step of Adam is the learning rate times the sign of the gradient, for each network of its own error."""
        model = pretrained(dataset)
        model.fit_fqe(gradient_steps=1, batch_size=8)
        before = parameters_of(model.critic)
        # A fresh optimizer again, and the rows that the next update draws
        model.policy.reset_optimizers()
        drawn: list[Any] = []
        sample_offline = model.replay_buffer.sample_offline

        def record(n: int, env: Any) -> Any:
            drawn.append(sample_offline(n, env))
            return drawn[-1]

        monkeypatch.setattr(model.replay_buffer, "sample_offline", record)
        monkeypatch.setattr("torch.distributions.Normal.rsample", lambda self: self.loc)
        model.train_fqe(gradient_steps=1, batch_size=8, learning_rate=0.01)
        after = parameters_of(model.critic)
        assert len(drawn[0].rewards) == 2 * 8
        model.critic.load_state_dict(before)
        # Targets moved by tau after the update: undo that
        for name, value in model.critic_target.state_dict().items():
            value.copy_((value - model.tau * after[name]) / (1 - model.tau))
        for index in range(2):  # the gradient of each member's own loss
            _, errors = fqe_errors(model.policy, drawn[0], model.gamma)
            model.critic.zero_grad()
            errors[index].pow(2).mean(dim=1).sum().backward()
            for name, parameter in model.critic.named_parameters():
                own = slice(2 * index, 2 * index + 2)  # two networks a member
                assert parameter.grad is not None
                gradient, step = parameter.grad[own].numpy(), (after[name] - before[name])[own].numpy()
                large = np.abs(gradient) > 1e-4
                assert large.any()
                np.testing.assert_allclose(step[large], -0.01 * np.sign(gradient[large]), rtol=1e-2)

    def test_learns_the_value_of_the_policy(self) -> None:
        """Reward 1 at each step, without an end: Q is 1 / (1 - gamma) everywhere, in random actions too."""
        env = TinyEnv()
        data = make_dataset(4, 25, env=env)
        endless = {name: getattr(data, name) for name in ("observations", "next_observations", "actions")}
        flags = np.zeros(len(data), dtype=bool)
        spaces_ = {"observation_space": data.observation_space, "action_space": data.action_space}
        constant = load_dataset({**endless, **spaces_, "rewards": np.ones(len(data)), "terminations": flags})
        model = small_model(env, gamma=0.8, tau=0.1).learn_offline(constant, gradient_steps=1)
        model.fit_fqe(gradient_steps=300, batch_size=32, learning_rate=5e-3)
        observations = model.replay_buffer.sample_offline(100).observations
        q_values = model.critic.member_q_values(observations, th.rand(100, 2) * 2 - 1)
        np.testing.assert_allclose(q_values.mean(dim=2).detach(), 5.0, atol=0.2)
        np.testing.assert_allclose(q_values.detach(), 5.0, atol=1.0)


class TestReset:
    def test_everything_is_new_but_the_policy(self, dataset: Any) -> None:
        model = pretrained(dataset)
        critic, actor = parameters_of(model.critic), parameters_of(model.actor)
        ids = [id(parameter) for parameter in model.critic.parameters()]
        reset_critics(model.policy)
        assert_same(parameters_of(model.actor), actor)
        assert_same(parameters_of(model.critic_target), parameters_of(model.critic))
        assert not model.critic.optimizer.state
        assert [id(parameter) for parameter in model.critic.parameters()] == ids
        weights = [name for name in critic if name.endswith("weight")]
        assert not any(th.isclose(critic[name], model.critic.state_dict()[name]).any() for name in weights)

    def test_frozen_features_stay(self, dataset: Any) -> None:
        kwargs = {"features_extractor_class": Encoder, "features_extractor_kwargs": {"frozen": True}}
        model = pretrained(dataset, policy_kwargs=kwargs)
        before = {name: x for name, x in parameters_of(model.critic).items() if "features" in name}
        model.fit_fqe(gradient_steps=2)
        assert_same({name: x for name, x in parameters_of(model.critic).items() if "features" in name}, before)

    def test_shared_features_stay(self, dataset: Any) -> None:
        kwargs = {"features_extractor_class": Encoder, "share_features_extractor": True}
        model = pretrained(dataset, policy_kwargs=kwargs)
        before = parameters_of(model.actor)
        model.fit_fqe(gradient_steps=2)
        assert_same(parameters_of(model.actor), before)
        assert model.critic.features_extractor is model.actor.features_extractor


class TestPhase:
    def test_only_critics_move(self, dataset: Any) -> None:
        model = pretrained(dataset)
        actor, critic, target = (parameters_of(x) for x in (model.actor, model.critic, model.critic_target))
        model.fit_fqe(gradient_steps=3)
        assert_same(parameters_of(model.actor), actor)
        for network, before in ((model.critic, critic), (model.critic_target, target)):
            assert not any(th.equal(value, before[name]) for name, value in network.state_dict().items())
        assert model.critic.optimizer.param_groups[0]["lr"] == 3e-4

    def test_policy_is_evaluated_as_it_is_played(self, dataset: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without dropout; the critics learn with theirs."""
        kwargs = {"features_extractor_class": Encoder, "features_extractor_kwargs": {"dropout": 0.5}}
        model = pretrained(dataset, policy_kwargs=kwargs)
        modes = []

        def look(*args: Any, **kwargs: Any) -> Any:
            modes.append((model.actor.training, model.critic.training, model.critic_target.training))
            return fqe_errors(*args, **kwargs)

        monkeypatch.setattr("sb3_off2on.off2on_sac.fqe_errors", look)
        model.fit_fqe(gradient_steps=2)
        assert modes == [(False, True, False)] * 2

    def test_is_part_of_the_offline_phase(self, dataset: Any, tmp_path: Path) -> None:
        """One counter, callbacks and logs as in learn_offline(); learn() hands over as usual."""
        model = small_model()
        model.set_logger(configure(str(tmp_path / "logs"), ["csv"]))
        model.learn_offline(dataset, gradient_steps=4)
        callback = CheckpointCallback(save_freq=2, save_path=str(tmp_path))
        model.fit_fqe(gradient_steps=6, callback=callback, log_interval=2)
        assert model.num_timesteps == model._n_offline_updates == 10
        assert {path.name for path in tmp_path.glob("*.zip")} == {f"rl_model_{step}_steps.zip" for step in (6, 8, 10)}
        logged = (tmp_path / "logs" / "progress.csv").read_text()
        assert "offline/fqe_loss" in logged
        assert "offline/fqe_q_data" in logged
        critic = parameters_of(model.critic)
        model.learn(4, callback=lambda *_: False)  # stops before the first online update
        assert model.num_timesteps == 11
        assert_same(parameters_of(model.critic), critic)
        assert_same(parameters_of(model.critic_target), critic)
        model.learn(4, reset_num_timesteps=False)
        assert not th.equal(model.critic.state_dict()["qf.0.weight"], critic["qf.0.weight"])

    def test_goes_on(self, dataset: Any, tmp_path: Path) -> None:
        """An interrupted one is completed, also after loading; after other updates it starts anew."""
        at_once, in_parts = (pretrained(dataset) for _ in range(2))
        for model, gradient_steps in ((at_once, 5), (in_parts, 2)):
            model.set_random_seed(1)
            model.fit_fqe(gradient_steps=gradient_steps)
        in_parts.save(tmp_path / "model")
        state = th.get_rng_state(), np.random.get_state()
        in_parts = Off2OnSAC.load(tmp_path / "model", env=in_parts.get_env(), dataset=dataset)
        th.set_rng_state(state[0])
        np.random.set_state(state[1])
        in_parts.fit_fqe(gradient_steps=3)
        assert_same(saved_state(in_parts), saved_state(at_once))
        assert in_parts._n_fqe_updates == 5

    @pytest.mark.parametrize(
        "other",
        [
            lambda model: model.learn_offline(gradient_steps=1),
            lambda model: model.set_member(0, model.get_member(1)),
        ],
        ids=["learn_offline", "set_member"],
    )
    def test_starts_anew(self, dataset: Any, other: Callable[[Off2OnSAC], Any], monkeypatch: pytest.MonkeyPatch) -> None:
        resets: list[Any] = []
        monkeypatch.setattr("sb3_off2on.off2on_sac.reset_critics", resets.append)
        model = pretrained(dataset).fit_fqe(gradient_steps=2)
        model.fit_fqe(gradient_steps=2)
        assert len(resets) == 1
        other(model)
        model.fit_fqe(gradient_steps=2)
        assert len(resets) == 2


class TestWrongUse:
    @pytest.mark.parametrize(
        ("kwargs", "match"),
        [
            ({"gradient_steps": 0}, r"`gradient_steps` must be an integer of at least 1, got 0"),
            ({"batch_size": 0}, r"`batch_size` must be above 0, got 0"),
            ({"learning_rate": 0.0}, r"`learning_rate` must be above 0, got 0.0"),
            ({"log_interval": 0}, r"`log_interval` must be at least 1, got 0"),
        ],
    )
    def test_arguments(self, dataset: Any, kwargs: dict[str, Any], match: str) -> None:
        model = pretrained(dataset)
        before = saved_state(model)
        with pytest.raises(ValueError, match=match):
            model.fit_fqe(**kwargs)
        assert_same(saved_state(model), before)

    def test_nothing_to_evaluate(self, dataset: Any) -> None:
        with pytest.raises(ValueError, match=r"`fit_fqe\(\)` evaluates pretrained policies before they learn online"):
            small_model(dataset=dataset).fit_fqe()
        with pytest.raises(ValueError, match=r"between `learn_offline\(\)` .* and `learn\(\)`"):
            pretrained(dataset).learn(5).fit_fqe()

    def test_no_dataset(self) -> None:
        model, agent = small_model(), small_model()
        model.set_member(0, agent.get_member(0))
        with pytest.raises(ValueError, match=r"There is no dataset to learn from"):
            model.fit_fqe(gradient_steps=1)
