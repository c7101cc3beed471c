"""
N networks of linear layers and ReLU on a processor, with a gradient of their own. Where that is faster, one network comes
after the other: what it has in the cache is used again, where a product over all networks goes through the memory of all.
"""

from collections.abc import Sequence
from typing import Any

import torch as th
from torch.autograd.function import once_differentiable

from sb3_off2on.onednn import product, takes_onednn

# Multiplications of the largest layer from which one network after the other is faster than all together, with one thread ...
MIN_MULTIPLICATIONS_ONE_BY_ONE = 2**19
# ... and, for each of several, which have networks of their own in a batched product, where MKL or oneDNN multiplies
MIN_MULTIPLICATIONS_PER_THREAD = {"MKL": 2**24, "oneDNN": 7 * 2**20}
# Rows without gradient, below which they are those of a prediction, for which a batched product is the fastest ...
MIN_ROWS_WITHOUT_GRADIENT = 128
# ... and weights are the better first factor, from so many rows on. For fewer, they are far worse
MIN_ROWS_WEIGHTS_FIRST = 16
# Share of rows with a gradient, up to which it pays to gather them
MAX_SHARE_GATHERED = 0.75
# Numbers in a row of a product, below which MKL is slow
MIN_ROW_LENGTH = 24


def is_faster_one_by_one(x: th.Tensor, weights: Sequence[th.Tensor]) -> bool:
    """
    :param x: input of the networks, shape ``(n_networks, batch_size, in_features)``
    :param weights: those of each layer, shape ``(n_networks, out_features, in_features)``
    :return: whether one network after the other takes less time than products over all networks
    """
    multiplications, n_threads = x.shape[1] * max(weight[0].numel() for weight in weights), th.get_num_threads()
    by = "oneDNN" if takes_onednn(x, multiplications) else "MKL"
    if by == "MKL" and len(weights) == 1:  # nothing is used again
        return False
    if n_threads == 1:
        return multiplications >= MIN_MULTIPLICATIONS_ONE_BY_ONE
    return multiplications >= n_threads * MIN_MULTIPLICATIONS_PER_THREAD[by]


def stacked_mlp(x: th.Tensor, weights: Sequence[th.Tensor], biases: Sequence[th.Tensor], relu_last: bool = False) -> th.Tensor:
    """
    Linear layers of N networks, with a ReLU after each but the last, where it is an option. There is no second derivative.

    :param x: shape ``(n_networks, batch_size, in_features)``
    :param weights: of each layer, shape ``(n_networks, out_features, in_features)``
    :param biases: of each layer, shape ``(n_networks, out_features)``
    :param relu_last: whether a ReLU follows the last layer
    :return: shape ``(n_networks, batch_size, out_features)``
    """
    with_gradient = th.is_grad_enabled()
    if not with_gradient and x.shape[1] < MIN_ROWS_WITHOUT_GRADIENT:
        return _mlp(x, weights, biases, relu_last, for_prediction=True)[-1]
    return _StackedMLP.apply(x, relu_last, with_gradient, *weights, *biases)


def linear(x: th.Tensor, weight: th.Tensor, bias: th.Tensor, relu: bool = False) -> th.Tensor:
    """
    A layer of all networks or, without the first axis, of one. Products by oneDNN have no gradient, see ``stacked_mlp``.

    :param x: shape ``(..., batch_size, in_features)``
    :param weight: shape ``(..., out_features, in_features)``
    :param bias: shape ``(..., out_features)``
    :param relu: whether a ReLU follows
    :return: shape ``(..., batch_size, out_features)``
    """
    if x.dim() == 3:
        y = th.baddbmm(bias.unsqueeze(1), x, weight.mT)
    elif takes_onednn(x, x.numel() * len(weight)):
        y = product(x, weight, bias)  # its own ReLU would make 0 of NaN
    else:
        y = th.addmm(bias, x, weight.T)
    return y.relu_() if relu else y


def _predict_linear(x: th.Tensor, weight: th.Tensor, bias: th.Tensor, relu: bool) -> th.Tensor:
    """As ``linear``, for all networks and the rows of a prediction."""
    if x.shape[1] < MIN_ROWS_WEIGHTS_FIRST:
        return linear(x, weight, bias, relu)
    # Weights times observations: the outputs lie transposed
    if takes_onednn(x, x.shape[1] * weight.shape[1] * weight.shape[2]):
        x = x if x.mT.is_contiguous() else x.contiguous()
        y = th.stack([product(*factors) for factors in zip(weight.unbind(), x.unbind(), strict=True)]).add_(bias.unsqueeze(2))
    else:
        y = th.baddbmm(bias.unsqueeze(2), weight, x.mT)
    return y.relu_().mT if relu else y.mT


def _mlp(
    x: th.Tensor,
    weights: Sequence[th.Tensor],
    biases: Sequence[th.Tensor],
    relu_last: bool = False,
    for_prediction: bool = False,
) -> list[th.Tensor]:
    """The outputs of each layer, see ``linear``."""
    layer = _predict_linear if for_prediction else linear
    outputs = []
    for number, (weight, bias) in enumerate(zip(weights, biases, strict=True), start=1):
        x = layer(x, weight, bias, relu_last or number < len(weights))
        outputs.append(x)
    return outputs


