"""A model of LLaVA-1.5's geometry with random weights: as many picture tokens, but a smaller decoder.

336-pixel pictures make 576 tokens, as in the published 7B and 13B models; layers are fewer and narrower. The weights
are random, but scaled so that the size of activations is stable over depth, attention selects few tokens, and both the
picture and a single edited word change the answers' log-probabilities by far more than rounding does.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jaxtyping import PyTree

from jaxid.errors import InputError
from jaxid.families.llava import Llava, LlavaConfig
from jaxid.io import ensure_output_folder
from jaxid.nn.decoder_config import DecoderConfig, RopeConfig
from jaxid.nn.fields import Json
from jaxid.nn.vision import VisionConfig
from jaxid.zoo import llava_texts, tiny_llava
from jaxid.zoo.export import hf_config, write_llava

CONFIG = LlavaConfig(
    text_config=DecoderConfig(
        vocab_size=32064,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=64,
        rope=RopeConfig(rope_theta=10000.0),
    ),
    vision_config=VisionConfig(
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=8,
        image_size=336,
        patch_size=14,
    ),
    image_token_index=llava_texts.VOCABULARY.index("<image>"),
    vision_feature_layer=(-2,),
)
"""About 260 million parameters."""

PIXEL_MEAN, PIXEL_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Those of CLIP."""

GAINS = {"query": 1.5, "key": 1.5, "out": 2.0, "down": 0.7}
"""Root mean square of a kernel's outputs for inputs of root mean square 1, by the kernel's name; 1 for all others.

Attention scores then have a standard deviation of 2.25, so that a token attends to a few others, not equally to all
600.
"""

BIAS = 0.1


def write(folder: Path, config: LlavaConfig = CONFIG, *, seed: int = 0) -> Path:
    """Writes the checkpoint in Hugging Face's layout, unless the folder already contains it.

    Args:
        folder: output folder, which is written atomically.
        config: the model's shape; its vocabulary has to have room for the words of tiny-llava.
        seed: seed of the weights.

    Returns:
        The folder.

    Raises:
        InputError: if the folder contains something else.
        OutputError: if the folder cannot be written.
    """
    vocabulary = _vocabulary(config.text_config.vocab_size)
    if folder.exists():
        _check_same(folder, hf_config(config, vocabulary))
        return folder
    ensure_output_folder(folder.parent)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        made = Path(temporary) / "model"
        write_llava(
            made,
            config,
            parameters(Llava, config, seed),
            vocabulary=vocabulary,
            chat_template=tiny_llava.CHAT_TEMPLATE,
            mean=PIXEL_MEAN,
            std=PIXEL_STD,
        )
        try:
            made.rename(folder)
        except OSError:  # another process was faster
            _check_same(folder, hf_config(config, vocabulary))
    return folder


def _check_same(folder: Path, expected: Json) -> None:
    file = folder / "config.json"
    if not file.is_file() or json.loads(file.read_text()) != json.loads(json.dumps(expected)):
        raise InputError(
            f"{folder} contains something other than the benchmark's model: remove it or name another folder."
        )


def _vocabulary(size: int) -> list[str]:
    """The words of tiny-llava, padded so that every id has a token."""
    words = list(llava_texts.VOCABULARY)
    return words + [f"word{index}" for index in range(len(words), size)]


def parameters(network: Callable[..., nnx.Module], config: object, seed: int) -> PyTree:
    """Random parameters of a network, scaled as the docstring of this module describes."""
    shapes = nnx.to_pure_dict(nnx.split(nnx.eval_shape(lambda: network(config, rngs=nnx.Rngs(0))))[1])
    rng = np.random.default_rng(seed)

    def draw(path: jax.tree_util.KeyPath, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        names = [part.key for part in path]
        values = rng.standard_normal(leaf.shape, np.float32)
        if names[-1] == "scale":
            return 1 + np.float32(BIAS) * values
        if "bias" in names[-1]:
            return np.float32(BIAS) * values
        gain = next((gain for name, gain in GAINS.items() if name in names), 1.0)
        return values * np.float32(gain * _inputs(names, leaf.shape) ** -0.5)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def _inputs(names: list[str], shape: tuple[int, ...]) -> int:
    """Number of inputs that each output of a weight sums over; rows of a table are looked up, not summed."""
    if names[-1] in ("embedding", "position", "class_token"):
        return 1
    if names[-1] == "patch_kernel":
        return int(np.prod(shape[:-1]))
    per_layer = shape[1:] if "layers" in names else shape
    return int(np.prod(per_layer[:-1] if names[-1] == "out" else per_layer[:1]))
