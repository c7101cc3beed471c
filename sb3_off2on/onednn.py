"""
Products of matrices on a processor. PyTorch multiplies float32 matrices with MKL, which takes less than half of what AMD's
newest processors can do. oneDNN, which PyTorch's builds for x86 bring for convolutions and for compiled code, takes nearly all
of it.
"""

import math
import platform
import re
from pathlib import Path

import torch as th

# What PyTorch's compiler calls for a linear layer. There is no public name for it
_ONEDNN_LINEAR = getattr(th.ops.mkldnn, "_linear_pointwise", None) if th.backends.mkldnn.is_available() else None


def describe_processor() -> str:
    """:return: on Linux, what the kernel says of the first core, elsewhere ``platform.processor()``"""
    path = Path("/proc/cpuinfo")
    return path.read_text().partition("\n\n")[0] if path.exists() else platform.processor()


def min_multiplications(processor: str, capability: str) -> float:
    """
    MKL does without AVX-512 on AMD's processors. From Zen 5 (family 26) on it is half of the speed, and only small products do
    not make up for oneDNN's call. Zen 4 takes such an instruction in two halves: oneDNN gains less, with large products. On
    others MKL is the faster one.

    :param processor: what ``describe_processor`` returned
    :param capability: what PyTorch says of the processor
    :return: multiplications of a product from which oneDNN takes less time than MKL
    """
    family = re.search(r"\bfamily\s*:?\s*(\d+)", processor, re.IGNORECASE)
    if "AuthenticAMD" not in processor or capability != "AVX512" or family is None:
        return math.inf
    return 2**22 if int(family[1]) >= 26 else 2**25


MIN_MULTIPLICATIONS = min_multiplications(describe_processor(), th.backends.cpu.get_cpu_capability())


def is_traced() -> bool:
    """:return: whether PyTorch compiles, exports or transforms (``torch.func``) what runs, which takes its own products"""
    # There is no public name for the last
    return th.compiler.is_compiling() or th.jit.is_tracing() or th._C._are_functorch_transforms_active()


def takes_onednn(x: th.Tensor, multiplications: int) -> bool:
    """
    :param x: a factor
    :param multiplications: of the product
    :return: whether the product is left to oneDNN
    """
    return (
        not is_traced()
        and multiplications >= MIN_MULTIPLICATIONS
        and _ONEDNN_LINEAR is not None
        and x.device.type == "cpu"
        and x.dtype == th.float32
    )


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
