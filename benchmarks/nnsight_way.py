"""The tasks in nnsight 0.8.1, as its documentation recommends: a trace for each prompt, with edits batched as invokes.

nnsight batches invokes of token ids or embeddings, but not of pictures ("Can't batch these inputs"). The control trace
therefore saves the embeddings, picture tokens included, and the edits' invokes start from them and need no tower.
Results have the shapes and order of `published`.

nnsight reads the source code of a trace from its file, so traces cannot be written at an interpreter's prompt.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import nnsight  # pyright: ignore[reportMissingImports] - comes with the extra `bench`
import numpy as np
import torch
from jaxtyping import Float, Int
from published import Batch, Edit, Network, Swap, Swapped
from torch import Tensor

Item = TypeVar("Item")

INVOKES = 16
"""Edits per trace. Each is a row of the whole prompt, about 30 MB of activations for 600 tokens of width 1,024.

With one edit per trace, activations stay in the processor's cache, and an edit takes 10 % less CPU time.
"""

PICTURES = 4
"""Number of pictures per trace that extracts hidden states; with one per trace, a picture takes 8 % less CPU time."""


def load(folder: Path) -> Network:
    """Loads a checkpoint folder as nnsight's model, in float32."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return nnsight.TransformersModel(str(folder), task="image-text-to-text", dtype=torch.float32, dispatch=True)


def control(model: Network, batch: Batch) -> Float[np.ndarray, "B n"]:
    """One trace for every prompt."""
    with torch.inference_mode():
        return np.concatenate([_control(model, batch.prompt(row), ()).found for row in range(len(batch.last))])


def steer(
    model: Network, batch: Batch, edits: Sequence[Edit], *, invokes: int = INVOKES
) -> tuple[Float[np.ndarray, "B n"], Float[np.ndarray, "E B n"]]:
    """For every prompt a control trace, and traces with one invoke for every edit.

    Returns:
        Log-probabilities of the answers in the control trace, and after every edit.
    """
    clean, edited = [], []
    read = sorted({edit.layer for edit in edits if edit.strength is not None})
    with torch.inference_mode():
        for row in range(len(batch.last)):
            prompt = batch.prompt(row)
            run = _control(model, prompt, read)
            rows: list[Tensor] = []
            for some in _chunks([edit.prompt(row) for edit in edits], invokes):
                rows += _steer(model, prompt, run, some)
            clean.append(run.found)
            edited.append(torch.cat(rows).numpy())
    return np.concatenate(clean), np.stack(edited, axis=1)


def swap(
    model: Network, batch: Batch, other: Float[Tensor, "B C Y X"], swaps: Sequence[Swap], *, invokes: int = INVOKES
) -> Swapped:
    """For every prompt a control and an intervened trace, and traces with one invoke for every swap."""
    clean, changed, patched = [], [], []
    read = sorted({swap.layer for swap in swaps})
    with torch.inference_mode():
        for row in range(len(batch.last)):
            prompt = batch.prompt(row)
            run = _control(model, prompt, ())
            intervened = _control(model, dataclasses.replace(prompt, pixels=other[row : row + 1]), read)
            rows: list[Tensor] = []
            for some in _chunks([swap.prompt(row) for swap in swaps], invokes):
                rows += _swap(model, prompt, run, intervened, some)
            clean.append(run.found)
            changed.append(intervened.found)
            patched.append(torch.cat(rows).numpy())
    return Swapped(control=np.concatenate(clean), intervened=np.concatenate(changed), patched=np.stack(patched, axis=1))


def extract(
    model: Network, batch: Batch, at: Int[Tensor, "B"], *, pictures: int = PICTURES
) -> Float[np.ndarray, "B L1 D"]:
    """Traces of several pictures, which stop after the last block.

    Returns:
        Hidden states at each prompt's position: the embeddings, then every block's output.
    """
    decoder = model.model.language_model
    found = []
    with torch.inference_mode():
        for rows in _chunks(range(len(at)), pictures):
            # Padding is on the right, so it does not change positions.
            inputs = {"input_ids": batch.token_ids[rows], "attention_mask": batch.valid[rows]}
            everywhere, positions = torch.arange(len(rows)), at[rows]
            with model.trace(**inputs, pixel_values=batch.pixels[rows], use_cache=False) as tracer:
                states = nnsight.save([])
                states.append(decoder.layers[0].input[everywhere, positions])
                for layer in decoder.layers:
                    states.append(layer.output[everywhere, positions])
                tracer.stop()
            found.append(torch.stack(states, dim=1).numpy())
    return np.concatenate(found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    found: Float[np.ndarray, "1 n"]  # the answers' log-probabilities
    embeddings: Float[Tensor, "1 T D"]
    states: dict[int, Float[Tensor, "1 T D"]]  # outputs of the requested layers


def _control(model: Network, prompt: Batch, read: Sequence[int]) -> _Run:
    decoder = model.model.language_model
    inputs = {"input_ids": prompt.token_ids, "attention_mask": prompt.valid, "pixel_values": prompt.pixels}
    with model.trace(**inputs, use_cache=False, logits_to_keep=1):
        embeddings = nnsight.save(decoder.layers[0].input)
        states = nnsight.save({})
        for layer in read:
            states[layer] = decoder.layers[layer].output
        found = nnsight.save(torch.log_softmax(model.lm_head.output[:, -1], dim=-1)[:, prompt.answers])
    return _Run(found=found.numpy(), embeddings=embeddings, states=states)


def _steer(model: Network, prompt: Batch, run: _Run, edits: Sequence[Edit]) -> list[Tensor]:
    decoder = model.model.language_model
    with model.trace(use_cache=False, logits_to_keep=1) as tracer:
        found = nnsight.save([])
        for edit in edits:
            with tracer.invoke(inputs_embeds=run.embeddings):
                vectors = edit.vectors[0]
                if edit.strength is not None:
                    lengths = run.states[edit.layer][0, edit.positions[0]].norm(dim=-1, keepdim=True)
                    vectors = edit.strength * lengths * vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(1e-12)
                decoder.layers[edit.layer].output[:, edit.positions[0]] += vectors
                found.append(torch.log_softmax(model.lm_head.output[:, -1], dim=-1)[:, prompt.answers])
    return found


def _swap(model: Network, prompt: Batch, run: _Run, intervened: _Run, swaps: Sequence[Swap]) -> list[Tensor]:
    decoder = model.model.language_model
    with model.trace(use_cache=False, logits_to_keep=1) as tracer:
        found = nnsight.save([])
        for swap in swaps:
            with tracer.invoke(inputs_embeds=run.embeddings):
                at = swap.positions[0]
                decoder.layers[swap.layer].output[:, at] = intervened.states[swap.layer][:, at]
                found.append(torch.log_softmax(model.lm_head.output[:, -1], dim=-1)[:, prompt.answers])
    return found


def _chunks(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    rest = iter(items)
    while chunk := list(itertools.islice(rest, size)):
        yield chunk
