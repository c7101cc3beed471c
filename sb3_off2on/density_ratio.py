"""
Likelihood-free density ratio ``w(s, a) = d_on(s, a) / d_off(s, a)`` (Lee et al. 2021, Sec. 4.1) and the replay priority
made from it: one network and pure functions.
"""

from collections.abc import Sequence

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, create_mlp
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn
from torch.utils._pytree import tree_map

# Keeps the logarithms finite where the network's ReLU gives 0 (the authors' value)
EPSILON = 1e-10


class DensityRatio(BaseModel):
    """
    The network ``w_psi(s, a) >= 0`` and its optimizer.

    :param observation_space: observation space
    :param action_space: action space
    :param features_extractor: features extractor of its own
    :param net_arch: sizes of the hidden layers
    :param activation_fn: activation function of the hidden layers
    :param learning_rate: learning rate of its optimizer
    :param normalize_images: whether images are divided by 255
    """

    optimizer: th.optim.Optimizer

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        features_extractor: BaseFeaturesExtractor,
        net_arch: Sequence[int] = (256, 256),
        activation_fn: type[nn.Module] = nn.ReLU,
        learning_rate: float = 3e-4,
        normalize_images: bool = True,
    ) -> None:
        super().__init__(
            observation_space, action_space, features_extractor=features_extractor, normalize_images=normalize_images
        )
        input_dim = features_extractor.features_dim + get_action_dim(action_space)
        self.ratio = nn.Sequential(*create_mlp(input_dim, 1, list(net_arch), activation_fn))
        last_layer = self.ratio[-1]
        assert isinstance(last_layer, nn.Linear)
        # Starts around a ratio of 1, away from the flat half of the ReLU (as in the authors' code)
        nn.init.constant_(last_layer.bias, 1.0)
        self.optimizer = th.optim.Adam(self.parameters(), lr=learning_rate, fused=True)

    def forward(self, obs: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        """
        :param obs: ``batch_size`` observations
        :param actions: in [-1, 1], shape ``(batch_size, action_dim)``
        :return: density ratios, >= 0, shape ``(batch_size,)``
        """
        assert isinstance(self.features_extractor, BaseFeaturesExtractor)
        features = self.extract_features(obs, self.features_extractor)
        return th.relu(self.ratio(th.cat([features, actions], dim=1))).squeeze(1)

    def of_batches(self, *batches: tuple[PyTorchObs, th.Tensor]) -> tuple[th.Tensor, ...]:
        """
        Several batches in one pass.

        :param batches: observations and actions of each, see ``forward``
        :return: density ratios of each, shape ``(batch_size,)``
        """
        observations, actions = zip(*batches, strict=True)
        joined = tree_map(lambda *parts: th.cat(parts), *observations)
        return self(joined, th.cat(actions)).split([len(part) for part in actions])


def density_ratio_loss(ratio_online: th.Tensor, ratio_reference: th.Tensor) -> th.Tensor:
    """
    Negative of the variational bound on the Jensen-Shannon divergence (Eq. 4), to be minimised.

    With ``f(y) = y log(2y / (y + 1)) + log(2 / (y + 1))`` there is ``f'(w) = log(2w / (w + 1))`` and
    ``f*(f'(w)) = -log(2 / (w + 1))``.

    :param ratio_online: ``w`` of samples of the online distribution P, shape ``(batch_size,)``
    :param ratio_reference: ``w`` of samples of the reference distribution Q, shape ``(batch_size,)``
    :return: scalar
    """
    assert ratio_online.dim() == ratio_reference.dim() == 1
    f_prime_online = th.log(2 * ratio_online / (ratio_online + 1) + EPSILON)
    f_conjugate_reference = -th.log(2 / (ratio_reference + 1) + EPSILON)
    return f_conjugate_reference.mean() - f_prime_online.mean()


def density_ratio_priority(ratio: th.Tensor, ratio_reference: th.Tensor, temperature: float) -> th.Tensor:
    """
    Self-normalised ratio ``w^(1/T) / E_reference[w^(1/T)]`` (Eq. 6), clamped to [1e-3, 1e3] as in the authors' code.

    :param ratio: ``w`` of the samples that get a priority, shape ``(batch_size,)``
    :param ratio_reference: ``w`` of samples of the reference distribution, shape ``(n_samples,)``
    :param temperature: T > 0; the larger, the flatter
    :return: priorities, shape ``(batch_size,)``
    """
    assert ratio.dim() == ratio_reference.dim() == 1
    normalizer = ratio_reference.pow(1 / temperature).mean().clamp_min(EPSILON)
    return (ratio.pow(1 / temperature) / normalizer).clamp(1e-3, 1e3)
