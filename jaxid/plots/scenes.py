"""Contact sheets of scenes with a model's answers."""

import textwrap
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from matplotlib import rc_context
from matplotlib.figure import Figure

from jaxid.plots.style import GREEN, STYLE, VERMILLION, About, captioned, check_shapes, new_figure


@rc_context(STYLE)
def scenes_with_answers(
    pictures: UInt8[np.ndarray, "N Y X 3"],
    questions: Sequence[str],
    answers: Sequence[str],
    truths: Sequence[str],
    *,
    about: About | None = None,
) -> Figure:
    """A contact sheet, four scenes to a row: each with its question and the model's answer.

    A right answer has a green tick; a wrong one a red cross and the truth after it.

    Args:
        pictures: the scenes; a dozen fit well.
        questions: one a picture.
        answers: what the model answered.
        truths: the right answers.
        about: what was measured on what.
    """
    check_shapes(
        pictures=(pictures, "N Y X 3"), questions=(questions, "N"), answers=(answers, "N"), truths=(truths, "N")
    )
    columns = min(4, len(pictures))
    rows = -(-len(pictures) // columns)
    figure = new_figure(1.85 * columns, 2.5 * rows)
    items = zip(pictures, questions, answers, truths, strict=True)
    for number, (picture, question, answer, truth) in enumerate(items, start=1):
        axes = figure.add_subplot(rows, columns, number)
        axes.imshow(picture, interpolation="lanczos")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        # A model may answer "$", which does not begin a formula, or only with blanks.
        axes.set_title(textwrap.fill(question, 27), fontsize=7.5, pad=5, parse_math=False, loc="left")
        right, shown = answer == truth, " ".join(answer.split()) or "nothing"
        verdict = f"✓ {shown}" if right else f"✗ {shown} (truth: {truth})"
        color = GREEN if right else VERMILLION
        axes.set_xlabel(verdict, color=color, weight="bold", labelpad=4, parse_math=False, loc="left")
    right_ones = sum(answer == truth for answer, truth in zip(answers, truths, strict=True))
    return captioned(figure, about, f"{right_ones} of these {len(pictures)} answered correctly")
