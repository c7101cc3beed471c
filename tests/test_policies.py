"""The stacked ensemble against a loop over SB3's own networks, Eq. 5 against NumPy, and members in and out."""

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import make_dataset, parameters_of, small_model
from stable_baselines3 import SAC
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.sac.policies import LOG_STD_MAX, LOG_STD_MIN, Actor, CnnPolicy, MultiInputPolicy, SACPolicy
from torch import nn

from sb3_off2on import EnsembleCQLPolicy, Off2OnSAC, policies
from sb3_off2on.images import CogCNN, FlatCombinedExtractor, StridedCNN
from sb3_off2on.policies import EnsembleCnnPolicy, EnsembleCritic, EnsembleMultiInputPolicy, moment_matching
from sb3_off2on.stacking import frozen, stack_modules

ACTION_SPACE = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([1.0, 10.0], np.float32))
VECTOR_SPACE = spaces.Box(-1, 1, (3,), np.float32)
IMAGE_SPACE = spaces.Box(0, 255, (1, 36, 36), np.uint8)
DICT_SPACE = spaces.Dict({"image": IMAGE_SPACE, "vector": VECTOR_SPACE})
SPACES: dict[str, spaces.Space] = {"mlp": VECTOR_SPACE, "cnn": IMAGE_SPACE, "multi": DICT_SPACE}
ENSEMBLES: dict[str, type[EnsembleCQLPolicy]] = {
    "mlp": EnsembleCQLPolicy,
    "cnn": EnsembleCnnPolicy,
    "multi": EnsembleMultiInputPolicy,
}
SB3_POLICIES: dict[str, type[SACPolicy]] = {"mlp": SACPolicy, "cnn": CnnPolicy, "multi": MultiInputPolicy}
# Small ones, where nothing else is asked for
DEFAULTS: dict[str, dict[str, Any]] = {
    "mlp": {"net_arch": [8, 6]},
    "cnn": {"net_arch": [8], "features_extractor_kwargs": {"features_dim": 10}},
    "multi": {"net_arch": [8], "features_extractor_kwargs": {"cnn_output_dim": 10}},
}
N_MEMBERS, BATCH_SIZE, ACTION_DIM = 3, 4, 2


class SmallCNN(BaseFeaturesExtractor):
    """An extractor of a user's own, with a convolution, parameters in several levels and a parametrised activation."""

    def __init__(self, observation_space: spaces.Space) -> None:
        super().__init__(observation_space, features_dim=5)
        self.convolution = nn.Sequential(nn.Conv2d(1, 2, kernel_size=8, stride=7), nn.PReLU(2))
        self.head = nn.Linear(50, 5, bias=False)

    def forward(self, x: th.Tensor) -> th.Tensor:
        return self.head(self.convolution(x).flatten(start_dim=1))


class StatelessExtractor(BaseFeaturesExtractor):
    """One without parameters."""

    def __init__(self, observation_space: spaces.Space) -> None:
        super().__init__(observation_space, features_dim=6)

    def forward(self, x: th.Tensor) -> th.Tensor:
        return th.cat([x.sin(), x.cos()], dim=1)


class BatchNormExtractor(BaseFeaturesExtractor):
    """One with buffers."""

    def __init__(self, observation_space: spaces.Space) -> None:
        super().__init__(observation_space, features_dim=4)
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))

    def forward(self, x: th.Tensor) -> th.Tensor:
        return self.layers(x)


CASES: list[tuple[str, dict[str, Any]]] = [
    ("mlp", {}),
    ("mlp", {"net_arch": {"pi": [7], "qf": [9, 5, 4]}}),
    ("mlp", {"net_arch": []}),
    ("mlp", {"activation_fn": nn.Tanh}),
    ("mlp", {"activation_fn": nn.ELU}),
    ("mlp", {"activation_fn": nn.PReLU}),
    ("mlp", {"n_critics": 1}),
    ("mlp", {"n_critics": 3}),
    ("mlp", {"share_features_extractor": True}),
    ("mlp", {"features_extractor_class": StatelessExtractor}),
    ("cnn", {}),
    ("cnn", {"features_extractor_class": SmallCNN, "features_extractor_kwargs": {}}),
    ("cnn", {"features_extractor_class": CogCNN, "features_extractor_kwargs": {}}),
    ("cnn", {"features_extractor_class": StridedCNN, "features_extractor_kwargs": {}}),
    ("cnn", {"share_features_extractor": True, "n_critics": 1}),
    ("multi", {}),
    ("multi", {"features_extractor_class": FlatCombinedExtractor, "features_extractor_kwargs": {"cnn_class": StridedCNN}}),
    ("multi", {"share_features_extractor": True}),
]
CASE_IDS = [kind + "".join(f"-{getattr(value, '__name__', value)}" for value in kwargs.values()) for kind, kwargs in CASES]
# The first is not SB3's; the second has running averages and is compared by itself
MORE_CASES: list[tuple[str, dict[str, Any]]] = [
    ("mlp", {"critic_layer_norm": True}),
    ("mlp", {"features_extractor_class": BatchNormExtractor}),
]
every_case = pytest.mark.parametrize(("kind", "kwargs"), CASES, ids=CASE_IDS)
every_kind = pytest.mark.parametrize("kind", ["mlp", "cnn", "multi"])


def learning_rate(_: float) -> float:
    return 1e-3


def make_ensemble(kind: str = "mlp", ensemble_size: Any = N_MEMBERS, seed: int = 0, **kwargs: Any) -> EnsembleCQLPolicy:
    th.manual_seed(seed)
    return ENSEMBLES[kind](
        SPACES[kind], ACTION_SPACE, learning_rate, ensemble_size=ensemble_size, **{**DEFAULTS[kind], **kwargs}
    )


def make_sb3_policy(kind: str = "mlp", seed: int = 0, **kwargs: Any) -> SACPolicy:
    th.manual_seed(seed)
    return SB3_POLICIES[kind](SPACES[kind], ACTION_SPACE, learning_rate, **{**DEFAULTS[kind], **kwargs})


def state_dicts(policy: SACPolicy) -> dict[str, dict[str, th.Tensor]]:
    return {name: getattr(policy, name).state_dict() for name in ("actor", "critic", "critic_target")}


def ensemble_of(members: list[SACPolicy], kind: str = "mlp", **kwargs: Any) -> EnsembleCQLPolicy:
    """Built with weights of its own, then given those of the members, one by one."""
    ensemble = make_ensemble(kind, len(members), seed=100, **kwargs)
    for index, member in enumerate(members):
        ensemble.set_member(index, state_dicts(member))
    return ensemble


def observations(kind: str, n: int, seed: int = 0) -> Any:
    space = SPACES[kind]
    space.seed(seed)
    samples = [space.sample() for _ in range(n)]
    if isinstance(space, spaces.Dict):
        return {key: th.as_tensor(np.stack([sample[key] for sample in samples])) for key in space.spaces}
    return th.as_tensor(np.stack(samples))


