"""CQL(H), its sampled gradient and Cal-QL's bound against NumPy, exact integrals and SB3's own networks and distributions."""

import math
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import TinyEnv
from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution
from stable_baselines3.common.policies import ContinuousCritic

from sb3_off2on import Off2OnSAC
from sb3_off2on.cql import calql_lower_bound, cql_gap, draw_softmax_actions, uniform_log_density

ENSEMBLE_SIZE, N_CRITICS = 2, 2
# A sum over many random numbers is allowed this many standard errors
N_ERRORS = 5


def make_model(**kwargs: Any) -> Off2OnSAC:
    """In float64, with smooth critics: nothing but the formulas can make a difference."""
    policy_kwargs = dict(ensemble_size=ENSEMBLE_SIZE, n_critics=N_CRITICS, net_arch=[8, 6], activation_fn=th.nn.Tanh)
    env = TinyEnv(spaces.Box(-1, 1, (4,)), spaces.Box(-1, 1, (3,)))
    model = Off2OnSAC("MlpPolicy", env, buffer_size=10, policy_kwargs=policy_kwargs, seed=0, device="cpu", **kwargs)
    model.policy.double()
    return model


def random_tensor(*shape: int, seed: int) -> th.Tensor:
    return th.as_tensor(np.random.default_rng(seed).normal(size=shape))


class TestGap:
    @pytest.mark.parametrize("temperature", [1.0, 0.3, 4.0])
    def test_against_numpy(self, temperature: float) -> None:
        """``temperature * log sum_a exp(Q / temperature) / density(a) - Q(s, a_data)``, one critic and state at a time."""
        q_sampled = random_tensor(ENSEMBLE_SIZE, N_CRITICS, 7, 5, seed=0)
        log_density = random_tensor(ENSEMBLE_SIZE, 7, 5, seed=1)
        q_data = random_tensor(ENSEMBLE_SIZE, N_CRITICS, 5, seed=2)

        expected = np.empty(q_data.shape)
        for member, critic, row in np.ndindex(*q_data.shape):
            total = 0.0
            for action in range(7):
                weight = 1 / math.exp(log_density[member, action, row])
                total += weight * math.exp(q_sampled[member, critic, action, row] / temperature)
            expected[member, critic, row] = temperature * math.log(total) - q_data[member, critic, row]
        np.testing.assert_allclose(cql_gap(q_sampled, log_density, q_data, temperature), expected, rtol=1e-12)

    def test_large_values_do_not_overflow(self) -> None:
        q_sampled = th.full((1, 1, 3, 1), 5000.0)
        gap = cql_gap(q_sampled, th.zeros(1, 3, 1), th.full((1, 1, 1), 4000.0))
        assert gap.item() == pytest.approx(1000 + math.log(3), rel=1e-6)

    def test_shapes_that_do_not_fit_are_refused(self) -> None:
        q_sampled, log_density, q_data = th.zeros(2, 2, 7, 5), th.zeros(2, 7, 5), th.zeros(2, 2, 5)
        with pytest.raises(AssertionError):
            cql_gap(q_sampled, log_density.transpose(1, 2), q_data)
        with pytest.raises(AssertionError):
            cql_gap(q_sampled, log_density, q_data[..., :1])

    @pytest.mark.parametrize("source", ["uniform", "policy", "both"])
    @pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
    def test_importance_sampling_gives_the_integral(self, temperature: float, source: str) -> None:
        """Whatever the actions are drawn from, many of them approach ``temperature * log of the integral of exp(Q / T)``."""
        n = 400_000

        def q_function(action: Any) -> Any:
            return 1.5 - 2.0 * (action - 0.4) ** 2

        th.manual_seed(0)
        uniform_actions = th.empty(n, 1, dtype=th.float64).uniform_(-1, 1)
        uniform_log_prob = th.full((n,), uniform_log_density(1), dtype=th.float64)
        # Wide enough for its density to be no smaller than the integrand
        parameters = th.full((n, 1), 0.3, dtype=th.float64), th.full((n, 1), 0.4, dtype=th.float64)
        policy_actions, policy_log_prob = SquashedDiagGaussianDistribution(1).log_prob_from_params(*parameters)
        parts = {"uniform": [0], "policy": [1], "both": [0, 1]}[source]
        actions = th.cat([(uniform_actions, policy_actions)[part] for part in parts]).view(1, 1, -1, 1)
        log_density = th.cat([(uniform_log_prob, policy_log_prob)[part] for part in parts]).view(1, -1, 1)

        gap = cql_gap(q_function(actions), log_density, th.zeros(1, 1, 1, dtype=th.float64), temperature).item()
        n_actions = actions.numel()
        estimate = gap - temperature * math.log(n_actions)

        grid = np.linspace(-1, 1, 20_001)
        integral = temperature * math.log(np.trapezoid(np.exp(q_function(grid) / temperature), grid))
        weights = th.exp(q_function(actions).flatten() / temperature - log_density.flatten())
        standard_error = temperature * (weights.std() / weights.mean()).item() / math.sqrt(n_actions)
        assert standard_error < 0.01 * temperature
        assert estimate == pytest.approx(integral, abs=N_ERRORS * standard_error)

    @pytest.mark.parametrize("action_dim", [1, 2, 6])
    def test_uniform_log_density(self, action_dim: int) -> None:
        """Times the volume of [-1, 1]^action_dim, the density is 1."""
        assert math.exp(uniform_log_density(action_dim)) * 2**action_dim == pytest.approx(1)


