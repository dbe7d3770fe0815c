"""The checker of types at run time: ``pytest -p tests.typed --jaxtyping-packages=mamba_ioi,tests.typed.check``."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float too
