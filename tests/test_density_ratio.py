"""Density ratio and priority against the paper's formulas in NumPy, known distributions, and Algorithm 2."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import make_dataset, make_model
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.utils import update_learning_rate

from sb3_off2on.buffers import BalancedReplayBufferSamples
from sb3_off2on.density_ratio import DensityRatio, density_ratio_loss, density_ratio_priority

ACTION_SPACE = spaces.Box(-1, 1, (2,), np.float32)
VECTOR_SPACE = spaces.Box(-10, 10, (3,), np.float32)
IMAGE_SPACE = spaces.Box(0, 255, (3, 36, 36), np.uint8)
DICT_SPACE = spaces.Dict({"image": IMAGE_SPACE, "vector": VECTOR_SPACE})

# Five points with known probabilities: of the online samples, and of the offline samples
P = np.array([0.05, 0.10, 0.20, 0.25, 0.40])
Q = np.array([0.40, 0.20, 0.20, 0.15, 0.05])


def f(y: np.ndarray) -> np.ndarray:
    """The generator of the Jensen-Shannon divergence, as the paper defines it above Eq. 4."""
    return y * np.log(2 * y / (y + 1)) + np.log(2 / (y + 1))


def f_derivative(y: np.ndarray) -> np.ndarray:
    step = 1e-5 * y
    return (f(y + step) - f(y - step)) / (2 * step)


def f_conjugate(t: np.ndarray) -> np.ndarray:
    """``sup_y (t y - f(y))``, over a fine grid."""
    grid = np.geomspace(1e-4, 1e4, 200_001)
    return np.array([np.max(value * grid - f(grid)) for value in t])


def rows(probabilities: np.ndarray, values: Any) -> Any:
    """One value for each of 100 rows, the five points in proportion to their probabilities: their mean is the expectation."""
    return values[np.repeat(np.arange(5), np.rint(100 * probabilities).astype(int))]


class TestLoss:
    def test_against_the_f_divergence(self) -> None:
        """Eq. 4 with the derivative of f by finite differences and its conjugate by brute force."""
        rng = np.random.default_rng(0)
        ratio_online, ratio_reference = rng.uniform(0.02, 20, 30), rng.uniform(0.02, 20, 40)
        objective = f_derivative(ratio_online).mean() - f_conjugate(f_derivative(ratio_reference)).mean()
        loss = density_ratio_loss(th.as_tensor(ratio_online), th.as_tensor(ratio_reference))
        assert loss.item() == pytest.approx(-objective, abs=1e-6)

    def test_ratios_of_zero_keep_value_and_gradient_finite(self) -> None:
        ratio = th.zeros(4, requires_grad=True)
        loss = density_ratio_loss(ratio, ratio)
        loss.backward()
        assert th.isfinite(loss)
        assert ratio.grad is not None
        assert th.isfinite(ratio.grad).all()

    def test_shapes_that_do_not_fit_are_refused(self) -> None:
        with pytest.raises(AssertionError):
            density_ratio_loss(th.ones(4, 1), th.ones(4))

    # A union of as many online as offline samples, and one of a third as many
    @pytest.mark.parametrize("online_share", [0.0, 0.5, 0.25], ids=["offline", "union of halves", "union"])
    def test_minimum_is_at_the_true_ratio(self, online_share: float) -> None:
        """There the bound is tight: the loss is minus the divergence. Any other ratio is worse, and the gradient says so."""

        def exact_loss(ratio: th.Tensor) -> th.Tensor:
            # Offline and online rows in proportion, as `sample_uniform` draws them
            reference = th.cat(
                [rows(Q, ratio)] * round((1 - online_share) / 0.25) + [rows(P, ratio)] * round(online_share / 0.25)
            )
            return density_ratio_loss(rows(P, ratio), reference)

        reference = (1 - online_share) * Q + online_share * P
        true_ratio = th.tensor(P / reference, requires_grad=True)
        minimum = exact_loss(true_ratio)
        assert minimum.item() == pytest.approx(-np.sum(reference * f(P / reference)), abs=1e-8)
        (gradient,) = th.autograd.grad(minimum, true_ratio)
        assert gradient.abs().max() < 1e-8

        rng = np.random.default_rng(1)
        for scale in (0.02, 0.3, 2.0):
            for _ in range(20):
                other = th.tensor(P / reference * np.exp(scale * rng.normal(size=5)))
                assert exact_loss(other) > minimum
        inverse, constant = th.tensor(reference / P), th.ones(5, dtype=th.float64)
        assert exact_loss(inverse) > exact_loss(constant) > minimum

    @pytest.mark.parametrize("online_share", [0.0, 0.5])
    def test_network_learns_the_ratio_of_two_gaussians(self, online_share: float) -> None:
        """Online states from N(1/2, 1) and actions of density (1 + a) / 2, offline ones from N(-1/2, 1) and uniform."""
        n_steps, batch_size, learning_rate = 400, 512, 5e-3
        rng = np.random.default_rng(0)

        def online(n: int) -> tuple[np.ndarray, np.ndarray]:
            return rng.normal(0.5, 1, (n, 1)), 2 * np.sqrt(rng.uniform(size=(n, 1))) - 1

        def offline(n: int) -> tuple[np.ndarray, np.ndarray]:
            return rng.normal(-0.5, 1, (n, 1)), rng.uniform(-1, 1, (n, 1))

        def true_ratio(states: np.ndarray, actions: np.ndarray) -> np.ndarray:
            offline_ratio = (np.exp(states) * (1 + actions)).squeeze(1)
            return offline_ratio / (1 - online_share + online_share * offline_ratio)

        th.manual_seed(0)
        network = make_network(spaces.Box(-10, 10, (1,)), action_dim=1, net_arch=(32, 32))

        def estimate(states: np.ndarray, actions: np.ndarray) -> th.Tensor:
            return network(th.as_tensor(states, dtype=th.float32), th.as_tensor(actions, dtype=th.float32))

        for step in range(n_steps):
            # Down to 0, as the last steps' noise would be the larger part of the error
            update_learning_rate(network.optimizer, learning_rate * (1 - step / n_steps))
            n_online = round(online_share * batch_size)
            reference = [np.concatenate(parts) for parts in zip(offline(batch_size - n_online), online(n_online), strict=True)]
            loss = density_ratio_loss(estimate(*online(batch_size)), estimate(*reference))
            network.optimizer.zero_grad()
            loss.backward()
            network.optimizer.step()

        samples = [np.concatenate(parts) for parts in zip(offline(1000), online(1000), strict=True)]
        with th.no_grad():
            learned = estimate(*samples).numpy()
        expected = true_ratio(*samples)
        usual = (expected > 0.1) & (expected < 10)
        assert usual.mean() > 0.8
        error = np.abs(np.log(learned[usual] + 1e-3) - np.log(expected[usual]))
        # For comparison: the true values spread over more than a factor of two
        assert np.median(error) < 0.15
        assert np.median(np.abs(np.log(expected[usual]))) > 0.3
        assert np.corrcoef(learned[usual], expected[usual])[0, 1] > 0.95


def make_network(
    observation_space: spaces.Space,
    action_dim: int = 2,
    extractor: type[BaseFeaturesExtractor] = FlattenExtractor,
    **kwargs: Any,
) -> DensityRatio:
    extractor_kwargs = kwargs.pop("extractor_kwargs", {})
    return DensityRatio(
        observation_space,
        spaces.Box(-1, 1, (action_dim,), np.float32),
        extractor(observation_space, **extractor_kwargs),
        **kwargs,
    )


def observations(space: spaces.Space, n: int) -> Any:
    """Random observations, as a replay buffer would give them."""
    space.seed(0)
    samples = [space.sample() for _ in range(n)]
    if isinstance(space, spaces.Dict):
        return {key: th.as_tensor(np.stack([sample[key] for sample in samples])) for key in space.spaces}
    return th.as_tensor(np.stack(samples))


class TestNetwork:
    def test_starts_with_a_last_bias_of_one(self) -> None:
        network = make_network(VECTOR_SPACE)
        linear = [layer for layer in network.ratio if isinstance(layer, th.nn.Linear)]
        assert [layer.out_features for layer in linear] == [256, 256, 1]
        assert linear[-1].bias.item() == 1.0
        # And nothing else is touched
        assert all(0 < layer.bias.std() < 1 for layer in linear[:-1])

    def test_arguments(self) -> None:
        network = make_network(VECTOR_SPACE, net_arch=(7,), activation_fn=th.nn.Tanh, learning_rate=0.02)
        assert [type(layer) for layer in network.ratio] == [th.nn.Linear, th.nn.Tanh, th.nn.Linear]
        assert network.ratio[0].out_features == 7
        assert isinstance(network.optimizer, th.optim.Adam)
        assert network.optimizer.param_groups[0]["lr"] == 0.02
        parameters = {id(parameter) for parameter in network.optimizer.param_groups[0]["params"]}
        assert parameters == {id(parameter) for parameter in network.parameters()}

    def test_never_negative(self) -> None:
        """Also where the last layer is, which it is somewhere with large weights; and zero is allowed."""
        th.manual_seed(0)
        network = make_network(VECTOR_SPACE, net_arch=(16,))
        obs, actions = observations(VECTOR_SPACE, 200), th.rand(200, 2)
        with th.no_grad():
            for parameter in network.parameters():
                parameter.mul_(20)
            last_layer = network.ratio(th.cat([obs, actions], dim=1)).squeeze(1)
            ratio = network(obs, actions)
        assert 20 < (last_layer < 0).sum() < 180
        assert th.equal(ratio, last_layer.clamp_min(0))

    @pytest.mark.parametrize(
        ("space", "extractor", "extractor_kwargs"),
        [
            (VECTOR_SPACE, FlattenExtractor, {}),
            (IMAGE_SPACE, NatureCNN, {"features_dim": 16}),
            (DICT_SPACE, CombinedExtractor, {"cnn_output_dim": 16}),
        ],
        ids=["vector", "image", "dict"],
    )
    def test_sees_observations_through_its_extractor(
        self, space: spaces.Space, extractor: type[BaseFeaturesExtractor], extractor_kwargs: dict[str, Any]
    ) -> None:
        th.manual_seed(0)
        network = make_network(space, extractor=extractor, extractor_kwargs=extractor_kwargs, net_arch=(16, 16))
        obs, actions = observations(space, 5), th.rand(5, 2)
        ratio = network(obs, actions)
        assert ratio.shape == (5,)

        # Images in [0, 1]
        if isinstance(obs, dict):
            scaled: Any = {"image": obs["image"].float() / 255, "vector": obs["vector"]}
        else:
            scaled = obs.float() / 255 if space is IMAGE_SPACE else obs
        assert isinstance(network.features_extractor, extractor)
        features = network.features_extractor(scaled)
        for row in range(5):
            expected = max(network.ratio(th.cat([features[row], actions[row]])).item(), 0)
            assert ratio[row].item() == pytest.approx(expected, abs=1e-5)

        # Two batches in one pass
        fewer, other_actions = observations(space, 3), th.rand(3, 2)
        both = network.of_batches((obs, actions), (fewer, other_actions))
        for part, expected_part in zip(both, (ratio, network(fewer, other_actions)), strict=True):
            th.testing.assert_close(part, expected_part)

        density_ratio_loss(ratio, network(obs, th.zeros(5, 2))).backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name

    def test_images_as_they_are(self) -> None:
        network = make_network(IMAGE_SPACE, extractor=FlattenExtractor, net_arch=(8,), normalize_images=False)
        obs, actions = observations(IMAGE_SPACE, 2), th.zeros(2, 2)
        expected = th.relu(network.ratio(th.cat([obs.float().flatten(1), actions], dim=1)).squeeze(1))
        th.testing.assert_close(network(obs, actions), expected)


class TestPriority:
    @pytest.mark.parametrize("temperature", [1.0, 2.5, 5.0])
    def test_against_numpy(self, temperature: float) -> None:
        """Eq. 6, whose expectation is over the reference samples."""
        rng = np.random.default_rng(0)
        ratio, ratio_reference = rng.uniform(0.01, 5, 20), rng.uniform(0.01, 20, 30)
        mean = sum(value ** (1 / temperature) for value in ratio_reference) / 30
        expected = [value ** (1 / temperature) / mean for value in ratio]
        assert 1e-3 < min(expected) < max(expected) < 1e3
        priorities = density_ratio_priority(th.as_tensor(ratio), th.as_tensor(ratio_reference), temperature)
        np.testing.assert_allclose(priorities, expected, rtol=1e-12)

    def test_clamp(self) -> None:
        ratio, ratio_reference = th.tensor([0.0, 1e-9, 0.5, 2.0, 1e9]), th.ones(3)
        priorities = density_ratio_priority(ratio, ratio_reference, temperature=1.0)
        th.testing.assert_close(priorities, th.tensor([1e-3, 1e-3, 0.5, 2.0, 1e3]))

    @pytest.mark.parametrize("temperature", [1.0, 5.0])
    def test_reference_of_zeros(self, temperature: float) -> None:
        """Where the network's ReLU gives 0 for a whole batch, priorities stay finite: the clamp's limits."""
        priorities = density_ratio_priority(th.tensor([0.0, 1.0]), th.zeros(3), temperature)
        th.testing.assert_close(priorities, th.tensor([1e-3, 1e3]))

    def test_high_temperature_is_uniform(self) -> None:
        priorities = density_ratio_priority(th.tensor([0.01, 1.0, 100.0]), th.tensor([0.5, 2.0]), temperature=1e6)
        th.testing.assert_close(priorities, th.ones(3), rtol=0, atol=1e-4)


class Spy:
    """Notes what a training step does, in order, and the density ratio's parameters whenever they change."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.batches: dict[str, list[BalancedReplayBufferSamples]] = {}
        self.networks: list[DensityRatio] = []
        self.default_priorities: list[float] = []
        self.model, self.monkeypatch = model, monkeypatch
        for name in ("sample", "sample_offline", "sample_online", "sample_uniform"):
            self.watch(model.replay_buffer, name, name)
        self.watch(model.replay_buffer, "update_priorities", "priorities")
        for name, network in (("density ratio", model.density_ratio), ("actor", model.actor), ("critic", model.critic)):
            self.watch(network.optimizer, "step", name)

    def watch(self, owner: Any, method: str, event: str) -> None:
        original = getattr(owner, method)

        def spied(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            self.events.append(event)
            if isinstance(result, BalancedReplayBufferSamples):
                self.batches.setdefault(event, []).append(result)
            elif event == "density ratio":
                self.networks.append(copy.deepcopy(self.model.density_ratio))
            elif event == "priorities":
                self.default_priorities.append(self.model.replay_buffer.default_priority)
            return result

        self.monkeypatch.setattr(owner, method, spied)


def numpy_ratio(network: DensityRatio, batch: BalancedReplayBufferSamples) -> np.ndarray:
    """The network written out, for vectors and ReLU."""
    assert isinstance(batch.observations, th.Tensor)
    x = np.concatenate([batch.observations.numpy(), batch.actions.numpy()], axis=1)
    state = {name: value.numpy() for name, value in network.ratio.state_dict().items()}
    for layer in (0, 2, 4):
        x = np.maximum(x @ state[f"{layer}.weight"].T + state[f"{layer}.bias"], 0)
    return x.squeeze(1)


class TestTraining:
    """Lines 13 to 22 of Algorithm 2 in ``Off2OnSAC.train``."""

    N_OFFLINE, N_ONLINE, BATCH_SIZE, TEMPERATURE = 300, 50, 32, 2.5

    def train(
        self, monkeypatch: pytest.MonkeyPatch, gradient_steps: int, reference: str = "offline", online_fraction: float = 0.75
    ) -> tuple[Any, Spy]:
        """The online rows are there, without an update yet; from here on everything is watched."""
        model = make_model(
            dataset=make_dataset(),
            gradient_steps=0,
            policy_kwargs={"ensemble_size": 2},
            density_ratio_kwargs={"net_arch": (16, 16), "reference": reference, "learning_rate": 0.01},
            initial_online_fraction=online_fraction,
            priority_temperature=self.TEMPERATURE,
        )
        model.learn(self.N_ONLINE)
        assert (model.replay_buffer.n_offline, model.replay_buffer.n_online) == (self.N_OFFLINE, self.N_ONLINE)
        spy = Spy(model, monkeypatch)
        model.train(gradient_steps, self.BATCH_SIZE)
        return model, spy

    def expected_priorities(self, network: DensityRatio, spy: Spy, step: int, drawn: str) -> np.ndarray:
        """Line 20 for the rows of one step, the expectation over the rows that `drawn` gave."""
        ratio = numpy_ratio(network, spy.batches["sample"][step])
        ratio_reference = numpy_ratio(network, spy.batches[drawn][step])
        normalizer = (ratio_reference ** (1 / self.TEMPERATURE)).mean()
        return np.clip(ratio ** (1 / self.TEMPERATURE) / normalizer, 1e-3, 1e3)

    @pytest.mark.parametrize(("reference", "drawn"), [("offline", "sample_offline"), ("union", "sample_uniform")])
    def test_order(self, monkeypatch: pytest.MonkeyPatch, reference: str, drawn: str) -> None:
        _, spy = self.train(monkeypatch, gradient_steps=3, reference=reference)
        per_step = [spy.events[start : start + 7] for start in range(0, len(spy.events), 7)]
        assert len(per_step) == 3
        for events in per_step:
            assert sorted(events[:2]) == sorted([drawn, "sample_online"])  # line 13
            assert events[2:] == ["density ratio", "sample", "critic", "actor", "priorities"]  # lines 14, 16, 17, 18, 20
        for batches in spy.batches.values():
            assert [len(batch.indices) for batch in batches] == [self.BATCH_SIZE] * 3
        assert all((batch.indices >= self.N_OFFLINE).all() for batch in spy.batches["sample_online"])
        reference_indices = np.concatenate([batch.indices for batch in spy.batches[drawn]])
        online_share = (reference_indices >= self.N_OFFLINE).mean()
        assert online_share == 0 if reference == "offline" else 0 < online_share < 0.4

    @pytest.mark.parametrize(("reference", "drawn"), [("offline", "sample_offline"), ("union", "sample_uniform")])
    def test_priorities_are_those_of_the_updated_network(
        self, monkeypatch: pytest.MonkeyPatch, reference: str, drawn: str
    ) -> None:
        """And only the rows that were drawn get new ones: the rest keep 1.0 and P0."""
        model, spy = self.train(monkeypatch, gradient_steps=3, reference=reference)
        p0 = self.N_OFFLINE / self.N_ONLINE * 0.75 / 0.25
        expected = np.concatenate([np.full(self.N_OFFLINE, 1.0), np.full(self.N_ONLINE, p0)])
        for step, network in enumerate(spy.networks):
            indices = spy.batches["sample"][step].indices
            expected[indices] = self.expected_priorities(network, spy, step, drawn)
        got = model.replay_buffer.priorities(np.arange(len(expected)))
        np.testing.assert_allclose(got, expected, rtol=1e-4)
        # The network before the last step gives others: the comparison can tell
        indices = spy.batches["sample"][-1].indices
        before = self.expected_priorities(spy.networks[-2], spy, -1, drawn)
        assert np.abs(before / got[indices] - 1).max() > 1e-3

    @pytest.mark.parametrize("online_fraction", [0.05, 0.75])
    def test_default_priority_is_the_largest_so_far(self, monkeypatch: pytest.MonkeyPatch, online_fraction: float) -> None:
        """Lines 7 and 21: below all priorities it follows them up, far above it stays; never goes down."""
        _, spy = self.train(monkeypatch, gradient_steps=4, online_fraction=online_fraction)
        p0 = self.N_OFFLINE / self.N_ONLINE * online_fraction / (1 - online_fraction)
        moved = 0
        for step, network in enumerate(spy.networks):
            largest = self.expected_priorities(network, spy, step, "sample_offline").max()
            moved += largest > p0
            p0 = max(p0, largest)
            assert spy.default_priorities[step] == pytest.approx(p0, rel=1e-4)
        assert moved > 0 if online_fraction == 0.05 else moved == 0

    def test_first_draws_are_online_with_probability_rho(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Section D's reason for P0; draws are stratified, so that a batch's share is nearly exact."""
        _, spy = self.train(monkeypatch, gradient_steps=1, online_fraction=0.75)
        online_share = (spy.batches["sample"][0].indices >= self.N_OFFLINE).mean()
        assert math.isclose(online_share, 0.75, abs_tol=1.5 / self.BATCH_SIZE)

    def test_one_step_lowers_the_loss_on_its_samples(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The samples of line 13 are those of the loss of line 14, P's and Q's in their places."""
        _, spy = self.train(monkeypatch, gradient_steps=30)

        def loss(network: DensityRatio, step: int) -> float:
            ratios = [numpy_ratio(network, spy.batches[name][step]) for name in ("sample_online", "sample_offline")]
            return density_ratio_loss(*(th.as_tensor(ratio) for ratio in ratios)).item()

        differences = [loss(spy.networks[step], step) - loss(spy.networks[step - 1], step) for step in range(1, 30)]
        assert np.mean(differences) < 0
        assert loss(spy.networks[-1], 0) < loss(spy.networks[0], 0)
