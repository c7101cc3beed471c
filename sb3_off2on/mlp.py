"""
N networks of linear layers and ReLU on a processor, one after the other: what a network has in the cache is used again, where
a product over all networks at once goes through the memory of all for each layer.
"""

from collections.abc import Sequence
from typing import Any

import torch as th
from torch.autograd.function import once_differentiable

from sb3_off2on.onednn import is_traced, product, takes_onednn

# Multiplications of the largest layer from which one by one takes less time than batched products with one thread ...
MIN_MULTIPLICATIONS = 2**19
# ... and, for each of several, which have networks of their own in a batched product, where MKL or oneDNN multiplies
MIN_MULTIPLICATIONS_PER_THREAD = {"MKL": 2**24, "oneDNN": 7 * 2**20}
# Rows of a batch from which this holds without gradient. Fewer are predictions, see `stacked_linear`
MIN_ROWS_WITHOUT_GRADIENT = 128
# Share of rows with a gradient, up to which it pays to gather them
MAX_SHARE_GATHERED = 0.75
# Numbers in a row of a product, below which MKL is slow
MIN_ROW_LENGTH = 24


def is_faster_one_by_one(x: th.Tensor, n_weights: int) -> bool:
    """
    :param x: input of the networks, shape ``(n_networks, batch_size, in_features)``
    :param n_weights: of one network's largest layer
    :return: whether ``stacked_mlp`` takes less time than a batched product for each layer
    """
    if is_traced() or x.device.type != "cpu" or (x.shape[1] < MIN_ROWS_WITHOUT_GRADIENT and not th.is_grad_enabled()):
        return False
    multiplications, n_threads = x.shape[1] * n_weights, th.get_num_threads()
    if n_threads == 1:
        return multiplications >= MIN_MULTIPLICATIONS
    by = "oneDNN" if takes_onednn(x, multiplications) else "MKL"
    return multiplications >= n_threads * MIN_MULTIPLICATIONS_PER_THREAD[by]


def stacked_mlp(x: th.Tensor, weights: Sequence[th.Tensor], biases: Sequence[th.Tensor], relu_last: bool = False) -> th.Tensor:
    """
    Linear layers of N networks, with a ReLU after each but the last, where it is an option.

    :param x: shape ``(n_networks, batch_size, in_features)``
    :param weights: of each layer, shape ``(n_networks, out_features, in_features)``
    :param biases: of each layer, shape ``(n_networks, out_features)``
    :param relu_last: whether a ReLU follows the last layer
    :return: shape ``(n_networks, batch_size, out_features)``
    """
    return _StackedMLP.apply(x, relu_last, *weights, *biases)


