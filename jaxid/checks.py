"""What is asked of numbers that users hand in, before anything is computed with them."""

import dataclasses
from typing import Any

import numpy as np

from jaxid.errors import InputError, JaxidError

_SEEDS = 2**32


def check_finite(what: str, value: Any, error: type[JaxidError] = InputError) -> None:
    """Refuses NaN and infinity.

    Args:
        what: names the value in the message, such as "strength".
        value: a number or an array on the host, of any floating type.
        error: the kind of error to raise.

    Raises:
        JaxidError: of the given kind, saying how many entries are not finite.
    """
    array = np.asarray(value)
    if array.dtype.kind == "V":  # bfloat16 and its kin, which NumPy's functions do not know
        array = array.astype(np.float32)
    bad = array.size - int(np.isfinite(array).sum())
    if bad and array.size == 1:
        raise error(f"{what} must be a finite number, not {array.reshape(-1)[0]}.")
    if bad:
        raise error(f"{what} must be finite, but {bad} of its {array.size} entries are NaN or infinite.")


def check_seed(seed: int) -> None:
    """Refuses a seed that random generators do not take.

    Raises:
        InputError: unless 0 <= seed < 2**32.
    """
    if not 0 <= seed < _SEEDS:
        raise InputError(f"the seed must be an integer from 0 to {_SEEDS - 1}, not {seed}.")


def check_options(options: Any) -> None:
    """Refuses NaN and infinity in any field of a dataclass, and a `seed` that random generators do not take.

    Args:
        options: the dataclass; fields that hold other things than numbers, or tuples of them, are passed over.

    Raises:
        InputError: naming the field.
    """
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name == "seed":
            check_seed(value)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float):
                check_finite(field.name, number)
