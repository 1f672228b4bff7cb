"""What a training run records about itself survives kills, and changes nothing else."""

import contextlib
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jaxid
from jaxid.errors import OutputError
from jaxid.train.loop import Stage
from jaxid.zoo.recipes import Recipe, RecipeConfig
from jaxid.zoo.records import PACKAGES, RECORD_FILE, read_record, recorded


def sessions(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / RECORD_FILE).read_text())["sessions"]


def test_sessions_are_summed(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None
    with pytest.raises(KeyboardInterrupt), recorded(tmp_path):
        time.sleep(0.15)
        raise KeyboardInterrupt
    broken_off = read_record(tmp_path)
    assert broken_off is not None and not broken_off["finished"] and broken_off["resumed"] == 0
    (tmp_path / "state" / "40").mkdir(parents=True)
    with recorded(tmp_path):
        time.sleep(0.15)
    record = read_record(tmp_path)
    assert record is not None and record["finished"] and record["resumed"] == 1
    assert (record["first_step"], sessions(tmp_path)[1]["first_step"]) == (0, 40)
    assert 0.3 <= record["seconds"] < 3
    assert record["start"] == broken_off["start"] <= record["end"] and record["end"].endswith("Z")
    assert set(record["versions"]) == {"jaxid", "python", *PACKAGES}
    assert record["versions"]["jax"] == jax.__version__ and record["versions"]["jaxid"] == jaxid.__version__
    assert record["cores"] >= 1
    before = (tmp_path / RECORD_FILE).read_bytes()
    with recorded(tmp_path):  # nothing is left to do
        pass
    assert (tmp_path / RECORD_FILE).read_bytes() == before


def test_a_killed_run_has_its_time_until_the_last_update(tmp_path: Path) -> None:
    with recorded(tmp_path, update_every=0.05):
        for _ in range(100):
            time.sleep(0.05)
            if (seconds := sessions(tmp_path)[0]["seconds"]) >= 0.1:
                break
        assert 0.1 <= seconds < 5
        assert json.loads((tmp_path / RECORD_FILE).read_text())["finished"] is False


@pytest.mark.parametrize("text", ["{", "[]", '{"finished": true, "sessions": [{"seconds": 1}]}'])
def test_damaged_records_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / RECORD_FILE).write_text(text)
    with pytest.raises(OutputError, match=RECORD_FILE):
        read_record(tmp_path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    steps: int = 3
    learning_rate: float = 0.1
    batch_size: int = 1
    warmup_steps: int = 0
    weight_decay: float = 0.0


def recipe(finish: Any) -> Recipe[Config]:
    """A recipe that trains one number."""

    def stages(_: nnx.GraphDef, config: Config) -> list[Stage]:
        optimizer = config.optimizer(config.learning_rate, config.steps, weight_decay=0.0)

        def loss(parameters: Any, batch: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            value = (parameters["network"] * batch["x"]).sum()
            return value, {"loss": value}

        return [
            Stage(
                name="only",
                first=0,
                steps=config.steps,
                loss=loss,
                batch=lambda step: {"x": jnp.full((1,), step, jnp.float32)},
                optimizer=optimizer,
            )
        ]

    return Recipe(
        config=Config,
        start=lambda seed: (nnx.graphdef(nnx.Module()), {"network": jnp.zeros(2)}),
        stages=stages,
        columns=("step", "stage", "loss"),
        vocabulary=1,
        write=lambda folder, parameters: None,
        finish=finish,
    )


def test_recipes_record_their_runs(tmp_path: Path) -> None:
    def fails(*_: object) -> None:
        raise OutputError("no evaluation")

    def train(finish: Any, **options: Any) -> None:
        with jax.numpy_dtype_promotion("standard"):  # optax is not written for strict promotion
            recipe(finish).train(tmp_path, Config(), save_every=2, progress=False, **options)

    with contextlib.suppress(OutputError):
        train(fails)
    record = read_record(tmp_path)
    assert record is not None and not record["finished"]
    train(lambda *_: None)
    record = read_record(tmp_path)
    assert record is not None and record["finished"] and record["resumed"] == 1
    assert [session["first_step"] for session in sessions(tmp_path)] == [0, 3]
    settings = json.loads((tmp_path / "run.json").read_text())
    assert settings == dataclasses.asdict(Config()) | {"vocabulary": 1}
    train(lambda *_: None, restart=True)
    record = read_record(tmp_path)
    assert record is not None and record["resumed"] == 0 and record["first_step"] == 0
