"""
Conditional variational autoencoder (Kingma & Welling 2014; Sohn et al. 2015): BCQ's model of the behaviour, and, without a
condition, a density model of state-action pairs (Lee et al. 2021, Fig. 1a).
"""

import math
from collections.abc import Sequence

import torch as th
from stable_baselines3.common.torch_layers import create_mlp
from torch import nn

# Bounds of the encoder's log standard deviations, for numerical stability (the published BCQ code)
LOG_STD_MIN = -4.0
LOG_STD_MAX = 15.0
# With the decoder's variance at 1/8 and two latents for each dimension of x, minus the ELBO is 4 * x_dim times the loss of the
# published BCQ code, mean((x - x')^2) + 0.5 * mean(KL), and a constant: the same step for Adam
BCQ_DECODER_STD = math.sqrt(1 / 8)


def gaussian_log_prob(x: th.Tensor, mean: th.Tensor, log_std: th.Tensor) -> th.Tensor:
    """
    :param x: shape ``(..., dim)``
    :param mean: shape ``(..., dim)``
    :param log_std: logarithms of the standard deviations, broadcast to that shape
    :return: log-density of x under independent Gaussians, shape ``(...,)``
    """
    standardized = (x - mean) * th.exp(-log_std)
    return -(0.5 * standardized.pow(2) + log_std + 0.5 * math.log(2 * math.pi)).sum(dim=-1)


def kl_to_standard_normal(mean: th.Tensor, log_std: th.Tensor) -> th.Tensor:
    """
    :param mean: shape ``(..., latent_dim)``
    :param log_std: logarithms of the standard deviations, same shape
    :return: divergence KL(N(mean, std^2) || N(0, 1)) in nats, shape ``(...,)``
    """
    return 0.5 * (mean.pow(2) + th.exp(2 * log_std) - 1 - 2 * log_std).sum(dim=-1)


class ConditionalVAE(nn.Module):
    """
    The density ``p(x | c) = E_{z ~ N(0, 1)}[N(x; decoder(c, z), decoder_std^2)]`` of x given a condition c, and the encoder
    ``q(z | c, x)``, a Gaussian, that makes it learnable.

    All methods take any number of leading dimensions, and use nothing of the class but ``encoder`` and ``decoder``.

    :param condition_dim: number of dimensions of the condition, e.g. of the features of a state; 0 for none
    :param x_dim: number of dimensions of x, e.g. of an action
    :param latent_dim: number of dimensions of z, twice that of x if ``None`` (as BCQ)
    :param net_arch: sizes of the hidden layers, of the encoder and of the decoder
    :param activation_fn: activation function of the hidden layers
    :param decoder_std: standard deviation of x given c and z, > 0
    :param squash_output: whether a tanh keeps the decoder's mean within [-1, 1], as for actions
    :raises ValueError: if ``latent_dim`` or ``decoder_std`` is out of its range
    """

    def __init__(
        self,
        condition_dim: int,
        x_dim: int,
        latent_dim: int | None = None,
        net_arch: Sequence[int] = (750, 750),
        activation_fn: type[nn.Module] = nn.ReLU,
        decoder_std: float = BCQ_DECODER_STD,
        squash_output: bool = True,
    ) -> None:
        super().__init__()
        self.latent_dim = 2 * x_dim if latent_dim is None else latent_dim
        if not isinstance(self.latent_dim, int) or self.latent_dim < 1:
            raise ValueError(f"`latent_dim` must be an integer of at least 1, got {latent_dim!r}")
        if not decoder_std > 0:
            raise ValueError(f"`decoder_std` must be above 0, got {decoder_std}")
        self.decoder_std = decoder_std
        # The encoder's outputs are means and log standard deviations
        encoder = create_mlp(condition_dim + x_dim, 2 * self.latent_dim, list(net_arch), activation_fn)
        decoder = create_mlp(condition_dim + self.latent_dim, x_dim, list(net_arch), activation_fn, squash_output)
        self.encoder = nn.Sequential(*encoder)
        self.decoder = nn.Sequential(*decoder)

    def encode(self, condition: th.Tensor, x: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param condition: shape ``(..., condition_dim)``
        :param x: shape ``(..., x_dim)``
        :return: mean and log standard deviation of z, each of shape ``(..., latent_dim)``
        """
        mean, log_std = self.encoder(th.cat([condition, x], dim=-1)).chunk(2, dim=-1)
        return mean, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)

    def decode(self, condition: th.Tensor, latents: th.Tensor) -> th.Tensor:
        """
        :param condition: shape ``(..., condition_dim)``
        :param latents: shape ``(..., latent_dim)``
        :return: mean of x, shape ``(..., x_dim)``
        """
        return self.decoder(th.cat([condition, latents], dim=-1))

    def _decoder_log_prob(self, condition: th.Tensor, x: th.Tensor, latents: th.Tensor) -> th.Tensor:
        mean = self.decode(condition, latents)
        return gaussian_log_prob(x, mean, th.full_like(mean, math.log(self.decoder_std)))

    def elbo(self, condition: th.Tensor, x: th.Tensor) -> th.Tensor:
        """
        Estimate of the lower bound on ``log p(x | c)`` at one latent, with gradient.

        :param condition: shape ``(..., condition_dim)``
        :param x: shape ``(..., x_dim)``
        :return: the bound in nats, shape ``(...,)``
        """
        mean, log_std = self.encode(condition, x)
        latents = mean + th.exp(log_std) * th.randn_like(mean)
        return self._decoder_log_prob(condition, x, latents) - kl_to_standard_normal(mean, log_std)

    @th.no_grad()
    def log_likelihood(self, condition: th.Tensor, x: th.Tensor, n_samples: int = 100) -> th.Tensor:
        """
        Importance-weighted estimate of ``log p(x | c)`` (Burda et al. 2016): in expectation a lower bound, which gets tighter
        with every sample.

        :param condition: shape ``(..., condition_dim)``
        :param x: shape ``(..., x_dim)``
        :param n_samples: number of latents for each x
        :return: estimates in nats, shape ``(...,)``
        :raises ValueError: if ``n_samples`` is below 1
        """
        if n_samples < 1:
            raise ValueError(f"`n_samples` must be at least 1, got {n_samples}")
        mean, log_std = self.encode(condition, x)
        zeros = th.zeros_like(mean)
        log_weights = []
        for _ in range(n_samples):  # one by one: memory does not grow with the decoder's size
            latents = mean + th.exp(log_std) * th.randn_like(mean)
            log_joint = self._decoder_log_prob(condition, x, latents) + gaussian_log_prob(latents, zeros, zeros)
            log_weights.append(log_joint - gaussian_log_prob(latents, mean, log_std))
        return th.logsumexp(th.stack(log_weights), dim=0) - math.log(n_samples)
