"""Linear layers by oneDNN beside PyTorch's own, and networks one by one beside the batched product."""

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
from torch import nn

from sb3_off2on import onednn, stacking
from sb3_off2on.onednn import describe_processor, linear, outruns_mkl, takes_onednn
from sb3_off2on.stacking import frozen, stack_modules, unstack_modules

assert_close = partial(th.testing.assert_close, rtol=1e-5, atol=2e-5)
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
needs_onednn = pytest.mark.skipif(
    onednn._ONEDNN_LINEAR is None or not IS_X86,
    reason="PyTorch's oneDNN for x86 is not on this machine",
)


@pytest.fixture(autouse=True)
def fast_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor for which oneDNN is the faster one."""
    monkeypatch.setattr(onednn, "_OUTRUNS_MKL", IS_X86)


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small products go the way of large ones."""
    monkeypatch.setattr(onednn, "MIN_MULTIPLICATIONS", 0)
    monkeypatch.setattr(stacking, "MIN_MULTIPLICATIONS_PER_THREAD", 0)


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
        ("processor", "expected"),
        [
            (LINUX.format("AuthenticAMD", 25), False),  # Zen 4
            (LINUX.format("AuthenticAMD", 26), True),  # Zen 5
            (LINUX.format("GenuineIntel", 6), False),
            (LINUX.format("GenuineIntel", 26), False),
            ("AMD64 Family 25 Model 97 Stepping 2, AuthenticAMD", False),
            ("AMD64 Family 26 Model 68 Stepping 0, AuthenticAMD", True),
            ("Intel64 Family 6 Model 183 Stepping 1, GenuineIntel", False),
            ("AuthenticAMD", False),
            ("arm", False),
            ("", False),
        ],
    )
    def test_on_which_onednn_is_much_faster(self, processor: str, expected: bool) -> None:
        assert outruns_mkl(processor) is expected

    @pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="not on Linux")
    def test_description_on_linux(self) -> None:
        description = describe_processor()
        assert description
        assert len(re.findall(r"^processor\b", description, re.MULTILINE)) <= 1

    def test_description_elsewhere(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Path, "exists", lambda _: False)
        assert describe_processor() == platform.processor()


class TestLinear:
    @needs_onednn
    @pytest.mark.usefixtures("any_size")
    @pytest.mark.parametrize(
        ("batch_size", "in_features", "out_features"), [(256, 23, 64), (7, 5, 3), (1, 8, 1), (300, 64, 6)]
    )
    @pytest.mark.parametrize("transposed", [False, True])
    def test_is_pytorchs(self, batch_size: int, in_features: int, out_features: int, transposed: bool) -> None:
        """Values and the three gradients, whatever the strides."""
        shapes = ((batch_size, in_features), (out_features, in_features), (out_features,))
        if transposed:
            values = [th.randn(shape[::-1]).T if len(shape) == 2 else th.randn(shape) for shape in shapes]
        else:
            values = [th.randn(shape) for shape in shapes]
        inputs = [value.requires_grad_() for value in values]
        output, expected = linear(*inputs), nn.functional.linear(*inputs)
        assert output.grad_fn is not None
        assert "OneDNN" in output.grad_fn.name()
        assert_close(output, expected)
        weights = th.randn_like(expected)
        for grad, expected_grad in zip(
            th.autograd.grad((output * weights).sum(), inputs),
            th.autograd.grad((expected * weights).sum(), inputs),
            strict=True,
        ):
            assert_close(grad, expected_grad)
        with th.no_grad():
            assert_close(linear(*inputs), expected)

    @needs_onednn
    @pytest.mark.usefixtures("any_size")
    @pytest.mark.parametrize("wanted", [0, 1, 2])
    def test_only_the_gradients_that_are_wanted(self, wanted: int) -> None:
        inputs = [th.randn(16, 8), th.randn(4, 8), th.randn(4)]
        inputs[wanted].requires_grad_()
        (grad,) = th.autograd.grad(linear(*inputs).square().sum(), inputs[wanted])
        (expected,) = th.autograd.grad(nn.functional.linear(*inputs).square().sum(), inputs[wanted])
        assert_close(grad, expected)

    @needs_onednn
    @pytest.mark.usefixtures("any_size")
    def test_no_product_for_frozen_weights(self, dense: list[bool]) -> None:
        """One for the output and one for the gradient to the input; ``backward(inputs=...)`` would take a third."""
        layer = stack_modules([nn.Sequential(nn.Linear(8, 4)) for _ in range(3)])
        x = th.randn(3, 16, 8, requires_grad=True)
        with frozen(layer):
            output = layer(x)
        output.sum().backward()
        assert x.grad is not None
        assert len(dense) == 3 * 2

    @needs_onednn
    @pytest.mark.usefixtures("any_size")
    def test_rows_of_a_wider_tensor(self, dense: list[bool]) -> None:
        """As the features of several members in one tensor: oneDNN gets what it has fast code for."""
        inputs = [th.randn(16, 24, requires_grad=True), th.randn(4, 8, requires_grad=True), th.randn(4)]
        output, expected = (f(inputs[0][:, 8:16], *inputs[1:]) for f in (linear, nn.functional.linear))
        assert_close(output, expected)
        weights = th.randn_like(expected)
        for grad, expected_grad in zip(
            th.autograd.grad((output * weights).sum(), inputs[:2]),
            th.autograd.grad((expected * weights).sum(), inputs[:2]),
            strict=True,
        ):
            assert_close(grad, expected_grad)
        assert dense == [True] * 3

    @pytest.mark.usefixtures("any_size")
    def test_what_onednn_does_not_take(self, monkeypatch: pytest.MonkeyPatch) -> None:
        x, weight, bias = th.randn(16, 8), th.randn(4, 8), th.randn(4)
        assert not takes_onednn(x.double(), 1)
        assert not takes_onednn(x.to("meta"), 1)
        assert linear(x.double(), weight.double(), bias.double()).dtype == th.float64
        monkeypatch.setattr(onednn, "_OUTRUNS_MKL", False)
        assert not takes_onednn(x, 1)
        monkeypatch.setattr(onednn, "_OUTRUNS_MKL", True)
        monkeypatch.setattr(onednn, "_ONEDNN_LINEAR", None)
        assert not takes_onednn(x, 1)
        assert th.equal(linear(x, weight, bias), nn.functional.linear(x, weight, bias))

    def test_small_products_are_left_to_pytorch(self) -> None:
        rows = onednn.MIN_MULTIPLICATIONS // (8 * 4)
        inputs = th.zeros(rows - 1, 8, requires_grad=True), th.zeros(4, 8), th.zeros(4)
        output = linear(*inputs)
        assert output.grad_fn is not None
        assert "OneDNN" not in output.grad_fn.name()