class TestDrawSoftmaxActions:
    @pytest.mark.parametrize("temperature", [1.0, 0.5])
    def test_frequencies_are_the_softmax(self, temperature: float) -> None:
        """Of every critic by itself: the chi-square statistic stays near its degrees of freedom."""
        n_actions, n_draws = 6, 20_000
        q_values = random_tensor(ENSEMBLE_SIZE, N_CRITICS, n_actions, 1, seed=3)
        log_density = random_tensor(ENSEMBLE_SIZE, n_actions, 1, seed=4)
        th.manual_seed(0)
        drawn = draw_softmax_actions(q_values.expand(-1, -1, -1, n_draws), log_density.expand(-1, -1, n_draws), temperature)
        assert drawn.shape == (ENSEMBLE_SIZE, N_CRITICS, n_draws)
        for member, critic in np.ndindex(ENSEMBLE_SIZE, N_CRITICS):
            weights = np.exp(q_values[member, critic, :, 0].numpy() / temperature) / np.exp(log_density[member, :, 0].numpy())
            expected = n_draws * weights / weights.sum()
            counts = np.bincount(drawn[member, critic].numpy(), minlength=n_actions)
            degrees = n_actions - 1
            assert ((counts - expected) ** 2 / expected).sum() < degrees + N_ERRORS * math.sqrt(2 * degrees)

    def test_each_state_and_critic_has_its_own_softmax(self) -> None:
        """One action stands out far above the rest, another one in every place."""
        best = th.arange(ENSEMBLE_SIZE * N_CRITICS * 5).view(ENSEMBLE_SIZE, N_CRITICS, 5) % 7
        q_values = 1000.0 * th.nn.functional.one_hot(best, 7).transpose(2, 3)
        assert th.equal(draw_softmax_actions(q_values, th.zeros(ENSEMBLE_SIZE, 7, 5)), best)

    @pytest.mark.parametrize("temperature", [1.0, 2.0])
    def test_mean_gradient_is_that_of_the_log_sum_exp(self, temperature: float) -> None:
        """Critics linear in (a, a^2), whose gradient at a drawn action is just that."""
        n_actions, n_draws = 6, 40_000
        actions = random_tensor(ENSEMBLE_SIZE, n_actions, 1, seed=5)
        log_density = random_tensor(ENSEMBLE_SIZE, n_actions, 1, seed=6)
        inputs = th.stack([actions, actions**2], dim=-1)  # (ensemble_size, n_actions, 1, 2)
        weights = random_tensor(ENSEMBLE_SIZE, N_CRITICS, 2, seed=7).requires_grad_()
        q_values = th.einsum("mabf,mcf->mcab", inputs, weights)

        full = cql_gap(q_values, log_density, th.zeros(ENSEMBLE_SIZE, N_CRITICS, 1), temperature).sum()
        (full_gradient,) = th.autograd.grad(full, weights)

        th.manual_seed(0)
        many = q_values.detach().expand(-1, -1, -1, n_draws)
        drawn = draw_softmax_actions(many, log_density.expand(-1, -1, n_draws), temperature)
        for member, critic in np.ndindex(ENSEMBLE_SIZE, N_CRITICS):
            gradients = inputs[member, drawn[member, critic], 0]  # (n_draws, 2)
            standard_error = gradients.std(dim=0) / math.sqrt(n_draws)
            assert (standard_error < 0.02).all()
            assert ((gradients.mean(dim=0) - full_gradient[member, critic]).abs() < N_ERRORS * standard_error).all()


