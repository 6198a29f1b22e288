# cuda-bindings ships no types: `from cuda.bindings import driver` gives a module of which nothing is known.
from typing import Any

def __getattr__(name: str) -> Any: ...
