"""The decorator that checks annotations while the tests run; `conftest.py` puts it on every function of jaxid."""

from beartype import BeartypeConf, beartype

# As for static checkers, an int will do where a float is asked for.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
