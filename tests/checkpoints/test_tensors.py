"""The reader of safetensors folders by itself: numbers, axes, partly filled and fused tensors, memory, damage."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from huggingface_hub.errors import GatedRepoError
from safetensors.torch import save_file

from jaxid.checkpoints.loading import find_folder
from jaxid.checkpoints.tensors import TensorFolder, read_parameters, save_parameters
from jaxid.errors import CheckpointError
from jaxid.nn.keys import LINEAR, Key

Weights = dict[str, torch.Tensor]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def write(folder: Path, *shards: Weights) -> TensorFolder:
    """Opens a new folder of one file, or of several and their index."""
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors")
        return TensorFolder(folder)
    for number, weights in enumerate(shards):
        save_file(weights, folder / f"{number}.safetensors")
    index = {name: f"{number}.safetensors" for number, weights in enumerate(shards) for name in weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return TensorFolder(folder)


def abstract(**shapes: tuple[int, ...]) -> dict[str, Any]:
    return {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes.items()}


def load_parameters(*given: Any, **settings: Any) -> dict[str, Any]:
    return read_parameters(*given, **settings)[0]


def on_the_host(*given: Any, **settings: Any) -> dict[str, Any]:
    """The arrays as they were filled, in number formats that devices may lack."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(jax, "device_put", lambda array: array)
        return load_parameters(*given, **settings)


def refusal(files: TensorFolder, shapes: dict[str, Any], *keys: Key) -> str:
    """What loading says; it must have placed nothing by then."""
    placed: list[np.ndarray] = []
    with pytest.MonkeyPatch.context() as patched, pytest.raises(CheckpointError) as caught:
        patched.setattr(jax, "device_put", placed.append)
        load_parameters(files, shapes, keys)
    assert placed == []
    return str(caught.value)


# --- numbers and axes -----------------------------------------------------------------------------------------------

FORMATS = {
    torch.float64: np.float64,
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.bfloat16: ml_dtypes.bfloat16,
}


def test_numbers_that_the_format_does_not_hold_are_refused(tmp_path: Path) -> None:
    files = write(tmp_path, {"plain": torch.tensor([[1.0, -7e4], [0.0, 2.0]])})
    with pytest.raises(CheckpointError, match="too large for float16 in tensor 'plain'"):
        load_parameters(files, abstract(plain=(2, 2)), [Key("plain", "plain")], dtype=np.float16)


