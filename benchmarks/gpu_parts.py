"""The parts of `gpu.py`: one work each, measured in both frameworks."""

import dataclasses
import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import accelerator_ideal
import gpu_torch
import jax
import jax.numpy as jnp
import numpy as np
import published_dcsm as published
import torch
from gpu_models import Setting, programs, torch_names

from jaxid import devices
from jaxid.dcsm.scoring import Scorer, score_tokens
from jaxid.experiments import finetune
from jaxid.interp.interventions import add
from jaxid.interp.trace import rerun, residuals_at, trace
from jaxid.train import loop

ANSWERS = (11, 12)
ROUNDS = 3
TIMED, TIMED_PROMPTS = 4, 2
"""Edits on which `batched` is timed, and prompts (and edits) on which `published` is: all cost the same."""

Figures = dict[str, float]


class NoTime(TimeoutError):
    """There is no time left for a part."""


@dataclasses.dataclass
class Clock:
    """Measures calls until a deadline.

    Attributes:
        deadline: of the process, in `time.monotonic`.
        wait: waits until the device has finished.
    """

    deadline: float
    wait: Callable[[], object] = lambda: None

    def median(self, call: Callable[[], Any]) -> tuple[float, float, Any]:
        """Median time of a warm call, the first call's time beyond it, and the last result.

        Raises:
            NoTime: if the deadline passed before a warm call was measured.
        """
        times: list[float] = []
        result: Any = None
        for index in range(ROUNDS + 1):
            left = self.deadline - time.monotonic()
            if left < (max(times[1:], default=0.0) if index > 1 else 0.0):
                break
            started = time.perf_counter()
            result = call()
            self.wait()
            times.append(time.perf_counter() - started)
        if len(times) < 2:
            raise NoTime("the deadline passed")
        middle = statistics.median(times[1:])
        return middle, times[0] - middle, result


