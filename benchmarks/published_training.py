"""A fine-tuning step in PyTorch as it is usually written: Hugging Face's class, autograd, AdamW.

The loss is the answer's cross-entropy plus a weighted ID loss: one minus the mean cosine between the second object's
activations, centred over the batch, and the IDs of its cells ([ID] arXiv 2601.12626, fine-tuning).
"""

import dataclasses
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from published import Network, bare_tensor
from published import load as load
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

IGNORED = -100
"""Label of tokens that the loss ignores."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Examples:
    """A small batch whose answers are one token long.

    Attributes:
        token_ids: Int[B, T], padding on the right.
        valid: 1 at tokens, 0 at padding, Int[B, T].
        pixels: Float[B, C, Y, X].
        places: position at which the answer is read, Int[B].
        labels: token id of the answer, Int[B].
        word: position of the second object's word, Int[B].
        target: the ID of its cell, Float[B, D].
    """

    token_ids: Int[Tensor, "B T"]
    valid: Int[Tensor, "B T"]
    pixels: Float[Tensor, "B C Y X"]
    places: Int[Tensor, "B"]
    labels: Int[Tensor, "B"]
    word: Int[Tensor, "B"]
    target: Float[Tensor, "B D"]

    @classmethod
    def read(cls, path: Path) -> "Examples":
        """Reads the batch from an .npz file."""
        with np.load(path) as arrays:
            return cls(**{name: torch.from_numpy(arrays[name]) for name in arrays.files})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a run.

    Attributes:
        id_layer: layer after which activations are compared with IDs.
        id_weight: weight of the ID loss.
        rates: learning rates of the first steps; all later steps use the last one.
        weight_decay: weight decay of all trained tensors.
        clip_norm: largest norm of the gradient of all trained tensors together.
    """

    id_layer: int
    id_weight: float
    rates: tuple[float, ...]
    weight_decay: float
    clip_norm: float


class Steps:
    """Fine-tuning steps on one batch; several runs may take turns on one network, each with its own tensors."""

    def __init__(
        self,
        network: Network,
        trained: Iterable[str],
        examples: Examples,
        settings: Settings,
        *,
        checkpointed: bool = False,
        lean: bool = False,
    ):
        """Prepares a run that begins with the network's tensors.

        Args:
            network: Hugging Face's class; all parameters are frozen except the trained ones.
            trained: names of the trained parameters.
            examples: the batch.
            settings: settings of the run.
            checkpointed: recompute the inside of every block in the backward pass.
            lean: compute logits of the answer only, where Hugging Face's loss computes those of every token.
        """
        self.network, self.examples, self.settings = network, examples, settings
        self.checkpointed, self.lean = checkpointed, lean
        network.requires_grad_(False)
        places = dict(network.named_parameters())
        self.places = {name: places[name] for name in trained}
        self.own = {name: torch.nn.Parameter(value.detach().clone()) for name, value in self.places.items()}
        self.optimizer = torch.optim.AdamW(self.own.values(), weight_decay=settings.weight_decay)
        self.done = 0

    def __call__(self) -> Mapping[str, float]:
        """Runs a step.

        Returns:
            "loss" and its parts "answer_loss" and "id_loss".
        """
        network = self.network.train()
        for name, value in self.own.items():
            self._put(name, value)
        # Like `gradient_checkpointing_enable`, but without a gradient of the embeddings, which adds a backward pass
        # through the frozen blocks of the tower.
        network._set_gradient_checkpointing(self.checkpointed, partial(checkpoint, use_reentrant=False))
        self.optimizer.zero_grad()
        total, losses = self._loss()
        total.backward()
        for value in self.own.values():
            if value.grad is None:  # of blocks after the hidden state that is read, whose tensors only decay
                value.grad = torch.zeros_like(value)
        torch.nn.utils.clip_grad_norm_(self.own.values(), self.settings.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rates[min(self.done, len(self.settings.rates) - 1)]
        self.optimizer.step()
        self.done += 1
        return {name: float(value.detach()) for name, value in losses.items()}

    def _put(self, name: str, value: torch.nn.Parameter) -> None:
        module, _, last = name.rpartition(".")
        setattr(self.network.get_submodule(module), last, value)

    def _loss(self) -> tuple[Tensor, dict[str, Tensor]]:
        examples, rows = self.examples, torch.arange(len(self.examples.places))
        held: list[Tensor] = []
        block = self.network.model.language_model.layers[self.settings.id_layer]
        handle = block.register_forward_hook(lambda *arguments: held.append(bare_tensor(arguments[-1])))
        try:
            hidden = self.network.model(
                input_ids=examples.token_ids,
                pixel_values=examples.pixels,
                attention_mask=examples.valid,
                use_cache=False,
            ).last_hidden_state
        finally:
            handle.remove()
        if self.lean:
            read = self.network.lm_head(hidden[rows, examples.places])
            answer = functional.cross_entropy(read.float(), examples.labels)
        else:  # as `ForCausalLMLoss` of transformers does
            labels = torch.full_like(examples.token_ids, IGNORED)
            labels[rows, examples.places] = examples.labels
            logits = self.network.lm_head(hidden).float()
            answer = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        word = held[0][rows, examples.word]
        near = functional.cosine_similarity(word - word.mean(dim=0), examples.target, dim=-1)
        identity = 1 - near.mean()
        total = answer + self.settings.id_weight * identity
        return total, {"loss": total, "answer_loss": answer, "id_loss": identity}

    def gradients(self) -> dict[str, np.ndarray]:
        """The last step's clipped gradients; after the first step, AdamW's first moment is a tenth of them."""
        return {name: value.grad.numpy().copy() for name, value in self.own.items() if value.grad is not None}

    def tensors(self) -> dict[str, np.ndarray]:
        """The current trained tensors."""
        return {name: value.detach().numpy().copy() for name, value in self.own.items()}
