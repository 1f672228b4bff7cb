"""CLIP-like models agree with Hugging Face's at every block, at every token and pooled, through the real loader."""

from typing import Any

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from encoders import ENCODER_CASES, EncoderCase, encoder, reference

CAPTIONS = ("a red star above a blue fish", "star", "an image of a small fish to the left of a big star")


def assert_close(ours: Any, theirs: torch.Tensor, name: str) -> None:
    expected = theirs.detach().numpy()
    assert ours.shape == expected.shape, name
    assert np.abs(np.asarray(ours) - expected).max() <= 2e-5 * np.abs(expected).max(), name


def recorded(model: Any, path: str, run: Any) -> tuple[list[torch.Tensor], Any]:
    """What enters the first block and leaves every block, and what the run returns."""
    blocks, found = model.get_submodule(path), []
    handles = [
        blocks[0].register_forward_pre_hook(
            lambda _, args, kwargs: found.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    ]
    for block in blocks:
        handles.append(
            block.register_forward_hook(lambda _, args, out: found.append(out[0] if isinstance(out, tuple) else out))
        )
    with torch.no_grad():
        result = run()
    for handle in handles:
        handle.remove()
    return found, result


@pytest.mark.parametrize("case", ENCODER_CASES, ids=lambda case: case.name)
def test_pictures(case: EncoderCase) -> None:
    ours, theirs = encoder(case), reference(case)
    pixels = ours.processor.pixels(fixtures.pictures())
    states, (tokens, pooled) = recorded(theirs, case.tower, lambda: case.image(theirs, torch.tensor(pixels)))
    network = ours.network()
    with jax.default_matmul_precision("highest"):
        own_states, encoded = jax.jit(lambda pixels: (network.tower(pixels), network.image(pixels)))(pixels)
    for layer, state in enumerate(states):
        assert_close(own_states[layer], state, f"hidden state {layer}")
    assert_close(encoded.tokens, tokens, "tokens")
    assert_close(encoded.pooled, pooled, "pooled")


@pytest.mark.parametrize("case", ENCODER_CASES, ids=lambda case: case.name)
def test_captions(case: EncoderCase) -> None:
    ours, theirs = encoder(case), reference(case)
    with pytest.warns(UserWarning, match="caption 2 loses"):
        batch = ours.processor.captions(CAPTIONS)
    ids, mask = torch.tensor(batch.token_ids).long(), torch.tensor(batch.valid).long()
    states, (tokens, pooled) = recorded(theirs, case.text_blocks, lambda: case.text(theirs, ids, mask))
    network = ours.network()
    with jax.default_matmul_precision("highest"):
        own_states, encoded = jax.jit(lambda *args: (network.text_encoder(*args), network.text(*args)))(
            jnp.asarray(batch.token_ids), jnp.asarray(batch.valid)
        )
    for layer, state in enumerate(states):
        assert_close(own_states[layer], state, f"hidden state {layer}")
    assert_close(encoded.tokens, tokens, "tokens")
    assert_close(encoded.pooled, pooled, "pooled")
    assert batch.valid.sum(axis=1).tolist()[0] != batch.valid.sum(axis=1).tolist()[1]
