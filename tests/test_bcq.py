"""BCQ against its formulas in NumPy, and against single agents. The VAE's own formulas are in test_vae.py."""

from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import (
    ACTION_DIM,
    OBS_DIM,
    TinyEnv,
    assert_close_members,
    assert_same,
    batch_of_member,
    make_dataset,
    parameters_of,
    random_batch,
)
from stable_baselines3.common.logger import configure
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.td3.policies import TD3Policy

from sb3_off2on.bcq import BCQ, BCQPolicy, soft_clipped_double_q
from sb3_off2on.vae import ConditionalVAE

pytestmark = pytest.mark.usefixtures("float64_preprocessing")

N_MEMBERS = 3


def make_bcq(env: Any = "Pendulum-v1", **kwargs: Any) -> BCQ:
    """In float64, to compare beyond float32's rounding, and with networks far enough from each other to be told apart."""
    policy_kwargs = {
        "net_arch": [12],
        "vae_net_arch": [10],
        "ensemble_size": N_MEMBERS,
        "n_candidates": 6,
        **kwargs.pop("policy_kwargs", {}),
    }
    model = BCQ("MlpPolicy", env, seed=0, device="cpu", buffer_size=100, policy_kwargs=policy_kwargs, **kwargs)
    model.set_logger(configure(None, []))
    model.policy.double()
    with th.no_grad():
        for parameter in model.policy.parameters():
            parameter.add_(0.3 * th.randn_like(parameter))
    return model


