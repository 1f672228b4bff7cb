"""Parts that every network shares: norms, activations, stacked layers, reading of configs."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, PyTree

from jaxid.errors import CheckpointError
from jaxid.kernels.product import PRODUCT, gated_product, product, prompts_divided
from jaxid.kernels.product import runs as reads_stack
from jaxid.kernels.stacks import LayerSlice
from jaxid.nn import placement
from jaxid.nn.fields import check_types

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
}
"""Activation functions by the names Hugging Face configs use."""

_IN_KERNELS = frozenset({"silu", "gelu_new", "gelu_pytorch_tanh"})
"""Activation functions that kernels for GPUs can compute."""

BOOKKEEPING = frozenset(
    """_name_or_path _attn_implementation _attn_implementation_autoset _commit_hash add_cross_attention architectures
attention_dropout attn_implementation bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dropout dtype early_stopping
encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id
forced_eos_token_id id2label initializer_factor initializer_range is_decoder is_encoder_decoder label2id
length_penalty max_length max_position_embeddings min_length model_type no_repeat_ngram_size num_beam_groups
num_beams num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix
pretraining_tp problem_type projection_dim pruned_heads remove_invalid_values repetition_penalty return_dict
return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p
use_bfloat16 use_cache""".split()
)
"""Fields of Hugging Face configs that say nothing about what the forward pass computes."""


# Not typing.Self: beartype, which checks the annotations in the tests, does not support it for single methods.
ConfigT = TypeVar("ConfigT", bound="Config")
ModuleT = TypeVar("ModuleT", bound=nnx.Module)
Tree = TypeVar("Tree")
Kept = TypeVar("Kept")
Result = TypeVar("Result")

Layer = int | Int[Array, ""]
"""Index of a layer, which may be traced."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Base of all configs: frozen, keyword-only, its field names those of the Hugging Face config."""

    @classmethod
    def from_fields(
        cls: type[ConfigT], fields: Mapping[str, object], *, where: str, ignored: Iterable[str] = ()
    ) -> ConfigT:
        """Builds the config from a Hugging Face config's fields, refusing any that it does not know.

        Args:
            fields: the parsed JSON object.
            where: how to name the object in an error, e.g. "text_config".
            ignored: fields that the caller has handled or that change nothing here.

        Raises:
            CheckpointError: for a field that is neither handled nor known to change nothing.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known - set(ignored) - BOOKKEEPING)
        if unknown:
            raise CheckpointError(
                f"{where} of the checkpoint's config.json holds fields that jaxid does not implement: "
                f"{', '.join(f'{name}={fields[name]!r}' for name in unknown)}. Loading would silently change the model."
            )
        kept = {name: value for name, value in fields.items() if name in known and value is not None}
        for name, value in kept.items():
            if name.endswith("_act") and value not in ACTIVATIONS:
                raise CheckpointError(f"{where}: {name}={value!r} is not one of {', '.join(ACTIVATIONS)}.")
        check_types(cls, kept, where)
        return cls(**kept)


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], scale: float) -> nnx.Param:
    """A parameter drawn from a normal distribution of the given standard deviation, float32."""
    return nnx.Param(scale * jax.random.normal(rngs.params(), shape, jnp.float32))


def filled(value: float, shape: tuple[int, ...]) -> nnx.Param:
    """A parameter that starts constant, float32."""
    return nnx.Param(jnp.full(shape, value, jnp.float32))


def rms_norm(
    x: Float[Array, "*B D"], scale: Float[Array, "D"], epsilon: float, offset: float = 0.0
) -> Float[Array, "*B D"]:
    """The last axis divided by its root mean square, computed in float32, times scale + offset."""
    exact = x.astype(jnp.float32)
    exact = exact * jax.lax.rsqrt(jnp.mean(exact * exact, axis=-1, keepdims=True) + epsilon)
    if offset:  # Gemma rounds after the multiplication, Llama before it
        return (exact * (scale.astype(jnp.float32) + offset)).astype(x.dtype)
    return exact.astype(x.dtype) * scale


class RMSNorm(nnx.Module):
    """Root-mean-square norm, computed in float32 (HF LlamaRMSNorm, Gemma3RMSNorm)."""

    def __init__(self, width: int, epsilon: float, offset: float = 0.0):
        """Starts with a scale of one."""
        self.scale = filled(1.0 - offset, (width,))
        self.epsilon, self.offset = epsilon, offset

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalises the last axis."""
        return rms_norm(x, self.scale[...], self.epsilon, self.offset)