def rows(obs: Any, start: int, stop: int) -> Any:
    return {key: value[start:stop] for key, value in obs.items()} if isinstance(obs, dict) else obs[start:stop]


def batches(kind: str, per_member: bool) -> tuple[Any, list[Any]]:
    """Observations as the ensemble takes them, and those that each member sees."""
    obs = observations(kind, N_MEMBERS * BATCH_SIZE if per_member else BATCH_SIZE)
    if not per_member:
        return obs, [obs] * N_MEMBERS
    return obs, [rows(obs, index * BATCH_SIZE, (index + 1) * BATCH_SIZE) for index in range(N_MEMBERS)]


def random_tensor(*shape: int, seed: int = 0) -> th.Tensor:
    return th.as_tensor(np.random.default_rng(seed).normal(size=shape), dtype=th.float32)


def assert_close(got: th.Tensor, expected: th.Tensor, name: str = "") -> None:
    np.testing.assert_allclose(got.detach().numpy(), expected.detach().numpy(), rtol=1e-5, atol=1e-5, err_msg=name)


def assert_same_states(got: dict[str, dict[str, th.Tensor]], expected: dict[str, dict[str, th.Tensor]]) -> None:
    assert set(got) == set(expected)
    for network, state in expected.items():
        assert set(got[network]) == set(state)
        for name, value in state.items():
            assert th.equal(got[network][name], value), f"{network} {name}"


def gradient_step(network: nn.Module, loss: th.Tensor) -> None:
    """After a step of plain gradient descent, networks of the same weights are the same if their gradients were."""
    network.zero_grad()
    loss.backward()
    th.optim.SGD(network.parameters(), lr=1.0).step()


@pytest.fixture
def use_noise(monkeypatch: pytest.MonkeyPatch) -> Callable[[th.Tensor], None]:
    """Choose the standard normal numbers that the next actions are made from."""

    def use(noise: th.Tensor) -> None:
        monkeypatch.setattr("torch.distributions.normal._standard_normal", lambda shape, dtype, device: noise.reshape(shape))
        monkeypatch.setattr(th, "randn_like", lambda x: noise.reshape(x.shape))

    return use


