"""
N modules of one shape as one: every parameter gets a leading member axis, so that one batched product serves all members.
Names stay, so that a member's state dict is that of the module it came from.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from operator import itemgetter

import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn
from torch.func import functional_call, stack_module_state
from torch.utils._pytree import tree_map

from sb3_off2on.mlp import stacked_mlp
from sb3_off2on.onednn import is_traced, product, takes_onednn

# Rows of a batch from which, on a CPU, the weights are the better first factor; for fewer, they are far worse
MIN_ROWS_WEIGHTS_FIRST = 16
# Rows of a batch from which, without gradient, it is not taken for that of a prediction
MIN_ROWS_WITHOUT_GRADIENT = 128


def is_for_training(x: th.Tensor) -> bool:
    """
    :param x: input of stacked layers, shape ``(n_members, batch_size, in_features)``
    :return: whether it is a batch for ``stacked_mlp``: on a processor, and with a gradient or larger than one of a prediction
    """
    is_training = th.is_grad_enabled() or x.shape[1] >= MIN_ROWS_WITHOUT_GRADIENT
    return x.device.type == "cpu" and not is_traced() and is_training


class EnsembleLayer(nn.Module):
    """
    Weights and biases of N layers, with a leading member axis.

    :param layers: the members' layers, all of one shape
    """

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        for name in ("weight", "bias"):  # a layer that was frozen stays so
            members = [getattr(layer, name) for layer in layers]
            setattr(self, name, nn.Parameter(th.stack(members).detach(), requires_grad=members[0].requires_grad))


class EnsembleLinear(EnsembleLayer):
    """N linear layers: a batched product, but for what is trained on a processor, which is for ``stacked_mlp``."""

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: shape ``(n_members, batch_size, in_features)``
        :return: shape ``(n_members, batch_size, out_features)``
        """
        if is_for_training(x):
            return stacked_mlp(x, [self.weight], [self.bias])
        weight, bias = self.weight, self.bias.unsqueeze(1)
        if th.is_grad_enabled() or x.device.type != "cpu" or is_traced() or x.shape[1] < MIN_ROWS_WEIGHTS_FIRST:
            # In place, where baddbmm() would copy the bias to every row first
            return th.bmm(x, weight.transpose(1, 2)).add_(bias)
        # Weights times observations, for predictions: the outputs lie transposed
        if takes_onednn(x, x.shape[1] * weight[0].numel()):
            x = x if x.transpose(1, 2).is_contiguous() else x.contiguous()
            y = th.stack([product(*factors) for factors in zip(weight.unbind(), x.unbind(), strict=True)])
        else:
            y = th.bmm(weight, x.transpose(1, 2))
        return y.transpose(1, 2).add_(bias)


