"""The conditional VAE against formulas in NumPy, numerical integration, and a case whose likelihood is known."""

from typing import Any

import numpy as np
import pytest
import torch as th

from sb3_off2on.vae import ConditionalVAE, gaussian_log_prob, kl_to_standard_normal

CONDITION_DIM, X_DIM, LATENT_DIM = 3, 2, 4


def make_vae(**kwargs: Any) -> Any:
    th.manual_seed(0)
    return ConditionalVAE(CONDITION_DIM, X_DIM, **{"net_arch": [8], **kwargs}).double()


def random_rows(*leading: int) -> tuple[th.Tensor, th.Tensor]:
    rng = np.random.default_rng(0)
    return th.as_tensor(rng.normal(size=(*leading, CONDITION_DIM))), th.as_tensor(rng.uniform(-1, 1, (*leading, X_DIM)))


def numpy_mlp(network: th.nn.Module, x: np.ndarray, squash: bool) -> np.ndarray:
    """A network with one hidden layer of ReLUs, from its weights."""
    state = {name: value.numpy() for name, value in network.state_dict().items()}
    hidden = np.maximum(x @ state["0.weight"].T + state["0.bias"], 0)
    output = hidden @ state["2.weight"].T + state["2.bias"]
    return np.tanh(output) if squash else output


def with_noise(monkeypatch: pytest.MonkeyPatch, noise: np.ndarray) -> None:
    monkeypatch.setattr(th, "randn_like", lambda like: th.as_tensor(noise).to(like.dtype))


