"""Convolutions against NumPy, random shifts against padding and cropping, and models that learn from images with them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import TinyEnv, assert_same, make_dataset, parameters_of, small_model
from torch import nn

from sb3_off2on import BalancedReplayBuffer, Off2OnSAC
from sb3_off2on.datasets import map_arrays
from sb3_off2on.density_ratio import DensityRatio
from sb3_off2on.images import CogCNN, FlatCNN, FlatCombinedExtractor, StridedCNN, random_offsets, shift_images

ACTION_SPACE = spaces.Box(-1, 1, (2,), np.float32)
IMAGE_SPACE = spaces.Box(0, 255, (3, 20, 18), np.uint8)
VECTOR_SPACE = spaces.Box(-1, 1, (4,), np.float32)
PAPER_SPACE = spaces.Box(0, 255, (3, 48, 48), np.uint8)


def convolve(x: np.ndarray, layer: nn.Conv2d) -> np.ndarray:
    """Shape ``(n_channels, height, width)`` to ``(n_kernels, ...)``, pixel by pixel."""
    assert layer.bias is not None
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    pad, stride, size = int(layer.padding[0]), layer.stride[0], weight.shape[-1]
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad)))
    shape = [(length - size) // stride + 1 for length in x.shape[1:]]
    out = np.empty((len(weight), *shape))
    for row, column in np.ndindex(*shape):
        patch = x[:, stride * row : stride * row + size, stride * column : stride * column + size]
        out[:, row, column] = (weight * patch).sum(axis=(1, 2, 3)) + bias
    return np.maximum(out, 0)


def max_pool(x: np.ndarray) -> np.ndarray:
    n, height, width = x.shape
    return x[:, : height // 2 * 2, : width // 2 * 2].reshape(n, height // 2, 2, width // 2, 2).max(axis=(2, 4))


class TestConvolutions:
    @pytest.mark.parametrize("cnn_class", [CogCNN, StridedCNN])
    def test_against_numpy(self, cnn_class: type[FlatCNN]) -> None:
        th.manual_seed(0)
        network = cnn_class(IMAGE_SPACE)
        images = np.random.default_rng(0).random((2, 3, 20, 18))
        got = network(th.as_tensor(images, dtype=th.float32)).detach().numpy()
        assert got.shape == (2, network.features_dim)
        first, second, third = (layer for layer in network.cnn if isinstance(layer, nn.Conv2d))
        for image, features in zip(images, got, strict=True):
            if cnn_class is CogCNN:
                expected = convolve(max_pool(convolve(max_pool(convolve(image, first)), second)), third)
            else:
                expected = convolve(convolve(convolve(image, first), second), third)
            np.testing.assert_allclose(features, expected.ravel(), rtol=1e-4, atol=1e-5)

    def test_paper(self) -> None:
        """Section D.2: 3 x 3 x 16 three times, and fully connected 1024, 512, 256, which the action joins at the first."""
        network = CogCNN(PAPER_SPACE)
        kernels = [parameter.shape for name, parameter in network.named_parameters() if name.endswith("weight")]
        assert kernels == [(16, 3, 3, 3), (16, 16, 3, 3), (16, 16, 3, 3)]
        assert network.features_dim == 16 * 12 * 12
        model = Off2OnSAC(
            "CnnPolicy",
            TinyEnv(PAPER_SPACE),
            buffer_size=1,
            policy_kwargs={"ensemble_size": 1, "features_extractor_class": CogCNN, "net_arch": [1024, 512, 256]},
        )
        shapes = {name: tuple(value.shape) for name, value in model.get_member(0)["critic"].items()}
        assert [shapes[f"qf0.{layer}.weight"] for layer in (0, 2, 4, 6)] == [(1024, 2306), (512, 1024), (256, 512), (1, 256)]

    @pytest.mark.parametrize("cnn_class", [CogCNN, StridedCNN])
    def test_smallest_images(self, cnn_class: type[FlatCNN]) -> None:
        n = cnn_class.smallest
        assert cnn_class(spaces.Box(0, 255, (1, n, n), np.uint8)).features_dim > 0
        with pytest.raises(ValueError, match=rf"{cnn_class.__name__}` needs images of at least {n} x {n} pixels, got"):
            cnn_class(spaces.Box(0, 255, (1, n, n - 1), np.uint8))

    def test_refuses_what_is_no_image(self) -> None:
        with pytest.raises(ValueError, match=r"`features_extractor_class=CogCNN` is for images, not for Box"):
            CogCNN(VECTOR_SPACE)
        floats = spaces.Box(0, 1, (3, 20, 20), np.float32)
        with pytest.raises(ValueError, match=r"or `normalized_image=True` for images that are in \[0, 1\] already"):
            CogCNN(floats)
        assert CogCNN(floats, normalized_image=True).features_dim == 16 * 5 * 5

    def test_dict(self) -> None:
        """Features of the image beside the vector, in the order of the keys, as in SB3's extractor."""
        th.manual_seed(0)
        extractor = FlatCombinedExtractor(spaces.Dict(image=PAPER_SPACE, state=VECTOR_SPACE), cnn_class=StridedCNN)
        cnn = extractor.extractors["image"]
        assert isinstance(cnn, StridedCNN)
        assert extractor.features_dim == cnn.features_dim + 4
        obs = {"image": th.rand(2, 3, 48, 48), "state": th.rand(2, 4)}
        assert th.equal(extractor(obs), th.cat([cnn(obs["image"]), obs["state"]], dim=1))


