"""The scorer's files in the authors' layout: written and read, scored in PyTorch, nested, broken, and dangerous."""

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from benchmark_files import importable

from jaxid.checkpoints.scorer_files import read_authors_scorer, write_authors_scorer
from jaxid.errors import CheckpointError, OutputError
from jaxid.kernels.scorer import CNN, MLP, apply, init_cnn, init_mlp

IMAGE_TOKENS, TEXT_TOKENS = 5, 7
"""Unequal and prime, so that no two axes can be confused."""

KINDS = {"cnn": (init_cnn, "ScorerCNN", CNN), "mlp": (init_mlp, "ScorerMLP", MLP)}
WORDS = 3


@pytest.fixture(scope="module")
def published() -> Any:
    """The published procedure in PyTorch."""
    with importable() as load:
        return load("published_dcsm")


def vectors() -> np.ndarray:
    return np.random.default_rng(2).random((WORDS, IMAGE_TOKENS), np.float32)


def maps() -> np.ndarray:
    return np.random.default_rng(3).standard_normal((6, IMAGE_TOKENS, TEXT_TOKENS), np.float32)


def their_network(published: Any, kind: str) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return getattr(published, KINDS[kind][1])(IMAGE_TOKENS, TEXT_TOKENS).eval()


def same(ours: CNN | MLP, expected: CNN | MLP) -> None:
    assert type(ours) is type(expected)
    for name, value in expected._asdict().items():
        np.testing.assert_array_equal(getattr(ours, name), value, err_msg=name)


def our_scores(network: CNN | MLP) -> np.ndarray:
    return np.asarray(apply(jax.tree.map(jnp.asarray, network), jnp.asarray(maps())))


