"""The tiny LLaVA's processor with tokenizers of all kinds and with other chat templates."""

import copy
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import fixtures
import numpy as np
from families import CASES
from numpy.typing import ArrayLike
from tokenizers import AddedToken, Tokenizer

from jaxid.families.llava import LlavaProcessor
from jaxid.prompts.processor import Processor, Prompts
from jaxid.zoo.tiny_llava import CHAT_TEMPLATE

PLAIN = CASES[0]

SENTENCES = [
    "Is the star to the left or right of the fish? left right",
    "The starfish is near the anchor, below the hourglass. The star is left, the fish is right.",
    *[f"{before}{word}" for before in ("(", "-", "/") for word in ("left", "right", "star")] * 20,
]
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]


def bytes_tokenizer() -> Tokenizer:
    """As in Llama 3 and Qwen: bytes; a space belongs to the word that follows it."""
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=400, min_frequency=2, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def sentencepiece_tokenizer() -> Tokenizer:
    """As in Llama 2 and LLaVA-1.5: a space is a letter, and unknown letters become bytes."""
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    single_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=400, min_frequency=2, special_tokens=SPECIAL + single_bytes, show_progress=False
        ),
    )
    # The published files contain no pre-tokenizer: the normalizer replaces spaces by the letter.
    fields = json.loads(tokenizer.to_str())
    fields["pre_tokenizer"] = None
    fields["added_tokens"] = [token for token in fields["added_tokens"] if token["content"] in SPECIAL]
    tokenizer = Tokenizer.from_str(json.dumps(fields))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def metaspace_tokenizer() -> Tokenizer:
    """As in newer files: a pre-tokenizer replaces spaces by the letter and adds it at the beginning of a text."""
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    single_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=400, min_frequency=2, special_tokens=SPECIAL + single_bytes, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    fields = json.loads(tokenizer.to_str())
    fields["added_tokens"] = [token for token in fields["added_tokens"] if token["content"] in SPECIAL]
    tokenizer = Tokenizer.from_str(json.dumps(fields))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


SUBWORD = [bytes_tokenizer, sentencepiece_tokenizer, metaspace_tokenizer]


@functools.cache
def processor_of(build: Callable[[], Tokenizer]) -> Processor:
    """The tiny model's processor with another tokenizer."""
    folder = Path(fixtures.SCRATCH.name) / build.__name__
    shutil.copytree(fixtures.folder(PLAIN), folder)
    build().save(str(folder / "tokenizer.json"))
    return LlavaProcessor.from_folder(folder, fixtures.model(PLAIN).config)


def with_template(processor: Processor, template: str) -> Processor:
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.chat_template = template
    # One special token from the tokenizer's settings, and one that is only in its vocabulary.
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|turn|>"]})
    tokenizer.add_tokens([AddedToken("<|end|>", special=True)])
    changed = LlavaProcessor(tokenizer, processor.image_processor, processor.config)
    changed.stop_ids = processor.stop_ids
    return changed


def ending(end: str) -> str:
    assert CHAT_TEMPLATE.count("ASSISTANT:{% endif %}") == 1
    return CHAT_TEMPLATE.replace("ASSISTANT:{% endif %}", f"ASSISTANT{end}{{% endif %}}")


def read(processor: Processor, prompts: Prompts, row: int, positions: ArrayLike) -> list[str]:
    """The tokens of a prompt at some positions."""
    ids = np.asarray(prompts.inputs.token_ids)[row, np.atleast_1d(positions)]
    return processor.tokenizer.convert_ids_to_tokens([int(index) for index in ids])