class TestAgainstLoop:
    """N members at once are N of SB3's networks one after the other."""

    @pytest.mark.parametrize("per_member", [False, True], ids=["shared-batch", "own-batches"])
    @every_case
    def test_actors(self, kind: str, kwargs: dict[str, Any], per_member: bool, use_noise: Callable[[th.Tensor], None]) -> None:
        members = [make_sb3_policy(kind, seed, **kwargs) for seed in range(N_MEMBERS)]
        ensemble = ensemble_of(members, kind, **kwargs)
        obs, member_obs = batches(kind, per_member)
        noise = random_tensor(N_MEMBERS, BATCH_SIZE, ACTION_DIM)
        mean_weights, log_std_weights = random_tensor(2, N_MEMBERS, BATCH_SIZE, ACTION_DIM, seed=1)

        mean_actions, log_std = ensemble.actor.member_action_dist_params(obs, per_member)
        assert mean_actions.shape == log_std.shape == (N_MEMBERS, BATCH_SIZE, ACTION_DIM)
        use_noise(noise)
        actions, log_prob = ensemble.actor.sample_from_params(mean_actions, log_std)
        assert actions.shape == (N_MEMBERS, 1, BATCH_SIZE, ACTION_DIM)
        assert log_prob.shape == (N_MEMBERS, 1, BATCH_SIZE)
        loss = (mean_weights * mean_actions + log_std_weights * log_std + actions.squeeze(1) ** 2).mean(dim=(1, 2)).sum()
        gradient_step(ensemble.actor, loss + log_prob.mean(dim=(1, 2)).sum())

        for index, member in enumerate(members):
            expected_mean, expected_log_std, _ = member.actor.get_action_dist_params(member_obs[index])
            use_noise(noise[index])
            expected_actions, expected_log_prob = member.actor.action_log_prob(member_obs[index])
            assert_close(mean_actions[index], expected_mean)
            assert_close(log_std[index], expected_log_std)
            assert_close(actions[index, 0], expected_actions)
            assert_close(log_prob[index, 0], expected_log_prob)

            before = copy.deepcopy(member.actor.state_dict())
            loss = (
                mean_weights[index] * expected_mean + log_std_weights[index] * expected_log_std + expected_actions**2
            ).mean()
            gradient_step(member.actor, loss + expected_log_prob.mean())
            stepped = ensemble.get_member(index)["actor"]
            for name, value in member.actor.state_dict().items():
                assert not th.equal(value, before[name])
                assert_close(stepped[name], value, name)

    @pytest.mark.parametrize("per_member", [False, True], ids=["shared-batch", "own-batches"])
    @every_case
    def test_critics(self, kind: str, kwargs: dict[str, Any], per_member: bool) -> None:
        members = [make_sb3_policy(kind, seed, **kwargs) for seed in range(N_MEMBERS)]
        ensemble = ensemble_of(members, kind, **kwargs)
        obs, member_obs = batches(kind, per_member)
        n_critics = kwargs.get("n_critics", 2)
        actions = th.tanh(random_tensor(N_MEMBERS, BATCH_SIZE, ACTION_DIM))
        if not per_member:
            actions[:] = actions[0].clone()
        weights = random_tensor(N_MEMBERS, n_critics, BATCH_SIZE, seed=1)

        q_values = ensemble.critic.member_q_values(obs, actions if per_member else actions[0], per_member)
        assert q_values.shape == (N_MEMBERS, n_critics, BATCH_SIZE)
        with th.no_grad():  # features extractors run another way then
            assert_close(ensemble.critic.member_q_values(obs, actions if per_member else actions[0], per_member), q_values)
        gradient_step(ensemble.critic, (weights * q_values).mean(dim=2).sum())
        for index, member in enumerate(members):
            expected = member.critic(member_obs[index], actions[index])
            for critic in range(n_critics):
                assert_close(q_values[index, critic], expected[critic].squeeze(1))
            stacked = th.cat(expected, dim=1).T
            gradient_step(member.critic, (weights[index] * stacked).mean(dim=1).sum())
            stepped = ensemble.get_member(index)["critic"]
            for name, value in member.critic.state_dict().items():
                assert_close(stepped[name], value, name)

    def test_critic_forward_is_that_of_sb3(self) -> None:
        """A tuple of ``(batch_size, 1)``, member by member; the target network was copied by `set_member` as well."""
        members = [make_sb3_policy(seed=seed) for seed in range(N_MEMBERS)]
        ensemble = ensemble_of(members)
        obs, actions = observations("mlp", BATCH_SIZE), th.tanh(random_tensor(BATCH_SIZE, ACTION_DIM))
        for network in ("critic", "critic_target"):
            expected = [q_values for member in members for q_values in getattr(member, network)(obs, actions)]
            got = getattr(ensemble, network)(obs, actions)
            assert isinstance(got, tuple)
            for q_values, expected_q_values in zip(got, expected, strict=True):
                assert q_values.shape == (BATCH_SIZE, 1)
                assert_close(q_values, expected_q_values)

    def test_actions_of_every_critic_of_its_own(self) -> None:
        """`q_values` also takes an action for each critic: ``(ensemble_size, n_critics, batch_size, action_dim)``."""
        ensemble = make_ensemble()
        features = random_tensor(N_MEMBERS, BATCH_SIZE, 3)
        actions = random_tensor(N_MEMBERS, 2, BATCH_SIZE, ACTION_DIM, seed=1)
        q_values = ensemble.critic.q_values(features, actions)
        for critic in range(2):
            expected = ensemble.critic.q_values(features, actions[:, critic].unsqueeze(1))
            assert_close(q_values[:, critic], expected[:, critic])

    @pytest.mark.parametrize("activation_fn", [nn.ReLU, nn.PReLU])
    def test_critic_layer_norm(self, activation_fn: type[nn.Module]) -> None:
        """A layer norm between every hidden linear layer and its activation function, in the critics alone."""
        net_arch = [8, 6]
        ensemble = make_ensemble(critic_layer_norm=True, net_arch=net_arch, activation_fn=activation_fn)
        # Away from ones and zeros, to be seen
        with th.no_grad():
            for network in (ensemble.critic, ensemble.critic_target):
                for parameter in network.parameters():
                    parameter.add_(0.1 * th.randn_like(parameter))
        plain = make_sb3_policy(net_arch=net_arch, activation_fn=activation_fn)
        assert set(ensemble.get_member(0)["actor"]) == set(plain.actor.state_dict())
        obs, actions = observations("mlp", BATCH_SIZE), th.tanh(random_tensor(BATCH_SIZE, ACTION_DIM))
        for name in ("critic", "critic_target"):
            q_values = getattr(ensemble, name).member_q_values(obs, actions)
            for member, critic in np.ndindex(N_MEMBERS, 2):
                hidden_layers = [
                    nn.Linear(5, 8),
                    nn.LayerNorm(8),
                    activation_fn(),
                    nn.Linear(8, 6),
                    nn.LayerNorm(6),
                    activation_fn(),
                ]
                q_network = nn.Sequential(*hidden_layers, nn.Linear(6, 1))
                state, prefix = ensemble.get_member(member)[name], f"qf{critic}."
                own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
                q_network.load_state_dict(own, strict=True)
                assert_close(q_values[member, critic], q_network(th.cat([obs, actions], dim=1)).squeeze(1))

    def test_layer_norm_reaches_the_model(self) -> None:
        model = Off2OnSAC(
            "MlpPolicy", "Pendulum-v1", policy_kwargs={"net_arch": [8], "critic_layer_norm": True}, buffer_size=10
        )
        assert any("LayerNorm" in repr(layer) for layer in model.critic.modules())
        assert not any("LayerNorm" in repr(layer) for layer in model.actor.modules())

    @pytest.mark.parametrize("per_member", [False, True], ids=["shared-batch", "own-batches"])
    def test_batch_norm_of_an_extractor(self, per_member: bool) -> None:
        """Statistics of each member's own batch, and running averages of them."""
        kwargs: dict[str, Any] = {"features_extractor_class": BatchNormExtractor}
        members = [make_sb3_policy(seed=seed, **kwargs) for seed in range(N_MEMBERS)]
        ensemble = ensemble_of(members, **kwargs)
        obs, member_obs = batches("mlp", per_member)
        for training in (True, False):
            ensemble.set_training_mode(training)
            mean_actions, _ = ensemble.actor.member_action_dist_params(obs, per_member)
            for index, member in enumerate(members):
                member.set_training_mode(training)
                assert_close(mean_actions[index], member.actor.get_action_dist_params(member_obs[index])[0])
                for name, value in ensemble.get_member(index)["actor"].items():
                    assert_close(value, member.actor.state_dict()[name], name)

    @every_kind
    def test_training_mode(self, kind: str) -> None:
        """That of SB3's policy, whatever the networks were in before."""
        ensemble, sb3_policy = make_ensemble(kind), make_sb3_policy(kind)
        for mode, mode_before, *networks_before in itertools.product([True, False], repeat=4):
            for policy in (ensemble, sb3_policy):
                policy.set_training_mode(mode_before)
                for network, network_before in zip((policy.actor, policy.critic), networks_before, strict=True):
                    network.set_training_mode(network_before)
                policy.set_training_mode(mode)
            for name in ("actor", "critic", "critic_target"):
                modes = {module.training for module in getattr(ensemble, name).modules()}
                assert modes == {getattr(sb3_policy, name).training}
            assert ensemble.training == sb3_policy.training == mode

    def test_evaluation_mode_is_entered_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ensemble = make_ensemble("mlp")
        obs = observations("mlp", 1).numpy()
        ensemble.predict(obs)
        calls: list[bool] = []
        monkeypatch.setattr(ensemble.actor, "set_training_mode", calls.append)
        ensemble.predict(obs)
        assert calls == []
        ensemble.set_training_mode(True)
        assert calls == [True]


def extractor_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    return {name: value for name, value in network.named_parameters() if name.startswith("features_extractor.")}


class TestSharedFeaturesExtractor:
    @pytest.mark.parametrize("kind", ["cnn", "multi"])
    def test_parameters_are_the_same_ones(self, kind: str) -> None:
        ensemble = make_ensemble(kind, share_features_extractor=True)
        networks = (ensemble.actor, ensemble.critic, ensemble.critic_target)
        actor_parameters, critic_parameters, target_parameters = map(extractor_parameters, networks)
        assert actor_parameters
        assert set(actor_parameters) == set(critic_parameters) == set(target_parameters)
        for name, parameter in actor_parameters.items():
            assert critic_parameters[name] is parameter
            assert target_parameters[name] is not parameter
            assert th.equal(target_parameters[name], parameter)

    @pytest.mark.parametrize("kind", ["cnn", "multi"])
    @pytest.mark.parametrize("shared", [True, False])
    def test_critic_loss_trains_the_extractor_only_if_it_is_its_own(self, kind: str, shared: bool) -> None:
        """SB3's rule, in the gradients and in what the optimizers hold."""
        ensemble = make_ensemble(kind, share_features_extractor=shared)
        obs, actions = observations(kind, BATCH_SIZE), th.zeros(BATCH_SIZE, ACTION_DIM)
        ensemble.critic.member_q_values(obs, actions).sum().backward()
        of_extractor = extractor_parameters(ensemble.critic).values()
        assert {parameter.grad is None for parameter in of_extractor} == {shared}
        assert all(parameter.grad is not None for parameter in ensemble.critic.qf.parameters())
        optimized = {id(parameter) for parameter in ensemble.critic.optimizer.param_groups[0]["params"]}
        assert {id(parameter) in optimized for parameter in of_extractor} == {not shared}
        assert {id(parameter) for parameter in ensemble.critic.qf.parameters()} <= optimized

        ensemble.actor.member_action_dist_params(obs)[0].sum().backward()
        optimized = {id(parameter) for parameter in ensemble.actor.optimizer.param_groups[0]["params"]}
        for parameter in extractor_parameters(ensemble.actor).values():
            assert parameter.grad is not None
            assert id(parameter) in optimized

    def test_gradient_stays_off_inside_no_grad(self) -> None:
        ensemble = make_ensemble("cnn", share_features_extractor=False)
        with th.no_grad():
            assert not ensemble.critic.extract_member_features(observations("cnn", 2)).requires_grad

    def test_member_with_two_extractors_does_not_fit_a_shared_one(self) -> None:
        """Actor and critic of the member would have to be the same there; nothing is written."""
        ensemble = make_ensemble("cnn", share_features_extractor=True)
        before = ensemble.get_member(0)
        member = make_ensemble("cnn", share_features_extractor=False).get_member(0)
        with pytest.raises(ValueError, match=r"differ in 'features_extractor.*shared with `share_features_extractor=True`"):
            ensemble.set_member(0, member)
        for network, state in ensemble.get_member(0).items():
            for name, value in state.items():
                assert th.equal(value, before[network][name])


