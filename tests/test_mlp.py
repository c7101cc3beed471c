"""Networks one by one beside the formula in NumPy, PyTorch's own gradient, and the batched product."""

import math
import weakref
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import pytest
import torch as th
from helpers import needs_onednn
from torch import nn

from sb3_off2on import mlp, onednn, stacking
from sb3_off2on.mlp import is_faster_one_by_one, stacked_mlp
from sb3_off2on.stacking import EnsembleSequential, frozen, stack_modules

N_NETWORKS, BATCH_SIZE = 3, 16
assert_close = partial(th.testing.assert_close, rtol=1e-5, atol=2e-5)


@pytest.fixture(params=["batched", "MKL", pytest.param("oneDNN", marks=needs_onednn)])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """All networks at once, or one by one by either library, whatever their size."""
    monkeypatch.setattr(mlp, "is_faster_one_by_one", lambda *_: request.param != "batched")
    monkeypatch.setattr(onednn, "MIN_MULTIPLICATIONS", 1 if request.param == "oneDNN" else math.inf)
    return request.param


def make_parameters(sizes: list[int]) -> tuple[list[th.Tensor], list[th.Tensor]]:
    layers = list(pairwise(sizes))
    weights = [th.randn(N_NETWORKS, n_out, n_in).div_(math.sqrt(n_in)).requires_grad_() for n_in, n_out in layers]
    return weights, [th.randn(N_NETWORKS, n_out).requires_grad_() for _, n_out in layers]


def plain(x: th.Tensor, weights: list[th.Tensor], biases: list[th.Tensor], relu_last: bool = False) -> th.Tensor:
    """With the gradient that PyTorch derives."""
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = th.einsum("nri,noi->nro", x, weight) + bias.unsqueeze(1)
        x = th.relu(x) if relu_last or index < len(weights) - 1 else x
    return x


# The inputs of a critic, features as wide as the layer, and one layer alone; narrow and wide, as MKL's products differ
SIZES = [[5, 32, 32, 1], [32, 32, 6], [30, 40, 2, 24], [7, 1], [24, 30], [1, 1, 1]]