@pytest.mark.parametrize("to", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stored", FORMATS, ids=str)
def test_numbers_are_rounded_as_pytorch_does(tmp_path: Path, stored: torch.dtype, to: torch.dtype) -> None:
    special = torch.tensor([0.0, -0.0, 1e-7, -1e-40, 6e4, -6e4, 1.0 if torch.float16 in (stored, to) else 3e38])
    weight = (torch.cat([special, noise(71 * 290)]).resize_(71, 290)).to(stored)
    files = write(tmp_path, {"linear": weight, "plain": weight.clone()})
    keys = [Key("linear", "linear", LINEAR), Key("plain", "plain")]
    found = load_parameters(files, abstract(linear=(290, 71), plain=(71, 290)), keys, dtype=FORMATS[to])
    for array, expected in ((found["linear"], weight.to(to).T), (found["plain"], weight.to(to))):
        assert array.dtype == FORMATS[to]
        # As bits, where NaN is NaN and -0 is not 0.
        bits, wanted = np.asarray(array).astype(np.float32), expected.float().numpy()
        np.testing.assert_array_equal(bits, wanted)
        np.testing.assert_array_equal(np.signbit(bits)[~np.isnan(wanted)], np.signbit(wanted)[~np.isnan(wanted)])


@pytest.mark.parametrize(
    ("pattern", "shape", "sizes"),
    [
        (LINEAR, (1, 700), {}),
        (LINEAR, (700, 1), {}),
        (LINEAR, (515, 300), {}),
        (LINEAR, (5000, 1100), {}),  # is read in pieces
        ("(h e) d -> d h e", (3 * 260, 301), {"h": 3}),
        ("(h e) d -> d h e", (270, 301), {"h": 1}),
        ("d (h e) -> h e d", (301, 3 * 260), {"h": 3}),
        ("(h e) -> h e", (12,), {"h": 3}),
        ("d c y x -> y x c d", (290, 3, 4, 5), {}),
        ("d c y x -> (c y x) d", (290, 3, 4, 5), {}),
        ("d c y x -> (x c y) d", (290, 3, 4, 5), {}),  # is no view
        ("1 1 d -> d", (1, 1, 9), {}),
        ("... -> ...", (2500, 2000), {}),
        ("... -> ...", (), {}),
        ("... -> ...", (0, 3), {}),
    ],
)
def test_axes(tmp_path: Path, pattern: str, shape: tuple[int, ...], sizes: dict[str, int]) -> None:
    weight, key = noise(*shape), Key("a", "a", pattern, sizes)
    expected = key.to_parameter(weight.numpy())
    for dtype in (np.float32, np.float64):  # without and with another number format
        files = write(tmp_path, {"a": weight, "odd": torch.ones(3, dtype=torch.int8)})
        found = on_the_host(files, abstract(a=expected.shape), [key], unused=["odd"], dtype=dtype)
        np.testing.assert_array_equal(found["a"], expected.astype(dtype))


def test_shards_are_read_like_one_file(tmp_path: Path) -> None:
    weights = {f"{layer}.w": noise(70, 50, seed=layer) for layer in range(5)} | {"head": noise(9, seed=9)}
    keys = [Key("{layer}.w", "w", LINEAR), Key("head", "head")]
    found = []
    for shards in ([weights], [{name: weights[name]} for name in weights]):
        folder = tmp_path / str(len(shards))
        folder.mkdir()
        found.append(load_parameters(write(folder, *shards), abstract(w=(5, 50, 70), head=(9,)), keys))
    np.testing.assert_array_equal(found[0]["w"], np.stack([weights[f"{layer}.w"].numpy().T for layer in range(5)]))
    assert all(np.array_equal(found[0][path], found[1][path]) for path in ("w", "head"))


# --- partly filled and fused parameters -----------------------------------------------------------------------------

SHAPES = abstract(own=(3, 4, 6), cross=(2, 4, 6), gate=(5, 1), query=(5, 4, 2, 3), value=(5, 4, 6))
TABLE = [
    Key("{layer}.own", "own", LINEAR, layers=(0, 1, 4), rows=(0, 1, 2)),
    Key("{layer}.cross", "cross", LINEAR, layers=(3, 2), rows=(0, 1)),
    Key("{layer}.gate", "gate", layers=(1, 3)),
    Key("{layer}.other_gate", "gate", layers=(0, 2, 4)),
    Key("{layer}.fused", "query", "(h e) d -> d h e", {"h": 2}, part=(0, 2)),
    Key("{layer}.fused", "value", LINEAR, part=(1, 2)),
]


def parts() -> Weights:
    names = ["0.own", "1.own", "4.own", "3.cross", "2.cross"]
    gates = ["0.other_gate", "1.gate", "2.other_gate", "3.gate", "4.other_gate"]
    return (
        {name: noise(6, 4, seed=seed) for seed, name in enumerate(names)}
        | {name: noise(1, seed=seed) for seed, name in enumerate(gates)}
        | {f"{layer}.fused": noise(12, 4, seed=layer) for layer in range(5)}
    )


def test_sub_stacks_and_fused_tensors(tmp_path: Path) -> None:
    weights = parts()
    found = load_parameters(write(tmp_path, weights), SHAPES, TABLE)
    for row, layer in enumerate((0, 1, 4)):
        np.testing.assert_array_equal(found["own"][row], weights[f"{layer}.own"].numpy().T)
    for row, layer in enumerate((3, 2)):
        np.testing.assert_array_equal(found["cross"][row], weights[f"{layer}.cross"].numpy().T)
    np.testing.assert_array_equal(found["gate"][2:4], [weights["2.other_gate"], weights["3.gate"]])
    fused = weights["3.fused"].numpy()
    np.testing.assert_array_equal(found["query"][3][:, 1, 2], fused[5])
    np.testing.assert_array_equal(found["value"][3][:, 4], fused[6 + 4])


def test_what_is_written_is_what_was_read(tmp_path: Path) -> None:
    weights = {name: value.to(torch.bfloat16) for name, value in parts().items()}
    found = load_parameters(write(tmp_path, weights), SHAPES, TABLE, dtype=ml_dtypes.bfloat16)
    (tmp_path / "again").mkdir()
    save_parameters(tmp_path / "again" / "model.safetensors", found, TABLE)
    before, after = TensorFolder(tmp_path), TensorFolder(tmp_path / "again")
    assert set(before.entries) == set(after.entries)
    assert all(before.read(name).tobytes() == after.read(name).tobytes() for name in before.entries)
    again = load_parameters(after, SHAPES, TABLE, dtype=ml_dtypes.bfloat16)
    assert all(np.array_equal(found[path], again[path]) for path in SHAPES)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({0: Key("{layer}.own", "own", LINEAR, layers=(0, 1), rows=(0, 1))}, ["unknown tensor '4.own'"]),
        ({2: Key("{layer}.gate", "gate", layers=(1, 3), rows=(0, 3))}, ["gate is set more than once"]),
        ({1: Key("{layer}.cross", "cross", LINEAR, layers=(3, 5), rows=(0, 1))}, ["'5.cross' is missing", "'2.cross'"]),
        ({5: Key("{layer}.fused", "value", LINEAR, part=(0, 2))}, ["'3.fused' is read by 2 keys"]),
        ({5: Key("{layer}.fused", "value", LINEAR, part=(1, 3))}, ["'3.fused' is read by 2 keys"]),
        ({4: Key("{layer}.fused", "query", "(h e) d -> d h e", {"h": 5}, part=(0, 2))}, ["(12, 4)", "query"]),
    ],
)
def test_key_tables_that_leave_something_out(tmp_path: Path, change: dict[int, Key], named: list[str]) -> None:
    table = [change.get(number, key) for number, key in enumerate(TABLE)]
    said = refusal(write(tmp_path, parts()), SHAPES, *table)
    assert all(part in said for part in named), said


