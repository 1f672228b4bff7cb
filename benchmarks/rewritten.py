"""The procedure of `strongest` on a rewritten network: the same arithmetic at the CPU's peak.

One control pass for every prompt keeps its keys and values. All edits are rows that share them, and each computes only
the tokens and layers from the first edited one on; the last block computes only the last token. A swap of all picture
tokens uses the other run's keys and values instead of computing 576 tokens again. `packed` explains why a pass is fast.
Results have the shapes and order of `published`.

Each CPU works on a separate prompt with one thread, which was 3 to 10 % faster than two threads on one prompt.

Other measurements are in CPU seconds of one thread (AMD EPYC, AVX-512) for a control pass of 593 tokens through the
model of `geometry`, of which 2.1 s are products at the processor's peak:

- Hugging Face's full pass: 2.87; its modules without values that nothing reads: 2.71.
- This network with PyTorch's `linear`: 2.45; with reordered weights: 2.26; with attention in chunks of 64 queries
  instead of PyTorch's flash kernel, as used here: 2.22.
- `torch.compile` with frozen weights made Hugging Face's decoder 6 % faster after 16 s of compilation, less than a
  third of the gain of this network. It does not support reordered weights.
- Attention of one block for 48 edits of 12 tokens took 155 ms with the prefix copied to every row, 26 ms with a shared
  prefix and one softmax over both parts, and 23 ms with two parts merged by their log-sum-exponentials, as used here.
"""

import concurrent.futures
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from packed import Group, Packed, Pass
from published import Batch, Edit, Swap, Swapped
from published import load as load_network
from torch import Tensor

Result = TypeVar("Result")


def load(folder: Path) -> Packed:
    """Loads Hugging Face's checkpoint and reorders its weights."""
    return Packed(load_network(folder))


def control(network: Packed, batch: Batch) -> Float[np.ndarray, "B n"]:
    """One pass for every prompt."""

    def one(row: int) -> np.ndarray:
        run = _run(network, batch.prompt(row), batch.pixels[row], int(batch.last[row]))
        return network.log_probs(run.states[-1], batch.answers).numpy()

    return np.concatenate(_for_all(len(batch.last), one))


def steer(
    network: Packed, batch: Batch, edits: Sequence[Edit]
) -> tuple[Float[np.ndarray, "B n"], Float[np.ndarray, "E B n"]]:
    """One control pass for every prompt, and all its edits together.

    Returns:
        Log-probabilities of the answers in the control pass, and after every edit.
    """

    def one(row: int) -> np.ndarray:
        mine = [edit.prompt(row) for edit in edits]
        start = min(int(edit.positions.min()) for edit in mine)
        run = _run(network, batch.prompt(row), batch.pixels[row], start)
        indices: dict[int, list[int]] = defaultdict(list)
        for index, edit in enumerate(mine):
            indices[edit.layer].append(index)
        joins = {
            layer: torch.stack([_edited(run, mine[index]) for index in chosen])
            for layer, chosen in sorted(indices.items())
        }
        (rows,) = network.resume([Group(source=run, start=start, joins=joins)])
        found = network.log_probs(torch.cat([run.states[-1, -1:], rows]), batch.answers).numpy()
        return found[[0, *_ranks(indices)]]

    found = np.stack(_for_all(len(batch.last), one), axis=1)
    return found[0], found[1:]


def _edited(run: Pass, edit: Edit) -> Float[Tensor, "S D"]:
    """The control pass's kept tokens at the edit's layer, with the edit of one prompt applied."""
    states = run.states[edit.layer + 1].clone()
    at, vectors = edit.positions[0] - run.start, edit.vectors[0]
    if edit.strength is not None:
        lengths = states[at].norm(dim=-1, keepdim=True)
        vectors = edit.strength * lengths * vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    states[at] += vectors
    return states


def _ranks(indices: dict[int, list[int]]) -> list[int]:
    """Each edit's row, counted from 1, when rows are in the order of their layers."""
    order = [index for _, chosen in sorted(indices.items()) for index in chosen]
    return [rank + 1 for rank in np.argsort(order)]


def swap(network: Packed, batch: Batch, other: Float[Tensor, "B C Y X"], swaps: Sequence[Swap]) -> Swapped:
    """One control and one intervened pass for every prompt, and all its swaps together.

    Args:
        network: the packed network.
        batch: the prompts with the control pictures.
        other: the pictures of the intervened runs.
        swaps: the sweep; each swap is of exactly the picture tokens, or of tokens after the picture.

    Raises:
        ValueError: for any other swap.
    """

    def one(row: int) -> np.ndarray:
        prompt = batch.prompt(row)
        picture = torch.nonzero(prompt.token_ids[0] == network.image_token)[:, 0]
        start = int(picture[-1]) + 1
        clean = _run(network, prompt, batch.pixels[row], start)
        changed = _run(network, prompt, other[row], start)
        # Rows are grouped by the pass whose keys and values they share, and by their first token.
        groups_of: dict[tuple[bool, int], dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        for index, edit in enumerate(swaps):
            at = edit.positions[row].unique()
            if torch.equal(at, picture):
                groups_of[True, start][edit.layer].append(index)
            elif at[0] >= start:
                groups_of[False, int(at[0])][edit.layer].append(index)
            else:
                raise ValueError("a swap must be of all picture tokens, or of tokens after the picture.")
        groups, order = [], []
        for (is_picture, first), layers in groups_of.items():
            joins = {}
            for layer, chosen in sorted(layers.items()):
                # After a swap of the picture, later blocks read the other run's keys and values, and text is unchanged.
                states = clean.states[layer + 1].expand(len(chosen), -1, -1).clone()
                if not is_picture:
                    for states_of_row, index in zip(states, chosen, strict=True):
                        at = swaps[index].positions[row] - start
                        states_of_row[at] = changed.states[layer + 1, at]
                joins[layer] = states[:, first - start :]
                order += chosen
            groups.append(Group(source=changed if is_picture else clean, start=first, joins=joins))
        rows = network.resume(groups)
        last = torch.cat([clean.states[-1, -1:], changed.states[-1, -1:], *rows])
        found = network.log_probs(last, batch.answers).numpy()
        return found[[0, 1, *(rank + 2 for rank in np.argsort(order))]]

    found = np.stack(_for_all(len(batch.last), one), axis=1)
    return Swapped(control=found[0], intervened=found[1], patched=found[2:])


def extract(network: Packed, batch: Batch, at: Int[Tensor, "B"]) -> Float[np.ndarray, "B L1 D"]:
    """One pass for every picture, which ends at the requested token.

    Returns:
        Hidden states at each prompt's position: the embeddings, then every block's output.
    """

    def one(row: int) -> np.ndarray:
        position = int(at[row])
        run = network.run(batch.token_ids[row, : position + 1], batch.pixels[row], position)
        return run.states[:, 0].numpy()

    return np.stack(_for_all(len(at), one))


def _run(network: Packed, prompt: Batch, picture: Float[Tensor, "C Y X"], start: int) -> Pass:
    return network.run(prompt.token_ids[0], picture, start)


def _for_all(count: int, one: Callable[[int], Result]) -> list[Result]:
    """Calls a function for every row, as many rows at a time as PyTorch has threads, each with one thread."""
    threads = torch.get_num_threads()

    def call(row: int) -> Result:
        with torch.inference_mode():
            return one(row)

    if threads == 1 or count == 1:
        return [call(row) for row in range(count)]
    try:
        with concurrent.futures.ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(call, range(count)))
    finally:
        torch.set_num_threads(threads)  # in some of PyTorch's libraries a worker's setting affects all threads