def stacked_mlp_of_many(
    x: th.Tensor, many: th.Tensor, weights: Sequence[th.Tensor], biases: Sequence[th.Tensor], rows_at_once: int
) -> th.Tensor:
    """
    ``stacked_mlp`` without gradient, of each row of ``x`` beside each of its many partners, as a state beside actions. What
    the first layer makes of ``x`` is worked out once.

    :param x: shape ``(n_networks, batch_size, x_features)``
    :param many: shape ``(n_networks, n_many, batch_size, many_features)``
    :param weights: of each layer, of which there are two at least, see ``stacked_mlp``
    :param biases: of each layer
    :param rows_at_once: how many rows of a network are computed together, or ``batch_size`` if that is more
    :return: shape ``(n_networks, n_many, batch_size, out_features)``
    """
    n_many, batch_size = many.shape[1:3]
    weight_of_x, weight_of_many = weights[0].split([x.shape[2], many.shape[3]], dim=2)
    of_x = th.baddbmm(biases[0].unsqueeze(1), x, weight_of_x.transpose(1, 2))  # (n_networks, batch_size, n_units)
    outputs = []
    for network_x, network_many, weight, *layers in zip(
        *(tensor.unbind() for tensor in (of_x, many, weight_of_many.transpose(1, 2), *weights[1:], *biases[1:])), strict=True
    ):
        for part in network_many.split(max(rows_at_once // batch_size, 1)):
            hidden = th.baddbmm(network_x.expand(len(part), -1, -1), part, weight.expand(len(part), -1, -1)).relu_()
            outputs.append(_mlp(hidden.flatten(0, 1), layers[: len(weights) - 1], layers[len(weights) - 1 :])[-1])
    return th.cat(outputs).view(len(x), n_many, batch_size, -1)


def _mlp(x: th.Tensor, weights: Sequence[th.Tensor], biases: Sequence[th.Tensor], relu_last: bool = False) -> list[th.Tensor]:
    """One network without gradient: as ``stacked_mlp`` without the first axis; the outputs of all layers."""
    outputs = []
    for number, (weight, bias) in enumerate(zip(weights, biases, strict=True), start=1):
        has_relu = number < len(weights) or relu_last
        if takes_onednn(x, x.numel() * len(weight)):
            x = product(x, weight, bias, has_relu)
        else:
            x = th.addmm(bias, x, weight.T)
            x = x.relu_() if has_relu else x
        outputs.append(x)
    return outputs


def _write_product(x: th.Tensor, y: th.Tensor, out: th.Tensor) -> None:
    """
    :param x: shape ``(n, features)``
    :param y: shape ``(m, features)``
    :param out: gets ``x @ y.T``, shape ``(n, m)``
    """
    if takes_onednn(x, x.numel() * len(y)):
        out.copy_(product(x, y))
    elif len(y) < MIN_ROW_LENGTH:
        out.copy_(th.mm(y, x.T).T)
    else:
        th.mm(x, y.T, out=out)


class _StackedMLP(th.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: th.Tensor, relu_last: bool, *parameters: th.Tensor) -> th.Tensor:
        n_layers = len(parameters) // 2
        outputs, kept = [], []
        for network_x, *network in zip(x.unbind(), *(stacked.unbind() for stacked in parameters), strict=True):
            layer_outputs = _mlp(network_x, network[:n_layers], network[n_layers:], relu_last)
            outputs.append(layer_outputs[-1])
            if any(ctx.needs_input_grad):
                kept += layer_outputs if relu_last else layer_outputs[:-1]
        ctx.relu_last = relu_last
        ctx.save_for_backward(x, *parameters[:n_layers], *kept)
        return th.stack(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: th.Tensor) -> tuple[th.Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        wants_x, _, *wants_parameters = ctx.needs_input_grad
        n_layers = len(wants_parameters) // 2
        weights, kept = saved[:n_layers], saved[n_layers:]
        n_networks, batch_size = x.shape[:2]
        n_kept = len(kept) // n_networks
        grad_x = x.new_zeros(x.shape) if wants_x else None
        shapes = [weight.shape for weight in weights] + [weight.shape[:2] for weight in weights]
        grads = [x.new_empty(shape) if wanted else None for shape, wanted in zip(shapes, wants_parameters, strict=True)]

        # Where the smaller of two critics is learned from, each row has a gradient to one of them only
        has_grad = grad.squeeze(2) != 0 if grad.shape[2] == 1 else None
        n_rows = [batch_size] * n_networks if has_grad is None else has_grad.sum(dim=1).tolist()
        for network, y_grad in enumerate(grad.unbind()):
            inputs = [x[network].contiguous(), *kept[network * n_kept : (network + 1) * n_kept]]  # of each layer
            rows = None
            if has_grad is not None and n_rows[network] <= MAX_SHARE_GATHERED * batch_size:
                rows = has_grad[network].nonzero().squeeze(1)
                y_grad, *inputs = (tensor.index_select(0, rows) for tensor in (y_grad, *inputs))
            if ctx.relu_last:
                y_grad = th.ops.aten.threshold_backward(y_grad, inputs[-1], 0)
            for layer in reversed(range(n_layers)):
                weight, grad_weight, grad_bias = weights[layer][network], grads[layer], grads[n_layers + layer]
                if grad_weight is not None:
                    _write_product(y_grad.T, inputs[layer].T, out=grad_weight[network])
                if grad_bias is not None:
                    th.sum(y_grad, 0, out=grad_bias[network])
                if layer > 0:
                    by_onednn = takes_onednn(y_grad, len(y_grad) * weight.numel())
                    y_grad = product(y_grad, weight.T) if by_onednn else th.mm(y_grad, weight)
                    y_grad = th.ops.aten.threshold_backward(y_grad, inputs[layer], 0)
            if grad_x is not None:
                x_grad = grad_x[network] if rows is None else grad_x.new_empty(len(rows), x.shape[2])
                _write_product(y_grad, weights[0][network].T, out=x_grad)
                if rows is not None:
                    grad_x[network].index_copy_(0, rows, x_grad)
        return grad_x, None, *grads