class TestStackedMLP:
    @pytest.mark.usefixtures("way")
    @pytest.mark.parametrize("relu_last", [False, True])
    @pytest.mark.parametrize("sizes", SIZES, ids=str)
    @pytest.mark.parametrize("batch_size", [mlp.MIN_ROWS_WEIGHTS_FIRST - 1, BATCH_SIZE, mlp.MIN_ROWS_WITHOUT_GRADIENT])
    def test_is_the_formula(self, sizes: list[int], relu_last: bool, batch_size: int) -> None:
        """With a gradient and without: few rows of a prediction, more of them, and more than for one."""
        x, (weights, biases) = th.randn(N_NETWORKS, batch_size, sizes[0]), make_parameters(sizes)
        expected = x.double().numpy()
        for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            expected = np.einsum("nri,noi->nro", expected, weight.detach().numpy()) + bias.detach().numpy()[:, None]
            expected = expected.clip(min=0) if relu_last or index < len(weights) - 1 else expected
        assert_close(stacked_mlp(x, weights, biases, relu_last).double(), th.as_tensor(expected))
        with th.no_grad():
            assert_close(stacked_mlp(x, weights, biases, relu_last).double(), th.as_tensor(expected))

    @pytest.mark.usefixtures("way")
    @pytest.mark.parametrize("relu_last", [False, True])
    @pytest.mark.parametrize("sizes", SIZES, ids=str)
    def test_gradient_is_pytorchs(self, sizes: list[int], relu_last: bool) -> None:
        x, (weights, biases) = th.randn(N_NETWORKS, BATCH_SIZE, sizes[0], requires_grad=True), make_parameters(sizes)
        self.check_gradient(x, weights, biases, relu_last)

    # Shares of rows that have a gradient, and how often rows are gathered one by one, and of all networks together
    SHARES: ClassVar[dict[tuple[float, ...], tuple[int, int]]] = {
        (1, 1, 1): (0, 0),
        (0.9, 0.9, 0.5): (1, 0),
        (0.7, 0.5, 0): (3, 1),
        (0.2, 0, 1): (2, 0),
        (0, 0, 0): (3, 1),
    }

    @pytest.mark.parametrize("shares", SHARES, ids=str)
    @pytest.mark.parametrize("relu_last", [False, True])
    def test_rows_without_a_gradient(
        self, monkeypatch: pytest.MonkeyPatch, way: str, shares: tuple[float, ...], relu_last: bool
    ) -> None:
        gathered, gather = [], mlp._gather

        def recording_gather(x: th.Tensor, rows: th.Tensor) -> th.Tensor:
            gathered.append(rows)
            return gather(x, rows)

        monkeypatch.setattr(mlp, "_gather", recording_gather)
        x, (weights, biases) = th.randn(N_NETWORKS, BATCH_SIZE, 5, requires_grad=True), make_parameters([5, 32, 32, 1])
        rows = th.stack([th.randperm(BATCH_SIZE) < share * BATCH_SIZE for share in shares])
        self.check_gradient(x, weights, biases, relu_last, rows.unsqueeze(2))
        # The output's gradient, and the inputs of the three layers with the output, if that has a ReLU
        assert len(gathered) == self.SHARES[shares][way == "batched"] * (5 if relu_last else 4)

    @pytest.mark.usefixtures("way")
    def test_minimum_of_two_critics(self) -> None:
        """As the actor's loss has it: the gradient to the inputs alone."""
        x, (weights, biases) = th.randn(N_NETWORKS, BATCH_SIZE, 5, requires_grad=True), make_parameters([5, 32, 32, 1])
        weights, biases = ([tensor.detach() for tensor in part] for part in (weights, biases))
        grads = [th.autograd.grad(f(x, weights, biases).min(dim=0).values.mean(), x)[0] for f in (stacked_mlp, plain)]
        assert (grads[0] == 0).all(dim=2).sum() == (N_NETWORKS - 1) * BATCH_SIZE
        assert_close(*grads)

    @pytest.mark.usefixtures("way")
    @pytest.mark.parametrize("where", ["input", "weight", "bias"])
    def test_nan_stays(self, where: str) -> None:
        x, (weights, biases) = th.randn(N_NETWORKS, BATCH_SIZE, 5), make_parameters([5, 32, 2])
        {"input": x, "weight": weights[0].data, "bias": biases[0].data}[where][1, 0] = math.nan
        assert_close(stacked_mlp(x, weights, biases), plain(x, weights, biases), equal_nan=True)
        assert stacked_mlp(x, weights, biases)[1].isnan().any()

    @pytest.mark.usefixtures("way")
    @pytest.mark.parametrize("network", range(N_NETWORKS))
    def test_nan_is_not_left_out(self, network: int) -> None:
        x, (weights, biases) = th.randn(N_NETWORKS, BATCH_SIZE, 5), make_parameters([5, 32, 1])
        grad = th.zeros(N_NETWORKS, BATCH_SIZE, 1)
        grad[network, 3] = math.nan
        grads = th.autograd.grad(stacked_mlp(x, weights, biases), weights, grad)
        for weight_grad in grads:
            assert weight_grad.isnan().flatten(1).any(dim=1).tolist() == [index == network for index in range(N_NETWORKS)]

    WANTED: ClassVar[dict[str, list[int]]] = {"input": [0], "weights": [1, 2], "biases": [3, 4], "last layer": [2, 4]}

    @pytest.mark.usefixtures("way")
    @pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED)
    def test_only_what_is_wanted(self, wanted: list[int]) -> None:
        weights, biases = make_parameters([5, 32, 2])
        inputs = [tensor.detach() for tensor in (th.randn(N_NETWORKS, BATCH_SIZE, 5), *weights, *biases)]
        for index in wanted:
            inputs[index].requires_grad_()
        grads = [
            th.autograd.grad(f(inputs[0], inputs[1:3], inputs[3:]).square().sum(), [inputs[index] for index in wanted])
            for f in (stacked_mlp, plain)
        ]
        for grad, expected in zip(*grads, strict=True):
            assert_close(grad, expected)

    @needs_onednn
    def test_no_product_for_frozen_weights(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Two for the outputs and two for the gradient to the inputs; with those to the weights there are six."""
        monkeypatch.setattr(mlp, "is_faster_one_by_one", lambda *_: True)
        monkeypatch.setattr(onednn, "MIN_MULTIPLICATIONS", 1)
        calls = count_products(monkeypatch)
        x, (weights, biases) = th.randn(N_NETWORKS, BATCH_SIZE, 5, requires_grad=True), make_parameters([5, 8, 2])
        stacked_mlp(x, [weight.detach() for weight in weights], [bias.detach() for bias in biases]).sum().backward()
        assert x.grad is not None
        assert len(calls) == N_NETWORKS * 4
        stacked_mlp(x, weights, biases).sum().backward()
        assert len(calls) == N_NETWORKS * (4 + 6)

    INPUTS: ClassVar[dict[str, Callable[[], th.Tensor]]] = {
        "transposed": lambda: th.randn(N_NETWORKS, 8, BATCH_SIZE).transpose(1, 2),
        "same-for-all": lambda: th.randn(BATCH_SIZE, 8).expand(N_NETWORKS, -1, -1),
        "part-of-wider-rows": lambda: th.randn(N_NETWORKS, BATCH_SIZE, 24)[..., 8:16],
    }

    @pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS)
    def test_strides(self, way: str, monkeypatch: pytest.MonkeyPatch, x: Callable[[], th.Tensor]) -> None:
        """oneDNN gets what it has fast code for."""
        calls = count_products(monkeypatch)
        self.check_gradient(x().requires_grad_(), *make_parameters([8, 32, 2]))
        # Two layers, with a gradient of three kinds to inputs and weights
        assert len(calls) == (N_NETWORKS * (2 + 3 * 4) if way == "oneDNN" else 0)
        assert all(second.is_contiguous() or second.T.is_contiguous() for second in calls)

    @pytest.mark.usefixtures("way")
    @pytest.mark.parametrize("batch_size", [0, 1])
    def test_small_batches(self, batch_size: int) -> None:
        self.check_gradient(th.randn(N_NETWORKS, batch_size, 5, requires_grad=True), *make_parameters([5, 32, 1]))

    @pytest.mark.usefixtures("way")
    def test_gradient_twice_but_no_second_derivative(self) -> None:
        x, (weights, biases) = th.randn(N_NETWORKS, BATCH_SIZE, 5), make_parameters([5, 32, 1])
        loss = stacked_mlp(x, weights, biases).square().sum()
        first = th.autograd.grad(loss, weights, retain_graph=True)
        for value, expected in zip(th.autograd.grad(loss, weights, retain_graph=True), first, strict=True):
            assert th.equal(value, expected)
        (grad, *_) = th.autograd.grad(loss, weights, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()

    @pytest.mark.usefixtures("way")
    def test_parameters_changed_before_the_gradient(self) -> None:
        x, (weights, biases) = th.randn(N_NETWORKS, BATCH_SIZE, 5), make_parameters([5, 32, 1])
        loss = stacked_mlp(x, weights, biases).sum()
        with th.no_grad():
            weights[1].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_nothing_is_kept_without_gradient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Else a target network's hidden layers would all be in memory at once."""
        monkeypatch.setattr(mlp, "is_faster_one_by_one", lambda *_: True)
        alive: list[Any] = []
        most, linear = [0], mlp.linear

        def recording_linear(*args: Any, **kwargs: Any) -> th.Tensor:
            y = linear(*args, **kwargs)
            alive.append(weakref.ref(y))
            most.append(sum(reference() is not None for reference in alive))
            return y

        monkeypatch.setattr(mlp, "linear", recording_linear)
        x, (weights, biases) = th.randn(N_NETWORKS, mlp.MIN_ROWS_WITHOUT_GRADIENT, 5), make_parameters([5, 32, 32, 1])
        with th.no_grad():
            stacked_mlp(x, weights, biases)
        # Three layers of two networks, and the outputs of those before; with gradient it is all nine
        assert max(most) == 3 * 2 + N_NETWORKS - 2
        stacked_mlp(x, weights, biases)
        assert max(most) == 3 * N_NETWORKS

    @pytest.mark.usefixtures("way")
    def test_other_dtypes(self) -> None:
        weights, biases = make_parameters([5, 32, 2])
        x, *parameters = (tensor.detach().double() for tensor in (th.randn(N_NETWORKS, BATCH_SIZE, 5), *weights, *biases))
        self.check_gradient(x.requires_grad_(), [w.requires_grad_() for w in parameters[:2]], parameters[2:])

    def check_gradient(
        self,
        x: th.Tensor,
        weights: list[th.Tensor],
        biases: list[th.Tensor],
        relu_last: bool = False,
        rows: th.Tensor | None = None,
    ) -> None:
        inputs = [tensor for tensor in (x, *weights, *biases) if tensor.requires_grad]
        outputs = [f(x, weights, biases, relu_last) for f in (stacked_mlp, plain)]
        assert_close(*outputs)
        grad = th.randn_like(outputs[0]) if rows is None else th.randn_like(outputs[0]) * rows
        # As it comes, transposed, and the same for all, as that of a sum
        for part in (grad, grad.mT.contiguous().mT, grad[:1, :1].expand_as(grad)):
            grads = (th.autograd.grad(output, inputs, part, retain_graph=True) for output in outputs)
            for value, expected in zip(*grads, strict=True):
                assert value.is_contiguous()
                assert_close(value, expected)
            if rows is not None:
                break


def count_products(monkeypatch: pytest.MonkeyPatch) -> list[th.Tensor]:
    """:return: second factor of each product by oneDNN, from now on"""
    calls: list[th.Tensor] = []

    def recording_product(x: th.Tensor, y: th.Tensor, *args: Any) -> th.Tensor:
        calls.append(y)
        return onednn.product(x, y, *args)

    monkeypatch.setattr(mlp, "product", recording_product)
    return calls


@pytest.mark.parametrize(
    ("n_threads", "min_multiplications", "expected"),
    [
        (1, math.inf, mlp.MIN_MULTIPLICATIONS_ONE_BY_ONE),
        (2, math.inf, 2 * mlp.MIN_MULTIPLICATIONS_PER_THREAD["MKL"]),
        (4, math.inf, 4 * mlp.MIN_MULTIPLICATIONS_PER_THREAD["MKL"]),
        (2, 0, 2 * mlp.MIN_MULTIPLICATIONS_PER_THREAD["oneDNN"]),
    ],
)
def test_from_which_size_one_by_one(
    monkeypatch: pytest.MonkeyPatch, n_threads: int, min_multiplications: float, expected: int
) -> None:
    monkeypatch.setattr(th, "get_num_threads", lambda: n_threads)
    monkeypatch.setattr(onednn, "MIN_MULTIPLICATIONS", min_multiplications)
    monkeypatch.setattr(onednn, "_ONEDNN_LINEAR", lambda *_: None)
    weights = [th.zeros(2, 64, 8), th.zeros(2, 2**8, 2**8), th.zeros(2, 1, 64)]
    x = th.zeros(2, expected // 2**16, 8)
    assert is_faster_one_by_one(x, weights)
    assert not is_faster_one_by_one(x[:, 1:], weights)
    # Of one layer, nothing is used again
    assert is_faster_one_by_one(x, weights[1:2]) == (min_multiplications == 0)


NETWORKS: dict[str, Any] = {
    "relu": lambda: nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1)),
    "relu-last": lambda: nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU()),
    "layer-norm": lambda: nn.Sequential(nn.Linear(5, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 1)),
    "tanh": lambda: nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 2), nn.Tanh()),
    "prelu": lambda: nn.Sequential(nn.Linear(5, 16), nn.PReLU(), nn.Linear(16, 2)),
    "two-linear": lambda: nn.Sequential(nn.Linear(5, 16), nn.Linear(16, 2), nn.ReLU()),
    "no-bias": lambda: nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 2, bias=False)),
}