class RecordedNoise:
    """Standard normal numbers from NumPy in the order of the draws; members are the leading axis."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.draws: list[np.ndarray] = []
        monkeypatch.setattr(th, "randn", lambda shape, **kwargs: self.draw(tuple(shape)))
        monkeypatch.setattr(th, "randn_like", lambda like: self.draw(tuple(like.shape)))
        self.start(0, None)

    def start(self, update: int, member: int | None) -> None:
        """A single agent draws what its place in the ensemble does."""
        self.rng, self.member = np.random.default_rng(update), member

    def draw(self, shape: tuple[int, ...]) -> th.Tensor:
        if self.member is None:
            noise = self.rng.normal(size=shape)
        else:
            noise = self.rng.normal(size=(N_MEMBERS, *shape[1:]))[[self.member]]
        self.draws.append(noise)
        return th.as_tensor(noise)


def numpy_mlp(state: dict[str, Any], prefix: str, *inputs: np.ndarray) -> np.ndarray:
    """A network with one hidden layer of ReLUs, from its weights."""
    weights = {name: value.numpy() for name, value in state.items()}
    hidden = np.concatenate(inputs, axis=1) @ weights[f"{prefix}.0.weight"].T + weights[f"{prefix}.0.bias"]
    return np.maximum(hidden, 0) @ weights[f"{prefix}.2.weight"].T + weights[f"{prefix}.2.bias"]


def numpy_generate(member: dict[str, Any], obs: np.ndarray, noise: np.ndarray, clip: float = 0.5) -> np.ndarray:
    return np.tanh(numpy_mlp(member["vae"], "model.decoder", obs, np.clip(noise, -clip, clip)))


def numpy_perturb(state: dict[str, Any], obs: np.ndarray, actions: np.ndarray, phi: float) -> np.ndarray:
    return np.clip(actions + phi * np.tanh(numpy_mlp(state, "perturbation", obs, actions)), -1, 1)


def numpy_q_values(state: dict[str, Any], obs: np.ndarray, actions: np.ndarray) -> np.ndarray:
    return np.array([numpy_mlp(state, f"qf{index}", obs, actions)[:, 0] for index in range(2)])


class LinearExtractor(BaseFeaturesExtractor):
    """One with parameters, so that it matters whose is used."""

    def __init__(self, observation_space: Any) -> None:
        super().__init__(observation_space, features_dim=4)
        self.linear = th.nn.Linear(OBS_DIM, 4)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.linear(observations)


class TestFormulas:
    @pytest.mark.parametrize("bcq_lambda", [0.0, 0.75, 1.0])
    def test_soft_clipped_double_q(self, bcq_lambda: float) -> None:
        first, second = np.random.default_rng(0).normal(size=(2, 4, 5))
        q_values = th.as_tensor(np.stack([first, second], axis=1))
        expected = bcq_lambda * np.minimum(first, second) + (1 - bcq_lambda) * np.maximum(first, second)
        np.testing.assert_allclose(soft_clipped_double_q(q_values, bcq_lambda).numpy(), expected, rtol=1e-12)

    @pytest.mark.parametrize("phi", [0.0, 0.05, 0.8])
    def test_perturbation(self, phi: float) -> None:
        model = make_bcq(policy_kwargs={"phi": phi})
        batch = random_batch(8)
        actions = th.as_tensor(np.random.default_rng(0).uniform(-1, 1, (N_MEMBERS, 4, 8, ACTION_DIM)))
        perturbed = model.actor(batch.observations, actions, per_member=False).detach().numpy()
        for index in range(N_MEMBERS):
            state = model.policy.get_member(index)["actor"]
            for draw in range(4):
                expected = numpy_perturb(state, batch.observations.numpy(), actions[index, draw].numpy(), phi)
                np.testing.assert_allclose(perturbed[index, draw], expected, rtol=1e-10)
        assert np.abs(perturbed - actions.numpy()).max() <= phi + 1e-12
        assert np.abs(perturbed).max() <= 1

    def test_generated_actions(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Latents are clipped, and each member decodes its own for its own rows."""
        model = make_bcq(policy_kwargs={"latent_clip": 0.3})
        noise = RecordedNoise(monkeypatch)
        batch = random_batch(N_MEMBERS * 5)
        generated = model.vae(batch.observations, 4, per_member=True).detach().numpy()
        assert generated.shape == (N_MEMBERS, 4, 5, ACTION_DIM)
        for index in range(N_MEMBERS):
            obs = batch.observations[index * 5 : (index + 1) * 5].numpy()
            for draw in range(4):
                expected = numpy_generate(model.policy.get_member(index), obs, noise.draws[0][index, draw], clip=0.3)
                np.testing.assert_allclose(generated[index, draw], expected, rtol=1e-10)

    def test_log_likelihood_of_each_member(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The stacked VAEs are single ones side by side."""
        model = make_bcq()
        batch = random_batch(5)
        noise = RecordedNoise(monkeypatch)
        estimates = model.vae.log_likelihood(batch.observations, batch.actions, n_samples=3).numpy()
        assert estimates.shape == (N_MEMBERS, 5)
        for index in range(N_MEMBERS):
            single = ConditionalVAE(OBS_DIM, ACTION_DIM, net_arch=[10]).double()
            state = model.policy.get_member(index)["vae"]
            single.load_state_dict({name.removeprefix("model."): x for name, x in state.items() if name.startswith("model.")})
            draws = iter(noise.draws)
            monkeypatch.setattr(th, "randn_like", lambda like, draws=draws, index=index: th.as_tensor(next(draws)[index]))
            expected = single.log_likelihood(batch.observations, batch.actions, n_samples=3)
            np.testing.assert_allclose(estimates[index], expected.numpy(), rtol=1e-10)


class TestLosses:
    @pytest.mark.parametrize("per_member", [True, False], ids=["rows of their own", "same rows"])
    def test_against_numpy(self, monkeypatch: pytest.MonkeyPatch, per_member: bool) -> None:
        """VAE, critics and perturbation networks, each with those that were updated before it."""
        batch_size, n_target_actions, gamma, phi, bcq_lambda = 5, 4, 0.9, 0.4, 0.6
        model = make_bcq(gamma=gamma, bcq_lambda=bcq_lambda, n_target_actions=n_target_actions, policy_kwargs={"phi": phi})
        for network in (model.vae, model.critic, model.actor):
            network.optimizer.param_groups[0]["lr"] = 0.05
        batch = random_batch(N_MEMBERS * batch_size if per_member else batch_size)
        noise = RecordedNoise(monkeypatch)
        before = [model.policy.get_member(index) for index in range(N_MEMBERS)]
        logged = model._update(batch, per_member)
        after = [model.policy.get_member(index) for index in range(N_MEMBERS)]
        encoder_noise, target_noise, actor_noise = noise.draws

        vae_losses, critic_losses, actor_losses, q_data = [], [], [], []
        for index in range(N_MEMBERS):
            old, new = before[index], after[index]
            rows = slice(index * batch_size, (index + 1) * batch_size) if per_member else slice(None)
            obs, next_obs, actions = (
                getattr(batch, name)[rows].numpy() for name in ("observations", "next_observations", "actions")
            )
            mean, log_std = np.split(numpy_mlp(old["vae"], "model.encoder", obs, actions), 2, axis=1)
            latents = mean + np.exp(log_std) * encoder_noise[index]
            decoded = np.tanh(numpy_mlp(old["vae"], "model.decoder", obs, latents))
            # The published weighting of the two terms
            published = np.mean((actions - decoded) ** 2)
            published += 0.5 * np.mean(-0.5 * (1 + 2 * log_std - mean**2 - np.exp(2 * log_std)))
            vae_losses.append(4 * ACTION_DIM * published + ACTION_DIM * 0.5 * np.log(2 * np.pi / 8))

            values = []
            for draw in range(n_target_actions):
                generated = numpy_generate(new, next_obs, target_noise[index, draw])
                next_actions = numpy_perturb(old["actor_target"], next_obs, generated, phi)
                q1, q2 = numpy_q_values(old["critic_target"], next_obs, next_actions)
                values.append(bcq_lambda * np.minimum(q1, q2) + (1 - bcq_lambda) * np.maximum(q1, q2))
            target = batch.rewards[rows, 0].numpy() + gamma * (1 - batch.dones[rows, 0].numpy()) * np.max(values, axis=0)
            q_values = numpy_q_values(old["critic"], obs, actions)
            q_data.append(q_values)
            critic_losses.append(np.mean((q_values - target) ** 2))

            perturbed = numpy_perturb(old["actor"], obs, numpy_generate(new, obs, actor_noise[index, 0]), phi)
            actor_losses.append(-np.mean(numpy_q_values(new["critic"], obs, perturbed)[0]))

        assert logged["vae_loss"] == pytest.approx(np.mean(vae_losses), rel=1e-9)
        assert logged["critic_loss"] == pytest.approx(np.mean(critic_losses), rel=1e-9)
        assert logged["actor_loss"] == pytest.approx(np.mean(actor_losses), rel=1e-9)
        assert logged["q_data"] == pytest.approx(np.mean(q_data), rel=1e-9)
        for old, new in zip(before, after, strict=True):
            for learned in ("actor", "critic"):
                for name, value in old[f"{learned}_target"].items():
                    expected = 0.995 * value + 0.005 * new[learned][name]
                    np.testing.assert_allclose(new[f"{learned}_target"][name].numpy(), expected.numpy(), rtol=1e-10)

    @pytest.mark.parametrize("network", ["critic_target", "actor_target"])
    def test_targets_have_features_of_their_own(self, monkeypatch: pytest.MonkeyPatch, network: str) -> None:
        losses = []
        for shift in (0.0, 1.0):
            model = make_bcq(policy_kwargs={"features_extractor_class": LinearExtractor, "phi": 1.0})
            with th.no_grad():
                for parameter in getattr(model, network).features_extractor.parameters():
                    parameter.add_(shift)
            with monkeypatch.context() as noise:
                RecordedNoise(noise)
                losses.append(model._update(random_batch(8), per_member=False)["critic_loss"])
        assert losses[0] != losses[1]

    def test_perturbation_climbs_the_first_critic(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The perturbation network alone moves, to actions to which the first critics give higher values."""
        model = make_bcq(policy_kwargs={"phi": 0.5})
        learning_rates = {"vae": 0.0, "critic": 0.0, "actor": 1e-2}
        for network, learning_rate in learning_rates.items():
            getattr(model, network).optimizer.param_groups[0]["lr"] = learning_rate
        before = {network: parameters_of(getattr(model, network)) for network in learning_rates}
        noise = RecordedNoise(monkeypatch)
        losses = []
        for _ in range(20):
            noise.start(0, None)
            losses.append(model._update(random_batch(16), per_member=False)["actor_loss"])
        assert losses[-1] < losses[0] - 0.02
        assert_same(
            {name: parameters_of(getattr(model, name)) for name in ("vae", "critic")},
            {k: before[k] for k in ("vae", "critic")},
        )


class TestActing:
    @pytest.mark.parametrize("deterministic", [True, False])
    def test_best_of_the_candidates_of_all_members(self, monkeypatch: pytest.MonkeyPatch, deterministic: bool) -> None:
        """By the mean over the members of their first critics; two candidates of each of three members."""
        model = make_bcq(policy_kwargs={"phi": 0.4})
        noise = RecordedNoise(monkeypatch)
        obs = random_batch(7).observations
        members = [model.policy.get_member(index) for index in range(N_MEMBERS)]
        with th.no_grad():
            actions = model.policy._predict(obs, deterministic).numpy()
        assert len(noise.draws) == (0 if deterministic else 1)
        candidates = []
        for index, member in enumerate(members):
            for draw in range(2):
                latents = (
                    model.vae.fixed_latents[index, draw].expand(7, -1).numpy()
                    if deterministic
                    else noise.draws[0][index, draw]
                )
                generated = numpy_generate(member, obs.numpy(), latents)
                candidates.append(numpy_perturb(member["actor"], obs.numpy(), generated, 0.4))
        values = [np.mean([numpy_q_values(x["critic"], obs.numpy(), a)[0] for x in members], axis=0) for a in candidates]
        best = np.argmax(values, axis=0)
        np.testing.assert_allclose(actions, np.array(candidates)[best, np.arange(7)], rtol=1e-10)
        assert len(np.unique(best // 2)) > 1  # not always of the same member

    @pytest.mark.parametrize(("ensemble_size", "n_candidates", "per_member"), [(1, 100, 100), (5, 100, 20), (3, 10, 4)])
    def test_number_of_candidates(self, ensemble_size: int, n_candidates: int, per_member: int) -> None:
        model = make_bcq(policy_kwargs={"ensemble_size": ensemble_size, "n_candidates": n_candidates})
        assert model.vae.fixed_latents.shape == (ensemble_size, per_member, 2 * ACTION_DIM)
        assert model.vae.fixed_latents.abs().max() <= 0.5

    def test_actions_in_the_bounds_of_the_environment(self) -> None:
        env = TinyEnv(action_space=spaces.Box(np.array([-2.0], np.float32), np.array([6.0], np.float32)))
        model = make_bcq(env)
        obs = random_batch(50).observations.numpy()
        first, second = (model.predict(obs, deterministic=True)[0] for _ in range(2))
        np.testing.assert_array_equal(first, second)
        others = model.predict(obs, deterministic=False)[0]
        assert (first != others).any()
        with th.no_grad():
            scaled = model.policy._predict(th.as_tensor(obs), deterministic=True).numpy()
        np.testing.assert_allclose(first, 2 + 4 * scaled, rtol=1e-5)


class TestMembers:
    def test_are_independent_agents_offline(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Three members at once equal three runs of one, on the same batches and noise."""
        batch_size, n_updates = 8, 4
        kwargs: dict[str, Any] = {"dataset": make_dataset(), "learning_rate": 1e-2, "n_target_actions": 3}
        ensemble = make_bcq(**kwargs)
        singles = [make_bcq(policy_kwargs={"ensemble_size": 1}, **kwargs) for _ in range(N_MEMBERS)]
        for index, single in enumerate(singles):
            single.policy.set_member(0, ensemble.policy.get_member(index))
        noise = RecordedNoise(monkeypatch)

        def run(model: BCQ, member: int | None) -> None:
            for update in range(n_updates):
                noise.start(update, member)
                batch = random_batch(N_MEMBERS * batch_size, seed=update)
                if member is not None:
                    batch = batch_of_member(batch, member, batch_size)
                monkeypatch.setattr(model.replay_buffer, "sample_offline", lambda *args, batch=batch, **kw: batch)
                model.train_offline(gradient_steps=1, batch_size=batch_size)

        run(ensemble, None)
        for index, single in enumerate(singles):
            run(single, index)
            assert_close_members(ensemble.policy.get_member(index), single.policy.get_member(0))

    def test_one_member_does_the_same_in_both_phases(self, monkeypatch: pytest.MonkeyPatch) -> None:
        models = [make_bcq(policy_kwargs={"ensemble_size": 1}) for _ in range(2)]
        noise = RecordedNoise(monkeypatch)
        for model, per_member in zip(models, (True, False), strict=True):
            for update in range(3):
                noise.start(update, None)
                model._update(random_batch(8, seed=update), per_member)
        assert_same(models[0].policy.state_dict(), models[1].policy.state_dict())

    def test_out_and_in(self) -> None:
        """A member can be moved to another place; targets that are missing are copies."""
        model = make_bcq()
        member, other = model.policy.get_member(0), model.policy.get_member(1)
        model.policy.set_member(2, member)
        assert_same(model.policy.get_member(2), member)
        assert_same(model.policy.get_member(1), other)
        model.policy.set_member(2, {name: other[name] for name in ("actor", "critic", "vae")})
        assert_same(model.policy.get_member(2)["actor_target"], other["actor"])
        assert_same(model.policy.get_member(2)["critic_target"], other["critic"])
        assert_same(model.policy.get_member(2)["vae"], other["vae"])

    @pytest.mark.parametrize("missing", ["actor", "critic", "vae"])
    def test_incomplete_member(self, missing: str) -> None:
        model = make_bcq()
        before = parameters_of(model.policy)
        member = {name: state for name, state in model.policy.get_member(0).items() if missing not in name}
        with pytest.raises(
            ValueError, match=rf"`member` must hold the state dicts? '{'actor' if missing == 'critic' else missing}'"
        ):
            model.policy.set_member(1, member)
        assert_same(parameters_of(model.policy), before)


class TestErrors:
    @pytest.mark.parametrize(
        ("kwargs", "match"),
        [
            ({"bcq_lambda": -0.1}, r"`bcq_lambda` must be in \[0, 1\], got -0.1"),
            ({"bcq_lambda": 1.1}, r"`bcq_lambda` must be in \[0, 1\], got 1.1"),
            ({"n_target_actions": 0}, "`n_target_actions` must be at least 1, got 0"),
            ({"policy_kwargs": {"phi": -0.1}}, r"`phi` must be in \[0, 2\], got -0.1"),
            ({"policy_kwargs": {"phi": float("nan")}}, r"`phi` must be in \[0, 2\], got nan"),
            ({"policy_kwargs": {"n_candidates": 0}}, "`n_candidates` must be an integer of at least 1, got 0"),
            ({"policy_kwargs": {"n_candidates": 2.5}}, "`n_candidates` must be an integer of at least 1, got 2.5"),
            ({"n_target_actions": 2.5}, "`n_target_actions` must be an integer, got 2.5"),
            ({"policy_kwargs": {"vae_net_arch": [0]}}, r"`vae_net_arch` must be a list of integers of at least 1, got \[0\]"),
            ({"policy_kwargs": {"vae_net_arch": "750"}}, "`vae_net_arch` must be a list of integers of at least 1, got '750'"),
            ({"policy_kwargs": {"latent_clip": 0.0}}, "`latent_clip` must be above 0, got 0.0"),
            ({"policy_kwargs": {"latent_dim": 0}}, "`latent_dim` must be an integer of at least 1, got 0"),
            ({"policy_kwargs": {"latent_dim": 2.5}}, "`latent_dim` must be an integer of at least 1, got 2.5"),
            (
                {"policy_kwargs": {"share_features_extractor": True}},
                "`share_features_extractor=True` is not supported, remove it",
            ),
        ],
        ids=str,
    )
    def test_constructor(self, kwargs: dict[str, Any], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            make_bcq(**kwargs)

    def test_policy_class(self) -> None:
        with pytest.raises(ValueError, match="`policy` must be a name or derived from BCQPolicy, got TD3Policy"):
            BCQ(TD3Policy, "Pendulum-v1")  # type: ignore[arg-type]

    def test_policy_class_of_ones_own(self) -> None:
        class OwnPolicy(BCQPolicy):
            pass

        model = BCQ(OwnPolicy, "Pendulum-v1", buffer_size=10, policy_kwargs={"vae_net_arch": [8]})
        assert type(model.policy) is OwnPolicy
