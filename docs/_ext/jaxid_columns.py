"""What the columns of every experiment's `table.parquet` hold; a test compares them with those that are written."""

COMMON = {
    "model": "name of the model",
    "item": "key of the item, a unique name: row of the file, picture, and what is asked",
    "image_id": "number of the picture",
    "subject": "object that the question is about",
    "object": "object that it is compared with",
    "relation": "true relation of the subject to the object: left, right, above or below",
    "axis": "horizontal (left, right) or vertical (above, below)",
    "layer": "decoder layer after which something is changed or read, from 0",
    "word": "answer word that the row is about",
    "control": "log-probability of the word without an edit",
    "control_correct": "log-probability of the correct word without an edit",
    "control_wrong": "log-probability of the wrong word without an edit",
    "correct": "whether the correct word is the more probable one without an edit",
}

COCO = ("image_id", "subject", "object", "relation", "axis")
STEERED = {
    "steered": "log-probability of the word under the edit",
    "change": "change of the log-probability: steered less control, or with the reference bugs the reverse",
}
SWAPPED = {
    "tokens": "whose activations are swapped: image, text, or words",
    "patched": "log-probability of the word after the swap",
    "intervened": "log-probability of the word for the changed picture or clip itself",
    "score": "0 as without the swap, 1 as for the changed picture or clip; no number where the change moves nothing",
}

COLUMNS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "belief-swap": (
        ("model", "item", *COCO, "layer", "control_correct", "control_wrong"),
        {
            "condition": "belief: the difference of two IDs is added; noise: noise of the same norm",
            "strength": "norm of the added vectors in units of the words' activations",
            "steered_correct": "log-probability of the correct word under the edit",
            "steered_wrong": "log-probability of the wrong word under the edit",
            "swapped": "whether the more probable of the two words changed",
            "control_verdict": "the answer without an edit: correct, wrong, or nonsense if it is neither word",
            "verdict": "the same of the answer under the edit",
            "control_text": "generated answer without an edit; empty if nothing was generated",
            "text": "generated answer under the edit",
        },
    ),
    "mirror-swap": (("model", "item", "layer", "word", "control"), SWAPPED),
    "attribute-swap": (("model", "item", "layer", "word", "control"), SWAPPED),
    "blank-image": (
        ("model", "item", *COCO, "layer", "control_correct", "control_wrong"),
        {
            "picture": "original, grey, or mean: the mean of all pictures",
            "swapped": "whether the belief about this picture changed when IDs were added",
            "swapped_by_noise": "the same with noise of the same norm",
            "subject_x": "place of the subject's word in the plane of the two ID axes, horizontally",
            "subject_y": "the same, vertically",
            "object_x": "place of the object's word, horizontally",
            "object_y": "the same, vertically",
        },
    ),
    "steer": (
        ("model", "item", "layer", "word", "control"),
        STEERED
        | {
            "x": "column of the cell that the subject is steered to, from 0",
            "y": "row of the cell, from 0",
            "place": "where the subject is, for the relations that are reported by it; else empty",
        },
    ),
    "steer-picture": (
        ("model", "item", "layer", "word", "control"),
        STEERED
        | {
            "subject_x": "column of the cell that the subject is steered to, from 0",
            "subject_y": "its row",
            "object_x": "column of the cell that the object is steered to",
            "object_y": "its row",
        },
    ),
    "depth": (
        ("model", "item", "layer", "word", "control"),
        STEERED
        | {
            "question": "height (above or below) or depth (front or behind)",
            "x": "column of the cell that the subject is steered to, from 0",
            "y": "row of the cell, from 0",
        },
    ),
    "deviation": (
        ("model", "item", *COCO, "layer", "control_correct", "control_wrong", "correct"),
        {
            "role": "subject or object: whose word is decoded",
            "name": "that object's name",
            "x": "decoded place, horizontally, in the coordinates of the two axes",
            "y": "decoded place, vertically",
            "true_x": "place of the box in the same coordinates, horizontally",
            "true_y": "the same, vertically",
            "box_x": "left edge of the box in pixels",
            "box_y": "upper edge of the box in pixels",
            "box_width": "width of the box in pixels",
            "box_height": "height of the box in pixels",
            "picture_width": "width of the picture in pixels",
            "picture_height": "height of the picture in pixels",
            "verdict": "the answer that counts: correct, wrong, or nonsense if it is neither word",
            "text": "generated answer; empty if nothing was generated",
            "gap": "distance of the two decoded places in the true direction; above 0 if they are the right way round",
            "true_gap": "distance of the two boxes in that direction",
            "margin": "gap less true gap",
        },
    ),
    "occlusion": (
        ("model", "item", *COCO, "correct"),
        {
            "variant": "index of the picture: 0 is the original, 1 has the subject blurred, 2 to 11 a box elsewhere",
            "kind": "original, object or random",
            "left": "left edge of the blurred box in pixels; in the original, that of the subject",
            "upper": "its upper edge",
            "right": "its right edge",
            "lower": "its lower edge",
            "logp_correct": "log-probability of the correct word for this picture",
            "logp_wrong": "log-probability of the wrong word",
            "sensitivity": "lowest log p(correct) with one of four boxes elsewhere blurred, less that of variant 1",
            "drop": "how far log p(correct) falls with the subject blurred",
            "random_drop": "how far it falls with a box elsewhere blurred, on average",
        },
    ),
    "temporal-swap": (
        ("model", "item", "layer", "word", "control"),
        SWAPPED | {"answer": "true answer: before or after"},
    ),
    "temporal-steer": (
        ("model", "item", "layer", "word", "control"),
        STEERED | {"frame": "frame that the second scene's words are steered to"},
    ),
}
"""Experiment -> columns that mean the same in all tables, and its own ones."""


def columns(experiment: str) -> dict[str, str]:
    """All columns of an experiment's table, explained."""
    common, own = COLUMNS[experiment]
    return {name: COMMON[name] for name in common} | own


def table(experiment: str) -> str:
    """The columns as a table in Markdown."""
    rows = [f"| `{name}` | {text} |" for name, text in columns(experiment).items()]
    return "\n".join(["| column | contents |", "| --- | --- |", *rows])
