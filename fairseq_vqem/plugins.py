"""Models, losses and tasks of other packages, beside those that are registered here.

fairseq imports one package, that of ``--user-dir``. Further ones are named in an environment
variable, which every process inherits that a command starts, fairseq-train and fairseq-generate
among them; a recipe names them under ``plugins``. They are modules or packages on ``PYTHONPATH``
that register what they have with fairseq's own decorators when they are imported.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fairseq_vqem.errors import UserError

VARIABLE = "FAIRSEQ_VQEM_PLUGINS"  # names, separated by commas


def plugins() -> list[str]:
    """Names of those in use."""
    names = (name.strip() for name in os.environ.get(VARIABLE, "").split(","))
    return list(dict.fromkeys(name for name in names if name))


def use_plugins(names: Sequence[str]) -> None:
    """Import the modules ``names`` here and in every process that this one starts from now on.

    Raises:
        UserError: one cannot be found; an error within one is its own and stays as it is.
    """
    os.environ[VARIABLE] = ",".join(dict.fromkeys([*plugins(), *names]))
    load_plugins()


def load_plugins() -> None:
    """Import what the environment names; see `use_plugins`."""
    for name in plugins():
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # something that the plugin needs
            raise UserError(
                f"there is no module {name}, which {VARIABLE} or the recipe names among the"
                " plugins: put its folder on PYTHONPATH"
            ) from error


def plugin_of(kind: type) -> str | None:
    """The plugin that defines the class ``kind``."""
    inside = (name for name in plugins() if f"{kind.__module__}.".startswith(f"{name}."))
    return next(inside, None)


def code_of(plugin: str) -> Path:
    """The folder of a package that has been imported, or the file of a module."""
    module: Any = sys.modules[plugin]
    path = Path(str(module.__file__)).resolve()
    return path.parent if path.name == "__init__.py" else path