def test_rows_that_no_tensor_sets(tmp_path: Path) -> None:
    files = write(tmp_path, {"0.a": noise(3), "2.a": noise(3)})
    assert "a has rows that no tensor sets" in refusal(files, abstract(a=(3, 3)), Key("{layer}.a", "a", layers=(0, 2)))


def test_a_fused_tensor_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    found = load_parameters(write(tmp_path, parts()), SHAPES, TABLE)
    with pytest.raises(CheckpointError, match=r"'0\.fused' has 2 parts"):
        save_parameters(tmp_path / "again.safetensors", found, TABLE[:-1])
    assert not list(tmp_path.glob("*again*"))


# --- identity --------------------------------------------------------------------------------------------------------


def digest_of(files: TensorFolder, keys: list[Key], **shapes: tuple[int, ...]) -> str:
    return read_parameters(files, abstract(**shapes), keys)[1]


def test_every_number_counts_wherever_it_stands(tmp_path: Path) -> None:
    weights = {"a": noise(2500, 1000), "b": noise(6, 5), "c": noise(), "d": noise(7)}
    keys = [Key("a", "a", LINEAR), Key("b", "x", part=(0, 2)), Key("b", "y", part=(1, 2)), Key("c", "c"), Key("d", "d")]
    shapes = {"a": (1000, 2500), "x": (3, 5), "y": (3, 5), "c": (), "d": (7,)}

    def digest(name: str, *shards: Weights) -> str:
        (tmp_path / name).mkdir()
        return digest_of(write(tmp_path / name, *shards), keys, **shapes)

    def nudged(tensor: str, place: int) -> Weights:
        changed = {name: value.clone() for name, value in weights.items()}
        bits = changed[tensor].view(-1).view(torch.int32)
        bits[place] ^= 1
        return changed

    whole = digest("whole", weights)
    spread = [{"d": weights["d"]}, {"b": weights["b"], "a": weights["a"]}, {"c": weights["c"]}]
    assert digest("spread", *spread) == whole
    marks = {
        whole,
        digest("half", {**weights, "d": weights["d"].half()}),
        digest("swapped", {**weights, "b": -weights["b"]}),
    }
    for number, (tensor, place) in enumerate(
        [("a", 0), ("a", 1_234_567), ("a", 2_499_999), ("b", 29), ("c", 0), ("d", 3)]
    ):
        marks.add(digest(str(number), nudged(tensor, place)))
    assert len(marks) == 9


# --- what is refused ------------------------------------------------------------------------------------------------