def test_what_suits_stacked_mlp() -> None:
    assert stacking.suits_stacked_mlp(th.zeros(2, 1, 3))
    assert not stacking.suits_stacked_mlp(th.zeros(2, 1, 3, device="meta"))


@pytest.mark.parametrize(
    ("n_rows", "with_gradient", "is_prediction"),
    [(1, True, False), (mlp.MIN_ROWS_WITHOUT_GRADIENT - 1, False, True), (mlp.MIN_ROWS_WITHOUT_GRADIENT, False, False)],
)
def test_what_is_taken_for_a_prediction(
    monkeypatch: pytest.MonkeyPatch, n_rows: int, with_gradient: bool, is_prediction: bool
) -> None:
    calls, predict_linear = [], mlp._predict_linear

    def recording_linear(x: th.Tensor, *args: Any) -> th.Tensor:
        calls.append(x)
        return predict_linear(x, *args)

    monkeypatch.setattr(mlp, "_predict_linear", recording_linear)
    with th.set_grad_enabled(with_gradient):
        stacked_mlp(th.zeros(N_NETWORKS, n_rows, 5), *make_parameters([5, 8, 1]))
    assert len(calls) == (2 if is_prediction else 0)


def test_autocast_has_batched_products() -> None:
    """Its types are not those of the saved tensors."""
    stacked = stack_modules([NETWORKS["relu"]() for _ in range(N_NETWORKS)])
    with th.autocast("cpu", th.bfloat16):
        output = stacked(th.randn(N_NETWORKS, BATCH_SIZE, 5))
    assert output.dtype == th.bfloat16
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in stacked.parameters())


