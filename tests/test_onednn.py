"""Which products oneDNN takes, and layers without gradient."""

import math
import platform
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch as th
from helpers import needs_onednn
from torch import nn

from sb3_off2on import mlp, onednn
from sb3_off2on.onednn import describe_processor, min_multiplications, product, takes_onednn
from sb3_off2on.stacking import stack_modules

assert_close = partial(th.testing.assert_close, rtol=1e-5, atol=2e-5)


@pytest.fixture
def dense(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each product by oneDNN: whether it has fast code for the second factor."""
    calls: list[bool] = []
    onednn_linear: Any = onednn._ONEDNN_LINEAR

    def recording_linear(x: th.Tensor, y: th.Tensor, *args: Any) -> th.Tensor:
        calls.append(y.is_contiguous() or y.T.is_contiguous())
        return onednn_linear(x, y, *args)

    if onednn_linear is not None:
        monkeypatch.setattr(onednn, "_ONEDNN_LINEAR", recording_linear)
    return calls


LINUX = "processor\t: 0\nvendor_id\t: {}\ncpu family\t: {}\nmodel\t\t: 17"


class TestProcessors:
    @pytest.mark.parametrize(
        ("processor", "capability", "expected"),
        [
            (LINUX.format("AuthenticAMD", 25), "AVX2", math.inf),  # Zen 3
            (LINUX.format("AuthenticAMD", 25), "AVX512", 2**25),  # Zen 4
            (LINUX.format("AuthenticAMD", 26), "AVX512", 2**22),  # Zen 5
            (LINUX.format("GenuineIntel", 6), "AVX512", math.inf),
            (LINUX.format("GenuineIntel", 26), "AVX512", math.inf),
            ("AMD64 Family 25 Model 97 Stepping 2, AuthenticAMD", "AVX512", 2**25),
            ("AMD64 Family 26 Model 68 Stepping 0, AuthenticAMD", "AVX512", 2**22),
            ("Intel64 Family 6 Model 183 Stepping 1, GenuineIntel", "AVX512", math.inf),
            ("AuthenticAMD", "AVX512", math.inf),
            ("arm", "DEFAULT", math.inf),
            ("", "", math.inf),
        ],
    )
    def test_from_which_size_onednn_is_faster(self, processor: str, capability: str, expected: float) -> None:
        assert min_multiplications(processor, capability) == expected

    @pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="not on Linux")
    def test_description_on_linux(self) -> None:
        description = describe_processor()
        assert description
        assert len(re.findall(r"^processor\b", description, re.MULTILINE)) <= 1

    def test_description_elsewhere(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Path, "exists", lambda _: False)
        assert describe_processor() == platform.processor()


@needs_onednn
class TestProduct:
    @pytest.mark.parametrize("transposed", [False, True])
    def test_is_numpys(self, transposed: bool) -> None:
        x, y = ((th.randn(8, n).T if transposed else th.randn(n, 8)) for n in (16, 4))
        bias = th.randn(4)
        expected = th.as_tensor(x.numpy() @ y.numpy().T)
        assert_close(product(x, y, bias), expected + bias)
        assert_close(product(x, y), expected)

    def test_what_onednn_takes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(onednn, "MIN_MULTIPLICATIONS", 8)
        x = th.randn(16, 8)
        assert takes_onednn(x, 8)
        assert not takes_onednn(x, 7)
        assert not takes_onednn(x.double(), 8)
        assert not takes_onednn(x.to("meta"), 8)
        monkeypatch.setattr(onednn, "_ONEDNN_LINEAR", None)
        assert not takes_onednn(x, 8)

    def test_compiled_code_chooses_for_itself(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(onednn, "MIN_MULTIPLICATIONS", 0)
        seen: list[bool] = []

        def look(x: th.Tensor) -> th.Tensor:
            seen.append(takes_onednn(x, 1))
            return x + 1

        th.compile(look, backend="eager")(th.zeros(1))
        assert seen == [False]


class TestWithoutGradient:
    """Weights times observations: the layer of a prediction for several environments."""

    ROWS = mlp.MIN_ROWS_WEIGHTS_FIRST
    INPUTS: ClassVar[dict[str, Callable[[], th.Tensor]]] = {
        "rows": lambda: th.randn(3, TestWithoutGradient.ROWS, 8),
        "transposed": lambda: th.randn(3, 8, TestWithoutGradient.ROWS).transpose(1, 2),
        "same-for-all": lambda: th.randn(TestWithoutGradient.ROWS, 8).expand(3, -1, -1),
        "wider-rows": lambda: th.randn(3, TestWithoutGradient.ROWS, 24)[..., 8:16],
        "fewer": lambda: th.randn(3, TestWithoutGradient.ROWS - 1, 8),
    }

    @pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS)
    @pytest.mark.parametrize("by_onednn", [False, pytest.param(True, marks=needs_onednn)])
    def test_is_the_layer(
        self, monkeypatch: pytest.MonkeyPatch, dense: list[bool], x: Callable[[], th.Tensor], by_onednn: bool
    ) -> None:
        monkeypatch.setattr(onednn, "MIN_MULTIPLICATIONS", 0 if by_onednn else math.inf)
        layers = [nn.Linear(8, 5) for _ in range(3)]
        observations = x()
        with th.no_grad():
            output = stack_modules(layers)(observations)
        weight, bias = (np.stack([getattr(layer, name).detach().numpy() for layer in layers]) for name in ("weight", "bias"))
        expected = np.einsum("nri,noi->nro", observations.numpy(), weight) + bias[:, None]
        assert_close(output, th.as_tensor(expected))
        assert dense == ([True] * 3 if by_onednn and observations.shape[1] >= self.ROWS else [])