class TestFormulas:
    def test_gaussian_log_prob(self) -> None:
        """The product of one-dimensional densities."""
        rng = np.random.default_rng(0)
        x, mean, std = rng.normal(size=(5, 3)), rng.normal(size=(5, 3)), rng.uniform(0.1, 3, (5, 3))
        density = np.exp(-((x - mean) ** 2) / (2 * std**2)) / np.sqrt(2 * np.pi * std**2)
        log_prob = gaussian_log_prob(th.as_tensor(x), th.as_tensor(mean), th.as_tensor(np.log(std)))
        np.testing.assert_allclose(log_prob.numpy(), np.log(density.prod(axis=1)), rtol=1e-12)

    def test_kl_divergence(self) -> None:
        """The integral of q log(q / p) on a fine grid."""
        means, stds = np.array([[0.0, 1.5], [-2.0, 0.3]]), np.array([[1.0, 0.2], [0.7, 2.5]])
        grid = np.linspace(-30, 30, 400_001)
        p = np.exp(-(grid**2) / 2) / np.sqrt(2 * np.pi)
        expected = np.zeros(2)
        for row in range(2):
            for mean, std in zip(means[row], stds[row], strict=True):
                q = np.exp(-((grid - mean) ** 2) / (2 * std**2)) / np.sqrt(2 * np.pi * std**2)
                inside = q > 1e-300
                expected[row] += np.trapezoid(
                    np.where(inside, q * np.log(np.where(inside, q, 1) / np.maximum(p, 1e-300)), 0), grid
                )
        divergence = kl_to_standard_normal(th.as_tensor(means), th.as_tensor(np.log(stds)))
        np.testing.assert_allclose(divergence.numpy(), expected, rtol=1e-6)

    @pytest.mark.parametrize("squash_output", [True, False])
    def test_elbo(self, monkeypatch: pytest.MonkeyPatch, squash_output: bool) -> None:
        """From the weights: likelihood of x at the latent that the noise gives, minus the divergence."""
        vae = make_vae(decoder_std=0.4, squash_output=squash_output)
        condition, x = random_rows(6)
        noise = np.random.default_rng(1).normal(size=(6, LATENT_DIM))
        with_noise(monkeypatch, noise)
        c, actions = condition.numpy(), x.numpy()
        encoded = numpy_mlp(vae.encoder, np.concatenate([c, actions], axis=1), squash=False)
        mean, std = encoded[:, :LATENT_DIM], np.exp(encoded[:, LATENT_DIM:])
        decoded = numpy_mlp(vae.decoder, np.concatenate([c, mean + std * noise], axis=1), squash_output)
        density = np.exp(-((actions - decoded) ** 2) / (2 * 0.4**2)) / np.sqrt(2 * np.pi * 0.4**2)
        divergence = -0.5 * (1 + np.log(std**2) - mean**2 - std**2).sum(axis=1)
        np.testing.assert_allclose(
            vae.elbo(condition, x).detach().numpy(), np.log(density.prod(axis=1)) - divergence, rtol=1e-10
        )

    def test_is_the_loss_of_the_published_bcq(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """mean((x - x')^2) + 0.5 mean(KL) over rows and dimensions is the negative ELBO, up to a factor and a constant."""
        vae = make_vae()
        condition, x = random_rows(6)
        with_noise(monkeypatch, np.random.default_rng(1).normal(size=(6, LATENT_DIM)))
        mean, log_std = vae.encode(condition, x)
        decoded = vae.decode(condition, mean + log_std.exp() * th.randn_like(mean))
        published = (x - decoded).pow(2).mean() - 0.25 * (1 + 2 * log_std - mean.pow(2) - (2 * log_std).exp()).mean()
        ours = -vae.elbo(condition, x).mean()
        constant = X_DIM * 0.5 * np.log(2 * np.pi / 8)
        assert ours.item() == pytest.approx(4 * X_DIM * published.item() + constant, rel=1e-10)

    def test_log_std_of_the_encoder_is_bounded(self) -> None:
        vae = make_vae()
        with th.no_grad():
            vae.encoder[-1].bias.copy_(th.tensor([0, 0, 0, 0, -50, -4.5, 20, 99]))
        _, log_std = vae.encode(*random_rows(1))
        np.testing.assert_allclose(log_std.detach().numpy(), [[-4, -4, 15, 15]])


def linear_gaussian(encoder_error: float) -> tuple[Any, th.Tensor, th.Tensor, np.ndarray]:
    """
    A linear decoder, so that x is Gaussian given the condition: N(V c + b, w w^T + std^2). The encoder is the posterior of
    its one latent, moved by ``encoder_error``.
    """
    std = 0.5
    vae = make_vae(latent_dim=1, net_arch=[], decoder_std=std, squash_output=False)
    condition, x = random_rows(5)
    weight, bias = vae.decoder[0].weight.detach(), vae.decoder[0].bias.detach()
    v, w = weight[:, :CONDITION_DIM], weight[:, CONDITION_DIM:]
    precision = 1 + (w.T @ w).item() / std**2
    with th.no_grad():
        # Mean w^T (x - V c - b) / (std^2 precision), variance 1 / precision
        mean_weight = th.cat([-w.T @ v, w.T], dim=1) / (std**2 * precision)
        mean_bias = -(w.T @ bias) / (std**2 * precision)
        vae.encoder[0].weight.copy_(th.cat([mean_weight, th.zeros(1, CONDITION_DIM + X_DIM)]))
        vae.encoder[0].bias.copy_(th.cat([mean_bias + encoder_error, th.tensor([-0.5 * np.log(precision) + encoder_error])]))
    covariance = (w @ w.T).numpy() + std**2 * np.eye(X_DIM)
    error = (x - condition @ v.T - bias).numpy()
    mahalanobis = np.einsum("bi,ij,bj->b", error, np.linalg.inv(covariance), error)
    exact = -0.5 * (mahalanobis + np.linalg.slogdet(covariance)[1] + X_DIM * np.log(2 * np.pi))
    return vae, condition, x, exact


class TestLogLikelihood:
    def test_with_the_exact_posterior_one_sample_is_enough(self) -> None:
        vae, condition, x, exact = linear_gaussian(encoder_error=0.0)
        np.testing.assert_allclose(vae.log_likelihood(condition, x, n_samples=1).numpy(), exact, rtol=1e-10)

    def test_converges_to_the_exact_likelihood(self) -> None:
        """From below in expectation: the ELBO at first, the tighter the more samples."""
        vae, condition, x, exact = linear_gaussian(encoder_error=0.4)
        rows = [tensor.repeat(500, 1, 1) for tensor in (condition, x)]
        th.manual_seed(0)
        gaps = [exact - vae.log_likelihood(*rows, n_samples=n).mean(dim=0).numpy() for n in (1, 8, 64)]
        elbo_gap = exact - vae.elbo(*rows).detach().mean(dim=0).numpy()
        np.testing.assert_allclose(gaps[0], elbo_gap, atol=0.15)
        assert (gaps[0] > 0.1).all()
        assert (gaps[0] > 2 * gaps[1]).all()
        assert (gaps[1] > 2 * gaps[2]).all()
        np.testing.assert_allclose(vae.log_likelihood(condition, x, n_samples=1000).numpy(), exact, atol=0.06)

    def test_against_numpy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The logarithm of the mean importance weight, for a model that is not linear."""
        vae = make_vae(decoder_std=0.4)
        condition, x = random_rows(6)
        noises = np.random.default_rng(1).normal(size=(3, 6, LATENT_DIM))
        draws = iter(noises)
        monkeypatch.setattr(th, "randn_like", lambda like: th.as_tensor(next(draws)))
        c, actions = condition.numpy(), x.numpy()
        encoded = numpy_mlp(vae.encoder, np.concatenate([c, actions], axis=1), squash=False)
        mean, std = encoded[:, :LATENT_DIM], np.exp(encoded[:, LATENT_DIM:])

        def density(value: np.ndarray, center: Any, scale: Any) -> np.ndarray:
            return (np.exp(-(((value - center) / scale) ** 2) / 2) / np.sqrt(2 * np.pi) / scale).prod(axis=1)

        weights = []
        for noise in noises:
            z = mean + std * noise
            decoded = numpy_mlp(vae.decoder, np.concatenate([c, z], axis=1), squash=True)
            weights.append(density(actions, decoded, 0.4) * density(z, 0, 1) / density(z, mean, std))
        log_likelihood = vae.log_likelihood(condition, x, n_samples=3)
        np.testing.assert_allclose(log_likelihood.numpy(), np.log(np.mean(weights, axis=0)), rtol=1e-10)
        assert not log_likelihood.requires_grad

    def test_learned_density_tells_data_from_other_actions(self) -> None:
        """Actions that depend on the state: likely at their own states, unlikely at others'."""
        th.manual_seed(0)
        vae = ConditionalVAE(1, 1, net_arch=[32], decoder_std=0.1)
        optimizer = th.optim.Adam(vae.parameters(), lr=1e-2)
        for _ in range(100):
            states = 2 * th.rand(64, 1) - 1
            loss = -vae.elbo(states, 0.8 * states).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        states = th.linspace(-1, 1, 50).unsqueeze(1)
        own, others = (vae.log_likelihood(states, sign * 0.8 * states) for sign in (1, -1))
        assert own.mean() > 0.5
        assert others.mean() < -5


class TestShapes:
    def test_leading_dimensions(self) -> None:
        """Rows do not depend on how they are arranged."""
        vae, condition, x, exact = linear_gaussian(encoder_error=0.0)
        rows = [tensor.repeat(2, 3, 1, 1) for tensor in (condition, x)]
        np.testing.assert_allclose(vae.log_likelihood(*rows, n_samples=2).numpy(), np.tile(exact, (2, 3, 1)), rtol=1e-10)
        assert vae.elbo(*rows).shape == (2, 3, 5)

    def test_without_a_condition(self) -> None:
        """A density of x alone, e.g. of state-action pairs."""
        vae = ConditionalVAE(0, 5, latent_dim=2, net_arch=[8], squash_output=False)
        condition, x = th.empty(7, 0), th.randn(7, 5)
        assert vae.elbo(condition, x).shape == vae.log_likelihood(condition, x).shape == (7,)

    def test_two_latents_for_each_dimension(self) -> None:
        assert make_vae().latent_dim == 2 * X_DIM


class TestErrors:
    @pytest.mark.parametrize(
        ("kwargs", "match"),
        [
            ({"latent_dim": 0}, "`latent_dim` must be an integer of at least 1, got 0"),
            ({"decoder_std": 0.0}, "`decoder_std` must be above 0, got 0.0"),
            ({"decoder_std": float("nan")}, "`decoder_std` must be above 0, got nan"),
        ],
        ids=str,
    )
    def test_constructor(self, kwargs: dict[str, Any], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            make_vae(**kwargs)

    def test_no_samples(self) -> None:
        with pytest.raises(ValueError, match="`n_samples` must be at least 1, got 0"):
            make_vae().log_likelihood(*random_rows(2), n_samples=0)