def _product(x: th.Tensor, y: th.Tensor, out: th.Tensor | None = None) -> th.Tensor:
    """
    ``x @ y.T``.

    :param x: shape ``(..., n, features)``, of all networks or of one
    :param y: shape ``(..., m, features)``
    :param out: where it is to be written, if that is given
    :return: shape ``(..., n, m)``
    """
    multiply = th.mm if x.dim() == 2 else th.bmm
    if x.dim() == 2 and takes_onednn(x, x.numel() * len(y)):
        result = product(x, y)
    elif out is not None and y.shape[-2] < MIN_ROW_LENGTH:
        result = multiply(y, x.mT).mT  # copied in any case
    else:
        return multiply(x, y.mT, out=out)
    return result if out is None else out.copy_(result)


def _split(tensor: th.Tensor, one_by_one: bool) -> Sequence[th.Tensor]:
    """:return: one network after the other, without the first axis, or all as one"""
    return tensor.unbind() if one_by_one else (tensor,)


def _rows_with_gradient(grad: th.Tensor, one_by_one: bool) -> list[th.Tensor | None]:
    """
    Where the smaller of two critics is learned from, each row has a gradient to one of them only.

    :param grad: gradient to the outputs, shape ``(n_networks, batch_size, out_features)``
    :param one_by_one: see ``_split``
    :return: indices of each network's rows that have a gradient, shape ``(n_rows,)``. Of all networks together, indices into
        the rows of all, shape ``(n_networks, n_rows)``: as many of each as of the one with the most. ``None`` in their place
        if it does not pay to gather them
    """
    n_networks, batch_size = grad.shape[:2]
    all_rows: list[th.Tensor | None] = [None] * (n_networks if one_by_one else 1)
    if grad.shape[2] > 1:  # as of actors, whose rows all have one
        return all_rows
    has_grad = grad.squeeze(2) != 0
    n_rows = has_grad.sum(dim=1).tolist()
    max_rows = MAX_SHARE_GATHERED * batch_size
    if (min if one_by_one else max)(n_rows) > max_rows:
        return all_rows
    rows = has_grad.sort(dim=1, descending=True).indices
    if one_by_one:
        return [network[:n] if n <= max_rows else None for network, n in zip(rows, n_rows, strict=True)]
    return [rows[:, : max(n_rows)] + batch_size * th.arange(n_networks).unsqueeze(1)]


def _gather(x: th.Tensor, rows: th.Tensor) -> th.Tensor:
    """
    :param x: shape ``(..., batch_size, features)``
    :param rows: see ``_rows_with_gradient``
    :return: shape ``(..., n_rows, features)``
    """
    return x.flatten(0, -2).index_select(0, rows.flatten()).view(*rows.shape, x.shape[-1])


class _StackedMLP(th.autograd.Function):
    """The networks one after the other or all together, and the gradient to inputs and parameters."""

    @staticmethod
    def forward(ctx: Any, x: th.Tensor, relu_last: bool, with_gradient: bool, *parameters: th.Tensor) -> th.Tensor:
        n_layers = len(parameters) // 2
        ctx.relu_last = relu_last
        ctx.one_by_one = is_faster_one_by_one(x, parameters[:n_layers])
        outputs, kept = [], []
        for network_x, *network in zip(*(_split(tensor, ctx.one_by_one) for tensor in (x, *parameters)), strict=True):
            layer_outputs = _mlp(network_x, network[:n_layers], network[n_layers:], relu_last)
            outputs.append(layer_outputs[-1])
            if with_gradient:
                kept += layer_outputs if relu_last else layer_outputs[:-1]
        ctx.save_for_backward(x, *parameters[:n_layers], *kept)
        return th.stack(outputs) if ctx.one_by_one else outputs[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: th.Tensor) -> tuple[th.Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        wants_x, _, _, *wanted = ctx.needs_input_grad
        n_layers = len(wanted) // 2
        n_kept = n_layers if ctx.relu_last else n_layers - 1
        weights, kept = saved[:n_layers], saved[n_layers:]
        shapes = [x.shape, *(weight.shape for weight in weights), *(weight.shape[:2] for weight in weights)]
        grads = [x.new_empty(shape) if wants else None for shape, wants in zip(shapes, (wants_x, *wanted), strict=True)]

        all_rows = _rows_with_gradient(grad, ctx.one_by_one)
        for index, (y_grad, rows) in enumerate(zip(_split(grad, ctx.one_by_one), all_rows, strict=True)):
            which = index if ctx.one_by_one else slice(None)
            x_grad, *network_grads = (None if stacked is None else stacked[which] for stacked in grads)
            # Of each layer, (..., batch_size, in_features)
            inputs = [x[which].contiguous(), *kept[index * n_kept : (index + 1) * n_kept]]
            if rows is not None:
                y_grad, *inputs = (_gather(tensor, rows) for tensor in (y_grad, *inputs))
            if ctx.relu_last:
                y_grad = th.ops.aten.threshold_backward(y_grad, inputs[-1], 0)
            for layer in reversed(range(n_layers)):
                weight, weight_grad, bias_grad = weights[layer][which], network_grads[layer], network_grads[n_layers + layer]
                if weight_grad is not None:
                    _product(y_grad.mT, inputs[layer].mT, out=weight_grad)
                if bias_grad is not None:
                    th.sum(y_grad, -2, out=bias_grad)
                if layer > 0:
                    y_grad = _product(y_grad, weight.mT)
                    y_grad = th.ops.aten.threshold_backward(y_grad, inputs[layer], 0)
            first_weight = weights[0][which]
            if x_grad is not None and rows is None:
                _product(y_grad, first_weight.mT, out=x_grad)
            elif x_grad is not None and rows is not None:
                of_rows = _product(y_grad, first_weight.mT, out=x.new_empty(*rows.shape, x.shape[2]))
                x_grad.zero_().flatten(0, -2).index_copy_(0, rows.flatten(), of_rows.flatten(0, -2))
        return grads[0], None, None, *grads[1:]
