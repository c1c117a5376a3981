"""The one exception for mistakes that the user can mend."""

import importlib.util


class UserError(Exception):
    """Bad input, a wrong flag combination, a missing file or an unfit checkpoint.

    Its message is one sentence that says what is wrong and what to do. The command line prints the
    message alone, without a stack trace (see ``compat.install_error_hook`` and ``cli.main``).
    """


def beginning(text: str, characters: int = 40) -> str:
    """``text`` for a message, cut after so many ``characters``."""
    return repr(text if len(text) <= characters else f"{text[:characters]}…")


def need_packages(purpose: str, *packages: str) -> None:
    """Raise UserError, naming what to install, unless all optional ``packages`` are there."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{purpose} needs {' and '.join(missing)}: pip install {' '.join(missing)}")
