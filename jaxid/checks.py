"""What is asked of numbers that users hand in, before anything is computed with them."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np

from jaxid.errors import InputError, JaxidError

_SEEDS = 2**32


@dataclasses.dataclass(frozen=True)
class Range:
    """Bounds of an option, as metadata of its type: `Annotated[int, Range(1)]`; both bounds are allowed values."""

    low: float
    high: float = float("inf")


Count = Annotated[int, Range(1)]
"""An option that counts something."""


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
    """Refuses options of a dataclass that its types do not allow, see `check_values`.

    Raises:
        InputError: naming the field.
    """
    check_values(type(options), {field.name: getattr(options, field.name) for field in dataclasses.fields(options)})


def check_values(declared: Any, values: Mapping[str, Any]) -> None:
    """Refuses values that their types do not allow.

    These are NaN and infinity, a `seed` that random generators do not take, a value that is not among those of its
    `Literal`, and a number outside its `Range`.

    Args:
        declared: a class or function whose annotations name the types.
        values: by name; sequences are checked entry by entry, None is passed over.

    Raises:
        InputError: naming the value.
    """
    types = typing.get_type_hints(declared, include_extras=True)
    for name, value in values.items():
        choices, bounds = _allowed(types[name])
        if name == "seed" and value is not None:
            check_seed(value)
        for entry in value if isinstance(value, tuple | list) else (value,):
            if isinstance(entry, float):
                check_finite(name, entry)
            if entry is None:
                continue
            if choices and entry not in choices:
                raise InputError(f"{name} is one of {', '.join(map(str, choices))}, not {entry!r}.")
            if bounds and not bounds.low <= entry <= bounds.high:
                limit = f"{bounds.low:g} or more" if entry < bounds.low else f"at most {bounds.high:g}"
                raise InputError(f"{name} must be {limit}, not {entry}.")


def _allowed(kind: Any) -> tuple[tuple[Any, ...], Range | None]:
    """The choices and bounds that a type names, wherever in it they stand."""
    choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    bounds = next((one for one in getattr(kind, "__metadata__", ()) if isinstance(one, Range)), None)
    for part in () if choices else typing.get_args(kind):
        inner, limits = _allowed(part)
        choices, bounds = choices or inner, bounds or limits
    return choices, bounds
