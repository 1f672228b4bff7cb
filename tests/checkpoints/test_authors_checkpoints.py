"""Checkpoints as the authors' training writes them: what is read of them, what is written for their loader, what is
refused, and that nothing of a file ever runs."""

import json
import re
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn
from transformers import CLIPTokenizer

from jaxid.checkpoints.scorer_files import read_authors_scorer
from jaxid.checkpoints.torch_files import read_torch_file
from jaxid.dcsm.placement import PUBLISHED
from jaxid.dcsm.scoring import Scorer
from jaxid.errors import CheckpointError
from jaxid.kernels.scorer import apply

IMAGE_TOKENS, TEXT_TOKENS = 5, 7


class CrossModalConvNetwork(nn.Module):
    """The published scorer, written from its description."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.fc1 = nn.Linear(4 * IMAGE_TOKENS * TEXT_TOKENS, 128)
        self.fc2 = nn.Linear(128, 1)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv2(torch.relu(self.conv1(maps[:, None]))))
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))[:, 0]


class Encoder(nn.Module):
    """A frozen encoder with names that look like those of a scorer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.token_embedding = nn.Linear(3, 3), nn.Embedding(9, IMAGE_TOKENS)


def tokenizer() -> CLIPTokenizer:
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[])


def trained(words: list[str] | None, **changes: Any) -> tuple[CrossModalConvNetwork, dict[str, Any]]:
    """A network after a step of Adam, and all that the published training saves with it."""
    torch.manual_seed(0)
    network, table = CrossModalConvNetwork(), nn.Embedding(11 if words is None else len(words), IMAGE_TOKENS)
    with torch.no_grad():
        table.weight = nn.Parameter((nn.functional.normalize(table.weight, p=2, dim=1) + 1) / 3)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    network(torch.randn(3, IMAGE_TOKENS, TEXT_TOKENS)).sum().backward()
    optimizer.step()
    held = {
        "epoch": 26,
        "model_state_dict": network.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "clip_state_dict": Encoder().state_dict(),
        "clip_text_tokenizer": tokenizer(),
        "train_loss": [2.5, 1.25],
        "valid_loss": [],
        "grads": {},
        "external_logic_token_embeddings": table,
        "learned_lookup": words,
    }
    network.eval()
    return network, held | changes


def scores(network: CrossModalConvNetwork) -> np.ndarray:
    with torch.no_grad():
        return network(maps()).numpy()


def last(network: CrossModalConvNetwork) -> np.ndarray:
    """The weights of its last layer."""
    return network.state_dict()["fc2.weight"].numpy()[0]