def their_scores(network: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return network(torch.from_numpy(maps())[:, None]).numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_written_and_read_again(tmp_path: Path, kind: str) -> None:
    network = KINDS[kind][0](jax.random.key(1), IMAGE_TOKENS, TEXT_TOKENS)
    write_authors_scorer(tmp_path / "scorer.pt", network, vectors())
    again, rows, words = read_authors_scorer(tmp_path / "scorer.pt", TEXT_TOKENS)
    same(again, network)
    np.testing.assert_array_equal(rows, vectors())
    assert words is None
    assert [path.name for path in tmp_path.iterdir()] == ["scorer.pt"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_pytorch_saved_scores_alike(published: Any, tmp_path: Path, kind: str) -> None:
    theirs = their_network(published, kind)
    rows = torch.from_numpy(vectors())
    published.save_checkpoint(tmp_path / "scorer.pt", published.Scorer(network=theirs, vectors=rows))
    ours, read, _ = read_authors_scorer(tmp_path / "scorer.pt", TEXT_TOKENS)
    assert isinstance(ours, KINDS[kind][2])
    np.testing.assert_array_equal(read, vectors())
    expected = their_scores(theirs)
    assert expected.std() > 1e-2
    np.testing.assert_allclose(our_scores(ours), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_pytorch_reads_what_is_written_here(published: Any, tmp_path: Path, kind: str) -> None:
    network = KINDS[kind][0](jax.random.key(5), IMAGE_TOKENS, TEXT_TOKENS)
    write_authors_scorer(tmp_path / "scorer.pt", network, vectors(), ("above", "not", "no"))
    theirs = published.load_checkpoint(tmp_path / "scorer.pt")
    assert theirs.words == ("above", "not", "no")
    np.testing.assert_array_equal(theirs.vectors.numpy(), vectors())
    np.testing.assert_allclose(their_scores(theirs.network), our_scores(network), rtol=0, atol=1e-5)


def nested(layers: dict[str, Any], rows: Any) -> dict[str, Any]:
    return {"epoch": 26, "state": {"model": layers, "func_rows": rows}}


def prefixed(layers: dict[str, Any], rows: Any) -> dict[str, Any]:
    return {**{f"module.scorer.{name}": value for name, value in layers.items()}, "module.word_embeddings.weight": rows}


def beside_an_optimiser(layers: dict[str, Any], rows: Any) -> dict[str, Any]:
    moments = {0: {"step": torch.tensor(9.0), "exp_avg": torch.ones(WORDS, IMAGE_TOKENS)}}
    return {"optimizer": {"state": moments, "param_groups": [{"lr": 1e-5}]}, "net": layers, "Functional": rows}


@pytest.mark.parametrize("laid_out", [nested, prefixed, beside_an_optimiser])
@pytest.mark.parametrize("kind", KINDS)
def test_names_of_all_kinds(
    published: Any, tmp_path: Path, kind: str, laid_out: Callable[[dict[str, Any], Any], dict[str, Any]]
) -> None:
    theirs = their_network(published, kind)
    torch.save(laid_out(dict(theirs.state_dict()), torch.from_numpy(vectors())), tmp_path / "scorer.pt")
    ours, rows, _ = read_authors_scorer(tmp_path / "scorer.pt", TEXT_TOKENS)
    np.testing.assert_array_equal(rows, vectors())
    np.testing.assert_allclose(our_scores(ours), their_scores(theirs), rtol=0, atol=1e-5)


def test_other_precisions_become_float32(published: Any, tmp_path: Path) -> None:
    theirs = their_network(published, "cnn")
    halved = {name: value.bfloat16() for name, value in theirs.state_dict().items()}
    rows = torch.from_numpy(vectors()).double()
    torch.save({"scorer": halved, "functional": rows}, tmp_path / "scorer.pt")
    ours, read, _ = read_authors_scorer(tmp_path / "scorer.pt", TEXT_TOKENS)
    assert {np.asarray(value).dtype for value in (*ours, read)} == {np.dtype("float32")}
    theirs.load_state_dict(halved)
    np.testing.assert_allclose(our_scores(ours), their_scores(theirs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("text_tokens", [30, 20])
def test_text_tokens_follow_from_the_sizes(tmp_path: Path, text_tokens: int) -> None:
    network = init_mlp(jax.random.key(1), IMAGE_TOKENS, text_tokens)
    write_authors_scorer(tmp_path / "scorer.pt", network, vectors())
    same(read_authors_scorer(tmp_path / "scorer.pt").network, network)


# --- what is refused ------------------------------------------------------------------------------------------------


def broken(tmp_path: Path, published: Any, kind: str, change: Callable[[dict[str, Any]], object]) -> Path:
    """A file that lacks or has something that it should not."""
    held: dict[str, Any] = {**their_network(published, kind).state_dict(), "functional": torch.from_numpy(vectors())}
    change(held)
    torch.save(held, tmp_path / "broken.pt")
    return tmp_path / "broken.pt"


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("cnn", f"{layer}.{part}") for layer in ("conv2", "fc1", "fc2") for part in ("weight", "bias")),
        ("cnn", "conv1.bias"),
        *(("mlp", f"{layer}.{part}") for layer in ("fc1", "fc2", "fc3") for part in ("weight", "bias")),
    ],
)
def test_refuses_files_without_a_layer(tmp_path: Path, published: Any, kind: str, name: str) -> None:
    path = broken(tmp_path, published, kind, lambda held: held.pop(name))
    with pytest.raises(CheckpointError, match=rf"broken\.pt is not a scorer: missing {re.escape(name)};.*it holds "):
        read_authors_scorer(path, TEXT_TOKENS)


@pytest.mark.parametrize(
    ("change", "count"),
    [(lambda held: held.pop("functional"), 0), (lambda held: held.update(embedding=held["functional"]), 2)],
)
def test_refuses_other_than_one_table_of_vectors(
    tmp_path: Path, published: Any, change: Callable[[dict[str, Any]], object], count: int
) -> None:
    path = broken(tmp_path, published, "cnn", change)
    said = rf"broken\.pt is not a scorer: missing nothing; {count} tables of functional vectors instead of one"
    with pytest.raises(CheckpointError, match=said):
        read_authors_scorer(path, TEXT_TOKENS)


@pytest.mark.parametrize(("kind", "channels"), [("cnn", 4), ("mlp", 1)])
def test_refuses_maps_of_another_size(tmp_path: Path, published: Any, kind: str, channels: int) -> None:
    flat = channels * IMAGE_TOKENS * TEXT_TOKENS
    path = broken(tmp_path, published, kind, lambda held: None)
    with pytest.raises(CheckpointError, match=rf"fc1 reads {flat} numbers, .* {channels} x 5 image .* x 8 caption"):
        read_authors_scorer(path, TEXT_TOKENS + 1)
    path = broken(tmp_path, published, kind, lambda held: held.update(functional=torch.ones(WORDS, 6)))
    with pytest.raises(CheckpointError, match=rf"broken\.pt: fc1 reads {flat} numbers, .* {channels} x 6 image tokens"):
        read_authors_scorer(path, TEXT_TOKENS)


class Harmful:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def test_refuses_files_with_objects_and_runs_nothing(tmp_path: Path, published: Any) -> None:
    trace = tmp_path / "trace"
    path = broken(tmp_path, published, "cnn", lambda held: held.update(options=Harmful(trace)))
    with pytest.raises(CheckpointError, match=r"broken\.pt cannot be read .* holds Python objects"):
        read_authors_scorer(path, TEXT_TOKENS)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Harmful(trace)))
    assert trace.exists(), "the file would have run code"