def model_parts(setting: Setting, clock: Clock) -> dict[str, Callable[[], Figures]]:
    """The parts of one model."""
    own, model, prompts = setting.geometry, setting.model, setting.prompts
    count, layers, width = len(prompts.texts), model.num_layers, model.width
    word = own.tokens - 24
    rng = np.random.default_rng(0)
    clean: dict[str, Any] = {}

    def roofline(kind: Callable[[Any], Any], per: float) -> Figures:
        return {"roofline_ms": 1e3 * kind(own).seconds(devices.this()) / per}

    def vectors(edits: int, words: int) -> np.ndarray:
        drawn = rng.standard_normal((edits, words, width)).astype(np.float32)
        # Long enough that the answers change by more than bfloat16 rounds.
        length = 8 * np.sqrt(width) * clean.get("size", 1.0)
        return length * drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)

    def trace_part() -> Figures:
        ours, compiling, found = clock.median(lambda: np.asarray(trace(model, prompts).logprobs(np.array(ANSWERS))))
        theirs, _, expected = clock.median(lambda: gpu_torch.control(setting, ANSWERS))
        rows = range(TIMED_PROMPTS)
        published, _, _ = clock.median(lambda: gpu_torch.control_one_by_one(setting, ANSWERS, rows))
        return {
            "jaxid_ms": 1e3 * ours / count,
            "batched_ms": 1e3 * theirs / count,
            "published_ms": 1e3 * published / len(rows),
            "compile_s": compiling,
            **_differences(found, expected.numpy()),
            **roofline(accelerator_ideal.trace, count),
        }

    def edits_part(chosen: Sequence[int], positions: Sequence[int], ideal: bool) -> Figures:
        pushes = vectors(len(chosen), len(positions))
        at = np.tile(np.array(positions), (count, 1))

        def ours() -> np.ndarray:
            control = trace(model, prompts)
            push = add(layer=np.array(chosen), positions=at, vector=pushes[:, None])
            return np.asarray(rerun(model, control, push).logprobs(np.array(ANSWERS)))

        timed, compiling, found = clock.median(ours)
        control = np.asarray(trace(model, prompts).logprobs(np.array(ANSWERS)))
        spread = np.linspace(0, len(chosen) - 1, TIMED).round().astype(int).tolist()
        edits = [
            gpu_torch.Edit(
                layer=chosen[index],
                positions=positions,
                vectors=torch.from_numpy(pushes[index]).to(setting.device),
            )
            for index in spread
        ]
        together, _, expected = clock.median(lambda: gpu_torch.batched(setting, ANSWERS, edits))
        figures = {
            "jaxid_ms": 1e3 * timed / len(chosen) / count,
            # A sweep has one control pass more than edits.
            "batched_ms": 1e3 * together / len(edits) / count * (len(chosen) + 1) / len(chosen),
            "compile_s": compiling,
            "edits": float(len(chosen)),
            "effect": float(np.abs(found - control).mean()),
            **_differences(found[spread], expected.numpy()),
        }
        few, rows = edits[:TIMED_PROMPTS], range(TIMED_PROMPTS)
        published, _, _ = clock.median(lambda: gpu_torch.one_by_one(setting, ANSWERS, few, rows))
        figures["published_ms"] = 1e3 * published / len(few) / len(rows)
        if importlib.util.find_spec("nnsight") is not None:
            traced, _, again = clock.median(lambda: gpu_torch.traced(setting, ANSWERS, edits))
            figures["nnsight_ms"] = 1e3 * traced / len(edits) / count
            figures["nnsight_difference"] = float(np.abs(again.numpy() - expected.numpy()).max())
        if ideal:
            least = accelerator_ideal.trace(own) + accelerator_ideal.rerun(own)
            figures |= roofline(lambda _: least, len(chosen) * count)
        return figures

    def steering() -> Figures:
        middle = max(0, min(12 * layers // 32, layers - 3))
        chosen = [layer for layer in range(layers)[middle : middle + 3] for _ in range(16)]
        return edits_part(chosen, [word], ideal=True)

    def belief_swap() -> Figures:
        return edits_part([layer for _ in range(2) for layer in range(layers)], [word, word + 4], ideal=False)

    def extraction() -> Figures:
        at = np.full((count, 1), word)
        ours, compiling, found = clock.median(
            lambda: np.asarray(residuals_at(model, prompts, at).astype(jnp.float32))[:, :, 0]
        )
        theirs, _, expected = clock.median(lambda: gpu_torch.extract(setting, word))
        published, _, _ = clock.median(lambda: gpu_torch.extract(setting, word, range(TIMED_PROMPTS)))
        expected = expected.numpy().swapaxes(0, 1)
        clean["size"] = float(np.sqrt((expected**2).mean()))
        return {
            "jaxid_ms": 1e3 * ours / count,
            "batched_ms": 1e3 * theirs / count,
            "published_ms": 1e3 * published / TIMED_PROMPTS,
            "compile_s": compiling,
            "difference": float(np.abs(found - expected).max() / np.abs(expected).max()),
            **roofline(accelerator_ideal.extract, count),
        }

    def finetune() -> Figures:
        step, theirs = training(setting)
        ours, compiling, _ = clock.median(step)
        first = step.first
        jax.clear_caches()
        timed, _, _ = clock.median(theirs)
        theirs.close()
        return {
            "jaxid_ms": 1e3 * ours,
            "batched_ms": 1e3 * timed,
            "compile_s": compiling,
            "difference": abs(first - theirs.first),
            **roofline(accelerator_ideal.finetune, 1),
        }

    return {
        "extraction": extraction,
        "trace": trace_part,
        "steering": steering,
        "belief_swap": belief_swap,
        "finetune": finetune,
    }


def _differences(found: np.ndarray, expected: np.ndarray) -> Figures:
    """The largest and the mean difference of log-probabilities, and their spread over prompts and edits."""
    apart = np.abs(found - expected)
    return {"difference": float(apart.max()), "mean_difference": float(apart.mean()), "spread": float(expected.std())}


class Noted:
    """Calls a step and notes the first loss."""

    def __init__(self, step: Callable[[], float], close: Callable[[], object] = lambda: None):
        """Wraps a step."""
        self.step, self.close, self.first = step, close, float("nan")

    def __call__(self) -> float:
        """Runs a step."""
        loss = self.step()
        self.first = loss if np.isnan(self.first) else self.first
        return loss


def training(setting: Setting) -> tuple[Noted, Noted]:
    """Steps of jaxid's fine-tuning and of PyTorch's, from the same tensors on the same prompts."""
    own, few = setting.geometry, programs.TRAINED
    task = programs.finetune_task(own, setting.model)
    stage, selection = task.stage(), task.selection
    rng, word = np.random.default_rng(1), own.tokens - programs.SUFFIX
    labels = rng.integers(3, 400, few).astype(np.int32)
    target = rng.standard_normal((few, own.text.hidden_size)).astype(np.float32)
    share = few / len(setting.prompts.texts)

    def first(leaf: Any) -> Any:
        return leaf[: round(len(leaf) * share)][None]

    inputs = setting.prompts.inputs
    batch = {
        "inputs": jax.tree.map(first, finetune.arrays_of(inputs)),
        "positions": np.full((1, few, 1), own.tokens - 1, np.int32),
        "labels": labels[None, :, None],
        "word": np.full((1, few), word, np.int32),
        "target": target[None],
        "weight": np.ones((1, few), np.float32),
    }
    state = jax.device_put(loop._start(stage, selection.split(setting.model.parameters)), jax.local_devices()[0])
    function, held = loop._step_function(stage), {"state": state}

    def ours() -> float:
        held["state"], metrics = function(held["state"], batch, {"frozen": setting.model.parameters})
        return float(metrics["loss"])

    arguments = {name: value[: round(len(value) * share)] for name, value in setting.arguments.items()}
    examples = {
        "arguments": arguments,
        "labels": torch.from_numpy(labels.astype(np.int64)).to(setting.device),
        "word": word,
        "layer": task.config.id_layer,
        "target": torch.from_numpy(target).to(setting.device),
    }
    steps = gpu_torch.Steps(setting, [name for name, _, _ in torch_names(setting, selection)], examples)
    return Noted(ours), Noted(steps, steps.close)


def dcsm_part(clock: Clock, device: Any, *, tiny: bool) -> Figures:
    """Scores of all pairs, from the tokens on."""
    size, rows, columns, width = (12, 20, 9, 16) if tiny else (programs.PAIRS, 197, 30, 512)
    generator = torch.Generator(device).manual_seed(0)
    images, texts = (
        torch.nn.functional.normalize(torch.randn(size, length, width, generator=generator, device=device), dim=-1)
        for length in (rows, columns)
    )
    scorer = Scorer.init(jax.random.key(0), rows, columns)
    network = published.ScorerCNN(rows, columns).to(device).eval()
    published.set_weights(network, scorer.network._asdict())
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

    def theirs(dtype: torch.dtype | None) -> np.ndarray:
        with torch.inference_mode(), torch.autocast(device.type, dtype or torch.float32, enabled=dtype is not None):
            maps = published.standardise(torch.einsum("nie,mte->nmit", images, texts).float())
            flat = maps.reshape(-1, 1, rows, columns)
            return torch.cat([network(part) for part in flat.split(4096)]).float().cpu().numpy().reshape(size, size)

    left, right = (jax.dlpack.from_dlpack(side) for side in (images, texts))
    words = jnp.full((size, columns), -1, jnp.int32)
    ours, compiling, found = clock.median(lambda: np.asarray(score_tokens(scorer, left, right, words, "call")))
    plain, _, expected = clock.median(lambda: theirs(None))
    half, _, _ = clock.median(lambda: theirs(torch.bfloat16 if device.type == "cpu" else torch.float16))
    least = accelerator_ideal.map_scores(scorer.network, width, size).seconds(devices.this())
    pairs = size * size
    return {
        "jaxid_ms": 1e6 * ours / pairs,
        "published_ms": 1e6 * plain / pairs,
        "batched_ms": 1e6 * half / pairs,
        "jaxid_pairs_per_s": pairs / ours,
        "compile_s": compiling,
        "difference": float(np.abs(found - expected).max() / np.abs(expected).max()),
        "roofline_ms": 1e6 * least / pairs,
    }