class LayerNorm(nnx.Module):
    """Layer norm with scale and bias, computed in float32."""

    def __init__(self, width: int, epsilon: float):
        """Starts as the plain standardisation."""
        self.scale = filled(1.0, (width,))
        self.bias = filled(0.0, (width,))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalises the last axis."""
        exact = x.astype(jnp.float32)
        exact = exact - jnp.mean(exact, axis=-1, keepdims=True)
        exact = exact * jax.lax.rsqrt(jnp.mean(exact * exact, axis=-1, keepdims=True) + self.epsilon)
        exact = exact * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return exact.astype(x.dtype)


class Linear(nnx.Module):
    """Affine map of the last axis, the kernel stored as [inputs, outputs]."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, rngs: nnx.Rngs):
        """Starts with variance 1 / inputs."""
        self.kernel = normal(rngs, (inputs, outputs), inputs**-0.5)
        self.bias = filled(0.0, (outputs,)) if bias else None

    def __call__(self, x: Float[Array, "*B inputs"]) -> Float[Array, "*B outputs"]:
        """Applies the map."""
        return _affine(x, self.kernel, self.bias)


class Projections(nnx.Module):
    """Maps from the width into the heads of an attention layer and back.

    The weights are matrices: heads become an axis after the product. Weights with an axis of heads would be copied to
    another layout before every product on TPU.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_width: int,
        layers: int,
        *,
        kv_heads: int | None = None,
        source_width: int | None = None,
        bias: bool,
        out_bias: bool,
        rngs: nnx.Rngs,
    ):
        """Starts with variance 1 / inputs, and the map back with less in a stack of more layers.

        Args:
            width: width of the tokens, D.
            heads: number of heads, H.
            head_width: width of a head, E.
            layers: number of layers in the stack, L.
            kv_heads: number of heads of keys and values, K, if it is not H.
            source_width: width of the tokens that become keys and values, if it is not D.
            bias: whether queries, keys and values have biases.
            out_bias: whether the map back has a bias.
            rngs: source of the first values.
        """
        inner, kv_inner = heads * head_width, (kv_heads or heads) * head_width
        source, scale = source_width or width, width**-0.5
        self.head_width = head_width
        self.query = normal(rngs, (width, inner), scale)
        self.key = normal(rngs, (source, kv_inner), source**-0.5)
        self.value = normal(rngs, (source, kv_inner), source**-0.5)
        self.out = normal(rngs, (inner, width), scale * (2 * layers) ** -0.5)
        self.query_bias = filled(0.0, (inner,)) if bias else None
        self.key_bias, self.value_bias = (filled(0.0, (kv_inner,)) if bias else None for _ in range(2))
        self.out_bias = filled(0.0, (width,)) if out_bias else None

    def into_heads(
        self, x: Float[Array, "*A S D"], source: Float[Array, "*B T C"]
    ) -> tuple[Float[Array, "*A S H E"], Float[Array, "*B T K E"], Float[Array, "*B T K E"]]:
        """Queries of the tokens `x`, and keys and values of the tokens `source`."""
        return self._heads(x, self.query, self.query_bias), *self.remembered(source)

    def remembered(self, source: Float[Array, "*B T C"]) -> tuple[Float[Array, "*B T K E"], Float[Array, "*B T K E"]]:
        """Keys and values of the tokens `source`; as many heads as `placement.kept_heads` says."""
        heads = self.query.get_value().shape[-1] // self.head_width

        def kept(x: Array) -> Array:
            copies = placement.kept_heads(heads, x.shape[-2]) // x.shape[-2]
            return x if copies == 1 else placement.heads(jnp.repeat(x, copies, axis=-2))

        key, value = self._heads(source, self.key, self.key_bias), self._heads(source, self.value, self.value_bias)
        return kept(key), kept(value)

    def _heads(self, x: Float[Array, "*B T D"], kernel: nnx.Param, bias: nnx.Param | None) -> Float[Array, "*B T H E"]:
        by_rows = placement.rows_of_heads(x, kernel.get_value().shape[-1] // self.head_width)
        return placement.heads(split_heads(_affine(x, kernel, bias, by_rows=by_rows), self.head_width))

    def from_heads(self, mixed: Float[Array, "*B S H E"]) -> Float[Array, "*B S D"]:
        """What attention adds to the tokens, from what their queries read."""
        return _affine(join_heads(placement.heads(mixed)), self.out, self.out_bias)


def _affine(
    x: Float[Array, "*B inputs"], kernel: nnx.Param, bias: nnx.Param | None, *, by_rows: bool | PartitionSpec = False
) -> Float[Array, "..."]:
    y = flat_product(x, kernel.get_value(), by_rows=by_rows)
    return y if bias is None else y + bias[...]


def flat_product(
    x: Float[Array, "*B inputs"],
    kernel: Float[Array, "inputs outputs"] | LayerSlice,
    *,
    by_rows: bool | PartitionSpec = False,
) -> Float[Array, "*B outputs"]:
    """A linear map of the last axis as one product of two matrices, whatever other axes there are.

    XLA's CPU back end takes twice as long for [B, T, D] @ [D, F], especially for its gradients. Where devices divide
    prompts, the axes stay: rows of several prompts, joined with them, could not be divided.

    Args:
        x: the inputs.
        kernel: the matrix.
        by_rows: as in `jaxid.kernels.product.product`.
    """
    flat = x if prompts_divided() else x.reshape(-1, x.shape[-1])
    y = product(flat, kernel, by_rows=by_rows) if isinstance(kernel, LayerSlice) else flat @ kernel
    return checkpoint_name(y, PRODUCT).reshape(*x.shape[:-1], kernel.shape[1])


def gated(x: Float[Array, "*B D"], gate: Linear, up: Linear, activation: str) -> Float[Array, "*B inner"]:
    """activation(gate(x)) * up(x), as one product where the matrices are read in their stacks."""
    matrices, function = (gate.kernel.get_value(), up.kernel.get_value()), ACTIVATIONS[activation]
    plain = gate.bias is not None or up.bias is not None or activation not in _IN_KERNELS
    if plain or not all(isinstance(matrix, LayerSlice) for matrix in matrices):
        return function(gate(x)) * up(x)
    return gated_product(x, *matrices, function)


def split_heads(x: Float[Array, "*B S F"], width: int) -> Float[Array, "*B S H E"]:
    """Splits the last axis into heads of a given width."""
    return x.reshape(*x.shape[:-1], -1, width)


def join_heads(x: Float[Array, "*B S H E"]) -> Float[Array, "*B S F"]:
    """Merges heads and their width into one axis."""
    return x.reshape(*x.shape[:-2], -1)


def take_tokens(values: Float[Array, "*layers B T D"], positions: Int[Array, "B S"]) -> Float[Array, "*layers B S D"]:
    """Every prompt's tokens at its own positions; NaN at positions out of range."""
    shape = (1,) * (values.ndim - 3) + (*positions.shape, 1)
    # Negative positions would otherwise count from the end.
    positions = jnp.where(positions < 0, values.shape[-2], positions)
    return jnp.take_along_axis(values, positions.reshape(shape), axis=-2, mode="fill")