class TestMomentMatching:
    def test_against_numpy(self) -> None:
        """Eq. 5 as it stands, one action dimension at a time."""
        rng = np.random.default_rng(0)
        means, log_stds = rng.normal(size=(5, 4, 3)), rng.normal(-1, 0.7, size=(5, 4, 3))
        mixture_mean, mixture_log_std = moment_matching(th.as_tensor(means), th.as_tensor(log_stds))
        assert mixture_mean.shape == mixture_log_std.shape == (4, 3)
        for row, dimension in np.ndindex(4, 3):
            mu, sigma = means[:, row, dimension], np.exp(log_stds[:, row, dimension])
            mean = np.mean(mu)
            variance = np.mean(sigma**2 + mu**2) - mean**2
            assert mixture_mean[row, dimension].item() == pytest.approx(mean, rel=1e-12)
            assert mixture_log_std[row, dimension].item() == pytest.approx(np.log(np.sqrt(variance)), rel=1e-9)

    def test_against_samples_of_the_mixture(self) -> None:
        """A member drawn at random, then an action of its Gaussian."""
        n = 200_000
        rng = np.random.default_rng(0)
        means, stds = np.array([-2.0, 0.5, 1.0]), np.array([0.3, 1.0, 0.1])
        drawn = rng.integers(3, size=n)
        samples = rng.normal(means[drawn], stds[drawn])
        mean, log_std = moment_matching(th.as_tensor(means).view(3, 1, 1), th.as_tensor(np.log(stds)).view(3, 1, 1))
        assert mean.item() == pytest.approx(samples.mean(), abs=5 * samples.std() / np.sqrt(n))
        assert np.exp(log_std.item()) == pytest.approx(samples.std(), rel=0.01)

    def test_float32_with_large_means_close_to_each_other(self) -> None:
        """About 1000, 0.001 apart: the equation's difference of squares would leave nothing of the variance."""
        means = th.tensor([1000.0, 1000.001, 1000.002, 1000.003, 1000.004]).view(5, 1, 1)
        for std in (1e-4, 1e-3, 1e-2):
            log_stds = th.full_like(means, np.log(std))
            mean, log_std = moment_matching(means, log_stds)
            exact = means.double().flatten().numpy()
            expected = np.sqrt(std**2 + exact.var())
            assert mean.item() == pytest.approx(exact.mean(), rel=1e-7)
            assert np.exp(log_std.item()) == pytest.approx(expected, rel=0.01)

    def test_one_member_is_itself(self) -> None:
        """Also at the limits of SAC's standard deviations, and as to gradients."""
        mean = random_tensor(1, 4, 2).requires_grad_()
        log_std = th.linspace(LOG_STD_MIN, LOG_STD_MAX, 8).view(1, 4, 2).requires_grad_()
        mixture_mean, mixture_log_std = moment_matching(mean, log_std)
        assert th.equal(mixture_mean, mean[0])
        th.testing.assert_close(mixture_log_std, log_std[0], rtol=1e-6, atol=1e-6)
        (mixture_mean.sum() + mixture_log_std[1:3].sum()).backward()
        assert mean.grad is not None
        assert log_std.grad is not None
        th.testing.assert_close(mean.grad, th.ones(1, 4, 2))
        th.testing.assert_close(log_std.grad[0, 1:3], th.ones(2, 2))

    def test_limits_of_the_standard_deviation(self) -> None:
        far_apart = th.tensor([-100.0, 100.0]).view(2, 1, 1)
        assert moment_matching(far_apart, th.zeros(2, 1, 1))[1].item() == LOG_STD_MAX
        assert moment_matching(th.zeros(2, 1, 1), th.full((2, 1, 1), -30.0))[1].item() == LOG_STD_MIN

    def test_shapes_that_do_not_fit_are_refused(self) -> None:
        with pytest.raises(AssertionError):
            moment_matching(th.zeros(2, 3, 1), th.zeros(2, 1, 1))


