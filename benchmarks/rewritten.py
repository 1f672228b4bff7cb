"""The procedure of `strongest` on a network written anew: the same arithmetic at the CPU's peak.

One control pass for every prompt, whose keys and values are kept; all edits as rows that share them, each computing the
tokens from the first edited one on from the first edited block on; of the last block only the last token; a swap of
all picture tokens takes the other run's keys and values instead of computing 576 tokens anew. `packed` says how a
pass is made fast. The numbers are those of `published`, in its shapes and order.

Each CPU works on a prompt of its own with one thread, which was 3 to 10 % faster than two threads on one prompt.

What else was measured, CPU seconds of one thread (AMD EPYC, AVX-512) for a control pass of 593 tokens through the
model of `geometry`, of which 2.1 are products at the processor's peak: Hugging Face's full pass 2.87; its modules
without what nobody reads 2.71; this rewriting with PyTorch's `linear` 2.45, with reordered weights 2.26, and with
attention in parts of 64 queries instead of PyTorch's flash kernel, as it is now, 2.22. `torch.compile` with frozen
weights took 6 % off Hugging Face's decoder after 16 s of compilation, less than a third of what the rewriting takes
off; it does not take reordered weights. The attention of a block for 48 edits of 12 tokens: the prefix copied to every
row 155 ms, shared with one softmax over both parts 26 ms, two parts merged by their log-sums, as it is now, 23 ms.
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
    """Hugging Face's checkpoint, its weights reordered."""
    return Packed(load_network(folder))


def control(network: Packed, batch: Batch) -> Float[np.ndarray, "B n"]:
    """A pass for every prompt."""

    def one(row: int) -> np.ndarray:
        run = _run(network, batch.prompt(row), batch.pixels[row], int(batch.last[row]))
        return network.log_probs(run.states[-1], batch.answers).numpy()

    return np.concatenate(_for_all(len(batch.last), one))


def steer(
    network: Packed, batch: Batch, edits: Sequence[Edit]
) -> tuple[Float[np.ndarray, "B n"], Float[np.ndarray, "E B n"]]:
    """One control pass for every prompt, and all its edits side by side.

    Returns:
        Log-probabilities of the answers in the control pass, and after every edit.
    """

    def one(row: int) -> np.ndarray:
        mine = [edit.prompt(row) for edit in edits]
        start = min(int(edit.positions.min()) for edit in mine)
        run = _run(network, batch.prompt(row), batch.pixels[row], start)
        places: dict[int, list[int]] = defaultdict(list)
        for place, edit in enumerate(mine):
            places[edit.layer].append(place)
        joins = {
            layer: torch.stack([_edited(run, mine[place]) for place in chosen])
            for layer, chosen in sorted(places.items())
        }
        (rows,) = network.resume([Group(source=run, start=start, joins=joins)])
        found = network.log_probs(torch.cat([run.states[-1, -1:], rows]), batch.answers).numpy()
        return found[[0, *_ranks(places)]]

    found = np.stack(_for_all(len(batch.last), one), axis=1)
    return found[0], found[1:]


def _edited(run: Pass, edit: Edit) -> Float[Tensor, "S D"]:
    """The kept tokens of the control pass after an edit of one prompt."""
    states = run.states[edit.layer + 1].clone()
    at, vectors = edit.positions[0] - run.start, edit.vectors[0]
    if edit.strength is not None:
        lengths = states[at].norm(dim=-1, keepdim=True)
        vectors = edit.strength * lengths * vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    states[at] += vectors
    return states


def _ranks(places: dict[int, list[int]]) -> list[int]:
    """Where each edit's row lies, counted from 1, when rows are in the order of the blocks they join at."""
    order = [place for _, chosen in sorted(places.items()) for place in chosen]
    return [rank + 1 for rank in np.argsort(order)]


def swap(network: Packed, batch: Batch, other: Float[Tensor, "B C Y X"], swaps: Sequence[Swap]) -> Swapped:
    """One control and one intervened pass for every prompt, and all its swaps side by side.

    Args:
        network: the packed network.
        batch: the prompts with the control pictures.
        other: the pictures of the intervened runs.
        swaps: what is replaced: each all picture tokens and no other, or tokens after the picture.

    Raises:
        ValueError: for any other swap.
    """

    def one(row: int) -> np.ndarray:
        prompt = batch.prompt(row)
        picture = torch.nonzero(prompt.token_ids[0] == network.image_token)[:, 0]
        start = int(picture[-1]) + 1
        clean = _run(network, prompt, batch.pixels[row], start)
        changed = _run(network, prompt, other[row], start)
        # The rows of a set of tokens share the keys and values of one pass; by that pass and the first token anew.
        places: dict[tuple[bool, int], dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        for place, edit in enumerate(swaps):
            at = edit.positions[row].unique()
            if torch.equal(at, picture):
                places[True, start][edit.layer].append(place)
            elif at[0] >= start:
                places[False, int(at[0])][edit.layer].append(place)
            else:
                raise ValueError("a swap is of all picture tokens, or of tokens after the picture.")
        groups, order = [], []
        for (is_picture, first), layers in places.items():
            joins = {}
            for layer, chosen in sorted(layers.items()):
                # Later blocks see a picture that was swapped for the other as the other run's keys and values.
                states = clean.states[layer + 1].expand(len(chosen), -1, -1).clone()
                if not is_picture:
                    for states_of_row, place in zip(states, chosen, strict=True):
                        at = swaps[place].positions[row] - start
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
    """A pass for every picture that ends at the asked token.

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
    """Calls a function for every row: as many rows at a time as PyTorch has threads, each with one thread."""
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
        torch.set_num_threads(threads)  # a worker's setting reaches some of PyTorch's libraries in all threads
