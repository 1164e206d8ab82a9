"""Finds the denoisers: every module of this folder that defines ``Method``, and third-party packages."""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from functools import cache
from importlib.metadata import entry_points

import cryobench.methods as folder
from cryobench.errors import CryobenchError
from cryobench.methods.base import Denoiser


@cache
def all_methods() -> dict[str, type[Denoiser]]:
    """Every method by name. Third-party classes join through the entry-point group ``cryobench.methods``."""
    found: dict[str, type[Denoiser]] = {}
    for module in pkgutil.iter_modules(folder.__path__):
        method = getattr(importlib.import_module(f"{folder.__name__}.{module.name}"), "Method", None)
        if method is not None:
            found[method.name] = method
    for point in entry_points(group="cryobench.methods"):
        try:
            method = point.load()
        except Exception as error:  # a broken plug-in must not take the others down
            warnings.warn(f"method {point.name} of {point.value} cannot be loaded: {error}", stacklevel=2)
        else:
            found.setdefault(method.name, method)
    return dict(sorted(found.items()))


def get_method(name: str) -> type[Denoiser]:
    """The method of that name. Raises CryobenchError naming the ones there are."""
    methods = all_methods()
    if name not in methods:
        raise CryobenchError(f"no method {name!r}; there are: {', '.join(methods)}")
    return methods[name]