class TestActing:
    @every_kind
    def test_ensemble_of_sb3_agents_plays_their_mixture(self, kind: str, use_noise: Callable[[th.Tensor], None]) -> None:
        """Deterministic: the squashed mean of the means, in the environment's range; else with Eq. 5's deviation."""
        members = [make_sb3_policy(kind, seed) for seed in range(N_MEMBERS)]
        # Deviations that are not all near 1
        with th.no_grad():
            for index, member in enumerate(members):
                parameters = dict(member.actor.named_parameters())
                parameters["log_std.bias"].fill_(-index)
                parameters["mu.bias"].uniform_(-1, 1)
        ensemble = ensemble_of(members, kind)
        obs, noise = observations(kind, BATCH_SIZE), random_tensor(BATCH_SIZE, ACTION_DIM)
        means, stds = [], []
        for member in members:
            mean, log_std, _ = member.actor.get_action_dist_params(obs)
            means.append(mean.detach().numpy())
            stds.append(np.exp(log_std.detach().numpy()))
        mixture_mean = np.mean(means, axis=0)
        mixture_std = np.sqrt(np.mean(np.square(stds) + np.square(means), axis=0) - mixture_mean**2)
        low, high = ACTION_SPACE.low, ACTION_SPACE.high

        numpy_obs = {key: value.numpy() for key, value in obs.items()} if isinstance(obs, dict) else obs.numpy()
        deterministic, _ = ensemble.predict(numpy_obs, deterministic=True)
        np.testing.assert_allclose(deterministic, low + (np.tanh(mixture_mean) + 1) / 2 * (high - low), atol=1e-5)
        use_noise(noise)
        stochastic, _ = ensemble.predict(numpy_obs)
        squashed = np.tanh(mixture_mean + mixture_std * noise.numpy())
        np.testing.assert_allclose(stochastic, low + (squashed + 1) / 2 * (high - low), atol=1e-4)

        # Log-density of the Gaussian, and the derivative of tanh
        actions, log_prob = ensemble.actor.action_log_prob(obs)
        np.testing.assert_allclose(actions.detach().numpy(), squashed, atol=1e-5)
        gaussian = -0.5 * noise.numpy() ** 2 - np.log(mixture_std * np.sqrt(2 * np.pi))
        expected = (gaussian - np.log(1 - squashed**2 + 1e-6)).sum(axis=1)
        np.testing.assert_allclose(log_prob.detach().numpy(), expected, atol=1e-4)

    @every_kind
    @pytest.mark.parametrize("deterministic", [True, False])
    def test_shapes(self, kind: str, deterministic: bool) -> None:
        ensemble = make_ensemble(kind)
        space = SPACES[kind]
        action, state = ensemble.predict(space.sample(), deterministic=deterministic)
        assert action.shape == (ACTION_DIM,)
        assert state is None
        obs = observations(kind, 5)
        numpy_obs = {key: value.numpy() for key, value in obs.items()} if isinstance(obs, dict) else obs.numpy()
        actions, _ = ensemble.predict(numpy_obs, deterministic=deterministic)
        assert actions.shape == (5, ACTION_DIM)
        assert ((actions >= ACTION_SPACE.low) & (actions <= ACTION_SPACE.high)).all()

    @pytest.mark.parametrize("deterministic", [True, False])
    def test_actions_have_a_gradient(self, deterministic: bool) -> None:
        """As SB3's: to the means always, and to the standard deviations if one was sampled."""
        ensemble = make_ensemble()
        ensemble.actor(observations("mlp", 4), deterministic=deterministic).sum().backward()
        grads = {name: parameter.grad for name, parameter in ensemble.actor.named_parameters()}
        assert grads["mu.bias"] is not None
        assert grads["mu.bias"].all()
        assert (grads["log_std.bias"] is None) == deterministic

    @pytest.mark.parametrize("transform", [th.func.jacrev, th.func.jacfwd, th.func.hessian])
    def test_torch_func(self, transform: Callable[..., Any]) -> None:
        """PyTorch's transforms of actions and Q-values, for each row, beside SB3's networks."""
        members = [make_sb3_policy(seed=seed) for seed in range(N_MEMBERS)]
        ensemble, obs, actions = ensemble_of(members, "mlp"), observations("mlp", 4), random_tensor(4, ACTION_DIM)

        def action(row: th.Tensor) -> th.Tensor:
            return ensemble.actor(row.unsqueeze(0), deterministic=True).squeeze(0)

        def expected_action(row: th.Tensor) -> th.Tensor:
            return th.stack([member.actor.mu(member.actor.latent_pi(row)) for member in members]).mean(dim=0).tanh()

        def q_values(action: th.Tensor) -> th.Tensor:
            return th.stack(ensemble.critic(obs[:1], action.unsqueeze(0))).tanh()

        def expected_q_values(action: th.Tensor) -> th.Tensor:
            return th.stack([q for member in members for q in member.critic(obs[:1], action.unsqueeze(0))]).tanh()

        for function, oracle, rows in ((action, expected_action, obs), (q_values, expected_q_values, actions)):
            expected = th.func.vmap(transform(oracle))(rows)
            th.testing.assert_close(th.func.vmap(transform(function))(rows), expected)
            assert expected.any()

    @pytest.mark.parametrize("deterministic", [True, False])
    def test_actions_without_gradient_are_fit_for_one(self, deterministic: bool) -> None:
        """E.g. as what another policy learns to imitate."""
        obs = observations("mlp", 4)
        with th.no_grad():
            actions = make_ensemble()(obs, deterministic)
        student = nn.Linear(obs.shape[1], ACTION_DIM)
        nn.functional.mse_loss(student(obs), actions).backward()

    @pytest.mark.parametrize("deterministic", [True, False])
    def test_what_an_extractor_keeps_is_fit_for_a_gradient(self, deterministic: bool) -> None:
        """E.g. a table that it makes when it first runs, here in a prediction."""

        class Scaled(FlattenExtractor):
            scale: th.Tensor | None = None

            def forward(self, observations: th.Tensor) -> th.Tensor:
                features = super().forward(observations)
                if self.scale is None:
                    self.scale = features.abs().mean()
                return features * self.scale

        ensemble = make_ensemble(features_extractor_class=Scaled)
        ensemble.predict(VECTOR_SPACE.sample(), deterministic=deterministic)
        features = observations("mlp", 4).requires_grad_()
        ensemble.actor(features).sum().backward()

    def test_actions_reach_the_bounds(self) -> None:
        ensemble = make_ensemble()
        for bias, bound in ((50.0, ACTION_SPACE.high), (-50.0, ACTION_SPACE.low)):
            with th.no_grad():
                dict(ensemble.actor.named_parameters())["mu.bias"].fill_(bias)
            np.testing.assert_allclose(ensemble.predict(VECTOR_SPACE.sample(), deterministic=True)[0], bound, rtol=1e-6)

    def test_several_samples_of_one_gaussian(self) -> None:
        """Of the Gaussian of their own member and state."""
        ensemble = make_ensemble()
        means = th.atanh(th.linspace(-0.9, 0.9, N_MEMBERS * BATCH_SIZE * ACTION_DIM)).view(N_MEMBERS, BATCH_SIZE, ACTION_DIM)
        actions, log_prob = ensemble.actor.sample_from_params(means, th.full_like(means, -9.0), n_samples=6)
        assert actions.shape == (N_MEMBERS, 6, BATCH_SIZE, ACTION_DIM)
        assert log_prob.shape == (N_MEMBERS, 6, BATCH_SIZE)
        for sample in range(6):
            th.testing.assert_close(actions[:, sample], th.tanh(means), rtol=0, atol=2e-3)
        assert len(actions.flatten().unique()) > 0.9 * actions.numel()


