"""Short representations of dataclasses that hold arrays."""

import dataclasses
from typing import Any

_SMALL = 8
"""Vectors of integers up to this length are written out."""


def brief(self: Any) -> str:
    """The `__repr__` of a dataclass: its fields in their order, arrays by their dtype and shape."""
    fields = (field.name for field in dataclasses.fields(self) if field.repr)
    return f"{type(self).__name__}({', '.join(f'{name}={shown(getattr(self, name))}' for name in fields)})"


def shown(value: Any) -> str:
    """A value in a few words; arrays by their dtype and shape, long tuples by their first entries."""
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        parts = [shown(entry) for entry in value[:3]] + [f"… {len(value)} in all"] * (len(value) > 3)
        return f"({', '.join(parts)}{',' if len(value) == 1 else ''})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name!r}: {shown(entry)}' for name, entry in value.items())}}}"
    return _array(value) if hasattr(value, "shape") and hasattr(value, "dtype") else repr(value)


def _array(value: Any) -> str:
    """An array, a traced one, or a description of one."""
    if hasattr(value, "tolist") and value.size <= _SMALL and value.ndim <= 1 and value.dtype.kind in "iub":
        return repr(value.tolist())
    return f"{value.dtype}[{', '.join(map(str, value.shape))}]"
