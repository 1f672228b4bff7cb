"""Greedy decoding of many rows that share their prompts' prefixes, with a KV cache of each row's own tokens."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxid.kernels import attention
from jaxid.nn.decoder import Blocks, Decoder, Memory
from jaxid.nn.layers import layer_of, take_tokens
from jaxid.nn.reuse import Runner, Suffix
from jaxid.nn.sites import Site


class Start(NamedTuple):
    """Where decoding begins.

    Attributes:
        hidden: normed final hidden state at the prompts' last tokens, Float[R, B, D].
        keys: of the tokens that are a row's own, Float[L, R, B, S, K, E]; S may be 0.
        values: likewise.
        valid: false where a prompt's own tokens have ended, Bool[B, S].
    """

    hidden: Float[Array, "R B D"]
    keys: Float[Array, "L R B S K E"]
    values: Float[Array, "L R B S K E"]
    valid: Bool[Array, "B S"]


class Prefix(NamedTuple):
    """What all rows share.

    Attributes:
        keys: recorded, heads first, Float[L, B, K, T, E].
        values: likewise.
        valid: which of them belong to the prefix, Bool[B, T].
        first: place in the prompt of the rows' own first token, Int[B].
        memory: what cross-attention layers read.
    """

    keys: Float[Array, "L B K T E"]
    values: Float[Array, "L B K T E"]
    valid: Bool[Array, "B T"]
    first: Int[Array, "B"]
    memory: Memory | None


def prefill(decoder: Decoder, suffix: Suffix, edits: Any, rows: int) -> Start:
    """Runs the suffix of R rows, each under its own edit, through all blocks and keeps its keys and values."""
    runner = Runner(decoder, suffix)
    recorded = suffix.residuals[0]
    x = runner.at_site("embed", -1, edits, jnp.broadcast_to(recorded, (rows, *recorded.shape)))

    def step(x: Array, layer: Array) -> tuple[Array, tuple[Array, Array]]:
        found: list[Array] = []
        x = runner(runner.block(layer), layer, edits, None, x, found=found)
        return x, (found[0], found[1])

    x, (keys, values) = jax.lax.scan(step, x, jnp.arange(decoder.config.num_hidden_layers))
    hidden = decoder.norm(take_tokens(x, suffix.last[:, None])[:, :, 0])
    valid = jnp.arange(suffix.positions.shape[1]) <= suffix.last[:, None]
    return Start(hidden, keys, values, valid)


def decode(
    decoder: Decoder,
    prefix: Prefix,
    start: Start,
    last: Int[Array, "B"],
    last_rope: Int[Array, "B A"] | None,
    stop_ids: Int[Array, "n"],
    edits: Any | None,
    *,
    steps: int,
) -> tuple[Int[Array, "R B N"], Int[Array, "R B"]]:
    """The most probable token again and again, until every row has ended.

    Args:
        decoder: the decoder.
        prefix: what all rows read.
        start: the rows' own tokens of the prompt.
        last: place of the prompts' last tokens.
        last_rope: what their heads turn by, if not the place.
        stop_ids: tokens that end a row; the first of them fills ended rows up.
        edits: interventions, a row each, called at the new tokens too; None leaves them as they are.
        steps: the most new tokens.

    Returns:
        New tokens, stop token included, and how many they are.
    """
    rows, batch, own = (*start.hidden.shape[:2], start.valid.shape[1])
    blocks = Blocks(decoder)
    tokens = prefix.keys.shape[3]
    window = decoder.window(tokens + steps)
    unembedding = decoder.unembed_matrix()
    room = [(0, 0)] * 3 + [(0, steps)] + [(0, 0)] * 2
    filler = stop_ids[0] if stop_ids.shape[0] else jnp.asarray(0, jnp.int32)

    def choose(hidden: Array) -> Array:
        logits = jnp.einsum("rbd,dv->rbv", hidden, unembedding, preferred_element_type=jnp.float32)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def next_token(
        token: Array, number: Array, keys: Array, values: Array
    ) -> tuple[Array, Array, Array]:  # of shape [R, B], and the caches with this token in them
        positions = last[:, None] + 1 + number
        slots = jnp.arange(own + steps)
        valid = jnp.concatenate([start.valid, jnp.ones((batch, steps), bool)], axis=1) & (slots <= own + number)
        turned = positions if last_rope is None else (last_rope + 1 + number)[:, :, None]
        rotation = tuple(jnp.tile(part, (rows, 1, 1)) for part in decoder.rotations(turned))

        def at_site(name: str, layer: Any, x: Array) -> Array:
            if edits is None:
                return x
            shaped = x.reshape(rows, batch, 1, -1)
            site = Site(name, jnp.asarray(layer), positions)
            return jax.vmap(lambda edit, value: edit(site, value))(edits, shaped).reshape(x.shape)

        def masks(layer: Array) -> tuple[Array, Array]:
            before, allowed = prefix.valid[:, None], valid[:, None]
            if window is not None:
                everywhere = ~blocks.slides(layer)
                places = jnp.broadcast_to(jnp.arange(tokens), (batch, tokens))
                before = before & (attention.near(positions, places, window) | everywhere)
                # The prompt's own tokens stand from `first` on, the new ones behind the last of them.
                new = last[:, None] + 1 + slots - own
                places = jnp.where(slots < own, prefix.first[:, None] + slots, new)
                allowed = allowed & (attention.near(positions, places, window) | everywhere)
            return before, allowed[None]

        def step(carry: tuple[Array, Array, Array], layer: Array) -> tuple[tuple[Array, Array, Array], None]:
            x, keys, values = carry
            caches = [keys, values]

            def read(query: Array, key: Array, value: Array) -> Array:
                for number_of_cache, new in enumerate((key, value)):
                    place = (layer, 0, 0, own + number, 0, 0)
                    new = new.reshape(1, rows, batch, *new.shape[1:])
                    caches[number_of_cache] = jax.lax.dynamic_update_slice(caches[number_of_cache], new, place)
                query = query.reshape(rows, batch, *query.shape[1:])

                def earlier() -> Array:
                    prefix_keys, prefix_values = layer_of((prefix.keys, prefix.values), layer)
                    own_keys, own_values = layer_of(tuple(caches), layer)
                    before, allowed = masks(layer)
                    return attention.shared_prefix_attention(
                        prefix_keys, prefix_values, before, query, own_keys, own_values, allowed
                    )

                def cross(memory_keys: Array, memory_values: Array) -> Array:
                    assert prefix.memory is not None
                    # New tokens see the pictures that the prompt's last token sees.
                    seen = jnp.take_along_axis(prefix.memory.mask, last[:, None, None], axis=1)
                    part = attention.prefix_part(query, memory_keys, memory_values, seen)
                    return attention.merge(part).astype(value.dtype)

                mixed = blocks.choose(layer, prefix.memory, earlier, cross)
                return mixed.reshape(rows * batch, *mixed.shape[2:])

            run = blocks(layer, memory=prefix.memory)
            x = run(x, rotation, read, lambda name, value: at_site(name, layer, value))
            return (x, caches[0], caches[1]), None

        x = at_site("embed", -1, decoder.embed(token).reshape(rows * batch, 1, -1))
        layers = jnp.arange(decoder.config.num_hidden_layers)
        (x, keys, values), _ = jax.lax.scan(step, (x, keys, values), layers)
        return choose(decoder.norm(x[:, 0]).reshape(rows, batch, -1)), keys, values

    def more(state: tuple[Array, ...]) -> Array:
        number, _, _, _, done, _, _ = state
        return (number < steps) & ~done.all()

    def advance(state: tuple[Array, ...]) -> tuple[Array, ...]:
        number, token, tokens, lengths, done, keys, values = state
        token = jnp.where(done, filler, token)
        tokens = jax.lax.dynamic_update_slice(tokens, token[:, :, None], (0, 0, number))
        lengths = lengths + (~done).astype(jnp.int32)
        done = done | (token[..., None] == stop_ids).any(axis=-1)

        def go() -> tuple[Array, Array, Array]:
            return next_token(token, number, keys, values)

        # Nothing follows the last token.
        following, keys, values = jax.lax.cond((number + 1 < steps) & ~done.all(), go, lambda: (token, keys, values))
        return number + 1, following, tokens, lengths, done, keys, values

    state = (
        jnp.asarray(0, jnp.int32),
        choose(start.hidden),
        jnp.full((rows, batch, steps), filler, jnp.int32),
        jnp.zeros((rows, batch), jnp.int32),
        jnp.zeros((rows, batch), bool),
        jnp.pad(start.keys, room),
        jnp.pad(start.values, room),
    )
    _, _, tokens, lengths, *_ = jax.lax.while_loop(more, advance, state)
    return tokens, lengths
