"""The works in PyTorch on a GPU: hooks on Hugging Face's class with SDPA, one prompt at a time or in batches.

`one_by_one` is the published procedure, a control pass and a patched pass for every prompt and edit. `batched` is what
a careful user of the same hooks writes: one patched pass of all prompts for every edit. `traced` does the latter in
nnsight.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from gpu_models import Setting
from published import bare_tensor
from torch import Tensor
from torch.nn import functional


@dataclasses.dataclass(frozen=True, kw_only=True)
class Edit:
    """Vectors added to a decoder block's output in all prompts.

    Attributes:
        layer: index of the block.
        positions: the tokens, the same in all prompts.
        vectors: one for each of them, Float[P, D].
    """

    layer: int
    positions: Sequence[int]
    vectors: Tensor


@contextlib.contextmanager
def _hooked(block: Any, hook: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    handle = block.register_forward_hook(lambda module, given, output: hook(bare_tensor(output)))
    try:
        yield
    finally:
        handle.remove()


def prompt(arguments: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    """The arguments of one prompt; all prompts have one picture of the same size."""
    count = len(arguments["input_ids"])
    return {
        name: value.unflatten(0, (count, -1))[row] if len(value) != count else value[row : row + 1]
        for name, value in arguments.items()
    }


def hidden(setting: Setting, arguments: Mapping[str, Tensor]) -> Tensor:
    """The last hidden state of every token."""
    return setting.network.model(**arguments, use_cache=False).last_hidden_state


def log_probs(setting: Setting, arguments: Mapping[str, Tensor], answers: Sequence[int]) -> Tensor:
    """Log-probabilities of the answers as the next token; logits are computed for the last position only."""
    logits = setting.network.lm_head(hidden(setting, arguments)[:, -1]).float()
    return torch.log_softmax(logits, dim=-1)[:, list(answers)]


def patched(setting: Setting, arguments: Mapping[str, Tensor], answers: Sequence[int], edit: Edit) -> Tensor:
    """The same under an edit."""

    def add(output: Tensor) -> Tensor:
        output[:, list(edit.positions)] += edit.vectors.to(output)
        return output

    with _hooked(setting.blocks[edit.layer], add):
        return log_probs(setting, arguments, answers)


def control(setting: Setting, answers: Sequence[int]) -> Tensor:
    """One pass of all prompts."""
    with torch.inference_mode():
        return log_probs(setting, setting.arguments, answers).cpu()


def control_one_by_one(setting: Setting, answers: Sequence[int], rows: Sequence[int]) -> Tensor:
    """One pass for every prompt."""
    with torch.inference_mode():
        found = [log_probs(setting, prompt(setting.arguments, row), answers) for row in rows]
        return torch.cat(found).cpu()


def batched(setting: Setting, answers: Sequence[int], edits: Sequence[Edit]) -> Tensor:
    """One pass of all prompts for every edit, Float[S, B, n]."""
    with torch.inference_mode():
        return torch.stack([patched(setting, setting.arguments, answers, edit) for edit in edits]).cpu()


def one_by_one(setting: Setting, answers: Sequence[int], edits: Sequence[Edit], rows: Sequence[int]) -> Tensor:
    """A control and a patched pass for every prompt and edit, Float[S, B, n]."""
    found = []
    with torch.inference_mode():
        for edit in edits:
            one = []
            for row in rows:
                own = prompt(setting.arguments, row)
                log_probs(setting, own, answers)
                one.append(patched(setting, own, answers, edit))
            found.append(torch.cat(one))
        return torch.stack(found).cpu()


def traced(setting: Setting, answers: Sequence[int], edits: Sequence[Edit]) -> Tensor:
    """One trace of all prompts for every edit in nnsight, Float[S, B, n]."""
    import nnsight  # pyright: ignore[reportMissingImports] - optional

    wrapped = nnsight.NNsight(setting.network)
    found = []
    with torch.inference_mode():
        for edit in edits:
            at, vectors, layer = list(edit.positions), edit.vectors, edit.layer
            with wrapped.trace(**setting.arguments, use_cache=False, logits_to_keep=1):
                block = wrapped.model.language_model.layers[layer]
                block.output[:, at] += vectors.to(block.output.dtype)
                logits = wrapped.lm_head.output[:, -1].float().save()
            found.append(torch.log_softmax(logits, dim=-1)[:, list(answers)])
        return torch.stack(found).cpu()


def extract(setting: Setting, position: int, rows: Sequence[int] | None = None) -> Tensor:
    """Residual stream at one token, the embeddings and every block's output, Float[B, L + 1, D]; rows one at a time."""
    given = [setting.arguments] if rows is None else [prompt(setting.arguments, row) for row in rows]
    found = []
    with torch.inference_mode():
        for arguments in given:
            states: list[Tensor] = []
            with contextlib.ExitStack() as hooks:
                first = setting.blocks[0].register_forward_pre_hook(
                    lambda module, inputs, states=states: states.append(inputs[0][:, position])
                )
                hooks.callback(first.remove)
                for block in setting.blocks:
                    hooks.enter_context(
                        _hooked(block, lambda output, states=states: states.append(output[:, position]))
                    )
                hidden(setting, arguments)
            found.append(torch.stack(states, dim=1).float().cpu())
    return torch.cat(found)


class Steps:
    """Fine-tuning steps on a few prompts: AdamW on float32 copies of the trained tensors, clipped gradients."""

    def __init__(self, setting: Setting, names: Sequence[str], examples: Mapping[str, Any]):
        """Prepares a run.

        Args:
            setting: the model.
            names: the trained tensors.
            examples: "arguments" of the prompts, their "labels", and the position "word" and layer "layer" that are
                compared with the IDs "target".
        """
        self.setting, self.examples = setting, examples
        places = dict(setting.network.named_parameters())
        self.places = {name: places[name].requires_grad_() for name in names}
        self.own = {name: value.detach().float().clone() for name, value in self.places.items()}
        self.optimizer = torch.optim.AdamW(self.own.values(), lr=5e-5, weight_decay=0.01)

    def __call__(self) -> float:
        """Runs a step and returns its loss."""
        examples, held = self.examples, []
        for name, value in self.own.items():
            self.places[name].data.copy_(value)
            self.places[name].grad = None
        with _hooked(self.setting.blocks[examples["layer"]], lambda output: held.append(output[:, examples["word"]])):
            last = hidden(self.setting, examples["arguments"])[:, -1]
        answer = functional.cross_entropy(self.setting.network.lm_head(last).float(), examples["labels"])
        word = held[0].float()
        near = functional.cosine_similarity(word - word.mean(dim=0), examples["target"], dim=-1)
        loss = answer + 1 - near.mean()
        loss.backward()
        for name, value in self.own.items():
            gradient = self.places[name].grad
            value.grad = torch.zeros_like(value) if gradient is None else gradient.float()
        torch.nn.utils.clip_grad_norm_(self.own.values(), 1.0)
        self.optimizer.step()
        return float(loss.detach())

    def close(self) -> None:
        """Leaves the network as it was before the first step, but for rounding, and without gradients."""
        for value in self.places.values():
            value.requires_grad_(False).grad = None
