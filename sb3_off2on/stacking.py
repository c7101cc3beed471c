"""
N modules of one shape as one: every parameter gets a leading member axis, so that one batched product serves all members.
Names stay, so that a member's state dict is that of the module it came from.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial, reduce
from operator import itemgetter
from typing import TypeGuard

import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn
from torch.func import functional_call, stack_module_state
from torch.utils._pytree import tree_map

from sb3_off2on.mlp import linear, stacked_mlp
from sb3_off2on.onednn import is_traced


def suits_stacked_mlp(x: th.Tensor) -> bool:
    """
    :param x: input of stacked layers
    :return: whether it is on a processor, and no compiler and no autocast chooses how to multiply
    """
    return x.device.type == "cpu" and not is_traced() and not th.is_autocast_enabled("cpu")


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
    """N linear layers: ``stacked_mlp`` on a processor, else a batched product."""

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: shape ``(n_members, batch_size, in_features)``
        :return: shape ``(n_members, batch_size, out_features)``
        """
        if suits_stacked_mlp(x):
            return stacked_mlp(x, [self.weight], [self.bias])
        return th.baddbmm(self.bias.unsqueeze(1), x, self.weight.transpose(1, 2))  # not .mT, for PyTorch's older ONNX exporter


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


def are_linear(layers: Sequence[nn.Module]) -> TypeGuard[Sequence[EnsembleLinear]]:
    """:return: whether all are ``EnsembleLinear``"""
    return all(type(layer) is EnsembleLinear for layer in layers)


def weights_and_biases(layers: Sequence[EnsembleLinear]) -> tuple[list[th.Tensor], list[th.Tensor]]:
    """:return: those of each layer"""
    return [layer.weight for layer in layers], [layer.bias for layer in layers]


class EnsembleSequential(nn.Sequential):
    """N sequences of layers. Those of linear layers and ReLU are one ``stacked_mlp`` on a processor."""

    def mlp_layers(self, x: th.Tensor) -> Sequence[EnsembleLinear]:
        """
        :param x: input
        :return: the linear layers if a ``stacked_mlp`` can have them, none otherwise
        """
        layers = list(self)
        linear_layers, activations = layers[::2], layers[1::2]
        if are_linear(linear_layers) and all(type(layer) is nn.ReLU for layer in activations) and suits_stacked_mlp(x):
            return linear_layers
        return []

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: shape ``(n_members, batch_size, in_features)``
        :return: shape ``(n_members, batch_size, out_features)``
        """
        linear_layers = self.mlp_layers(x)
        if linear_layers:
            return stacked_mlp(x, *weights_and_biases(linear_layers), relu_last=len(self) % 2 == 0)
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
        # What is compiled stays on its own
        if len(self) % 2 == 0 and self._compiled_call_impl is None and are_linear(heads):
            linear_layers = self.mlp_layers(x)
            if linear_layers:
                weights, biases = weights_and_biases(linear_layers)
                head_weights, head_biases = weights_and_biases(heads)
                outputs = stacked_mlp(x, [*weights, th.cat(head_weights, dim=1)], [*biases, th.cat(head_biases, dim=1)])
                return outputs.split([bias.shape[1] for bias in head_biases], dim=2)
        latent = self(x)
        return [head(latent) for head in heads]

    def of_pairs(self, x: th.Tensor, partners: th.Tensor, max_rows: int) -> th.Tensor:
        """
        Without gradient, what is made of each row of ``x`` beside each of its partners, as of a state beside several actions:
        member by member and in pieces that fit the cache, and what the first layer makes of ``x`` is worked out once.

        :param x: shape ``(n_members, batch_size, x_features)``
        :param partners: shape ``(n_members, n_partners, batch_size, partner_features)``
        :param max_rows: of a piece, or ``batch_size`` if that is more
        :return: shape ``(n_members, n_partners, batch_size, out_features)``
        """
        first, n_features = self[0], x.shape[2]
        assert isinstance(first, EnsembleLinear)
        of_x = linear(x, first.weight[..., :n_features], first.bias)  # (n_members, batch_size, n_units)
        weights = first.weight[..., n_features:].mT  # (n_members, partner_features, n_units)
        at_once = max(max_rows // max(x.shape[1], 1), 1)
        outputs = []
        for index, other_layers in enumerate(unstack_modules(self[1:], len(x))):
            for part in partners[index].split(at_once):  # (n, batch_size, partner_features)
                of_part, weight = (tensor[index].expand(len(part), -1, -1) for tensor in (of_x, weights))
                outputs.append(other_layers(th.baddbmm(of_part, part, weight).flatten(0, 1)))
        return th.cat(outputs).view(*partners.shape[:3], outputs[0].shape[1])


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


def unstack_modules(stacked: nn.Module, n_modules: int) -> list[Callable[[th.Tensor], th.Tensor]]:
    """
    The networks that ``stack_modules`` made one module of, one by one, without gradient.

    :param stacked: what ``stack_modules`` returned
    :param n_modules: of how many
    :return: functions from shape ``(batch_size, in_features)`` to ``(batch_size, out_features)``
    """
    if isinstance(stacked, nn.Sequential):
        layers_of_all = (unstack_modules(layer, n_modules) for layer in stacked)
        networks = zip(*layers_of_all, strict=True) if len(stacked) > 0 else [()] * n_modules
        return [partial(reduce, lambda x, layer: layer(x), layers) for layers in networks]
    if isinstance(stacked, EnsembleLinear):
        parameters = zip(stacked.weight.unbind(), stacked.bias.unbind(), strict=True)
        return [partial(linear, weight=weight, bias=bias) for weight, bias in parameters]
    if isinstance(stacked, EnsembleLayerNorm):
        parameters = zip(stacked.weight.unbind(), stacked.bias.unbind(), strict=True)
        norm = partial(nn.functional.layer_norm, normalized_shape=stacked.normalized_shape, eps=stacked.eps)
        return [partial(norm, weight=weight, bias=bias) for weight, bias in parameters]
    if isinstance(stacked, EnsembleModule):
        return list(stacked.unstack())
    return [stacked] * n_modules


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