class TestShift:
    def test_against_padding_and_cropping(self) -> None:
        """As Kostrikov et al. 2020 describe it: pad by repeating the edge, and crop."""
        rng, pad = np.random.default_rng(0), 4
        images = rng.integers(0, 256, (50, 3, 9, 7), dtype=np.uint8)
        offsets = rng.integers(-pad, pad + 1, (2, 50))
        got = shift_images(th.as_tensor(images), th.as_tensor(offsets))
        assert got.dtype == th.uint8
        for image, row, column, shifted in zip(images, *(offsets + pad), got.numpy(), strict=True):
            padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)), mode="edge")
            np.testing.assert_array_equal(shifted, padded[:, row : row + 9, column : column + 7])

    def test_no_offset_no_change(self) -> None:
        images = th.rand(3, 1, 5, 6)
        assert th.equal(shift_images(images, th.zeros(2, 3, dtype=th.int64)), images)

    def test_offsets_are_uniform_and_independent(self) -> None:
        np.random.seed(0)
        counts = np.zeros((5, 5))
        np.add.at(counts, tuple(random_offsets(25_000, 2) + 2), 1)
        # 1000 expected in each cell, with a standard deviation of 31
        assert (np.abs(counts - 1000) < 130).all()


class TestReplay:
    """Which of a batch are shifted: images alone, in each draw of each part."""

    def make_buffer(self, random_shift: int, space: spaces.Space | None = None) -> BalancedReplayBuffer:
        space = spaces.Dict(image=IMAGE_SPACE, vector=VECTOR_SPACE) if space is None else space
        buffer = BalancedReplayBuffer(8, space, ACTION_SPACE, device="cpu", scheme="uniform", random_shift=random_shift)
        env = TinyEnv(space)
        env.reset(seed=0)
        buffer.set_offline_data(make_dataset(n_episodes=2, length=10, env=env))
        for _ in range(8):
            obs, next_obs = (map_arrays(lambda part: part[None], env.observation_space.sample()) for _ in range(2))
            buffer.add(obs, next_obs, np.zeros((1, 2)), np.zeros(1), np.zeros(1), [{}])
        return buffer

    @pytest.mark.parametrize("draw", ["sample", "sample_offline", "sample_online", "sample_uniform"])
    def test_images_alone_are_shifted(self, draw: str) -> None:
        buffer = self.make_buffer(random_shift=2)
        np.random.seed(0)
        samples = getattr(buffer, draw)(40)
        rows = buffer._get_samples(samples.indices)
        offsets = []
        pairs: Any = ((samples.observations, rows.observations), (samples.next_observations, rows.next_observations))
        for got, plain in pairs:
            assert th.equal(got["vector"], plain["vector"])
            for image, original in zip(got["image"], plain["image"], strict=True):
                candidates = [(row, column) for row in range(-2, 3) for column in range(-2, 3)]
                matches = [
                    offset
                    for offset in candidates
                    if th.equal(image, shift_images(original.unsqueeze(0), th.tensor(offset).unsqueeze(1))[0])
                ]
                assert len(matches) == 1
                offsets += matches
        # All offsets occur, and those of observation and next observation do not hang together
        assert len(set(offsets)) > 20
        assert np.mean([one == other for one, other in zip(offsets[:40], offsets[40:], strict=True)]) < 0.2
        for name in ("actions", "rewards", "dones"):
            assert th.equal(getattr(samples, name), getattr(rows, name))

    def test_off_by_default_and_without_a_draw(self) -> None:
        buffer = self.make_buffer(random_shift=0)
        np.random.seed(0)
        samples = buffer.sample(5)
        state = np.random.get_state()
        np.random.seed(0)
        buffer._draw(5)
        assert_same(list(state), list(np.random.get_state()))
        assert_same(samples.observations, buffer._get_samples(samples.indices).observations)

    @pytest.mark.parametrize("value", [-1, 1.5, True])
    def test_refuses_other_numbers(self, value: Any) -> None:
        with pytest.raises(ValueError, match=rf"`random_shift` must be an integer of at least 0 \(pixels\), got {value}"):
            self.make_buffer(value)

    def test_refuses_to_shift_nothing(self) -> None:
        with pytest.raises(ValueError, match=r"`random_shift=4` is for images of type uint8, of which there are none in Box"):
            self.make_buffer(4, VECTOR_SPACE)


