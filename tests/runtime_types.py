"""The decorator that checks annotations at run time; `conftest.py` applies it to every function of jaxid."""

from beartype import BeartypeConf, beartype

# As for static checkers, an int is accepted where a float is expected.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
