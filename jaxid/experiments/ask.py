"""`jaxid ask`: the most probable answers to one question about one picture."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from jaxid.checkpoints.loading import open_checkpoint
from jaxid.checks import Count, check_finite
from jaxid.errors import DataError
from jaxid.experiments.base import Command
from jaxid.interp.forward import forward


@dataclasses.dataclass(frozen=True)
class Ask(Command[list[tuple[str, float]]]):
    """Ask a model about a picture and print the most probable next tokens with their probabilities.

    Attributes:
        picture: file of the picture.
        question: question about it.
        model: alias, Hugging Face id or folder.
        top: number of answers to print.
        dtype: of parameters and activations.
        mesh: devices that share the model and the work, such as data=4,model=2; auto takes all of them. By default one.
    """

    picture: Path
    question: str
    model: str = dataclasses.field(default="tiny-llava", kw_only=True)
    top: Count = dataclasses.field(default=5, kw_only=True)
    dtype: Literal["float32", "bfloat16", "float16"] = dataclasses.field(default="float32", kw_only=True)
    mesh: str | None = dataclasses.field(default=None, kw_only=True)

    def run(self) -> list[tuple[str, float]]:
        """The most probable tokens and their probabilities, the largest first."""
        checkpoint = open_checkpoint(self.model, dtype=self.dtype).on(self.mesh)
        prompts = checkpoint.model.prepare([self.picture], self.question)  # before the weights, which may take minutes
        loaded = checkpoint.load()
        logits = forward(loaded, prompts).logits[0]
        check_finite(f"the numbers that {self.model} computes in {self.dtype}", logits, DataError)
        probabilities = np.asarray(jax.nn.softmax(logits))
        names = loaded.processor.tokenizer.convert_ids_to_tokens
        # An unembedding may have more rows than the tokenizer has tokens.
        return [
            (names(int(token)) or f"(no token, id {token})", float(probabilities[token]))
            for token in np.argsort(-probabilities)[: self.top]
        ]

    def report(self, result: list[tuple[str, float]]) -> Iterator[str]:
        """A line for each token."""
        for word, probability in result:
            yield f"{probability:8.3%}  {word}"