class TestQValuesOfMany:
    """The pass without gradient goes network by network and in pieces; the one with gradient is plain."""

    @pytest.mark.parametrize("batch_size", [1, 3, 12])
    @pytest.mark.parametrize("n_actions", [1, 3, 4, 5, 8, 9])
    def test_is_one_by_one(self, monkeypatch: pytest.MonkeyPatch, n_actions: int, batch_size: int) -> None:
        """With 12 rows at once: fewer than fit, just as many, a remainder; a batch that fills it."""
        monkeypatch.setattr(policies, "MAX_ROWS_AT_ONCE", 12)
        self.check(n_actions, batch_size)

    def test_at_its_real_size(self) -> None:
        self.check(5, policies.MAX_ROWS_AT_ONCE // 4)

    @pytest.mark.parametrize(
        "kwargs",
        [{"critic_layer_norm": True}, {"activation_fn": nn.PReLU}, {"activation_fn": nn.Tanh}, {"net_arch": []}],
        ids=["layer-norm", "prelu", "tanh", "linear"],
    )
    def test_any_network(self, kwargs: dict[str, Any]) -> None:
        self.check(4, 3, **kwargs)

    def test_a_first_layer_of_another_kind(self) -> None:
        """As a policy of one's own may have it."""
        critic = make_ensemble(n_critics=2).critic
        networks = [
            nn.Sequential(nn.Linear(3 + ACTION_DIM, 4, bias=False), nn.ReLU(), nn.Linear(4, 1)) for _ in range(2 * N_MEMBERS)
        ]
        critic.qf = stack_modules(networks)  # type: ignore[assignment]
        self.check_critic(critic, 4, 3)

    def check(self, n_actions: int, batch_size: int, **kwargs: Any) -> None:
        self.check_critic(make_ensemble(n_critics=2, **kwargs).critic, n_actions, batch_size)

    def check_critic(self, critic: EnsembleCritic, n_actions: int, batch_size: int) -> None:
        with th.no_grad():  # biases and layer norms start out alike
            for parameter in critic.qf.parameters():
                parameter.add_(0.1 * th.randn_like(parameter))
        features = random_tensor(N_MEMBERS, batch_size, 3)
        actions = random_tensor(N_MEMBERS, n_actions, batch_size, ACTION_DIM, seed=1)
        expected = th.stack([critic.q_values(features, actions[:, [action]]) for action in range(n_actions)], dim=2)
        assert expected.shape == (N_MEMBERS, 2, n_actions, batch_size)
        assert_close(critic.q_values_of_many(features, actions), expected)
        with th.no_grad():
            assert_close(critic.q_values_of_many(features, actions), expected)


class TestMembers:
    @pytest.mark.parametrize(("kind", "kwargs"), [*CASES, *MORE_CASES], ids=[*CASE_IDS, "mlp-layer-norm", "mlp-batch-norm"])
    def test_round_trip(self, kind: str, kwargs: dict[str, Any]) -> None:
        """Members of one ensemble, in another order, are those of another; nothing else changes."""
        first, second = make_ensemble(kind, seed=0, **kwargs), make_ensemble(kind, seed=1, **kwargs)
        with th.no_grad():
            for parameter in first.critic_target.parameters():
                parameter.add_(1)
        before = [second.get_member(index) for index in range(N_MEMBERS)]
        second.set_member(2, first.get_member(0))
        assert_same_states(second.get_member(2), first.get_member(0))
        for index in (0, 1):
            assert_same_states(second.get_member(index), before[index])
        second.set_member(0, first.get_member(1))
        second.set_member(1, first.get_member(2))
        for index, source in ((0, 1), (1, 2), (2, 0)):
            assert_same_states(second.get_member(index), first.get_member(source))

    @every_case
    def test_member_loads_into_sb3(self, kind: str, kwargs: dict[str, Any]) -> None:
        ensemble = make_ensemble(kind, **kwargs)
        obs, actions = observations(kind, BATCH_SIZE), th.tanh(random_tensor(BATCH_SIZE, ACTION_DIM))
        for index in range(N_MEMBERS):
            member, sb3_policy = ensemble.get_member(index), make_sb3_policy(kind, seed=10, **kwargs)
            assert type(sb3_policy.actor) is Actor
            assert type(sb3_policy.critic) is ContinuousCritic
            for network in ("actor", "critic", "critic_target"):
                getattr(sb3_policy, network).load_state_dict(member[network], strict=True)
            assert_close(
                ensemble.actor.member_action_dist_params(obs)[0][index], sb3_policy.actor.get_action_dist_params(obs)[0]
            )
            expected = th.cat(sb3_policy.critic(obs, actions), dim=1).T
            assert_close(ensemble.critic.member_q_values(obs, actions)[index], expected)

    @pytest.mark.parametrize("kind", ["mlp", "cnn"])
    def test_sb3_sac_agent_becomes_a_member(self, kind: str) -> None:
        """An ensemble of two copies of one agent plays that agent's actions."""
        policy, env = ("MlpPolicy", "Pendulum-v1") if kind == "mlp" else ("CnnPolicy", FakeImageEnv(2, 36, 36, discrete=False))
        kwargs: dict[str, Any] = dict(policy_kwargs=DEFAULTS[kind], buffer_size=10, device="cpu")
        sac = SAC(policy, env, seed=1, **kwargs)
        kwargs["policy_kwargs"] = {**DEFAULTS[kind], "ensemble_size": 2}
        model = Off2OnSAC(policy, env, seed=2, **kwargs)
        sac_env = sac.get_env()
        assert sac_env is not None
        obs = sac_env.observation_space.sample()
        expected, _ = sac.predict(obs, deterministic=True)
        assert np.abs(model.predict(obs, deterministic=True)[0] - expected).max() > 1e-4
        for index in range(2):
            model.set_member(index, state_dicts(sac.policy))
            assert_same_states(model.policy.get_member(index), state_dicts(sac.policy))
        np.testing.assert_allclose(model.predict(obs, deterministic=True)[0], expected, atol=1e-5)

    def test_critic_target_is_the_critic_where_it_is_missing(self) -> None:
        ensemble, sb3_policy = make_ensemble(), make_sb3_policy(seed=5)
        member = state_dicts(sb3_policy)
        del member["critic_target"]
        ensemble.set_member(1, member)
        got = ensemble.get_member(1)
        assert_same_states(got, {**member, "critic_target": member["critic"]})
        assert "critic_target" not in member

    def test_numpy_arrays_and_other_dtypes_are_taken(self) -> None:
        ensemble, member = make_ensemble(), make_ensemble(seed=1).get_member(0)
        arrays: Any = {
            network: {name: value.double().numpy() for name, value in state.items()} for network, state in member.items()
        }
        ensemble.set_member(0, arrays)
        assert_same_states(ensemble.get_member(0), member)

    def test_get_member_returns_copies(self) -> None:
        ensemble = make_ensemble()
        expected = copy.deepcopy(ensemble.state_dict())
        for state in ensemble.get_member(1).values():
            for value in state.values():
                assert not value.requires_grad
                value.zero_()
        for name, value in ensemble.state_dict().items():
            assert th.equal(value, expected[name])

    def test_set_member_copies(self) -> None:
        ensemble, member = make_ensemble(), make_ensemble(seed=1).get_member(0)
        ensemble.set_member(0, member)
        expected = ensemble.get_member(0)
        for state in member.values():
            for value in state.values():
                value.zero_()
        assert_same_states(ensemble.get_member(0), expected)

    @pytest.mark.parametrize("index", [-1, N_MEMBERS])
    def test_wrong_index(self, index: int) -> None:
        ensemble = make_ensemble()
        message = rf"`index` must be between 0 and 2 \(`ensemble_size - 1`\), got {index}"
        with pytest.raises(ValueError, match=message):
            ensemble.get_member(index)
        with pytest.raises(ValueError, match=message):
            ensemble.set_member(index, ensemble.get_member(0))

    @staticmethod
    def without(network: str) -> Callable[[dict[str, Any]], None]:
        return lambda member: member.pop(network)

    MISTAKES: tuple[tuple[Callable[[dict[str, Any]], Any], str], ...] = (
        (
            lambda member: member.pop("actor"),
            r"must hold the state dicts .*'critic_target', got \['critic', 'critic_target'\]",
        ),
        (lambda member: member.pop("critic"), r"must hold the state dicts .*got \['actor', 'critic_target'\]"),
        (lambda member: member.update(policy={}), r"must hold the state dicts .*got \['actor', .*, 'policy'\]"),
        (
            lambda member: member["actor"].pop("mu.bias"),
            r"`member\['actor'\]` do not fit: missing \['mu.bias'\], not known \[\]",
        ),
        (
            lambda member: member["critic"].update(qf2=th.zeros(1)),
            r"`member\['critic'\]` do not fit: missing \[\], not known \['qf2'\].*`policy_kwargs`",
        ),
        (
            lambda member: member["critic_target"].update({"qf1.4.bias": th.zeros(2)}),
            r"`member\['critic_target'\]\['qf1.4.bias'\]` has shape \(2,\) but the ensemble's is \(1,\).*`policy_kwargs`",
        ),
        # A shape that PyTorch would spread over all rows
        (
            lambda member: member["critic"].update({"qf0.0.bias": th.zeros(1)}),
            r"`member\['critic'\]\['qf0.0.bias'\]` has shape \(1,\) but the ensemble's is \(8,\)",
        ),
    )

    @pytest.mark.parametrize(("change", "message"), MISTAKES)
    def test_mistakes_write_nothing(self, change: Callable[[dict[str, Any]], Any], message: str) -> None:
        ensemble, member = make_ensemble(), make_ensemble(seed=1).get_member(0)
        expected = copy.deepcopy(ensemble.state_dict())
        change(member)
        with pytest.raises(ValueError, match=message):
            ensemble.set_member(0, member)
        for name, value in ensemble.state_dict().items():
            assert th.equal(value, expected[name])


class TestArguments:
    @pytest.mark.parametrize("ensemble_size", [0, -1, True, 2.5, "5", None])
    def test_ensemble_size(self, ensemble_size: Any) -> None:
        with pytest.raises(ValueError, match=f"`ensemble_size` must be an integer of at least 1, got {ensemble_size!r}"):
            make_ensemble(ensemble_size=ensemble_size)

    @pytest.mark.parametrize("n_critics", [0, -2, 1.5, True])
    def test_n_critics(self, n_critics: Any) -> None:
        with pytest.raises(ValueError, match=f"`n_critics` must be an integer of at least 1, got {n_critics!r}"):
            make_ensemble(n_critics=n_critics)

    def test_gsde(self) -> None:
        with pytest.raises(ValueError, match=r"`use_sde=True` is not supported: .*Use `action_noise`"):
            make_ensemble(use_sde=True)
        assert not make_ensemble(use_sde=False).actor.use_sde

    @pytest.mark.parametrize(("name", "value"), [("log_std_init", -3.0), ("use_expln", False), ("clip_mean", 2.0)])
    def test_arguments_of_gsde(self, name: str, value: Any) -> None:
        with pytest.raises(ValueError, match=f"`{name}` only has a meaning with gSDE .*remove it"):
            make_ensemble(**{name: value})

    def test_mistakes_in_policy_kwargs_reach_the_user(self) -> None:
        with pytest.raises(ValueError, match="`ensemble_size` must be an integer of at least 1, got 0"):
            Off2OnSAC("MlpPolicy", "Pendulum-v1", policy_kwargs={"ensemble_size": 0})

    @pytest.mark.parametrize(
        ("kwargs", "expected_class", "expected"),
        [
            ({}, th.optim.Adam, {"fused": True}),
            ({"optimizer_class": th.optim.AdamW}, th.optim.AdamW, {"fused": True}),
            (
                {"optimizer_kwargs": {"eps": 1e-3, "betas": (0.5, 0.9)}},
                th.optim.Adam,
                {"eps": 1e-3, "betas": (0.5, 0.9), "fused": True},
            ),
            ({"optimizer_kwargs": {"fused": False}}, th.optim.Adam, {"fused": False}),
            ({"optimizer_kwargs": {"foreach": True}}, th.optim.Adam, {"foreach": True}),
            (
                {"optimizer_class": th.optim.SGD, "optimizer_kwargs": {"momentum": 0.9}},
                th.optim.SGD,
                {"momentum": 0.9, "fused": None},
            ),
            ({"optimizer_class": th.optim.RMSprop}, th.optim.RMSprop, {}),
        ],
        ids=["default", "AdamW", "Adam-arguments", "not-fused", "foreach", "SGD", "RMSprop"],
    )
    def test_optimizer(self, kwargs: dict[str, Any], expected_class: Any, expected: dict[str, Any]) -> None:
        """Also after `reset_optimizers`, which forgets the steps done before and keeps everything else."""
        ensemble = make_ensemble(**kwargs)
        networks: list[Any] = [ensemble.actor, ensemble.critic]
        parameters = [network.optimizer.param_groups[0]["params"] for network in networks]
        for network in networks:
            network.optimizer.param_groups[0]["lr"] = 0.02
            for parameter in network.parameters():
                parameter.grad = th.ones_like(parameter)
            network.optimizer.step()
        before = [network.optimizer for network in networks]
        for fresh in (False, True):
            for index, network in enumerate(networks):
                assert type(network.optimizer) is expected_class
                group = network.optimizer.param_groups[0]
                assert {name: group[name] for name in expected} == expected
                assert group["lr"] == 0.02
                assert all(a is b for a, b in zip(group["params"], parameters[index], strict=True))
                assert (network.optimizer is not before[index]) == fresh
                assert bool(network.optimizer.state) == (not fresh)
            ensemble.reset_optimizers()

    def test_fused_steps_are_adam_steps(self) -> None:
        """The same few updates with PyTorch's plain Adam."""
        states = []
        for fused in (True, False):
            ensemble = make_ensemble(optimizer_kwargs={"fused": fused})
            for step in range(5):
                obs, actions = observations("mlp", BATCH_SIZE, seed=step), random_tensor(BATCH_SIZE, ACTION_DIM, seed=step)
                loss = ensemble.critic.member_q_values(obs, actions).pow(2).mean()
                ensemble.critic.optimizer.zero_grad()
                loss.backward()
                ensemble.critic.optimizer.step()
            states.append(ensemble.critic.state_dict())
        for name, value in states[0].items():
            assert_close(value, states[1][name], name)


class TestInitialWeights:
    @every_case
    def test_one_member_has_those_of_sac(self, kind: str, kwargs: dict[str, Any]) -> None:
        """The same seed, the same random numbers in the same order."""
        assert_same_states(
            make_ensemble(kind, ensemble_size=1, seed=3, **kwargs).get_member(0),
            state_dicts(make_sb3_policy(kind, 3, **kwargs)),
        )

    @every_kind
    def test_members_differ(self, kind: str) -> None:
        """In every weight and bias of actor and critic; targets start equal to their critics."""
        ensemble = make_ensemble(kind)
        members = [ensemble.get_member(index) for index in range(N_MEMBERS)]
        for network in ("actor", "critic"):
            for name in members[0][network]:
                for first, second in ((0, 1), (0, 2), (1, 2)):
                    assert not th.isclose(members[first][network][name], members[second][network][name]).all()
        for member in members:
            assert not th.equal(member["critic"]["qf0.0.weight"], member["critic"]["qf1.0.weight"])
            for name, value in member["critic"].items():
                assert th.equal(value, member["critic_target"][name])

    @every_kind
    def test_same_seed_same_weights(self, kind: str) -> None:
        first, second, other = (make_ensemble(kind, seed=seed).state_dict() for seed in (4, 4, 5))
        for name, value in first.items():
            assert th.equal(value, second[name])
        assert any(not th.equal(value, other[name]) for name, value in first.items())

    def test_parameters_are_leaves_without_the_members_they_came_from(self) -> None:
        """All real memory, and counted once: N times those of an SB3 policy."""
        ensemble, sb3_policy = make_ensemble("cnn"), make_sb3_policy("cnn")
        for network in ("actor", "critic", "critic_target"):
            parameters = list(getattr(ensemble, network).parameters())
            assert all(parameter.is_leaf and parameter.requires_grad and not parameter.is_meta for parameter in parameters)
            n_expected = sum(parameter.numel() for parameter in getattr(sb3_policy, network).parameters())
            assert sum(parameter.numel() for parameter in parameters) == N_MEMBERS * n_expected


class TestSaving:
    @pytest.mark.parametrize(("kind", "kwargs"), [*CASES, *MORE_CASES], ids=[*CASE_IDS, "mlp-layer-norm", "mlp-batch-norm"])
    def test_save_and_load(self, tmp_path: Path, kind: str, kwargs: dict[str, Any]) -> None:
        ensemble = make_ensemble(kind, **kwargs)
        ensemble.save(str(tmp_path / "policy.zip"))
        loaded = ENSEMBLES[kind].load(str(tmp_path / "policy.zip"), device="cpu")
        assert type(loaded) is ENSEMBLES[kind]
        assert (loaded.ensemble_size, loaded.critic_layer_norm) == (N_MEMBERS, kwargs.get("critic_layer_norm", False))
        assert loaded.optimizer_kwargs == ensemble.optimizer_kwargs
        for policy in (ensemble, loaded):
            policy.set_training_mode(False)
        obs, actions = observations(kind, BATCH_SIZE), th.zeros(BATCH_SIZE, ACTION_DIM)
        assert th.equal(loaded._predict(obs, deterministic=True), ensemble._predict(obs, deterministic=True))
        assert th.equal(loaded.critic.member_q_values(obs, actions), ensemble.critic.member_q_values(obs, actions))
        for index in range(N_MEMBERS):
            assert_same_states(loaded.get_member(index), ensemble.get_member(index))

    @every_kind
    def test_state_dict(self, kind: str) -> None:
        first, second = make_ensemble(kind, seed=0), make_ensemble(kind, seed=1)
        second.load_state_dict(first.state_dict(), strict=True)
        obs = observations(kind, BATCH_SIZE)
        assert th.equal(second._predict(obs, deterministic=True), first._predict(obs, deterministic=True))

    def test_extractors_of_the_image_and_dict_policies(self) -> None:
        """SB3's, unless told otherwise."""
        assert make_ensemble("cnn").features_extractor_class is NatureCNN
        assert make_ensemble("multi").features_extractor_class is CombinedExtractor
        kwargs: dict[str, Any] = {"features_extractor_class": SmallCNN, "features_extractor_kwargs": {}}
        assert make_ensemble("cnn", **kwargs).features_extractor_class is SmallCNN


@pytest.mark.parametrize(
    ("name", "alternative"), [("policy_kwargs", ", or a dict of such for pi and qf"), ("density_ratio_kwargs", "")]
)
def test_message_about_layers_names_what_the_argument_takes(name: str, alternative: str) -> None:
    kwargs: Any = {name: {"net_arch": [0]}}
    with pytest.raises(ValueError, match=rf"must be a list of integers of at least 1{alternative}, got \[0\]"):
        small_model(**kwargs)


class TestCompile:
    def test_same_update(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Both phases, with the compiler's front end alone: a bare machine has no C++ compiler."""
        compiled = []

        def compile_without_backend(function: Any, mode: str) -> Any:
            compiled.append(mode)
            return th_compile(function, backend="eager")

        th_compile = th.compile
        monkeypatch.setattr(th, "compile", compile_without_backend)
        models = [
            small_model(dataset=make_dataset(), policy_kwargs={"compile_mode": mode}) for mode in (None, "reduce-overhead")
        ]
        assert compiled == 3 * ["reduce-overhead"]
        for model in models:
            model.set_random_seed(0)
            model.learn_offline(gradient_steps=2).learn(8)
        plain, other = (parameters_of(model.policy) for model in models)
        for name, value in plain.items():
            assert_close(other[name], value)

    def test_saved_and_loaded(self, tmp_path: Path) -> None:
        model = small_model(policy_kwargs={"compile_mode": "default"})
        model.save(tmp_path / "model")
        assert Off2OnSAC.load(tmp_path / "model").policy.compile_mode == "default"

    def test_unknown_mode(self) -> None:
        with pytest.raises(ValueError, match=r"`compile_mode` must be None or one of default, .*, got 'fast'"):
            make_ensemble(compile_mode="fast")


class TestFrozen:
    def test_only_inside(self) -> None:
        first, last = nn.Linear(2, 3), nn.Linear(3, 1)
        network = nn.Sequential(first, last)
        first.bias.requires_grad_(False)
        before = [parameter.requires_grad for parameter in network.parameters()]
        x = th.ones(4, 2, requires_grad=True)
        with frozen(network):
            assert not any(parameter.requires_grad for parameter in network.parameters())
            output = network(x)
        assert [parameter.requires_grad for parameter in network.parameters()] == before
        output.sum().backward()
        assert x.grad is not None
        assert_close(x.grad, (last.weight @ first.weight).expand(4, 2))
        assert all(parameter.grad is None for parameter in network.parameters())

    def test_over_after_an_error(self) -> None:
        network = nn.Linear(2, 3)
        with pytest.raises(KeyError), frozen(network):
            raise KeyError
        assert network.weight.requires_grad