def test_density_ratio_of_the_paper() -> None:
    """Section D.2: the convolutions of the value network, and (256, 128) fully connected."""
    model = small_model(
        TinyEnv(PAPER_SPACE),
        "CnnPolicy",
        dataset=make_dataset(n_episodes=2, length=5, env=TinyEnv(PAPER_SPACE)),
        policy_kwargs={"ensemble_size": 1, "features_extractor_class": CogCNN, "net_arch": [8]},
        density_ratio_kwargs={"net_arch": [256, 128]},
    )
    assert isinstance(model.density_ratio, DensityRatio)
    assert isinstance(model.density_ratio.features_extractor, CogCNN)
    assert model.density_ratio.features_extractor is not model.actor.features_extractor
    weights = [tuple(value.shape) for name, value in model.density_ratio.ratio.named_parameters() if name.endswith("weight")]
    assert weights == [(256, 2306), (128, 256), (1, 128)]


@pytest.mark.parametrize("share", [False, True], ids=["own-encoders", "shared-encoder"])
@pytest.mark.parametrize("kind", ["image", "dict"])
def test_learns_and_is_saved(kind: str, share: bool, tmp_path: Path) -> None:
    """Both phases, with every network's convolutions trained, and the next update of a loaded model to the last bit."""
    image_space = spaces.Box(0, 255, (36, 36, 3), np.uint8)
    space = image_space if kind == "image" else spaces.Dict(image=image_space, vector=VECTOR_SPACE)
    extractor = {"image": StridedCNN, "dict": FlatCombinedExtractor}[kind]
    dataset = make_dataset(n_episodes=2, length=5, env=TinyEnv(space))
    model = small_model(
        TinyEnv(space),
        "CnnPolicy" if kind == "image" else "MultiInputPolicy",
        dataset=dataset,
        policy_kwargs={
            "ensemble_size": 2,
            "net_arch": [8],
            "features_extractor_class": extractor,
            "share_features_extractor": share,
        },
        density_ratio_kwargs={"net_arch": [8]},
        replay_buffer_kwargs={"random_shift": 2},
    )
    before = parameters_of(model.policy)
    model.learn_offline(gradient_steps=2)
    for name, value in parameters_of(model.policy).items():
        if not name.startswith("critic_target"):
            assert not th.equal(value, before[name]), name
    model.learn(4)
    assert model._n_updates > 0
    assert model.density_ratio is not None
    model.save(tmp_path / "model")
    loaded = Off2OnSAC.load(tmp_path / "model", env=TinyEnv(space), dataset=dataset)
    assert loaded.replay_buffer.random_shift == 2
    assert_same(parameters_of(loaded.policy), parameters_of(model.policy))
    assert loaded.density_ratio is not None
    assert_same(parameters_of(loaded.density_ratio), parameters_of(model.density_ratio))