class TestCalQL:
    def test_against_numpy(self) -> None:
        q_policy = random_tensor(ENSEMBLE_SIZE, N_CRITICS, 4, 5, seed=8)
        mc_returns = random_tensor(ENSEMBLE_SIZE, 5, seed=9)
        bounded = calql_lower_bound(q_policy, mc_returns)
        for member, critic, action, row in np.ndindex(*q_policy.shape):
            expected = max(q_policy[member, critic, action, row].item(), mc_returns[member, row].item())
            assert bounded[member, critic, action, row].item() == expected

    def test_shapes_that_do_not_fit_are_refused(self) -> None:
        with pytest.raises(AssertionError):
            calql_lower_bound(th.zeros(2, 2, 4, 5), th.zeros(5, 2))


class TestQValuesAndGap:
    """``Off2OnSAC``'s full and sampled form against a loop over SB3's own critics."""

    BATCH_SIZE, CQL_N_ACTIONS = 4, 3

    def inputs(self, model: Off2OnSAC, batch_size: int = BATCH_SIZE) -> dict[str, th.Tensor]:
        """Random states and actions, and returns of which about half are above the Q-values."""
        n_actions = 3 * self.CQL_N_ACTIONS
        inputs = {
            "features": random_tensor(ENSEMBLE_SIZE, batch_size, 4, seed=10),
            "actions": th.tanh(random_tensor(ENSEMBLE_SIZE, batch_size, 3, seed=11)),
            "cql_actions": th.tanh(random_tensor(ENSEMBLE_SIZE, n_actions, batch_size, 3, seed=12)),
            "cql_log_density": random_tensor(ENSEMBLE_SIZE, n_actions, batch_size, seed=13),
        }
        with th.no_grad():
            q_values = model.critic.q_values_of_many(inputs["features"], inputs["cql_actions"])
        inputs["mc_returns"] = q_values.median(dim=2).values.mean(dim=1)
        return inputs

    def sb3_critic(self, model: Off2OnSAC, member: int) -> ContinuousCritic:
        critic = ContinuousCritic(**{**model.policy.critic_kwargs, **self.extractor(model)}).double()
        critic.load_state_dict(model.policy.get_member(member)["critic"])
        return critic

    def extractor(self, model: Off2OnSAC) -> dict[str, Any]:
        features_extractor = model.policy.make_features_extractor()
        return {"features_extractor": features_extractor, "features_dim": features_extractor.features_dim}

    def by_loop(
        self, critic: ContinuousCritic, member: int, inputs: dict[str, th.Tensor], bounded: bool, temperature: float
    ) -> tuple[th.Tensor, th.Tensor]:
        """Q-values of the data and the gap of one member, each ``(n_critics, batch_size)``, sums written out."""
        q_data, gap = [], []
        for q_network in critic.q_networks:
            for row, state in enumerate(inputs["features"][member]):
                q_of_data = q_network(th.cat([state, inputs["actions"][member, row]]))
                total = th.zeros(1, dtype=th.float64)
                for action in range(3 * self.CQL_N_ACTIONS):
                    q_value = q_network(th.cat([state, inputs["cql_actions"][member, action, row]]))
                    # The first third of the actions is uniform, and has no bound
                    if bounded and action >= self.CQL_N_ACTIONS and q_value < inputs["mc_returns"][member, row]:
                        q_value = inputs["mc_returns"][member, row]
                    total = total + th.exp(q_value / temperature) / th.exp(inputs["cql_log_density"][member, action, row])
                q_data.append(q_of_data)
                gap.append(temperature * th.log(total) - q_of_data)
        return th.cat(q_data).view(N_CRITICS, -1), th.cat(gap).view(N_CRITICS, -1)

    def gradients_by_loop(
        self, model: Off2OnSAC, inputs: dict[str, th.Tensor], bounded: bool, temperature: float
    ) -> list[th.Tensor]:
        """Gradient of the mean gap's sum over all critics, a flat vector for each of them (those of member 0 first)."""
        gradients = []
        for member in range(ENSEMBLE_SIZE):
            critic = self.sb3_critic(model, member)
            _, gap = self.by_loop(critic, member, inputs, bounded, temperature)
            for q_network in critic.q_networks:
                gradient = th.autograd.grad(gap.mean(dim=1).sum(), list(q_network.parameters()), retain_graph=True)
                gradients.append(th.cat([part.flatten() for part in gradient]))
        return gradients

    def gradients(self, model: Off2OnSAC, loss: th.Tensor) -> list[th.Tensor]:
        gradients = th.autograd.grad(loss, list(model.critic.qf.parameters()), retain_graph=True)
        return [th.cat([gradient[index].flatten() for gradient in gradients]) for index in range(ENSEMBLE_SIZE * N_CRITICS)]

    @pytest.mark.parametrize("temperature", [1.0, 0.4])
    @pytest.mark.parametrize("bounded", [False, True])
    def test_full_form_is_the_loop(self, bounded: bool, temperature: float) -> None:
        model = make_model(cql_sampled_gradient=False, cql_n_actions=self.CQL_N_ACTIONS, cql_temp=temperature)
        inputs = self.inputs(model)
        unbounded = {name: value for name, value in inputs.items() if name != "mc_returns"}
        q_data, gap = model._q_values_and_gap(**(inputs if bounded else unbounded))
        for member in range(ENSEMBLE_SIZE):
            expected_q_data, expected_gap = self.by_loop(self.sb3_critic(model, member), member, inputs, bounded, temperature)
            th.testing.assert_close(q_data[member], expected_q_data, rtol=0, atol=1e-12)
            th.testing.assert_close(gap[member], expected_gap, rtol=0, atol=1e-12)
        expected = self.gradients_by_loop(model, inputs, bounded, temperature)
        for gradient, expected_gradient in zip(self.gradients(model, gap.mean(dim=2).sum()), expected, strict=True):
            th.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("temperature", [1.0, 0.4])
    @pytest.mark.parametrize("bounded", [False, True])
    def test_sampled_form_has_the_same_value_and_mean_gradient(self, bounded: bool, temperature: float) -> None:
        """Every state many times in a batch: the mean over its draws is the batch's, its error that between batches."""
        model = make_model(cql_sampled_gradient=True, cql_n_actions=self.CQL_N_ACTIONS, cql_temp=temperature)
        inputs = self.inputs(model)
        expected_gradients = self.gradients_by_loop(model, inputs, bounded, temperature)
        n_copies, n_batches = 250, 30
        repeated = {name: value.repeat_interleave(n_copies, dim=self.batch_axis(name)) for name, value in inputs.items()}
        if not bounded:
            del repeated["mc_returns"]

        th.manual_seed(0)
        samples: list[list[th.Tensor]] = []
        for _ in range(n_batches):
            q_data, gap = model._q_values_and_gap(**repeated)
            samples.append(self.gradients(model, gap.mean(dim=2).sum()))
        for member in range(ENSEMBLE_SIZE):
            expected = self.by_loop(self.sb3_critic(model, member), member, inputs, bounded, temperature)
            for got, by_loop in zip((q_data[member], gap[member]), expected, strict=True):
                th.testing.assert_close(got, by_loop.repeat_interleave(n_copies, dim=1), rtol=0, atol=1e-12)
        for index, expected_gradient in enumerate(expected_gradients):
            gradients = th.stack([sample[index] for sample in samples])
            standard_error = gradients.std(dim=0) / math.sqrt(n_batches)
            # Tight enough to tell this gradient from that of other weights
            assert standard_error.norm() < 0.02 * expected_gradient.norm()
            assert ((gradients.mean(dim=0) - expected_gradient).abs() < N_ERRORS * standard_error + 1e-12).all()

    @staticmethod
    def batch_axis(name: str) -> int:
        return {"cql_actions": 2, "cql_log_density": 2}.get(name, 1)

    @pytest.mark.parametrize("sampled_gradient", [True, False])
    def test_no_gradient_where_the_bound_holds(self, sampled_gradient: bool) -> None:
        """Returns far above all Q-values: the log-sum-exp is a constant, and only the data's Q-values are pushed, up."""
        model = make_model(cql_sampled_gradient=sampled_gradient, cql_n_actions=self.CQL_N_ACTIONS)
        inputs = self.inputs(model)
        inputs["mc_returns"] = th.full_like(inputs["mc_returns"], 200.0)
        q_data, gap = model._q_values_and_gap(**inputs)
        assert (gap > 190).all()
        expected = self.gradients(model, -q_data.sum())
        for gradient, expected_gradient in zip(self.gradients(model, gap.sum()), expected, strict=True):
            th.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("sampled_gradient", [True, False])
    def test_bound_below_all_values_changes_nothing(self, sampled_gradient: bool) -> None:
        model = make_model(cql_sampled_gradient=sampled_gradient, cql_n_actions=self.CQL_N_ACTIONS)
        inputs = self.inputs(model)
        inputs["mc_returns"] = th.full_like(inputs["mc_returns"], -200.0)
        results = []
        for used in (inputs, {**inputs, "mc_returns": None}):
            th.manual_seed(0)
            results.append(model._q_values_and_gap(**used))
        for with_bound, without in zip(*results, strict=True):
            assert th.equal(with_bound, without)


