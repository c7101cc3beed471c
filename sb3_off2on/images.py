"""What learning from images needs beside SB3's ``CnnPolicy``: the paper's convolutions, faster ones, and random shifts."""

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, NatureCNN
from torch import nn


class FlatCNN(BaseFeaturesExtractor):
    """
    Convolutions whose output is flattened, without a linear layer: the first layer of ``net_arch`` comes right after them, and
    takes the action beside their features.

    :param observation_space: channel-first images, as SB3's wrappers make them
    :param normalized_image: whether images are in [0, 1] already, see ``NatureCNN``
    :raises ValueError: if these are no images, or too small ones
    """

    smallest: int

    def __init__(self, observation_space: spaces.Space, normalized_image: bool = False) -> None:
        if not isinstance(observation_space, spaces.Box) or not is_image_space(
            observation_space, check_channels=False, normalized_image=normalized_image
        ):
            raise ValueError(
                f"`features_extractor_class={type(self).__name__}` is for images, not for {observation_space}: use "
                "`MlpPolicy`, or `normalized_image=True` for images that are in [0, 1] already"
            )
        if min(observation_space.shape[1:]) < self.smallest:
            raise ValueError(
                f"`features_extractor_class={type(self).__name__}` needs images of at least {self.smallest} x {self.smallest} "
                f"pixels, got {observation_space.shape}"
            )
        n_channels = observation_space.shape[0]
        cnn = nn.Sequential(*self.make_layers(n_channels), nn.Flatten())
        with th.no_grad():
            features_dim = cnn(th.zeros(1, *observation_space.shape)).shape[1]
        super().__init__(observation_space, features_dim)
        self.cnn = cnn

    @staticmethod
    def make_layers(n_channels: int) -> list[nn.Module]:
        """
        :param n_channels: of the images
        :return: the layers
        """
        raise NotImplementedError

    def forward(self, observations: th.Tensor) -> th.Tensor:
        """
        :param observations: in [0, 1], shape ``(batch_size, n_channels, height, width)``
        :return: shape ``(batch_size, features_dim)``
        """
        return self.cnn(observations)


class CogCNN(FlatCNN):
    """
    The paper's convolutions (section D.2), which are those of COG (Singh et al. 2020): three of 16 kernels of 3 x 3 each, the
    first two followed by max-pooling. With ``net_arch=[1024, 512, 256]`` it is the paper's network.
    """

    smallest = 4

    @staticmethod
    def make_layers(n_channels: int) -> list[nn.Module]:
        return [
            nn.Conv2d(n_channels, 16, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 16, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 16, kernel_size=3, padding=1),
            nn.ReLU(),
        ]


class StridedCNN(FlatCNN):
    """
    A small one for processors: strides in the place of pooling, which leave little to compute.
    """

    smallest = 17

    @staticmethod
    def make_layers(n_channels: int) -> list[nn.Module]:
        return [
            nn.Conv2d(n_channels, 16, kernel_size=5, stride=3),
            nn.ReLU(),
            nn.Conv2d(16, 32, kernel_size=3, stride=2),
            nn.ReLU(),
            nn.Conv2d(32, 32, kernel_size=3, stride=2, padding=1),
            nn.ReLU(),
        ]


class FlatCombinedExtractor(CombinedExtractor):
    """
    SB3's ``CombinedExtractor`` with one of these in the place of ``NatureCNN``.

    :param observation_space: a Dict
    :param cnn_class: for each of its images
    :param normalized_image: whether images are in [0, 1] already, see ``CombinedExtractor``
    """

    def __init__(
        self, observation_space: spaces.Dict, cnn_class: type[FlatCNN] = CogCNN, normalized_image: bool = False
    ) -> None:
        super().__init__(observation_space, normalized_image=normalized_image)
        for key, extractor in self.extractors.items():
            if isinstance(extractor, NatureCNN):
                cnn = cnn_class(observation_space[key], normalized_image=normalized_image)
                self.extractors[key] = cnn
                self._features_dim += cnn.features_dim - extractor.features_dim


def shift_images(images: th.Tensor, offsets: th.Tensor) -> th.Tensor:
    """
    Move every image by its own offset; what would come from outside repeats the edge. The same as padding with the edge's
    pixels and cropping (Kostrikov et al. 2020), in one gather.

    :param images: shape ``(batch_size, n_channels, height, width)``
    :param offsets: where the new row 0 and column 0 are in the old image, integers of shape ``(2, batch_size)``
    :return: shape and type as ``images``
    """
    height, width = images.shape[-2:]
    row_offsets, column_offsets = offsets.unsqueeze(-1)
    rows = (th.arange(height, device=images.device) + row_offsets).clamp(0, height - 1)
    columns = (th.arange(width, device=images.device) + column_offsets).clamp(0, width - 1)
    pixels = (width * rows.unsqueeze(2) + columns.unsqueeze(1)).flatten(1)  # (batch_size, height * width)
    pixels = pixels.unsqueeze(1).expand(-1, images.shape[1], -1)
    return images.flatten(2).gather(2, pixels).view(images.shape)


def random_offsets(batch_size: int, pad: int) -> np.ndarray:
    """
    Offsets for ``shift_images``, from NumPy's global generator as all draws of SB3's replay buffers.

    :param batch_size: number of images
    :param pad: the largest shift, in pixels
    :return: uniform integers from ``-pad`` to ``pad``, shape ``(2, batch_size)``
    """
    return np.random.randint(-pad, pad + 1, size=(2, batch_size))
