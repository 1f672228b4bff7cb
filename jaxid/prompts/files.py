"""What the files beside a tokenizer say: its class, the chat template, and the tokens that end an answer."""

from pathlib import Path

from jaxid.errors import CheckpointError
from jaxid.io import read_json
from jaxid.nn.decoder_config import ModelConfig
from jaxid.prompts import templates
from jaxid.prompts.base import PictureReader, Tokenizer
from jaxid.prompts.words import shown


def takes_any(folder: Path) -> bool:
    """Whether a folder names the tokenizer class that reads tokenizer.json only."""
    named = read_json(folder / "tokenizer_config.json", missing={}).get("tokenizer_class")
    return named in ("PreTrainedTokenizerFast", "TokenizersBackend")


def chat_template(folder: Path, tokenizer: Tokenizer, reader: PictureReader) -> str:
    """The template of the processor, or else of the family, or else of the tokenizer.

    Raises:
        CheckpointError: if there is none, or it does not place pictures.
    """
    path = folder / "chat_template.json"
    fields = read_json(path, missing={})
    template = fields.get("chat_template") if path.exists() else reader.template or tokenizer.chat_template
    if template is None and not path.exists():
        raise CheckpointError(f"{folder} has no chat template (chat_template.jinja or chat_template.json).")
    where = path if path.exists() else folder / "chat_template.jinja"
    return templates.check(
        template,
        str(where if where.exists() else folder),
        placeholder=reader.placeholder,
        variables=tokenizer.special_tokens_map,
    )


def stop_ids(folder: Path, tokenizer: Tokenizer, config: ModelConfig) -> tuple[int, ...]:
    """Tokens that end an answer, from the files that Hugging Face's `generate` reads, or else the tokenizer's own.

    Raises:
        CheckpointError: for a value that is neither a token of the vocabulary nor a list of them.
    """
    size = max(len(tokenizer), config.text_config.vocab_size)
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        fields = read_json(path, missing={})
        for part in (fields, fields.get("text_config")):
            ids = part.get("eos_token_id") if isinstance(part, dict) else None
            if ids is None:
                continue
            ids = ids if isinstance(ids, list) else [ids]
            if not all(type(token) is int and 0 <= token < size for token in ids):
                raise CheckpointError(
                    f"{path} has eos_token_id {shown(str(ids))}; it must be a token from 0 to {size - 1}, or a list."
                )
            return tuple(ids)
    return () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
