"""The published procedure in PyTorch: forward hooks on Hugging Face's class, full passes ([ID] arXiv 2601.12626).

There are two variants. `one_by_one` is the published one: a single prompt at a time, with a full control pass and a
full patched pass for every edit. `batched` is what a careful user of the same hooks would write: one control pass for a
batch of prompts, then one patched pass of the batch for every edit. Swaps and the extraction of hidden states exist in
the published variant only.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

Network = Any
"""Hugging Face's LLaVA class or `video_reference.Video`, whose parts are built at run time and have no static types."""


class HookError(RuntimeError):
    """A decoder block's output does not have the form that the hooks expect; they would edit the wrong values."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Prompts as Hugging Face's class reads them.

    Attributes:
        token_ids: Int[B, T], padding on the right.
        valid: 1 at tokens, 0 at padding, Int[B, T].
        pixels: Float[B, C, Y, X]; of clips Float[B, F, C, Y, X].
        last: position of each prompt's last token, Int[B].
        answers: token ids of the answers, Int[n].
    """

    token_ids: Int[Tensor, "B T"]
    valid: Int[Tensor, "B T"]
    pixels: Float[Tensor, "B *F C Y X"]
    last: Int[Tensor, "B"]
    answers: Int[Tensor, "n"]

    def prompt(self, row: int) -> "Batch":
        """One prompt, without padding."""
        length = int(self.last[row]) + 1
        return dataclasses.replace(
            self,
            token_ids=self.token_ids[row : row + 1, :length],
            valid=self.valid[row : row + 1, :length],
            pixels=self.pixels[row : row + 1],
            last=self.last[row : row + 1],
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Edit:
    """Vectors added to the output of one decoder block, one set of vectors per prompt.

    Attributes:
        layer: index of the block.
        positions: Int[B, P].
        vectors: Float[B, P, D].
        strength: if given, each vector is rescaled to strength * |control activation at its position|.
    """

    layer: int
    positions: Int[Tensor, "B P"]
    vectors: Float[Tensor, "B P D"]
    strength: float | None = None

    def prompt(self, row: int) -> "Edit":
        """The edit of one prompt."""
        return dataclasses.replace(self, positions=self.positions[row : row + 1], vectors=self.vectors[row : row + 1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Swap:
    """Outputs of one decoder block replaced by those of a run on other pictures.

    Attributes:
        layer: index of the block.
        positions: Int[B, P]; shorter rows are padded with one of their own positions.
    """

    layer: int
    positions: Int[Tensor, "B P"]

    def prompt(self, row: int) -> "Swap":
        """The swap of one prompt."""
        return dataclasses.replace(self, positions=self.positions[row : row + 1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Swapped:
    """Log-probabilities of the answers in a sweep of swaps.

    Attributes:
        control: in the runs on the prompts' own pictures, Float[B, n].
        intervened: in the runs on the other pictures, Float[B, n].
        patched: in the control runs after every swap, Float[E, B, n].
    """

    control: Float[np.ndarray, "B n"]
    intervened: Float[np.ndarray, "B n"]
    patched: Float[np.ndarray, "E B n"]


def load(folder: Path) -> Network:
    """Loads Hugging Face's class in float32 and without log messages, or our own network for LLaVA-Video."""
    if json.loads((folder / "config.json").read_text())["model_type"] == "llava_qwen":
        import video_reference

        return video_reference.load(folder)
    from transformers import LlavaForConditionalGeneration
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def flops(network: Network, batch: Batch) -> int:
    """Floating-point operations of one pass over one prompt: matrix products and convolutions, two per product."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # The counter does not know the CPU's fused attention kernel; the plain one consists of products that it counts.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        log_probs(network, batch.prompt(0))
    return counter.get_total_flops()


def log_probs(network: Network, batch: Batch) -> Float[Tensor, "B n"]:
    """Log-probabilities of the answers as the next token; logits are computed for the last position only."""
    output = network.model(
        input_ids=batch.token_ids, pixel_values=batch.pixels, attention_mask=batch.valid, use_cache=False
    )
    last = output.last_hidden_state[torch.arange(len(batch.last)), batch.last]
    return torch.log_softmax(network.lm_head(last).float(), dim=-1)[:, batch.answers]


def control_one_by_one(network: Network, batch: Batch) -> Float[np.ndarray, "B n"]:
    """One pass for every prompt."""
    with torch.inference_mode():
        return np.concatenate([log_probs(network, batch.prompt(row)).numpy() for row in range(len(batch.last))])


def control_batched(network: Network, batch: Batch) -> Float[np.ndarray, "B n"]:
    """One pass for all prompts."""
    with torch.inference_mode():
        return log_probs(network, batch).numpy()


def one_by_one(
    network: Network, batch: Batch, edits: Sequence[Edit]
) -> tuple[Float[np.ndarray, "B n"], Float[np.ndarray, "E B n"]]:
    """The published variant: for every prompt and every edit a control pass and a patched pass.

    Returns:
        Log-probabilities of the answers in the control passes, and after every edit.
    """
    clean: list[np.ndarray] = []
    edited: list[list[np.ndarray]] = []
    with torch.inference_mode():
        for row in range(len(batch.last)):
            prompt = batch.prompt(row)
            pairs = [_control_and_patched(network, prompt, [edit.prompt(row)]) for edit in edits]
            clean.append(pairs[-1][0].numpy()[0])
            edited.append([patched[0].numpy()[0] for _, patched in pairs])
    return np.stack(clean), np.stack(edited, axis=1)


def batched(
    network: Network, batch: Batch, edits: Sequence[Edit]
) -> tuple[Float[np.ndarray, "B n"], Float[np.ndarray, "E B n"]]:
    """The careful variant: one control pass of the batch, and one patched pass of the batch for every edit.

    Returns:
        Log-probabilities of the answers in the control pass, and after every edit.
    """
    with torch.inference_mode():
        clean, edited = _control_and_patched(network, batch, edits)
        return clean.numpy(), torch.stack(edited).numpy()


def swap_one_by_one(
    network: Network, batch: Batch, other: Float[Tensor, "B *F C Y X"], swaps: Sequence[Swap]
) -> Swapped:
    """The published variant: for every prompt and every swap a control, an intervened and a patched pass.

    Args:
        network: Hugging Face's class.
        batch: the prompts with the control pictures.
        other: the pictures of the intervened runs.
        swaps: the sweep.
    """
    rows: list[Swapped] = []
    with torch.inference_mode():
        for row in range(len(batch.last)):
            prompt = batch.prompt(row)
            intervened = dataclasses.replace(prompt, pixels=other[row : row + 1])
            triples = [_swap(network, prompt, intervened, swap.prompt(row)) for swap in swaps]
            control, changed, patched = (torch.cat(parts).numpy() for parts in zip(*triples, strict=True))
            rows.append(Swapped(control=control[-1], intervened=changed[-1], patched=patched))
    return Swapped(
        control=np.stack([row.control for row in rows]),
        intervened=np.stack([row.intervened for row in rows]),
        patched=np.stack([row.patched for row in rows], axis=1),
    )


def _swap(network: Network, prompt: Batch, intervened: Batch, swap: Swap) -> tuple[Tensor, Tensor, Tensor]:
    control = log_probs(network, prompt)
    values: list[Tensor] = []
    with _hooked(network, swap.layer, _record(values)):
        changed = log_probs(network, intervened)
    with _hooked(network, swap.layer, _replace(values[0], swap.positions)):
        return control, changed, log_probs(network, prompt)


def extract_one_by_one(network: Network, batch: Batch, at: Int[Tensor, "B"]) -> Float[np.ndarray, "B L1 D"]:
    """The published variant: a full pass for every picture, with all hidden states kept until it ends.

    Returns:
        Hidden states at each prompt's position: the embeddings, then every block's output. The last one is taken before
        the final norm, so Hugging Face's `output_hidden_states` cannot be used.
    """
    found = []
    layers = network.model.language_model.layers
    with torch.inference_mode():
        for row, position in enumerate(at.tolist()):
            states: list[Tensor] = []
            with contextlib.ExitStack() as hooks:
                hooks.enter_context(_before(layers[0], states))
                for layer in range(len(layers)):
                    hooks.enter_context(_hooked(network, layer, _record(states)))
                log_probs(network, batch.prompt(row))
            found.append(torch.cat([state[:, position] for state in states]).numpy())
    return np.stack(found)


def _control_and_patched(network: Network, batch: Batch, edits: Sequence[Edit]) -> tuple[Tensor, list[Tensor]]:
    norms: dict[int, Tensor] = {}
    with contextlib.ExitStack() as hooks:
        for edit in edits:
            if edit.strength is not None and edit.layer not in norms:
                norms[edit.layer] = torch.empty(edit.positions.shape)
                hooks.enter_context(_hooked(network, edit.layer, _record_norms(norms[edit.layer], edit.positions)))
        clean = log_probs(network, batch)
    patched = []
    for edit in edits:
        vectors = edit.vectors
        if edit.strength is not None:
            unit = vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(1e-12)
            vectors = edit.strength * norms[edit.layer][..., None] * unit
        with _hooked(network, edit.layer, _add(vectors, edit.positions)):
            patched.append(log_probs(network, batch))
    return clean, patched


Hook = Callable[[torch.nn.Module, object, object], Tensor | None]


@contextlib.contextmanager
def _hooked(network: Network, layer: int, hook: Hook) -> Iterator[None]:
    handle = network.model.language_model.layers[layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _before(block: torch.nn.Module, values: list[Tensor]) -> Iterator[None]:
    """Records a block's input."""
    handle = block.register_forward_pre_hook(lambda _, arguments: values.append(arguments[0]))
    try:
        yield
    finally:
        handle.remove()


def _record(values: list[Tensor]) -> Hook:
    def hook(block: torch.nn.Module, arguments: object, output: object) -> None:
        values.append(bare_tensor(output))

    return hook


def _replace(values: Float[Tensor, "B T D"], at: Int[Tensor, "B P"]) -> Hook:
    def hook(block: torch.nn.Module, arguments: object, output: object) -> Tensor:
        edited, rows = bare_tensor(output), torch.arange(len(at))[:, None]
        edited[rows, at] = values[rows, at]
        return edited

    return hook


def _record_norms(norms: Float[Tensor, "B P"], at: Int[Tensor, "B P"]) -> Hook:
    def hook(block: torch.nn.Module, arguments: object, output: object) -> None:
        norms.copy_(bare_tensor(output)[torch.arange(len(at))[:, None], at].norm(dim=-1))

    return hook


def _add(vectors: Float[Tensor, "B P D"], at: Int[Tensor, "B P"]) -> Hook:
    def hook(block: torch.nn.Module, arguments: object, output: object) -> Tensor:
        edited = bare_tensor(output)
        edited[torch.arange(len(at))[:, None], at] += vectors
        return edited

    return hook


def bare_tensor(output: object) -> Float[Tensor, "B T D"]:
    """A decoder block's output, which is a bare tensor since transformers 5 and was a tuple before.

    Raises:
        HookError: if it is anything else; indexing a bare tensor like a tuple would select a prompt.
    """
    if not isinstance(output, Tensor) or output.ndim != 3:
        shape = f" of shape {list(output.shape)}" if isinstance(output, Tensor) else ""
        raise HookError(
            f"a decoder block returned a {type(output).__name__}{shape}, not a tensor [B, T, D]; these hooks are "
            "written for transformers 5."
        )
    return output