def maps() -> torch.Tensor:
    return torch.randn(6, IMAGE_TOKENS, TEXT_TOKENS, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("words", [None, ["near", "far"]])
def test_a_whole_checkpoint(tmp_path: Path, words: list[str] | None) -> None:
    network, held = trained(words)
    torch.save(held, tmp_path / "scorer.pt")
    found = Scorer.load(tmp_path / "scorer.pt")
    assert found.vocabulary == (PUBLISHED if words is None else tuple(words)) and found.placement == "replace"
    assert found.map_shape == (IMAGE_TOKENS, TEXT_TOKENS)
    table = held["external_logic_token_embeddings"].weight.detach().numpy()
    np.testing.assert_array_equal(np.asarray(found.vectors), table)
    np.testing.assert_array_equal(found.network.fc2, last(network))
    np.testing.assert_allclose(
        np.asarray(apply(found.network, jnp.asarray(maps().numpy()))), scores(network), atol=1e-5
    )


def test_their_loader_takes_what_is_written(tmp_path: Path) -> None:
    """As their evaluation loads: missing keys keep a random network there, and it is not strict."""
    torch.save(trained(["near", "far"])[1], tmp_path / "scorer.pt")
    scorer = Scorer.load(tmp_path / "scorer.pt")
    scorer.export(tmp_path / "again.pt")
    state = torch.load(tmp_path / "again.pt", map_location="cpu", weights_only=False)
    assert {*state} == {*trained(None)[1]}
    network, encoder = CrossModalConvNetwork(), Encoder()
    before = encoder.state_dict()["fc1.weight"].clone()
    missing = encoder.load_state_dict(state.get("clip_state_dict", encoder.state_dict()), strict=False)
    assert missing.missing_keys and torch.equal(encoder.state_dict()["fc1.weight"], before)
    keys = network.load_state_dict(state.get("model_state_dict", network.state_dict()), strict=False)
    assert not keys.missing_keys and not keys.unexpected_keys
    rows = state["external_logic_token_embeddings"](torch.tensor([1]))
    np.testing.assert_array_equal(rows.detach().numpy()[0], np.asarray(scorer.vectors)[1])
    assert state["learned_lookup"] == ["near", "far"]
    np.testing.assert_array_equal(scores(network), scores(trained(["near", "far"])[0]))
    plain = Scorer.init(jax.random.key(0), IMAGE_TOKENS, TEXT_TOKENS)
    plain.export(tmp_path / "plain.pt")
    assert torch.load(tmp_path / "plain.pt", weights_only=False)["learned_lookup"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"learned_lookup": None},
            r"does not list its words, so the published list is used: 11 functional .* \(2, 5",
        ),
        ({"learned_lookup": ["near"]}, r"1 functional words at 5 image tokens need vectors \(1, 5\), not \(2, 5\)"),
        ({"learned_lookup": ["near", "near"]}, "the functional word 'near' is there twice"),
        ({"learned_lookup": ["near", 5]}, "learned_lookup is neither None nor a list of words"),
        ({"learned_lookup": "near"}, "learned_lookup is neither None nor a list of words"),
        ({"external_logic_token_embeddings": None}, "0 tables of functional vectors instead of one"),
        ({"model_state_dict": {}}, "not a scorer: missing fc1.weight"),
    ],
)
def test_words_and_vectors_must_agree(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    torch.save(trained(["near", "far"])[1] | changes, tmp_path / "scorer.pt")
    with pytest.raises(CheckpointError, match=message):
        Scorer.load(tmp_path / "scorer.pt")


# --- tokenizers -----------------------------------------------------------------------------------------------------


def stand_in(monkeypatch: pytest.MonkeyPatch, full_name: str, kind: Any) -> Any:
    """A class or function under the full name that other versions of a package have."""
    module, name = full_name.rsplit(".", 1)
    if module not in sys.modules:
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
    kind.__module__, kind.__qualname__, kind.__name__ = module, name, name
    monkeypatch.setattr(sys.modules[module], name, kind, raising=False)
    return kind


def test_tokenizers_of_older_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The objects that transformers 4.40 pickles with a slow CLIPTokenizer."""

    class Plain:
        def __init__(self, **fields: Any) -> None:
            self.__dict__.update(fields)

    def made(name: str, **fields: Any) -> Any:
        return stand_in(monkeypatch, name, type("Plain", (Plain,), {}))(**fields)

    pattern = type("Pattern", (), {"__reduce__": lambda self: (compiled, ("a|b", 0, [1, 2], {}))})()
    compiled = stand_in(monkeypatch, "_regex.compile", lambda *given: pytest.fail("it ran"))
    clip = "transformers.models.clip.tokenization_clip"
    old = made(
        f"{clip}.CLIPTokenizer",
        encoder={"a": 0},
        tokens_trie=made("transformers.tokenization_utils.Trie", data={}, _tokens=set()),
        nlp=made(f"{clip}.BasicTokenizer", never_split=set()),
        pat=pattern,
        fix_text=stand_in(monkeypatch, "ftfy.fix_text", lambda text: pytest.fail("it ran")),
        _modules=OrderedDict(),
    )
    network, held = trained(None, clip_text_tokenizer=old)
    torch.save(held, tmp_path / "old.pt")
    np.testing.assert_array_equal(Scorer.load(tmp_path / "old.pt").network.fc2, last(network))


# --- what a file cannot do ------------------------------------------------------------------------------------------


class Harmful:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path, how: str) -> None:
        self.trace, self.how = trace, how

    def __reduce__(self) -> tuple[Any, ...]:
        if self.how == "call":
            return Path.touch, (self.trace,)
        return eval, (f"open({str(self.trace)!r}, 'w').close()",)


@pytest.mark.parametrize("how", ["call", "eval"])
@pytest.mark.parametrize("key", ["clip_text_tokenizer", "external_logic_token_embeddings", "grads", "more"])
def test_harmful_files_are_refused_and_never_run(tmp_path: Path, key: str, how: str) -> None:
    trace = tmp_path / "trace"
    torch.save(trained(None)[1] | {key: Harmful(trace, how)}, tmp_path / "scorer.pt")
    with pytest.raises(CheckpointError, match=r"holds Python objects \(among them [\w.]+\)"):
        Scorer.load(tmp_path / "scorer.pt")
    assert not trace.exists()
    torch.load(tmp_path / "scorer.pt", weights_only=False)
    assert trace.exists(), "the file would have run code"


def test_an_object_inside_an_allowed_one_is_refused_too(tmp_path: Path) -> None:
    trace, (_, held) = tmp_path / "trace", trained(None)
    held["external_logic_token_embeddings"].extra = Harmful(trace, "call")
    torch.save(held, tmp_path / "scorer.pt")
    with pytest.raises(CheckpointError, match="holds Python objects"):
        Scorer.load(tmp_path / "scorer.pt")
    assert not trace.exists()


def test_other_modules_are_refused_everywhere_else(tmp_path: Path) -> None:
    """The embedding is allowed to scorers alone; a linear layer is allowed to nobody."""
    torch.save({"a": nn.Embedding(2, 3)}, tmp_path / "embedding.pt")
    with pytest.raises(CheckpointError, match=r"among them torch\.nn\.modules\.sparse\.Embedding"):
        read_torch_file(tmp_path / "embedding.pt")
    torch.save({"a": nn.Linear(2, 3)}, tmp_path / "linear.pt")
    with pytest.raises(CheckpointError, match=r"among them torch\.nn\.modules\.linear\.Linear"):
        read_authors_scorer(tmp_path / "linear.pt")


def test_reading_imports_no_class_of_the_file(tmp_path: Path) -> None:
    torch.save(trained(None)[1], tmp_path / "scorer.pt")
    script = (
        "import sys; from jaxid.checkpoints.scorer_files import read_authors_scorer; "
        f"read_authors_scorer({str(tmp_path / 'scorer.pt')!r}); "
        "import json; print(json.dumps([name for name in sys.modules if name.startswith(('transf', 'tokenizers'))]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_the_message_says_how_to_convert(tmp_path: Path) -> None:
    """A file with an object of a class that nobody knows here, and the command of the message, run as it stands."""
    network, held = trained(["near", "far"], options=nn.Linear(1, 1))
    path = tmp_path / 'their $(touch run) "scorer".pt'
    torch.save(held, path)
    with pytest.raises(CheckpointError, match=r"among them torch\.nn\.modules\.linear\.Linear") as caught:
        Scorer.load(path)
    assert "\n" not in str(caught.value)
    command = re.search(r'python( -c ".+)$', str(caught.value))
    assert command is not None
    subprocess.run(f"{sys.executable}{command[1]}", shell=True, check=True, cwd=tmp_path)
    assert not (tmp_path / "run").exists()
    found = Scorer.load(path.with_name(f"{path.stem}-plain.pt"))
    np.testing.assert_array_equal(found.network.fc2, last(network))
    assert found.vocabulary == ("near", "far")
