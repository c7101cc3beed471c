"""
Linear layers on a processor. PyTorch multiplies float32 matrices with MKL, which takes less than half of what AMD's newest
processors can do. oneDNN, which PyTorch's builds for x86 bring for convolutions and for compiled code, takes nearly all of it.
"""

import platform
import re
from pathlib import Path
from typing import Any

import torch as th
from torch import nn
from torch.autograd.function import once_differentiable

# What PyTorch's compiler calls for a linear layer. There is no public name for it
_ONEDNN_LINEAR = getattr(th.ops.mkldnn, "_linear_pointwise", None) if th.backends.mkldnn.is_available() else None
# Multiplications, of which smaller products have too few to make up for the call
MIN_MULTIPLICATIONS = 2**22


def describe_processor() -> str:
    """:return: on Linux, what the kernel says of the first core, elsewhere ``platform.processor()``"""
    path = Path("/proc/cpuinfo")
    return path.read_text().partition("\n\n")[0] if path.exists() else platform.processor()


def outruns_mkl(processor: str) -> bool:
    """
    MKL does without AVX-512 on AMD's processors. Up to Zen 4 nothing is lost by it, as these take such an instruction in two
    halves; from Zen 5 (family 26) on it is half of the speed. On others they differ by less than MKL's batched product saves.

    :param processor: what ``describe_processor`` returned
    :return: whether oneDNN multiplies much faster than MKL on this processor
    """
    family = re.search(r"\bfamily\s*:?\s*(\d+)", processor, re.IGNORECASE)
    return "AuthenticAMD" in processor and family is not None and int(family[1]) >= 26


_OUTRUNS_MKL = outruns_mkl(describe_processor())


def is_traced() -> bool:
    """:return: whether PyTorch compiles or exports what runs, for which it chooses the products itself"""
    return th.compiler.is_compiling() or th.jit.is_tracing()


def takes_onednn(x: th.Tensor, multiplications: int) -> bool:
    """
    :param x: the layer's input
    :param multiplications: rows times weights
    :return: whether ``linear`` leaves the product to oneDNN
    """
    return (
        not is_traced()
        and multiplications >= MIN_MULTIPLICATIONS
        and _OUTRUNS_MKL
        and _ONEDNN_LINEAR is not None
        and x.device.type == "cpu"
        and x.dtype == th.float32
    )


def linear(x: th.Tensor, weight: th.Tensor, bias: th.Tensor) -> th.Tensor:
    """
    ``nn.functional.linear`` for a batch of rows, by whichever library is faster.

    :param x: shape ``(batch_size, in_features)``
    :param weight: shape ``(out_features, in_features)``
    :param bias: shape ``(out_features,)``
    :return: shape ``(batch_size, out_features)``
    """
    if takes_onednn(x, x.shape[0] * weight.numel()):
        return _OneDNNLinear.apply(x, weight, bias)
    return nn.functional.linear(x, weight, bias)


def product(x: th.Tensor, y: th.Tensor, bias: th.Tensor | None = None) -> th.Tensor:
    """
    A product by oneDNN, without gradient. The factors may be transposed, but ``y`` must not be part of wider rows: for these,
    oneDNN has plain loops only, which take a thousand times as long.

    :param x: shape ``(n, features)``
    :param y: shape ``(m, features)``
    :param bias: shape ``(m,)``
    :return: ``x @ y.T + bias``, shape ``(n, m)``
    """
    assert _ONEDNN_LINEAR is not None
    return _ONEDNN_LINEAR(x, y, bias, "none", [], "")


class _OneDNNLinear(th.autograd.Function):
    """The layer with its gradient, each of whose two products is one of oneDNN again."""

    @staticmethod
    def forward(ctx: Any, x: th.Tensor, weight: th.Tensor, bias: th.Tensor) -> th.Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: th.Tensor) -> tuple[th.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = product(grad, weight.T) if ctx.needs_input_grad[0] else None
        grad_weight = product(grad.T, x.T) if ctx.needs_input_grad[1] else None
        grad_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias
