"""AWAC against its formulas in NumPy, and against single agents."""

from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import ACTION_DIM, TinyEnv, assert_close_members, batch_of_member, make_dataset, random_batch
from stable_baselines3.common.logger import configure
from stable_baselines3.sac.policies import SACPolicy

from sb3_off2on.awac import AWAC, AWACPolicy, advantage_weights
from sb3_off2on.policies import EnsembleCQLPolicy

pytestmark = pytest.mark.usefixtures("float64_preprocessing")


def make_awac(env: Any = "Pendulum-v1", **kwargs: Any) -> AWAC:
    """In float64, to compare beyond float32's rounding."""
    policy_kwargs = {"net_arch": [12], "ensemble_size": 3, **kwargs.pop("policy_kwargs", {})}
    model = AWAC("MlpPolicy", env, seed=0, device="cpu", buffer_size=100, policy_kwargs=policy_kwargs, **kwargs)
    model.set_logger(configure(None, []))
    model.policy.double()
    return model


class RecordedSamples:
    """Actions that the Gaussians drew, in the order of the draws; noise comes from NumPy, members by the leading axis."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, n_members: int = 1) -> None:
        self.actions: list[np.ndarray] = []
        self.n_members = n_members
        monkeypatch.setattr("torch.distributions.Normal.sample", lambda distribution: self.draw(distribution))
        self.start(0, None)

    def start(self, update: int, member: int | None) -> None:
        """A single agent draws what its place in the ensemble does."""
        self.rng, self.member = np.random.default_rng(update), member

    def draw(self, distribution: Any) -> th.Tensor:
        shape = tuple(distribution.loc.shape)
        if self.member is None:
            noise = self.rng.normal(size=shape)
        else:
            noise = self.rng.normal(size=(self.n_members, *shape[1:]))[[self.member]]
        actions = (distribution.loc + distribution.scale * th.as_tensor(noise)).detach()
        self.actions.append(actions.numpy())
        return actions


def numpy_policy(member: dict[str, Any], observations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of one member's Gaussian from its weights."""
    state = {name: value.numpy() for name, value in member["actor"].items()}
    hidden = np.maximum(observations @ state["latent_pi.0.weight"].T + state["latent_pi.0.bias"], 0)
    mean = np.tanh(hidden @ state["mu.0.weight"].T + state["mu.0.bias"])
    return mean, np.broadcast_to(np.exp(-6 + 6 / (1 + np.exp(-state["log_std.logits"]))), mean.shape)


