"""The same works with nnsight 0.8.1, in its documented way: a trace for each prompt, edits batched as its invokes.

nnsight batches invokes of token ids or embeddings, not of pictures ("Can't batch these inputs"). So the control trace
reads the embeddings, picture tokens included, and the edits' invokes start from them, which also spares them the
tower. The numbers are those of `published`, in its shapes and order.

A trace finds its own source code in its file: it cannot be written at the prompt of an interpreter.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import nnsight  # pyright: ignore[reportMissingImports] - comes with the extra `bench`
import numpy as np
import torch
from jaxtyping import Float, Int
from published import Batch, Edit, Swap, Swapped
from torch import Tensor

Item = TypeVar("Item")

INVOKES = 16
"""Edits of a trace. Each is a row of the whole prompt, some 30 MB of activations on 600 tokens of width 1,024.

One a trace, whose activations stay in the processor's cache, takes 10 % less CPU time for each.
"""

PICTURES = 4
"""Pictures of a trace that extracts hidden states; one a trace takes 8 % less CPU time for each."""


def load(folder: Path) -> Any:
    """The nnsight model of a checkpoint folder, in float32."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return nnsight.TransformersModel(str(folder), task="image-text-to-text", dtype=torch.float32, dispatch=True)


def control(model: Any, batch: Batch) -> Float[np.ndarray, "B n"]:
    """A trace for every prompt."""
    with torch.inference_mode():
        return np.concatenate([_control(model, batch.prompt(row), ()).found for row in range(len(batch.last))])


def steer(
    model: Any, batch: Batch, edits: Sequence[Edit], *, invokes: int = INVOKES
) -> tuple[Float[np.ndarray, "B n"], Float[np.ndarray, "E B n"]]:
    """For every prompt a control trace, and traces with an invoke for every edit.

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
    model: Any, batch: Batch, other: Float[Tensor, "B C Y X"], swaps: Sequence[Swap], *, invokes: int = INVOKES
) -> Swapped:
    """For every prompt a control and an intervened trace, and traces with an invoke for every swap."""
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


def extract(model: Any, batch: Batch, at: Int[Tensor, "B"], *, pictures: int = PICTURES) -> Float[np.ndarray, "B L1 D"]:
    """Traces of several pictures, which stop after the last block.

    Returns:
        Hidden states at each prompt's position: the embeddings, then every block's output.
    """
    decoder = model.model.language_model
    found = []
    with torch.inference_mode():
        for rows in _chunks(range(len(at)), pictures):
            # Padding is on the right, so the places of earlier tokens are the same with it.
            inputs = {"input_ids": batch.token_ids[rows], "attention_mask": batch.valid[rows]}
            everywhere, places = torch.arange(len(rows)), at[rows]
            with model.trace(**inputs, pixel_values=batch.pixels[rows], use_cache=False) as tracer:
                states = nnsight.save([])
                states.append(decoder.layers[0].input[everywhere, places])
                for layer in decoder.layers:
                    states.append(layer.output[everywhere, places])
                tracer.stop()
            found.append(torch.stack(states, dim=1).numpy())
    return np.concatenate(found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    found: Float[np.ndarray, "1 n"]  # the answers' log-probabilities
    embeddings: Float[Tensor, "1 T D"]
    states: dict[int, Float[Tensor, "1 T D"]]  # outputs of the blocks that were asked for


def _control(model: Any, prompt: Batch, read: Sequence[int]) -> _Run:
    decoder = model.model.language_model
    inputs = {"input_ids": prompt.token_ids, "attention_mask": prompt.valid, "pixel_values": prompt.pixels}
    with model.trace(**inputs, use_cache=False, logits_to_keep=1):
        embeddings = nnsight.save(decoder.layers[0].input)
        states = nnsight.save({})
        for layer in read:
            states[layer] = decoder.layers[layer].output
        found = nnsight.save(torch.log_softmax(model.lm_head.output[:, -1], dim=-1)[:, prompt.answers])
    return _Run(found=found.numpy(), embeddings=embeddings, states=states)


def _steer(model: Any, prompt: Batch, run: _Run, edits: Sequence[Edit]) -> list[Tensor]:
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


def _swap(model: Any, prompt: Batch, run: _Run, intervened: _Run, swaps: Sequence[Swap]) -> list[Tensor]:
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