class TestSampleCqlActions:
    N_ACTIONS, BATCH_SIZE = 50, 4

    def sample(self, log_std: float) -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor]:
        """:return: actions, their log-densities, and the means at s and s': no two of the means are near each other"""
        model = make_model(cql_n_actions=self.N_ACTIONS)
        shape = (2, ENSEMBLE_SIZE, self.BATCH_SIZE, 3)
        squashed_means = th.linspace(-0.9, 0.9, math.prod(shape), dtype=th.float64)
        squashed_means = squashed_means[th.randperm(len(squashed_means), generator=th.Generator().manual_seed(0))].view(shape)
        means, next_means = th.atanh(squashed_means)
        log_stds = th.full_like(means, log_std)
        th.manual_seed(0)
        actions, log_density = model._sample_cql_actions((means, log_stds), (next_means, log_stds))
        assert actions.shape == (ENSEMBLE_SIZE, 3 * self.N_ACTIONS, self.BATCH_SIZE, 3)
        assert log_density.shape == (ENSEMBLE_SIZE, 3 * self.N_ACTIONS, self.BATCH_SIZE)
        return actions, log_density, means, next_means

    def test_policy_actions_belong_to_their_member_and_state(self) -> None:
        actions, _, means, next_means = self.sample(log_std=-8.0)
        spacing = 1.8 / (2 * means.numel() - 1)
        _, here, there = actions.split(self.N_ACTIONS, dim=1)
        for member, action, row in np.ndindex(ENSEMBLE_SIZE, self.N_ACTIONS, self.BATCH_SIZE):
            assert (here[member, action, row] - th.tanh(means[member, row])).abs().max() < spacing / 4
            assert (there[member, action, row] - th.tanh(next_means[member, row])).abs().max() < spacing / 4

    def test_policy_actions_of_a_state_differ(self) -> None:
        actions, _, _, _ = self.sample(log_std=-1.0)
        _, here, there = actions.split(self.N_ACTIONS, dim=1)
        for part in (here, there):
            assert len(part.flatten().unique()) == part.numel()

    def test_uniform_actions_cover_the_box(self) -> None:
        """In [-1, 1] (not [0, 1]): no gap between neighbours in order is wide, in any dimension, and all are independent."""
        actions, _, _, _ = self.sample(log_std=0.0)
        uniform = actions[:, : self.N_ACTIONS].reshape(-1, 3)
        n = len(uniform)
        assert uniform.abs().max() <= 1
        for dimension in range(3):
            ordered = uniform[:, dimension].sort().values
            # Kolmogorov and Smirnov's statistic, whose 0.1 per cent quantile is 1.95 / sqrt(n)
            distribution = (th.arange(n) + 0.5) / n
            assert ((ordered + 1) / 2 - distribution).abs().max() < 1.95 / math.sqrt(n)
        correlation = np.corrcoef(uniform.numpy().T)
        assert np.abs(correlation - np.eye(3)).max() < N_ERRORS / math.sqrt(n)
        assert len(uniform.flatten().unique()) == uniform.numel()

    def test_log_densities_are_those_of_sb3(self) -> None:
        actions, log_density, means, next_means = self.sample(log_std=-1.0)
        distribution = SquashedDiagGaussianDistribution(3)
        for member, action, row in np.ndindex(*log_density.shape):
            kind = action // self.N_ACTIONS
            if kind == 0:
                expected = math.log(0.5**3)
            else:
                mean = (means, next_means)[kind - 1][member, row].unsqueeze(0)
                distribution.proba_distribution(mean, th.full_like(mean, -1.0))
                expected = distribution.log_prob(actions[member, action, row].unsqueeze(0)).item()
            assert log_density[member, action, row].item() == pytest.approx(expected, abs=1e-5)