def numpy_q_values(member: dict[str, Any], network: str, observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Twin Q-values of one member from its weights, shape ``(2, batch_size)``."""
    values = []
    for index in range(2):
        state = {name: value.numpy() for name, value in member[network].items()}
        hidden = np.concatenate([observations, actions], axis=1)
        hidden = np.maximum(hidden @ state[f"qf{index}.0.weight"].T + state[f"qf{index}.0.bias"], 0)
        values.append((hidden @ state[f"qf{index}.2.weight"].T + state[f"qf{index}.2.bias"])[:, 0])
    return np.array(values)


def numpy_mixture(members: list[dict[str, Any]], observations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eq. 5 as the paper writes it."""
    means, stds = np.array([numpy_policy(member, observations) for member in members]).transpose(1, 0, 2, 3)
    mean = means.mean(axis=0)
    return mean, np.sqrt((stds**2 + means**2).mean(axis=0) - mean**2)


def numpy_log_prob(actions: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    return np.log(np.exp(-((actions - mean) ** 2) / (2 * std**2)) / np.sqrt(2 * np.pi * std**2)).sum(axis=1)


def numpy_weights(advantages: np.ndarray, awac_lambda: float) -> np.ndarray:
    weights = np.exp(advantages / awac_lambda)
    return weights / weights.mean()


class TestWeights:
    def test_against_numpy(self) -> None:
        advantages = np.random.default_rng(0).normal(size=(3, 50))
        weights = advantage_weights(th.as_tensor(advantages), 0.7).numpy()
        np.testing.assert_allclose(weights, [numpy_weights(row, 0.7) for row in advantages], rtol=1e-12)
        np.testing.assert_allclose(weights.mean(axis=1), 1.0)

    def test_does_not_overflow(self) -> None:
        weights = advantage_weights(th.tensor([[0.0, 1e6, -1e6, 5e5]]), 0.1)
        assert weights.tolist() == [[0, 4, 0, 0]]

    def test_large_lambda_is_behaviour_cloning(self) -> None:
        weights = advantage_weights(th.tensor([[-3.0, 0.0, 5.0]]), 1e6)
        np.testing.assert_allclose(weights, 1.0, atol=1e-4)


class TestPolicy:
    def test_members_against_numpy(self) -> None:
        model = make_awac()
        with th.no_grad():
            for parameter in model.actor.parameters():
                parameter.add_(0.3 * th.randn_like(parameter))
        observations = random_batch(7).observations
        distribution = model.actor.distribution(observations.repeat(3, 1), per_member=True)
        for index in range(3):
            mean, std = numpy_policy(model.policy.get_member(index), observations.numpy())
            np.testing.assert_allclose(distribution.loc[index].detach().numpy(), mean, rtol=1e-10)
            np.testing.assert_allclose(distribution.scale[index].detach().numpy(), std, rtol=1e-10)
        mean, std = numpy_mixture([model.policy.get_member(index) for index in range(3)], observations.numpy())
        joint = model.actor.distribution(observations, per_member=False)
        np.testing.assert_allclose(joint.loc[0].detach().numpy(), mean, rtol=1e-10)
        np.testing.assert_allclose(joint.scale[0].detach().numpy(), std, rtol=1e-8)

    def test_standard_deviation_starts_half_way_and_is_bounded(self) -> None:
        model = make_awac()
        observations = random_batch(5).observations.repeat(3, 1)
        assert model.actor.distribution(observations, True).scale.log().unique().item() == pytest.approx(-3)
        for logit, log_std in ((-100, -6), (100, 0)):
            with th.no_grad():
                model.policy.get_parameter("actor.log_std.template.logits").fill_(logit)
            assert model.actor.distribution(observations, True).scale.log().unique().item() == pytest.approx(log_std)

    def test_plays_the_clipped_gaussian(self) -> None:
        """The mean, or a sample of the joint Gaussian, within the environment's own bounds."""
        env = TinyEnv(action_space=spaces.Box(np.array([-2.0], np.float32), np.array([6.0], np.float32)))
        model = make_awac(env)
        with th.no_grad():
            model.policy.get_parameter("actor.log_std.template.logits").fill_(100)  # a standard deviation of 1
        observations = random_batch(500).observations
        mean, _ = numpy_mixture([model.policy.get_member(index) for index in range(3)], observations.numpy())
        with th.no_grad():
            np.testing.assert_allclose(model.actor(observations, deterministic=True).numpy(), mean, rtol=1e-10)
            actions = model.actor(observations).numpy()
        assert actions.min() == -1
        assert actions.max() == 1
        assert actions.std() > 0.5
        played, _ = model.predict(observations.numpy(), deterministic=True)
        np.testing.assert_allclose(played, 2 + 4 * mean, rtol=1e-5)

    def test_actions_on_the_bounds_have_a_finite_likelihood(self) -> None:
        model = make_awac()
        batch = random_batch(9)._replace(actions=th.ones(9, ACTION_DIM, dtype=th.float64))
        assert np.isfinite(model._update(batch, per_member=False)["actor_loss"].item())
        assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())

    def test_only_the_actor_has_weight_decay(self) -> None:
        model = make_awac(policy_kwargs={"actor_weight_decay": 0.1})
        for _ in range(2):
            assert model.actor.optimizer.param_groups[0]["weight_decay"] == 0.1
            assert model.critic.optimizer.param_groups[0]["weight_decay"] == 0
            model.policy.reset_optimizers()


class TestLosses:
    @pytest.mark.parametrize("per_member", [True, False], ids=["independent", "joint"])
    def test_against_numpy(self, monkeypatch: pytest.MonkeyPatch, per_member: bool) -> None:
        """The critics' targets and losses, then, with the critics that were just updated, the actor's loss."""
        n_members, batch_size, gamma, awac_lambda = 3, 16, 0.9, 0.3
        model = make_awac(gamma=gamma, awac_lambda=awac_lambda)
        with th.no_grad():  # far enough from each other for the minima and the weights to matter
            for parameter in model.policy.parameters():
                parameter.add_(0.3 * th.randn_like(parameter))
            model.policy.get_parameter("actor.log_std.template.logits").add_(3)  # far enough to be clipped
        model.critic.optimizer.param_groups[0]["lr"] = 0.05
        batch = random_batch(n_members * batch_size if per_member else batch_size)
        samples = RecordedSamples(monkeypatch)
        before = [model.policy.get_member(index) for index in range(n_members)]
        logged = model._update(batch, per_member)
        after = [model.policy.get_member(index) for index in range(n_members)]
        assert all(np.abs(actions).max() > 1 for actions in samples.actions)
        next_actions, actions_pi = (np.clip(actions, -1, 1) for actions in samples.actions)

        critic_losses, minima, minima_pi = [], [], []
        for index in range(n_members):
            rows = slice(index * batch_size, (index + 1) * batch_size) if per_member else slice(None)
            draw = index if per_member else 0
            obs, next_obs, actions = (
                getattr(batch, name)[rows].numpy() for name in ("observations", "next_observations", "actions")
            )
            next_q = numpy_q_values(before[index], "critic_target", next_obs, next_actions[draw]).min(axis=0)
            target = batch.rewards[rows, 0].numpy() + gamma * (1 - batch.dones[rows, 0].numpy()) * next_q
            q_values = numpy_q_values(before[index], "critic", obs, actions)
            critic_losses.append(0.5 * np.mean((q_values - target) ** 2))
            # SB3's order: the actor learns from the new critics
            minima.append(numpy_q_values(after[index], "critic", obs, actions).min(axis=0))
            minima_pi.append(numpy_q_values(after[index], "critic", obs, actions_pi[draw]).min(axis=0))
        assert logged["critic_loss"] == pytest.approx(np.mean(critic_losses), rel=1e-9)

        advantages = np.array(minima) - np.array(minima_pi)
        if per_member:
            actor_losses = []
            for index in range(n_members):
                rows = slice(index * batch_size, (index + 1) * batch_size)
                mean, std = numpy_policy(before[index], batch.observations[rows].numpy())
                log_prob = numpy_log_prob(batch.actions[rows].numpy(), mean, std)
                actor_losses.append(-np.mean(numpy_weights(advantages[index], awac_lambda) * log_prob))
        else:
            log_prob = numpy_log_prob(batch.actions.numpy(), *numpy_mixture(before, batch.observations.numpy()))
            actor_losses = [-np.mean(numpy_weights(advantages.mean(axis=0), awac_lambda) * log_prob)]
        assert logged["actor_loss"] == pytest.approx(np.mean(actor_losses), rel=1e-8)
        assert logged["q_data"] == pytest.approx(np.mean(minima), rel=1e-9)
        assert logged["advantage"] == pytest.approx(np.mean(advantages), rel=1e-9)

        for old, new in zip(before, after, strict=True):
            for name, value in old["critic_target"].items():
                expected = 0.995 * value + 0.005 * new["critic"][name]
                np.testing.assert_allclose(new["critic_target"][name].numpy(), expected.numpy(), rtol=1e-10)

    def test_gradient_of_the_actor(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """
        A step of plain gradient descent on the standard deviations, from the derivative of the Gaussian's log-density. No
        gradient flows through the weights.
        """
        model = make_awac(awac_lambda=0.3, policy_kwargs={"optimizer_class": th.optim.SGD, "actor_weight_decay": 0.0})
        for network, learning_rate in ((model.actor, 0.1), (model.critic, 0.0)):
            network.optimizer.param_groups[0]["lr"] = learning_rate
        batch = random_batch(3 * 6)
        samples = RecordedSamples(monkeypatch)
        members = [model.policy.get_member(index) for index in range(3)]
        model._update(batch, per_member=True)
        actions_pi = np.clip(samples.actions[1], -1, 1)
        for index, member in enumerate(members):
            rows = slice(index * 6, (index + 1) * 6)
            obs, actions = batch.observations[rows].numpy(), batch.actions[rows].numpy()
            q_values, q_values_pi = (
                numpy_q_values(member, "critic", obs, a).min(axis=0) for a in (actions, actions_pi[index])
            )
            weights = numpy_weights(q_values - q_values_pi, 0.3)
            mean, std = numpy_policy(member, obs)
            # d log N / d log std, and d log std / d logit at logit 0
            gradient = np.mean(weights[:, None] * ((actions - mean) ** 2 / std**2 - 1), axis=0) * 6 * 0.25
            moved = model.policy.get_member(index)["actor"]["log_std.logits"].numpy()
            np.testing.assert_allclose(moved, 0.1 * gradient, rtol=1e-8)


class TestMembers:
    def test_are_independent_agents_offline(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Three members at once equal three runs of one, on the same batches and noise."""
        n_members, batch_size, n_updates = 3, 8, 4
        kwargs: dict[str, Any] = {"dataset": make_dataset(), "learning_rate": 1e-2}
        ensemble = make_awac(**kwargs)
        singles = [make_awac(policy_kwargs={"ensemble_size": 1}, **kwargs) for _ in range(n_members)]
        for index, single in enumerate(singles):
            single.policy.set_member(0, ensemble.policy.get_member(index))
        samples = RecordedSamples(monkeypatch, n_members)

        def run(model: AWAC, member: int | None) -> None:
            for update in range(n_updates):
                samples.start(update, member)
                batch = random_batch(n_members * batch_size, seed=update)
                if member is not None:
                    batch = batch_of_member(batch, member, batch_size)
                monkeypatch.setattr(model.replay_buffer, "sample_offline", lambda *args, batch=batch, **kw: batch)
                model.train_offline(gradient_steps=1, batch_size=batch_size)

        run(ensemble, None)
        for index, single in enumerate(singles):
            run(single, index)
            assert_close_members(ensemble.policy.get_member(index), single.policy.get_member(0))

    def test_one_member_does_the_same_in_both_phases(self, monkeypatch: pytest.MonkeyPatch) -> None:
        models = [make_awac(policy_kwargs={"ensemble_size": 1}) for _ in range(2)]
        samples = RecordedSamples(monkeypatch)
        for model, per_member in zip(models, (True, False), strict=True):
            for update in range(3):
                samples.start(update, None)
                model._update(random_batch(8, seed=update), per_member)
        for one, other in zip(*(model.policy.parameters() for model in models), strict=True):
            np.testing.assert_allclose(one.detach().numpy(), other.detach().numpy(), rtol=0, atol=1e-10)

    def test_equal_members_move_as_one_agent(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Online, where they are one policy, each member learns as fast as an agent alone."""
        sgd = {"optimizer_class": th.optim.SGD, "actor_weight_decay": 0.0}
        single, ensemble = (
            make_awac(learning_rate=0.1, policy_kwargs={**sgd, "ensemble_size": ensemble_size}) for ensemble_size in (1, 3)
        )
        for index in range(3):
            ensemble.policy.set_member(index, single.policy.get_member(0))
        noise = RecordedSamples(monkeypatch)
        for model in (single, ensemble):
            noise.start(0, None)
            model._update(random_batch(16), per_member=False)
        expected = single.policy.get_member(0)
        for index in range(3):
            for network, state in ensemble.policy.get_member(index).items():
                for name, value in state.items():
                    np.testing.assert_allclose(
                        value.numpy(), expected[network][name].numpy(), rtol=0, atol=1e-10, err_msg=name
                    )


class TestErrors:
    @pytest.mark.parametrize(
        ("kwargs", "match"),
        [
            ({"awac_lambda": 0.0}, "`awac_lambda` must be above 0 and finite, got 0.0"),
            ({"awac_lambda": float("nan")}, "`awac_lambda` must be above 0 and finite, got nan"),
            ({"policy_kwargs": {"actor_weight_decay": -1e-4}}, "`actor_weight_decay` must be at least 0, got -0.0001"),
            (
                {"policy_kwargs": {"optimizer_class": th.optim.Rprop}},
                "`optimizer_class=Rprop` has no weight decay: set `actor_weight_decay=0`",
            ),
        ],
        ids=str,
    )
    def test_constructor(self, kwargs: dict[str, Any], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            make_awac(**kwargs)

    def test_optimizer_without_weight_decay(self) -> None:
        model = make_awac(policy_kwargs={"optimizer_class": th.optim.Rprop, "actor_weight_decay": 0})
        assert isinstance(model.actor.optimizer, th.optim.Rprop)

    @pytest.mark.parametrize("policy", [SACPolicy, EnsembleCQLPolicy])
    def test_policy_class(self, policy: Any) -> None:
        with pytest.raises(ValueError, match=f"`policy` must be a name or derived from AWACPolicy, got {policy.__name__}"):
            AWAC(policy, "Pendulum-v1")

    def test_policy_class_of_ones_own(self) -> None:
        class OwnPolicy(AWACPolicy):
            pass

        assert type(AWAC(OwnPolicy, "Pendulum-v1", buffer_size=10).policy) is OwnPolicy
