"""Compares pooled cosine and dense maps on the published benchmarks ([DCSM] arXiv 2503.08723, section 6)."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import numpy as np
from jaxtyping import Float

from jaxid import jobs, plots
from jaxid.checkpoints.encoders import load_encoder
from jaxid.checks import Count
from jaxid.data.files import write_csv
from jaxid.dcsm import benchmarks, evaluate, orders
from jaxid.dcsm.benchmarks import Question
from jaxid.dcsm.embedding import Pictures, Texts, embed_images
from jaxid.dcsm.own_scorers import find_scorer, is_kind, own_scorer
from jaxid.dcsm.scoring import Scorer
from jaxid.errors import DataError, InputError
from jaxid.experiments.base import Command, write_config
from jaxid.experiments.session import Columns
from jaxid.families.base import Encoder
from jaxid.io import ensure_output_folder, write_json, write_text

Asked = tuple[str, Question]
"""Name of a benchmark, and one of its questions."""

METHODS = {"cosine": "pooled cosine", "dcsm": "dense maps"}

Results = Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]]
"""Numbers by encoder, method and benchmark."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationSummary:
    """Summary of an evaluation.

    Attributes:
        models: accuracy with its 95 % interval, number of questions, and chance, by encoder, method and benchmark; and
            by kinds of questions, and of pairs and sets of questions, where a benchmark has them, see
            `jaxid.dcsm.evaluate.summary`.
        skipped: items that could not be used, and the reasons.
        unknown_words: words that are missing in an encoder's vocabulary, and in how many questions they occur.
    """

    models: Results
    skipped: Sequence[Mapping[str, str]]
    unknown_words: Mapping[str, Mapping[str, int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateScorers(Command[EvaluationSummary]):
    """Compare pooled cosine and dense maps on the published benchmarks.

    Attributes:
        data: folder of benchmarks in their published layouts.
        out: folder for parts, tables and figure. A run that it holds is resumed if its settings agree.
        model: encoders.
        scorer: scorers, each used for the encoder that it was trained with; or cnn or mlp, for every encoder's own one
            of that kind; an encoder's default one by default.
        benchmark: names of benchmarks; all that the folder holds by default.
        rewrite: reword captions as the published evaluation does.
        seed: of the wrong word orders that are drawn for captions of COCO-Order and Flickr30k-Order.
        reference_bugs: reproduce the bugs of the published code: if captions share the highest score, the first one is
            chosen; BLIP compares class tokens that are not projected; SigLIP's captions are padded to the longest of
            their question alone.
        group: maps that are standardised together: those of a question, as published, or none.
        batch_size: questions answered together.
        mesh: devices that share the work, such as data=8; auto takes all of them; one device by default.
        restart: discard the run that the folder holds, and begin anew.
        skip_bad: skip rows and pictures that cannot be used, and list them.
        progress: show progress bars, on terminals.
    """

    name: ClassVar[str] = "dcsm eval"

    data: Path
    out: Path
    model: tuple[str, ...] = ("tiny-clip",)
    scorer: tuple[Path, ...] = ()
    benchmark: tuple[str, ...] = ()
    rewrite: bool = True
    seed: int = 0
    reference_bugs: bool = False
    group: Literal["row", "pair"] = "row"
    batch_size: Count = 64
    mesh: str | None = None
    restart: bool = False
    skip_bad: bool = False
    progress: bool = True

    def run(self) -> EvaluationSummary:
        """Answers all questions with every model; writes one table (CSV, Markdown, figure) and the summary.

        Raises:
            InputError: for a scorer that belongs to none of the encoders.
            DataError: if benchmarks cannot be read.
            CheckpointError: if a scorer or an encoder cannot.
            OutputError: if the folder holds another run, is in use, or cannot be written to.
        """
        if self.reference_bugs:
            from jaxid.experiments.reference import with_bugs  # it knows all experiments

            return with_bugs(self)._run()
        return self._run()

    def _run(self) -> EvaluationSummary:
        ensure_output_folder(self.out)
        bad: list[tuple[str, DataError]] | None = [] if self.skip_bad else None
        asked = self.asked(bad)
        chances = {(name, question.key): 1 / len(question.captions) for name, question in asked}
        scorers = self.scorers()
        models, unknown = {}, {}
        skipped = [{"item": item, "reason": str(error)} for item, error in bad or ()]
        for model in self.model:
            encoder = load_encoder(model, mesh=self.mesh)
            done = self._answered(encoder, scorers[model], asked)
            columns = done.table.to_pydict()
            keys = zip(columns["benchmark"], columns["question"], strict=True)
            models[model] = evaluate.summary(columns | {"chance": [chances[key] for key in keys]})
            lost = ({word for text in own.captions for word in encoder.processor.unknown(text)} for _, own in asked)
            unknown[model] = dict(Counter(word for own in lost for word in sorted(own)))
            skipped += [{"item": f"{model}: {bad.key}", "reason": bad.reason} for bad in done.skipped]
        write_config(self, self.out)
        _write_tables(self.out, models)
        summary = EvaluationSummary(models=models, skipped=skipped, unknown_words=unknown)
        write_json(self.out / "summary.json", summary)
        return summary

    def report(self, result: EvaluationSummary) -> Iterator[str]:
        """The table, and how many items were skipped."""
        yield (self.out / "table.md").read_text(encoding="utf-8").rstrip()
        if result.skipped:
            yield f"{len(result.skipped)} skipped; see {self.out / 'summary.json'}"

    def asked(self, bad: list[tuple[str, DataError]] | None = None) -> list[Asked]:
        """All questions; those about one picture are adjacent, so that it is encoded once.

        Args:
            bad: collects the items that cannot be used; by default, they are errors.
        """
        # Captions are reworded later, since the cosine and the scorer are given different wordings.
        read = benchmarks.read(self.data, self.benchmark or None, rewrite=False, bad=bad, seed=self.seed)
        found = [(name, question) for name, questions in read.items() for question in questions]
        return sorted(found, key=lambda entry: (str(entry[1].picture), str(entry[1].crop), entry[0], entry[1].key))

    def scorers(self) -> dict[str, Scorer | None]:
        """Each encoder's scorer: the given one, its own one of the given kind, or else its default one."""
        kinds = [path for path in self.scorer if is_kind(path)]
        given = {path: Scorer.load(path) for path in self.scorer if path not in kinds}
        for path, scorer in given.items():
            if scorer.encoder not in ("", *self.model):
                raise InputError(f"{path} was trained on {scorer.encoder}, which is none of {', '.join(self.model)}.")
        found: dict[str, Scorer | None] = {}
        for model in self.model:
            # The authors' files do not name the encoder.
            own = [path for path, scorer in given.items() if scorer.encoder in (model, "")] + kinds
            if len(own) > 1:
                raise InputError(f"{own[0]} and {own[1]} are both for {model}; give one of them.")
            if own:
                found[model] = given.get(own[0]) or find_scorer(model, own[0])
            else:
                found[model] = None if own_scorer(model) is None else find_scorer(model)
        return found

    def _answered(self, encoder: Encoder, scorer: Scorer | None, asked: Sequence[Asked]) -> jobs.Finished:
        """One encoder's answers, computed by a job in a separate folder."""
        out = self.out / "models" / encoder.name.replace("/", "--")
        settings = {
            "model": encoder.name,
            "fingerprint": encoder.fingerprint,
            "scorer": None if scorer is None else _digest(scorer),
            "rewrite": self.rewrite,
            "group": self.group,
            "seed": self.seed,
            "tagged_words": any(name in benchmarks.ORDERS for name, _ in asked) and orders.tagger() is not None,
            "reference_bugs": self.reference_bugs,
        }
        done = jobs.run(
            out,
            settings=settings,
            items=asked,
            key=lambda entry: f"{entry[0]}/{entry[1].key}",
            read=lambda chunk: self.opened(encoder, scorer, chunk),
            compute=lambda opened: self.compute(encoder, scorer, opened),
            chunk_size=self.batch_size,
            restart=self.restart,
            skip_bad=self.skip_bad,
            progress=self.progress,
            unit="question",
        )
        jobs.write_merged(out, done)
        return done

    def compute(self, encoder: Encoder, scorer: Scorer | None, opened: "Opened") -> Columns:
        """Answers to some questions."""
        words, shown, encoded = opened.words, opened.shown, embed_images(encoder, opened.pixels)
        texts, told = evaluate.embedded(encoder, words)
        columns: Columns = {
            "model": [encoder.name] * len(opened.asked),
            "benchmark": [name for name, _ in opened.asked],
            "question": [question.key for _, question in opened.asked],
            "kind": [question.kind for _, question in opened.asked],
            "scene": [question.scene for _, question in opened.asked],
        }
        scores = {"cosine": self.cosines(encoder, opened, encoded, texts)}
        if scorer is not None:
            options: Any = {"group": self.group, "mesh": encoder.mesh}
            scores["dcsm"] = evaluate.map_scores(scorer, encoded, told, words, shown, **options)
        return {
            **columns,
            **{method: self.correct(found) for method, found in scores.items()},
            **{name: column for method, found in scores.items() for name, column in _columns(method, found)},
        }

    correct: ClassVar[Callable[[evaluate.Scores], np.ndarray]] = staticmethod(evaluate.is_highest)
    """Which questions are answered correctly."""

    def cosines(self, encoder: Encoder, opened: "Opened", pictures: Pictures, captions: Texts) -> evaluate.Scores:
        """Cosines of pooled vectors, for every question."""
        del encoder
        return evaluate.cosines(pictures.pooled, captions.pooled, opened.words, opened.shown)

    def opened(self, encoder: Encoder, scorer: Scorer | None, asked: Sequence[Asked]) -> "Opened":
        """Questions with their pictures, each of which is opened once."""
        pictures: dict[object, int] = {}
        shown = [pictures.setdefault((question.picture, question.crop), len(pictures)) for _, question in asked]
        opened = [benchmarks.load_picture(asked[shown.index(index)][1]) for index in range(len(pictures))]

        def worded(flat: bool) -> list[tuple[str, ...]]:
            if not self.rewrite:
                return [question.captions for _, question in asked]
            return [
                tuple(benchmarks.published_caption(name, caption, flat=flat) for caption in question.captions)
                for name, question in asked
            ]

        pixels = encoder.processor.pixels(opened)
        words = evaluate.Wording.read(encoder, worded(False), scorer, worded(True))
        return Opened(asked=asked, pixels=pixels, shown=shown, words=words)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Opened:
    """Questions as they were read.

    Attributes:
        asked: the questions.
        pixels: each picture, once.
        shown: index of the picture of every question.
        words: their captions.
    """

    asked: Sequence[Asked]
    pixels: Float[np.ndarray, "N C Y X"]
    shown: Sequence[int]
    words: evaluate.Wording


def _told(entry: Mapping[str, Any]) -> str:
    """The accuracy of a benchmark in words."""
    told = "{accuracy:.4f} ({low:.3f} to {high:.3f}, n = {questions})".format(**entry)
    for name in ("pair", "set"):
        if f"{name}s" in entry:
            told += f"; {name}s {entry[f'{name}_accuracy']:.4f} (n = {entry[f'{name}s']})"
    return told


def _columns(method: str, scores: evaluate.Scores) -> Iterator[tuple[str, Float[np.ndarray, "N"]]]:
    """Columns of scores: of the correct caption, `{method}_0`, and of the others; NaN where a question has fewer."""
    for index in range(max(len(own) for own in scores)):
        values = [own[index] if index < len(own) else np.nan for own in scores]
        yield f"{method}_{index}", np.array(values, np.float32)


def _digest(scorer: Scorer) -> str:
    digest = hashlib.sha256(f"{scorer.vocabulary} {scorer.placement}".encode())
    for leaf in jax.tree.leaves(scorer):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def _write_tables(out: Path, models: Results) -> None:
    """Writes `table.csv`, `table.md` and the figure: a row for each model and method, a column for each benchmark.

    Accuracies by kinds of questions, if there are several, go to `kinds.csv`, a row each.
    """
    rows = [(model, METHODS[method], found) for model, methods in models.items() for method, found in methods.items()]
    columns = list(dict.fromkeys(name for _, _, found in rows for name in found))
    known = {name: [found[name] for _, _, found in rows if name in found] for name in columns}
    chances = [known[name][0]["chance"] for name in columns]
    parts = ("accuracy", "low", "high", "questions")
    cells = [(name, part) for name in columns for part in known[name][0] if part != "kinds"]
    heads = [name if part == "accuracy" else f"{name} {part.replace('_', ' ')}" for name, part in cells]
    table = [["model", "method", *heads]]
    for model, method, found in rows:
        numbers = (f"{found[name][part]:.6g}" if name in found else "" for name, part in cells)
        table.append([model, method, *numbers])
    write_csv(out / "table.csv", table)

    kinds = [
        [model, method, name, kind, *(f"{entry[part]:.6g}" for part in parts)]
        for model, method, found in rows
        for name, own in found.items()
        for kind, entry in own.get("kinds", {}).items()
    ]
    if kinds:
        write_csv(out / "kinds.csv", [["model", "method", "benchmark", "kind", *parts], *kinds])

    lines = [["model", "method", *columns], ["---"] * (2 + len(columns))]
    for model, method, found in rows:
        lines.append([model, method, *(_told(found[name]) if name in found else "" for name in columns)])
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    guesses = ", ".join(f"{name} {chance:.3g}" for name, chance in zip(columns, chances, strict=True))
    note = f"Shares of correct answers, 95 % Wilson intervals, n questions. Chance: {guesses}."
    write_text(out / "table.md", f"{text}\n{note}\n")

    accuracy, low, high = (
        np.array([[found.get(name, {}).get(part, np.nan) for name in columns] for _, _, found in rows])
        for part in parts[:3]
    )
    figure = plots.benchmark_bars(
        [f"{model}, {method}" for model, method, _ in rows],
        [f"{name}\nn = {max(own['questions'] for own in known[name])}" for name in columns],
        accuracy,
        np.stack([low, high], axis=1),
        chance=chances,
        about=plots.About(model=", ".join(models)),
    )
    plots.save(figure, out / "table.png")
