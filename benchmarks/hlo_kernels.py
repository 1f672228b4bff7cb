"""What kernels compute and read: products and convolutions of XLA, calls of libraries and of Pallas."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from hlo_text import Instruction, Shape

Dims = Sequence[int]


class Kernel(NamedTuple):
    """A kernel of Pallas.

    Attributes:
        flop: its operations, from the shapes of its first output and of its operands.
        read: the share of every operand that it reads; all of them by default.
    """

    flop: Callable[[Dims, Sequence[Dims]], float]
    read: Callable[[Sequence[Dims]], Sequence[float]] | None = None


def _layer_product(out: Dims, operands: Sequence[Dims]) -> float:
    return 2.0 * operands[1][0] * sum(math.prod(stack[1:]) for stack in operands[2:])


def _dense_maps(out: Dims, operands: Sequence[Dims]) -> float:
    _, first, second, wide, *_ = operands
    rows, blocks = wide[:2]
    return 2.0 * math.prod(out) * (rows * (math.prod(first) + blocks * math.prod(second)) + math.prod(wide))


def _dense_maps_in_lanes(out: Dims, operands: Sequence[Dims]) -> float:
    first, second, wide = operands[2], operands[4], operands[6]
    return 2.0 * math.prod(out) * (wide[0] * (2 * math.prod(first) + math.prod(second)) + math.prod(wide))


def _keys(operands: Sequence[Dims]) -> int:
    """How many keys attention reads: of a stack of all layers, as many as its mask has, which is told before them."""
    stacked = len(operands[-2]) == 6
    return min(operands[-2][-2], operands[-4][-1]) if stacked else operands[-2][-2]


def _read_by_attention(operands: Sequence[Dims]) -> Sequence[float]:
    """All operands; of stacked keys and values, one layer's."""
    stacked = len(operands[-2]) == 6
    share = _keys(operands) / math.prod(operands[-2][i] for i in (1, 4)) if stacked else 1.0
    return [*[1.0] * (len(operands) - 2), share, share]


KERNELS: Mapping[str, Kernel] = {
    # `jaxid.kernels.flash`: two products with all scores, then three and four. The last operands are query, key and
    # value; or query, the gradient of what was read, key, value and two numbers of every query. Pairs that a mask
    # excludes count too.
    # Where programs share the keys of few queries, there is an output of each.
    "attention_forward": Kernel(
        lambda out, operands: 4.0 * out[0] * math.prod(operands[-3][-3:]) * _keys(operands), _read_by_attention
    ),
    "attention_query_gradient": Kernel(lambda out, operands: 6.0 * math.prod(out) * operands[-4][-2]),
    "attention_key_gradient": Kernel(
        lambda out, operands: 8.0 * out[0] * math.prod(out[-2:]) * math.prod(operands[-6][-3:-1])
    ),
    # `jaxid.kernels.product`: an index, the tokens, and the stack, or two of them, of which one layer is read.
    "layer_product": Kernel(_layer_product, lambda operands: (1, 1, 1 / operands[2][0])),
    "gated_product": Kernel(_layer_product, lambda operands: (1, 1, 1 / operands[2][0], 1 / operands[3][0])),
    "layer_product_transposed": Kernel(_layer_product, lambda operands: (1, 1, 1 / operands[2][0])),
    # `jaxid.kernels.banded`: maps and three stacks of matrices, of which the first two serve all rows of a map.
    "dense_map_scores": Kernel(_dense_maps),
    # `jaxid.kernels.lanes`: products of tokens and four factors, then weights and biases in turn; two rows at each step
    # take the first matrix twice, and the second ones and a part of the third once.
    "dense_map_scores_in_lanes": Kernel(_dense_maps_in_lanes),
}
"""The library's own kernels by name."""


def kernel_name(instruction: Instruction) -> str:
    """The name of a custom call's kernel: that which Pallas' call was given, else that of its target.

    Where a kernel was divided among devices, the name of the call is lost, and only the kernel tells.
    """
    named = re.search(r"(\w+)/pallas_call\"", instruction.rest) or re.search(r', name = "(\w+)"', instruction.rest)
    return named[1] if named else instruction.target


def read_shares(instruction: Instruction, operands: Sequence[Dims]) -> Sequence[float]:
    """The share of every operand that a custom call reads."""
    read = KERNELS[kernel_name(instruction)].read if kernel_name(instruction) in KERNELS else None
    return [1.0] * len(operands) if read is None else read(operands)


def library(instruction: Instruction, operands: Sequence[Shape]) -> float | None:
    """Operations of a library's or Pallas' kernel; None for an unknown one."""
    target, name = instruction.target, kernel_name(instruction)
    output = instruction.shapes[0].dims
    if "cublas" in target:
        axes = re.search(r'"lhs_contracting_dimensions":(\[[^\]]*\])', instruction.rest)
        contracted = math.prod(operands[0].dims[int(axis)] for axis in json.loads(axes[1])) if axes else 0
        return 2.0 * math.prod(output) * contracted if axes else None
    if "cudnn$convForward" in target:  # the labels of a gradient are those of the convolution
        return convolution(instruction, operands)
    if "cudnn$fmha" in target:
        return _fmha(instruction, operands)
    return KERNELS[name].flop(output, [shape.dims for shape in operands]) if name in KERNELS else None


def _fmha(instruction: Instruction, operands: Sequence[Shape]) -> float | None:
    """Operations of cuDNN's attention, whose axes may lie in any order: two products with the scores, or five."""
    scores = re.search(r'"intermediate_tensor_shape":\{[^}]*"dimensions":(\[[^\]]*\])', instruction.rest)
    if not scores:
        return None
    dims = [int(one) for one in json.loads(scores[1])]
    width = math.prod(operands[0].dims) / math.prod(dims[:-1])
    return 2.0 * (5 if "Backward" in instruction.target else 2) * math.prod(dims) * width


def convolution(instruction: Instruction, operands: Sequence[Shape]) -> float:
    """Operations of a convolution, as which TPUs also compute products of matrices, without those on padding."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    if not labels:
        raise ValueError(f"{instruction.name} has no dim_labels")
    data, kernel, output = ({axis: place for place, axis in enumerate(text)} for text in labels.groups())
    window = re.search(r"window=\{([^}]*)\}", instruction.rest)
    fields = dict(re.findall(r"(\w+)=(\S+)", window[1])) if window else {}
    sizes, result = [shape.dims for shape in operands[:2]], instruction.shapes[0].dims
    total = 2.0 * result[output["b"]] * result[output["f"]] * sizes[1][kernel["i"]]
    spatial = sorted(axis for axis in data if axis.isdigit())
    for place, axis in enumerate(spatial):
        own = {name: value.split("x")[place] for name, value in fields.items()}
        step, spread, gap = (int(own.get(name, 1)) for name in ("stride", "lhs_dilate", "rhs_dilate"))
        first = int(own.get("pad", "0_0").split("_")[0])
        reach = np.arange(result[output[axis]])[:, None] * step + np.arange(sizes[1][kernel[axis]]) * gap - first
        inside = (reach >= 0) & (reach <= (sizes[0][data[axis]] - 1) * spread) & (reach % spread == 0)
        total *= int(inside.sum())
    return total