def test_refuses_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.pt does not exist"):
        read_authors_scorer(tmp_path / "gone.pt")
    write_authors_scorer(tmp_path / "cut.pt", init_mlp(jax.random.key(1), IMAGE_TOKENS, 30), vectors())
    whole = (tmp_path / "cut.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"cut\.pt cannot be read"):
        read_authors_scorer(tmp_path / "cut.pt")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match=r"list\.pt is not a scorer: missing fc1\.weight"):
        read_authors_scorer(tmp_path / "list.pt")


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "scorer.pt").mkdir()
    with pytest.raises(OutputError, match=r"scorer\.pt"):
        write_authors_scorer(tmp_path / "scorer.pt", init_mlp(jax.random.key(1), IMAGE_TOKENS, 30), vectors())
    assert [path.name for path in tmp_path.iterdir()] == ["scorer.pt"]


@pytest.mark.parametrize(
    ("kind", "layer", "shape"),
    [
        ("cnn", "fc1.weight", (128,)),
        ("cnn", "fc2.weight", (2, 128)),
        ("cnn", "fc2.weight", (1, 99)),
        ("cnn", "conv1.weight", (4, 1, 5, 5)),
        ("cnn", "conv2.bias", (3,)),
        ("mlp", "fc2.weight", (32, 63)),
    ],
)
def test_layers_of_other_shapes_are_named(tmp_path: Path, kind: str, layer: str, shape: tuple[int, ...]) -> None:
    import jax

    from jaxid.checkpoints.scorer_files import read_authors_scorer, write_authors_scorer
    from jaxid.kernels.scorer import init_cnn, init_mlp

    network = {"cnn": init_cnn, "mlp": init_mlp}[kind](jax.random.key(0), 5, 30)
    write_authors_scorer(tmp_path / "scorer.pt", network, np.ones((2, 5), np.float32))
    saved = torch.load(tmp_path / "scorer.pt", weights_only=False)
    layers = saved["model_state_dict"]
    torch.save({**saved, "model_state_dict": {**layers, layer: torch.ones(shape)}}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=layer.replace(".", r"\.") + " has the shape"):
        read_authors_scorer(tmp_path / "other.pt")
    torch.save({"net": layers, "ema": layers, "functional": torch.ones(2, 5)}, tmp_path / "two.pt")
    with pytest.raises(CheckpointError, match="twice, again as ema"):
        read_authors_scorer(tmp_path / "two.pt")