class TestWithoutGradient:
    """Weights times observations: the layer of a prediction for several environments."""

    ROWS = stacking.MIN_ROWS_WEIGHTS_FIRST
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


NETWORKS: dict[str, Any] = {
    "relu": lambda: nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1)),
    "layer-norm": lambda: nn.Sequential(nn.Linear(5, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 1)),
    "tanh": lambda: nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 2), nn.Tanh()),
    "prelu": lambda: nn.Sequential(nn.Linear(5, 16), nn.PReLU(), nn.Linear(16, 2)),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_networks_without_gradient(network: str) -> None:
    """Layers whose inputs lie transposed."""
    stacked = stack_modules([NETWORKS[network]() for _ in range(3)])
    x = th.randn(3, stacking.MIN_ROWS_WEIGHTS_FIRST, 5)
    with th.no_grad():
        output = stacked(x)
    assert_close(output, stacked(x))


class TestOneByOne:
    """The batched product has no oneDNN in it."""

    @needs_onednn
    @pytest.mark.parametrize("network", NETWORKS)
    def test_is_the_batched_product(self, monkeypatch: pytest.MonkeyPatch, network: str) -> None:
        stacked = stack_modules([NETWORKS[network]() for _ in range(3)])
        x = th.randn(3, 12, 5, requires_grad=True)
        inputs = [x, *stacked.parameters()]

        def run() -> tuple[th.Tensor, ...]:
            output = stacked(x)
            return output, *th.autograd.grad(output.square().sum(), inputs)

        monkeypatch.setattr(stacking, "MIN_MULTIPLICATIONS_PER_THREAD", math.inf)
        expected = run()
        monkeypatch.setattr(stacking, "MIN_MULTIPLICATIONS_PER_THREAD", 0)
        monkeypatch.setattr(onednn, "MIN_MULTIPLICATIONS", 0)
        calls = []

        def recording_unstack(module: nn.Module, n_modules: int) -> Any:
            calls.append(n_modules)
            return unstack_modules(module, n_modules)

        monkeypatch.setattr(stacking, "unstack_modules", recording_unstack)
        for value, expected_value in zip(run(), expected, strict=True):
            assert_close(value, expected_value)
        assert 3 in calls

    @pytest.mark.parametrize("n_threads", [1, 2])
    def test_only_where_layers_are_large(self, monkeypatch: pytest.MonkeyPatch, n_threads: int) -> None:
        calls: list[int] = []

        def recording_unstack(module: nn.Module, n_modules: int) -> Any:
            calls.append(n_modules)
            return unstack_modules(module, n_modules)

        monkeypatch.setattr(stacking, "takes_onednn", lambda *_: True)
        monkeypatch.setattr(stacking, "unstack_modules", recording_unstack)
        monkeypatch.setattr(th, "get_num_threads", lambda: n_threads)
        stacked = stack_modules([nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 1)) for _ in range(2)])
        enough = n_threads * stacking.MIN_MULTIPLICATIONS_PER_THREAD // (8 * 64)
        stacked(th.zeros(2, enough - 1, 8))
        assert not calls
        stacked(th.zeros(2, enough, 8))
        assert calls

    def test_a_network_without_linear_layers(self) -> None:
        assert stack_modules([nn.Sequential(nn.Flatten())] * 2)(th.ones(2, 3, 4)).shape[0] == 2

    @pytest.mark.filterwarnings("ignore")  # of PyTorch: this tracer is deprecated
    @pytest.mark.parametrize("rows", [8, 64])
    def test_traced_code_has_the_batched_product(self, rows: int) -> None:
        """Weights that oneDNN would take, and rows for which they would be the first factor."""
        stacked = stack_modules([nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2)) for _ in range(2)])
        x = th.randn(2, rows, 256)
        with th.no_grad():
            expected = stacked(x)
            assert_close(th.jit.trace(stacked, x)(x), expected)
            exported = th.export.export(stacked, (x,), dynamic_shapes=({1: th.export.Dim("batch", max=4096)},))
            assert_close(exported.module()(x), expected)

    @needs_onednn
    def test_compiled_code_has_the_batched_product(self) -> None:
        """PyTorch's compiler chooses for itself."""
        seen: list[bool] = []

        def look(x: th.Tensor) -> th.Tensor:
            seen.append(takes_onednn(x, onednn.MIN_MULTIPLICATIONS))
            return x + 1

        th.compile(look, backend="eager")(th.zeros(1))
        assert seen == [False]
