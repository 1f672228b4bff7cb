"""The key table: how a checkpoint's tensors map to a network's parameters, in both directions."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from einops import EinopsError, rearrange
from jaxtyping import Shaped


@dataclasses.dataclass(frozen=True)
class Key:
    """One row of a family's key table.

    Attributes:
        source: the tensor's name in the checkpoint, where `{layer}` is replaced by a layer's index.
        target: path of the parameter, separated by dots.
        pattern: einops pattern from source axes to parameter axes (without the layer axis).
        sizes: lengths of pattern axes that cannot be inferred from the source.
        copy: whether this is a second copy of a parameter, which checkpoints may contain with the same values.
        layers: the layers that have this tensor; all by default.
        rows: which rows of the stacked parameter those layers fill; by default the rows of the same indices.
        part: (index, count) for a source that several keys share in equal parts of its first axis.
    """

    source: str
    target: str
    pattern: str = "... -> ..."
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    copy: bool = False
    layers: tuple[int, ...] | None = None
    rows: tuple[int, ...] | None = None
    part: tuple[int, int] | None = None

    def to_parameter(self, tensor: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        """The checkpoint's tensor, or its part, in the axes of the parameter; a view where possible."""
        return rearrange(self.own_part(tensor), self.pattern, **self.sizes)

    def own_part(self, tensor: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        """The part of a tensor that the key reads; a view."""
        if self.part is None:
            return tensor
        index, count = self.part
        length = tensor.shape[0] // count
        return tensor[index * length : (index + 1) * length]

    def parameter_shape(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """Shape of the parameter that a tensor of a given shape becomes; None if the shapes do not fit."""
        if self.part is not None and (not shape or shape[0] % self.part[1]):
            return None
        try:
            return self.to_parameter(np.broadcast_to(np.zeros((), np.int8), shape)).shape
        except EinopsError:
            return None

    def tensors(self, shape: tuple[int, ...]) -> list[tuple[str, int | None]]:
        """Names of the tensors that make up a parameter of a given shape.

        Returns:
            The tensor's name and the row of the stacked parameter that it fills, for each layer; for a parameter that
            is not stacked, the name of its only tensor and None.
        """
        if "{layer}" not in self.source:
            return [(self.source, None)]
        layers = tuple(range(shape[0])) if self.layers is None else self.layers
        rows = layers if self.rows is None else self.rows
        return [(self.source.format(layer=layer), row) for layer, row in zip(layers, rows, strict=True)]

    def to_checkpoint(self, parameter: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        """The inverse of `to_parameter`; only the key's own part, if the source has several."""
        source, target = self.pattern.split("->")
        used = {name: size for name, size in self.sizes.items() if name in target}
        return np.asarray(rearrange(parameter, f"{target} -> {source}", **used), order="C")


LINEAR = "outputs inputs -> inputs outputs"
"""PyTorch stores a linear map as [outputs, inputs]."""

LANGUAGE_MODEL = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
)
"""Renames of the decoder's keys (transformers >= 4.52, in memory and on disk) to their published form."""

ROTARY = (r"\.inv_freq$",)
"""Patterns of tensors that only repeat the config's rotary settings."""


def prefixed(keys: list[Key], source: str, target: str) -> list[Key]:
    """The same rows with prefixes added to their names."""
    return [dataclasses.replace(key, source=source + key.source, target=target + key.target) for key in keys]


def linear(source: str, target: str, *, bias: bool) -> list[Key]:
    """Rows of a `Linear`."""
    rows = [Key(f"{source}.weight", f"{target}.kernel", LINEAR)]
    return [*rows, Key(f"{source}.bias", f"{target}.bias")] if bias else rows


def layer_norm(source: str, target: str, *, bias: bool = True) -> list[Key]:
    """Rows of a `LayerNorm`, or of an `RMSNorm` if there is no bias."""
    rows = [Key(f"{source}.weight", f"{target}.scale")]
    return [*rows, Key(f"{source}.bias", f"{target}.bias")] if bias else rows


def projection(source: str, target: str, *, bias: bool) -> list[Key]:
    """Rows of one of the `Projections` of an attention layer."""
    rows = [Key(f"{source}.weight", target, LINEAR)]
    return [*rows, Key(f"{source}.bias", f"{target}_bias")] if bias else rows


def attention_keys(source: str, names: Sequence[str], out: str, *, bias: bool, out_bias: bool) -> list[Key]:
    """Rows of an attention layer with separate tensors for queries, keys and values.

    Args:
        source: name of a projection into heads, with `{}` for which of them: "self_attn.{}_proj".
        names: the names of queries, keys and values there.
        out: name of the projection back to the width.
        bias: whether the projections into heads have biases.
        out_bias: whether the projection back has a bias.
    """
    into = [
        row
        for name, target in zip(names, ("query", "key", "value"), strict=True)
        for row in projection(source.format(name), f"attention.{target}", bias=bias)
    ]
    return [*into, *projection(out, "attention.out", bias=out_bias)]


def fused_attention_keys(source: str, out: str) -> list[Key]:
    """Rows of an attention layer with biases, whose queries, keys and values are thirds of one tensor.

    Args:
        source: prefix of the names of weight and bias, including the separator: "attn.qkv.", "in_proj_".
        out: name of the projection back to the width.
    """
    into = [
        Key(f"{source}{kind}", f"attention.{name}{suffix}", pattern, part=(index, 3))
        for index, name in enumerate(("query", "key", "value"))
        for kind, suffix, pattern in (("weight", "", LINEAR), ("bias", "_bias", "... -> ..."))
    ]
    return [*into, *projection(out, "attention.out", bias=True)]


def encoder_block(
    attention: list[Key], norms: Sequence[str], mlp: Sequence[str] = ("mlp.fc1", "mlp.fc2"), *, norm_bias: bool = True
) -> list[Key]:
    """Rows of a `Block`.

    Args:
        attention: its attention's rows.
        norms: names of the norms of attention and MLP.
        mlp: names of the MLP's maps, up and down.
        norm_bias: False for norms without biases.
    """
    return [
        *attention,
        *layer_norm(norms[0], "attention_norm", bias=norm_bias),
        *layer_norm(norms[1], "mlp_norm", bias=norm_bias),
        *linear(mlp[0], "up", bias=True),
        *linear(mlp[1], "down", bias=True),
    ]
