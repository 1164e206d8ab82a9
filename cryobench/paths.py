"""Where things are: the tables, notebooks and manifest that ship with the package, the cache, the data.

Nothing is created here; whoever writes makes the folder.
"""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def project_root() -> Path:
    """Folder that holds tables/, notebooks/, data/ and book/: the repository, or the package's copy."""
    package = Path(__file__).resolve().parent
    repository = package.parent
    # "tables" alone would not do: PyTables installs a folder of that name beside this package.
    if (repository / "pyproject.toml").is_file() and (repository / "tables").is_dir():
        return repository
    return package / "_share"


def shipped_dir() -> Path:
    """Committed records that fill tables where nothing was run: $CRYOBENCH_SHIPPED (for tests), or results/shipped."""
    chosen = os.environ.get("CRYOBENCH_SHIPPED")
    return Path(chosen).absolute() if chosen else project_root() / "results" / "shipped"


def cache_dir() -> Path:
    """$CRYOBENCH_CACHE, or the user's cache folder of this system."""
    chosen = os.environ.get("CRYOBENCH_CACHE")
    return Path(chosen).expanduser().absolute() if chosen else platformdirs.user_cache_path("cryobench")


def data_dir() -> Path:
    """Where downloads go: $CRYOBENCH_DATA, or ``data`` in the cache."""
    chosen = os.environ.get("CRYOBENCH_DATA")
    return Path(chosen).expanduser().absolute() if chosen else cache_dir() / "data"