class TestStackedModules:
    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[th.Tensor]:
        """Inputs of ``stacked_mlp``."""
        calls: list[th.Tensor] = []

        def recording_mlp(x: th.Tensor, *args: Any, **kwargs: Any) -> th.Tensor:
            calls.append(x)
            return stacked_mlp(x, *args, **kwargs)

        monkeypatch.setattr(stacking, "stacked_mlp", recording_mlp)
        return calls

    @pytest.fixture
    def switch(self, monkeypatch: pytest.MonkeyPatch, calls: list[th.Tensor]) -> Callable[[bool], list[th.Tensor]]:
        """All go through ``stacked_mlp``, or none, as on an accelerator."""

        def switch(for_training: bool) -> list[th.Tensor]:
            monkeypatch.setattr(stacking, "suits_stacked_mlp", lambda _: for_training)
            return calls

        return switch

    @pytest.mark.usefixtures("way")
    @pytest.mark.parametrize("network", NETWORKS)
    def test_is_the_batched_product(self, switch: Callable[[bool], list[th.Tensor]], network: str) -> None:
        stacked = stack_modules([NETWORKS[network]() for _ in range(N_NETWORKS)])
        x = th.randn(N_NETWORKS, BATCH_SIZE, 5, requires_grad=True)

        def run() -> tuple[th.Tensor, ...]:
            output = stacked(x)
            with th.no_grad():
                assert_close(stacked(x), output)
            return output, *th.autograd.grad(output.square().sum(), [x, *stacked.parameters()])

        calls = switch(False)
        expected = run()
        assert not calls
        switch(True)
        for value, expected_value in zip(run(), expected, strict=True):
            assert_close(value, expected_value)
        # Twice: all layers at once, or each linear layer
        assert len(calls) == 2 * (1 if network.startswith("relu") else len(list(linear_layers(stacked))))

    @pytest.mark.usefixtures("way")
    @pytest.mark.parametrize("max_rows", [1, BATCH_SIZE, 3 * BATCH_SIZE + 1, 1000])
    @pytest.mark.parametrize("n_partners", [1, 7])
    @pytest.mark.parametrize("network", [*NETWORKS, "linear"])
    def test_pairs(self, network: str, n_partners: int, max_rows: int) -> None:
        make = {**NETWORKS, "linear": lambda: nn.Sequential(nn.Linear(5, 2))}[network]
        networks = [make() for _ in range(N_NETWORKS)]
        x, partners = th.randn(N_NETWORKS, BATCH_SIZE, 3), th.randn(N_NETWORKS, n_partners, BATCH_SIZE, 2)
        stacked: Any = stack_modules(networks)
        with th.no_grad():
            output = stacked.of_pairs(x, partners, max_rows)
            for index, plain_network in enumerate(networks):
                for number in range(n_partners):
                    pairs = th.cat([x[index], partners[index, number]], dim=1)
                    assert_close(output[index, number], plain_network(pairs))

    @pytest.mark.parametrize("network", ["relu", "relu-last", "tanh"])
    def test_heads(self, switch: Callable[[bool], list[th.Tensor]], network: str) -> None:
        stacked: Any = stack_modules([NETWORKS[network]() for _ in range(N_NETWORKS)])
        x = th.randn(N_NETWORKS, BATCH_SIZE, 5, requires_grad=True)
        heads = [stack_modules([nn.Linear(stacked(x).shape[2], n) for _ in range(N_NETWORKS)]) for n in (2, 3)]
        inputs = [x, *(parameter for module in (stacked, *heads) for parameter in module.parameters())]

        def run() -> tuple[th.Tensor, ...]:
            outputs = stacked.with_heads(x, *heads)
            return *outputs, *th.autograd.grad(sum(output.square().sum() for output in outputs), inputs)

        switch(False)
        expected = run()
        calls = switch(True)
        calls.clear()
        for value, expected_value in zip(run(), expected, strict=True):
            assert_close(value, expected_value)
        # Together if the network is an MLP that ends in a ReLU
        assert len(calls) == {"relu": 3, "relu-last": 1, "tanh": 4}[network]

    def test_heads_of_another_kind(self, switch: Callable[[bool], list[th.Tensor]]) -> None:
        stacked: Any = stack_modules([NETWORKS["relu-last"]() for _ in range(N_NETWORKS)])
        head = stack_modules([nn.Sequential(nn.Linear(16, 2), nn.Tanh()) for _ in range(N_NETWORKS)])
        x = th.randn(N_NETWORKS, BATCH_SIZE, 5)
        switch(True)
        (output,) = stacked.with_heads(x, head)
        assert_close(output, head(stacked(x)))

    def test_frozen_networks(self, switch: Callable[[bool], list[th.Tensor]]) -> None:
        stacked = stack_modules([NETWORKS["relu"]() for _ in range(N_NETWORKS)])
        switch(True)
        x = th.randn(N_NETWORKS, BATCH_SIZE, 5, requires_grad=True)
        with frozen(stacked):
            output = stacked(x)
        (expected,) = th.autograd.grad(stacked(x).sum(), x)
        output.sum().backward()
        assert x.grad is not None
        assert_close(x.grad, expected)
        assert all(parameter.grad is None for parameter in stacked.parameters())

    def test_layers_that_are_changed_later(self) -> None:
        """As of any ``nn.Sequential``."""
        stacked: Any = stack_modules([NETWORKS["relu"]() for _ in range(N_NETWORKS)])
        x = th.randn(N_NETWORKS, BATCH_SIZE, 5)
        output, hidden = stacked(x), stacked[:-1](x)
        assert_close(stacked[-1](hidden), output)
        stacked.append(nn.Tanh())
        assert_close(stacked(x), th.tanh(output))

    def test_a_network_without_linear_layers(self) -> None:
        assert stack_modules([nn.Sequential(nn.Flatten())] * 2)(th.ones(2, 3, 4)).shape[0] == 2

    def test_rows_of_a_prediction(self) -> None:
        """Layers whose inputs lie transposed."""
        for make in NETWORKS.values():
            stacked = stack_modules([make() for _ in range(N_NETWORKS)])
            x = th.randn(N_NETWORKS, mlp.MIN_ROWS_WEIGHTS_FIRST, 5)
            with th.no_grad():
                output = stacked(x)
            assert_close(output, stacked(x))

    @pytest.mark.filterwarnings("ignore")  # of PyTorch: this tracer is deprecated
    @pytest.mark.parametrize("rows", [8, 64, 512])
    def test_traced_code_has_the_batched_product(self, calls: list[th.Tensor], rows: int) -> None:
        """Rows for which weights would be the first factor, and as many as for training."""
        stacked = stack_modules([nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2)) for _ in range(2)])
        x = th.randn(2, rows, 256)
        with th.no_grad():
            expected = stacked(x)
            calls.clear()
            assert_close(th.jit.trace(stacked, x, check_trace=False)(x), expected)
            exported = th.export.export(stacked, (x,), dynamic_shapes=({1: th.export.Dim("batch", max=4096)},))
            assert_close(exported.module()(x), expected)
        assert not calls

    def test_compiled_networks_stay_compiled(self, calls: list[th.Tensor]) -> None:
        """With heads as well, which are not part of what is compiled."""
        stacked = stack_modules([NETWORKS["relu-last"]() for _ in range(N_NETWORKS)])
        assert isinstance(stacked, EnsembleSequential)
        head = stack_modules([nn.Linear(16, 2) for _ in range(N_NETWORKS)])
        x = th.randn(N_NETWORKS, BATCH_SIZE, 5)
        expected = stacked.with_heads(x, head)[0]
        assert len(calls) == 1
        stacked.compile(backend="eager")
        assert_close(stacked.with_heads(x, head)[0], expected)
        assert len(calls) == 2
        assert calls[1].shape[2] == 16  # the head's


def linear_layers(stacked: nn.Module) -> list[nn.Module]:
    return [layer for layer in stacked.modules() if isinstance(layer, stacking.EnsembleLinear)]