class EnsembleLayerNorm(EnsembleLayer):
    """
    N layer norms.

    :param layers: the members' norms, all of one shape
    """

    def __init__(self, layers: Sequence[nn.LayerNorm]) -> None:
        super().__init__(layers)
        self.normalized_shape, self.eps = layers[0].normalized_shape, layers[0].eps

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: shape ``(n_members, batch_size, features)``
        :return: same shape
        """
        normalized = nn.functional.layer_norm(x, self.normalized_shape, eps=self.eps)
        return th.addcmul(self.bias.unsqueeze(1), normalized, self.weight.unsqueeze(1))


class EnsembleSequential(nn.Sequential):
    """N sequences of layers. Those of linear layers and ReLU are trained as one ``stacked_mlp`` on a processor."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.is_mlp = len(layers) > 0 and all(
            type(layer) is (nn.ReLU if index % 2 else EnsembleLinear) for index, layer in enumerate(layers)
        )

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: shape ``(n_members, batch_size, in_features)``
        :return: shape ``(n_members, batch_size, out_features)``
        """
        if self.is_mlp and is_for_training(x):
            return stacked_mlp(x, *self.mlp_parameters(), relu_last=len(self) % 2 == 0)
        for layer in self:
            x = layer(x)
        return x

    def with_heads(self, x: th.Tensor, *heads: nn.Module) -> Sequence[th.Tensor]:
        """
        What further layers make of the output; where these are linear, one ``stacked_mlp`` with all of them.

        :param x: shape ``(n_members, batch_size, in_features)``
        :param heads: stacked modules
        :return: the output of each head
        """
        ends_in_relu = self.is_mlp and len(self) % 2 == 0 and self._compiled_call_impl is None
        if ends_in_relu and all(type(head) is EnsembleLinear for head in heads) and is_for_training(x):
            weights, biases = self.mlp_parameters()
            head_weights, head_biases = ([getattr(head, name) for head in heads] for name in ("weight", "bias"))
            outputs = stacked_mlp(x, [*weights, th.cat(head_weights, dim=1)], [*biases, th.cat(head_biases, dim=1)])
            return outputs.split([bias.shape[1] for bias in head_biases], dim=2)
        latent = self(x)
        return [head(latent) for head in heads]

    def mlp_parameters(self) -> tuple[list[th.Tensor], list[th.Tensor]]:
        """:return: weights and biases of all linear layers"""
        layers = [layer for layer in self if isinstance(layer, EnsembleLinear)]
        return [layer.weight for layer in layers], [layer.bias for layer in layers]


class EnsembleModule(nn.Module):
    """
    N copies of any module, e.g. a features extractor with convolutions. They run side by side with ``torch.vmap``, but one
    after the other where each has rows of its own and a gradient is taken: ``vmap`` makes grouped convolutions of these, whose
    gradient is slow on a CPU.

    :param modules: the members' modules, alike but for their parameters
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.template = deepcopy(modules[0])
        parameters, buffers = stack_module_state(list(modules))
        for name, value in parameters.items():
            owner, _, leaf = name.rpartition(".")
            parameter = nn.Parameter(value.detach(), requires_grad=value.requires_grad)
            setattr(self.template.get_submodule(owner), leaf, parameter)
        for name, value in buffers.items():
            owner, _, leaf = name.rpartition(".")
            setattr(self.template.get_submodule(owner), leaf, value.detach())

    def forward(self, x: PyTorchObs, per_member: bool = True) -> th.Tensor:
        """
        :param x: tensors of shape ``(n_members, batch_size, ...)``, or ``(batch_size, ...)`` if not ``per_member``
        :param per_member: whether ``x`` has a member axis; without it, every member sees the same
        :return: shape ``(n_members, batch_size, ...)``
        """
        if per_member and th.is_grad_enabled():
            return th.stack([network(tree_map(itemgetter(index), x)) for index, network in enumerate(self.unstack())])

        def run_member(state: dict[str, th.Tensor], member_x: PyTorchObs) -> th.Tensor:
            return functional_call(self.template, state, (member_x,))

        return th.vmap(run_member, in_dims=(0, 0 if per_member else None), randomness="different")(self.stacked_state(), x)

    def stacked_state(self) -> dict[str, th.Tensor]:
        """:return: parameters and buffers of all members by name, with a leading member axis"""
        return {**dict(self.template.named_parameters()), **dict(self.template.named_buffers())}

    def unstack(self) -> list[Callable[[PyTorchObs], th.Tensor]]:
        """:return: each member's module as a function, with views on its parameters and buffers"""
        state = self.stacked_state()
        members = zip(*(value.unbind() for value in state.values()), strict=True)
        return [partial(functional_call, self.template, dict(zip(state, values, strict=True))) for values in members]


def stack_modules(modules: Sequence[nn.Module]) -> nn.Module:
    """
    One module for N alike: parameters get a leading member axis, names stay. Modules without parameters, as most activation
    functions, must treat their elements alike, or count their dimensions from the last.

    :param modules: the members' modules
    :return: a module from and to tensors with a leading member axis; the first one itself if there is nothing to stack
    """
    first = modules[0]
    if isinstance(first, nn.Sequential):
        return EnsembleSequential(*(stack_modules(layers) for layers in zip(*modules, strict=True)))
    if isinstance(first, nn.Linear) and first.bias is not None:
        return EnsembleLinear(modules)
    if isinstance(first, nn.LayerNorm) and first.bias is not None:
        return EnsembleLayerNorm(modules)  # type: ignore[arg-type]
    if type(first) is nn.ReLU:
        # Its input is the output of a linear layer or a norm, which nobody else reads: no second tensor of that size
        return nn.ReLU(inplace=True)
    if not first.state_dict():
        return first
    return EnsembleModule(modules)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """
    What ``module`` computes here has no gradient to its parameters, so that none is worked out for nothing.

    :param module: a network whose inputs learn, as those of the critic in the actor's loss
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