def test_tensors_of_other_numbers(tmp_path: Path) -> None:
    whole = torch.arange(6)
    files = write(tmp_path, {"a": noise(6), "b": whole, "tied": whole.bool(), "buffer": whole + 1, "c": noise(5)})
    keys = [Key("a", "a"), Key("b", "b"), Key("tied", "a", copy=True), Key("c", "c")]
    shapes, ignored = abstract(a=(6,), b=(6,), c=(6,)), ["buffer"]
    with pytest.raises(CheckpointError) as caught:
        load_parameters(files, shapes, keys, unused=ignored)
    for part in ("'b' holds I64", "'tied' holds BOOL", "'c' has shape (5,)"):
        assert part in str(caught.value)
    assert "buffer" not in str(caught.value)
    with pytest.raises(CheckpointError, match=r"'b' cannot be read: it holds I64"):
        files.read("b")


@pytest.mark.parametrize(
    ("other", "differs"),
    [
        (lambda weight: weight.clone(), False),
        (lambda weight: weight.double(), False),
        (lambda weight: weight.index_fill(0, torch.tensor([2999]), 0.5), True),
        (lambda weight: weight[:-1].clone(), True),
    ],
    ids=["same", "same in another format", "last row", "shape"],
)
def test_tied_tensors(tmp_path: Path, other: Any, differs: bool) -> None:
    weight = noise(3000, 1000)  # more than is compared at a time
    files = write(tmp_path, {"a": weight, "b": other(weight)})
    keys = [Key("a", "a"), Key("b", "a", copy=True)]
    if differs:
        assert "'b' differs from 'a'" in refusal(files, abstract(a=(3000, 1000)), *keys)
    else:
        np.testing.assert_array_equal(load_parameters(files, abstract(a=(3000, 1000)), keys)["a"], weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("stored", FORMATS, ids=str)
def test_numbers_that_are_none_are_refused_by_tensor(tmp_path: Path, stored: torch.dtype, value: float) -> None:
    largest = torch.finfo(stored).max
    good, bad, fused = (noise(*shape).to(stored) for shape in ((3, 4), (3100, 1500), (6, 2)))
    good[0, 0], bad[3099, 7], fused[5, 1] = largest, value, value
    files = write(tmp_path, {"good": good, "bad": bad, "fused": fused})
    keys = [
        Key("good", "good"),
        Key("bad", "bad", LINEAR),
        Key("fused", "x", part=(0, 2)),
        Key("fused", "y", part=(1, 2)),
    ]
    shapes = abstract(good=(3, 4), bad=(1500, 3100), x=(3, 2), y=(3, 2))
    with pytest.raises(CheckpointError, match=r"NaN or infinite numbers in tensor 'bad'; tensor 'fused'; copy"):
        on_the_host(files, shapes, keys, dtype=np.float64)
    on_the_host(files, abstract(good=(3, 4)), keys[:1], unused=["bad", "fused"], dtype=np.float64)  # are not read


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_numbers_of_eight_bits_are_refused(tmp_path: Path, stored: torch.dtype) -> None:
    files = write(tmp_path, {"a": noise(3).to(stored)})
    assert re.search(
        r"'a' holds F8_\w+, no floating-point numbers of 16", refusal(files, abstract(a=(3,)), Key("a", "a"))
    )


def test_everything_wrong_with_the_files_at_once(tmp_path: Path) -> None:
    write(tmp_path, *({f"{number}": noise(5), f"{number}b": noise(5)} for number in range(5)))
    for number in (1, 3):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    save_file({"0": noise(5), "4": noise(5)}, tmp_path / "4.safetensors")
    with pytest.raises(CheckpointError) as caught:
        TensorFolder(tmp_path)
    for part in ("1.safetensors cannot be read", "3.safetensors cannot", "'0' is in more", "promises tensor '4b'"):
        assert part in str(caught.value), part
    for part in ("2.safetensors", "'2b'", "'1b'"):
        assert part not in str(caught.value), part


def test_all_missing_shards_are_named(tmp_path: Path) -> None:
    write(tmp_path, *({str(number): noise(2)} for number in range(4)))
    (tmp_path / "1.safetensors").unlink()
    (tmp_path / "2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"missing .*1\.safetensors, .*2\.safetensors; copy or download"):
        TensorFolder(tmp_path)


@pytest.mark.parametrize("file", [3, "../other/model.safetensors", "/model.safetensors", None, ["0.safetensors"]])
def test_an_index_of_strange_files(tmp_path: Path, file: Any) -> None:
    write(tmp_path, {"a": noise(2)}, {"b": noise(2)})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "0.safetensors", "b": file}}))
    with pytest.raises(CheckpointError, match=re.escape(str(index))):
        TensorFolder(tmp_path)


