"""Log-probabilities of a few vocabulary entries, without building the table of all of them.

Experiments read an answer as the log-softmax over the full vocabulary at the id of an answer word ([ID] arXiv
2601.12626, evaluation). With 150,000 entries and hundreds of interventions, the table of all of them would be the
largest array of the program, but only its log-sum-exp is needed.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def log_probs(
    hidden: Float[Array, "*batch D"],
    unembedding: Float[Array, "D V"],
    token_ids: Int[Array, "*ids"],
    *,
    block: int = 8192,
    parts: int = 1,
) -> Float[Array, "*result"]:
    """Log-softmax over the vocabulary at chosen entries, in float32.

    The normaliser is a running log-sum-exp over blocks of the vocabulary, so the largest temporary is [*batch, block],
    in the backward pass too. Two bfloat16 arguments are multiplied without conversion and summed in float32.

    Args:
        hidden: final hidden states, after the last norm.
        unembedding: the matrix from hidden state to logits (the transposed embedding table where they are tied).
        token_ids: entries to read: [n], the same for every row, or [*batch, n]. An id outside the vocabulary gives
            NaN.
        block: vocabulary entries in a block; a vocabulary no larger than this is not divided.
        parts: number of devices that divide the vocabulary, if it divides: each sums over its own entries.

    Returns:
        Log-probabilities, float32 [*batch, n].
    """
    if hidden.dtype != unembedding.dtype:
        hidden, unembedding = hidden.astype(jnp.float32), unembedding.astype(jnp.float32)
    # Negative ids would otherwise count from the end.
    token_ids = jnp.where(token_ids < 0, unembedding.shape[1], token_ids)
    chosen_columns = jnp.take(unembedding, token_ids, axis=1)  # [D, n] or [D, *batch, n]
    pattern = "...d,dn->...n" if token_ids.ndim == 1 else "...d,d...n->...n"
    chosen = _contract(pattern, hidden, chosen_columns)
    if parts == 1 or unembedding.shape[1] % parts:
        return chosen - _log_normaliser(hidden, unembedding, block)[..., None]
    own = unembedding.reshape(unembedding.shape[0], parts, -1)
    normalisers = jax.vmap(lambda matrix: _log_normaliser(hidden, matrix, block), in_axes=1, out_axes=-1)(own)
    return chosen - jax.nn.logsumexp(normalisers, axis=-1, keepdims=True)


def _log_normaliser(
    hidden: Float[Array, "*batch D"], unembedding: Float[Array, "D V"], block: int
) -> Float[Array, "*batch"]:
    """Log of the sum of exponentials of all logits, a block of the vocabulary at a time."""
    vocabulary = unembedding.shape[1]
    if vocabulary <= block:
        return jax.nn.logsumexp(_contract("...d,dv->...v", hidden, unembedding), axis=-1)

    # Without recomputing in the backward pass, the scan would store every block's logits: the table to avoid.
    @jax.checkpoint
    def add_block(
        carry: tuple[Float[Array, "*batch"], Float[Array, "*batch"]], first: Int[Array, ""]
    ) -> tuple[tuple[Float[Array, "*batch"], Float[Array, "*batch"]], None]:
        largest, total = carry
        # The last block is moved back to end with the vocabulary (padding would copy the matrix), and its overlap
        # with the block before is masked.
        start = jnp.minimum(first, vocabulary - block)
        columns = jax.lax.dynamic_slice_in_dim(unembedding, start, block, axis=1)
        logits = _contract("...d,dv->...v", hidden, columns)
        logits = jnp.where(start + jnp.arange(block) >= first, logits, -jnp.inf)
        # The result does not depend on the shift, so neither does the gradient.
        new_largest = jax.lax.stop_gradient(jnp.maximum(largest, logits.max(axis=-1)))
        total = total * jnp.exp(largest - new_largest) + jnp.exp(logits - new_largest[..., None]).sum(axis=-1)
        return (new_largest, total), None

    rows = hidden.shape[:-1]
    start = (jnp.full(rows, -jnp.inf, jnp.float32), jnp.zeros(rows, jnp.float32))
    (largest, total), _ = jax.lax.scan(add_block, start, jnp.arange(0, vocabulary, block))
    return largest + jnp.log(total)


def _contract(pattern: str, left: Float[Array, "..."], right: Float[Array, "..."]) -> Float[Array, "..."]:
    """Product summed in float32, at full precision for float32 inputs on accelerators too."""
    return jnp.einsum(pattern, left, right, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