def layer_of(arrays: Tree, layer: Layer) -> Tree:
    """One layer's arrays out of stacked ones."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False), arrays)


def parameters_of(stack: Tree, layer: Layer, slices: Tree | None = None) -> Tree:
    """One layer's parameters out of stacked ones; large matrices are not sliced out where that would copy them.

    Args:
        stack: parameters of all layers.
        layer: the layer.
        slices: its parameters, if they are at hand.
    """

    def read(stack: Array, own: Array) -> Array | LayerSlice:
        lazy = stack.ndim == 3 and reads_stack(stack.dtype, *stack.shape[1:])
        return LayerSlice(stack, layer, own) if lazy else own

    return jax.tree.map(read, stack, layer_of(stack, layer) if slices is None else slices)


def stacked(make: Callable[[nnx.Rngs], ModuleT], count: int, rngs: nnx.Rngs) -> ModuleT:
    """One module whose parameters carry a leading layer axis of `count`, for use under `lax.scan`."""
    return nnx.vmap(make, in_axes=0, out_axes=0)(rngs.split(count))


Recompute = Literal["nothing", "cheap", "all"]
"""What a backward pass recomputes: nothing, everything but the products with weights, or everything in a block."""


class Learning(NamedTuple):
    """How a stack of layers is differentiated.

    Attributes:
        frozen: number of first layers that get no gradient, nor does anything before them.
        trained: whether the parameters of the other layers get a gradient.
        recompute: what the backward pass recomputes from what entered a layer instead of keeping it.
    """

    frozen: int = 0
    trained: bool = True
    recompute: Recompute = "nothing"


class Stackable(nnx.Module):
    """A layer of a stack, or the stack itself, which may define how it is differentiated."""

    learning: Learning | None = None


def by_index(layers: Stackable) -> bool:
    """Whether running some of the stacked layers by their index costs nothing for the others.

    Scanning over a part of the parameters copies that part. Selecting layers by their index does not copy, but its
    gradient with respect to the parameters costs a whole stack for every layer, and without recomputation the selected
    parameters are kept for the backward pass.
    """
    learning = layers.learning
    return learning is None or (not learning.trained and learning.recompute != "nothing")


def recomputed(layers: Stackable, step: Callable[..., Result]) -> Callable[..., Result]:
    """A step through one of the stacked layers, of which the backward pass keeps what `layers.learning` says."""
    if layers.learning is None or layers.learning.recompute == "nothing":
        return step
    products = jax.checkpoint_policies.save_only_these_names(PRODUCT)
    policy = products if layers.learning.recompute == "cheap" else None
    return jax.checkpoint(step, prevent_cse=False, policy=policy)


def scan_stack(
    layers: Stackable,
    step: Callable[[Result, Layer, PyTree], tuple[Result, Kept]],
    x: Result,
    depth: int | None = None,
) -> tuple[Result, Kept]:
    """`jax.lax.scan` over the first `depth` of stacked layers, differentiated as `layers.learning` says.

    Args:
        layers: the stack.
        step: maps a value, a layer's index and its parameters to the next value and an output.
        x: the value that enters the first layer.
        depth: number of layers to run; all by default.

    Returns:
        The value that leaves the last layer, and the stacked outputs.
    """
    stack = nnx.state(layers)
    count = jax.tree.leaves(stack)[0].shape[0]
    end = count if depth is None else depth

    def picked(x: Result, stack: PyTree, first: int, last: int) -> tuple[Result, Kept]:
        body = recomputed(layers, lambda x, index: step(x, index, parameters_of(stack, index)))
        return jax.lax.scan(body, x, jnp.arange(first, last))

    def learning(x: Result, first: int) -> tuple[Result, Kept]:
        if (first, end) != (0, count) and by_index(layers):
            return picked(x, stack, first, end)

        def body(x: Result, own: tuple[Array, PyTree]) -> tuple[Result, Kept]:
            index, slices = own
            return step(x, index, parameters_of(part, index - first, slices))

        part = stack if (first, end) == (0, count) else jax.tree.map(lambda leaf: leaf[first:end], stack)
        return jax.lax.scan(recomputed(layers, body), x, (jnp.arange(first, end), part))

    frozen = 0 if layers.learning is None else min(layers.learning.frozen, end)
    if not frozen:
        return learning(x, 0)
    x, below = picked(*jax.lax.stop_gradient((x, stack)), 0, frozen)
    x, above = learning(x, frozen)
    return x, jax.tree.map(lambda *parts: jnp.concatenate(parts), below, above)