def damaged(header: dict[str, Any] | bytes, length: int = 0) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (length or len(text)).to_bytes(8, "little") + text + bytes(8)


@pytest.mark.parametrize(
    "content",
    [
        damaged(b"{not JSON"),
        damaged(b"[]"),
        damaged({}, length=10**15),
        damaged({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}),
        damaged({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}),
        damaged({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}),
        damaged({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}),
        damaged({"a": {"dtype": "F33", "shape": [2], "data_offsets": [0, 8]}}),
        damaged({"a": {"dtype": "F32", "shape": [2]}}),
        damaged({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}),
    ],
    ids=["header", "list", "length", "outside", "shape", "backwards", "hole", "format", "no offsets", "negative"],
)
def test_corrupt_headers(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read.*truncated or corrupt"):
        TensorFolder(tmp_path)


def test_the_hub_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(error: Exception) -> str:
        def download(*_: Any, **__: Any) -> str:
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        with pytest.raises(CheckpointError, match="some/model is neither in the Hugging Face cache") as caught:
            find_folder("some/model")
        return str(caught.value)

    assert "https://huggingface.co/some/model" in refuse(GatedRepoError.__new__(GatedRepoError))
    assert "the line broke" in refuse(RuntimeError("the line broke\nin two"))
    assert "TimeoutError" in refuse(TimeoutError())


# --- memory ---------------------------------------------------------------------------------------------------------


def test_the_parameters_are_the_memory_that_was_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, addresses, put = write(tmp_path, {"a": noise(300, 500), "b": noise(3)}), set(), jax.device_put

    def place(array: np.ndarray) -> jax.Array:
        addresses.add(array.ctypes.data)
        return put(array)

    monkeypatch.setattr(jax, "device_put", place)
    found = load_parameters(files, abstract(a=(500, 300), b=(3,)), [Key("a", "a", LINEAR), Key("b", "b")])
    assert {leaf.unsafe_buffer_pointer() for leaf in found.values()} == addresses and len(addresses) == 2


MEASURE = """
import sys
from pathlib import Path
import jax, ml_dtypes
from jaxid.checkpoints.tensors import TensorFolder, read_parameters
from jaxid.nn.keys import LINEAR, Key

def memory(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

jax.block_until_ready(jax.device_put(0.0))
shapes = {"a": (4, 4096, 4000), "b": (4, 4000, 4000), "head": (12000, 2000)}
abstract = {path: jax.ShapeDtypeStruct(shape, ml_dtypes.bfloat16) for path, shape in shapes.items()}
keys = [Key("{layer}.a", "a", LINEAR), Key("{layer}.b", "b"), Key("head", "head")]
files, before = TensorFolder(Path(sys.argv[1])), memory("VmRSS")
found = jax.block_until_ready(read_parameters(files, abstract, keys, dtype=ml_dtypes.bfloat16)[0])
assert sum(leaf.nbytes for leaf in found.values()) == int(sys.argv[2])
print(memory("VmHWM") - before)
"""


def test_loading_needs_little_more_memory_than_the_parameters(tmp_path: Path) -> None:
    block = torch.from_numpy(np.random.default_rng(0).integers(0, 0x7F80, 4096 * 4000, np.uint16)).view(torch.bfloat16)
    shards = [
        {f"{layer}.a": block.reshape(4000, 4096), f"{layer}.b": block[: 4000 * 4000].reshape(4000, 4000).clone()}
        for layer in range(4)
    ]
    shards[1]["head"] = torch.cat([block, block])[: 12000 * 2000].reshape(12000, 2000)
    write(tmp_path, *shards)
    size = sum(weight.nbytes for weights in shards for weight in weights.values())
    command = [sys.executable, "-c", MEASURE, str(tmp_path), str(size)]
    grown = int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    assert size <= grown + (16 << 20), (grown, size)
    assert grown <= 1.15 * size + (16 << 20), (grown, size)
