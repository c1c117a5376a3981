"""Models, losses and tasks of other packages, beside those that are registered here.

fairseq imports one package, that of ``--user-dir``. Further ones are named in an environment
variable, which every process inherits that a command starts, fairseq-train and fairseq-generate
among them; a recipe names them under ``plugins``. They are modules or packages on ``PYTHONPATH``
that register what they have with fairseq's own decorators when they are imported.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
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
    load_plugins(names)
    os.environ[VARIABLE] = ",".join(dict.fromkeys([*plugins(), *names]))


def load_plugins(names: Sequence[str] | None = None) -> None:
    """Import ``names``, by default what the environment names; see `use_plugins`."""
    for name in plugins() if names is None else names:
        try:
            if importlib.import_module(name).__file__ is None:
                raise UserError(
                    f"the plugin {name} is a folder without __init__.py: put one there that"
                    " imports what registers its models"
                )
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # something that the plugin needs
            raise UserError(
                f"there is no module {name}, which {VARIABLE} or the recipe names among the"
                " plugins: put its folder on PYTHONPATH"
            ) from error


def plugins_of(options: Mapping[str, Any]) -> list[str]:
    """Those that define the task, the model, its architecture or the loss of a training.

    Args:
        options: of fairseq-train.
    """
    # not above: `compat`, which mends fairseq before these are imported, needs `VARIABLE`
    from fairseq.criterions import CRITERION_REGISTRY
    from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
    from fairseq.tasks import TASK_REGISTRY

    registries = (
        ("task", TASK_REGISTRY),
        ("arch", ARCH_MODEL_REGISTRY),
        ("arch", ARCH_CONFIG_REGISTRY),
        ("criterion", CRITERION_REGISTRY),
    )
    found = [known[options[name]] for name, known in registries if options.get(name) in known]
    packages = {_package(kind.__module__) for kind in found}
    return sorted(name for name in plugins() if _package(name) in packages)


def code_of(plugin: str) -> Path:
    """The folder of the package that ``plugin`` is or lies in, or the file of a single module."""
    path = Path(str(importlib.import_module(_package(plugin)).__file__)).resolve()
    return path.parent if path.name == "__init__.py" else path


def _package(module: str) -> str:
    return module.partition(".")[0]
