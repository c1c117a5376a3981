"""Importing the plugin, and what the user reads."""

import os
import re
import sys
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from fairseq import utils

from fairseq_vqem.compat.patching import patch
from fairseq_vqem.errors import UserError

_PACKAGE = UserError.__module__.partition(".")[0]
_USER_ERROR_LINE = re.compile(
    rf"^(?:{re.escape(UserError.__module__)}\.)?UserError: (.*)", re.MULTILINE
)


# What fairseq itself says in a sentence, but below a stack trace; and what is added to it.
_FAIRSEQ_SENTENCES = {
    r"Size of sample #\d+ is invalid": "",
    r"The dataset is empty": " Or raise --max-source-positions and --max-target-positions.",
    r"Dataset not found": "; check the data folder and the name of the split.",
    r"Could not infer language pair": "; check the data folder, or give -s and -t.",
    r"--finetune-from-model \S+ does not exist": "; check the path.",
    r"Optimizer does not match": " Or go on in the precision that it began in (--fp16, --amp).",
}


def recognise_own_user_dir() -> None:
    """--user-dir fails with "not globally unique" if the path reaches this package by a link.

    A second copy of the package is still refused, with a message that names both.
    """

    def build(import_user_module: Callable[..., Any]) -> Callable[..., Any]:
        def import_unless_loaded(args: Any) -> Any:
            user_dir = getattr(args, "user_dir", None)
            here = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
            name = os.path.basename(os.path.abspath(user_dir or ""))
            if user_dir is None or name != _PACKAGE or not os.path.isdir(user_dir):
                return import_user_module(args)
            if os.path.realpath(user_dir) == here:
                return None
            raise UserError(
                f"--user-dir {user_dir} is another copy of {_PACKAGE} than the one in use "
                f"({here}); give --user-dir {here}."
            )

        return import_unless_loaded

    patch(utils, "import_user_module", build)


def silence_known_warnings() -> None:
    """Every run prints a page of warnings about calls that fairseq makes, not the user."""
    for message in (
        r"`torch\.cuda\.amp\.(autocast|GradScaler)\(args\.\.\.\)` is deprecated",
        "'pin_memory' argument is set as true but no accelerator is found",
        "Support for mismatched key_padding_mask and attn_mask is deprecated",
        r"hydra\.experimental\.",
        r"\s*The version_base parameter is not specified",
        r"\s*The strict flag in the compose API is deprecated",
        "In 'config': Usage of deprecated keyword in package header",
        r"\s*'config' is validated against ConfigStore schema with the same name",
    ):
        warnings.filterwarnings("ignore", message=message)


def install_error_hook() -> None:
    """Print a UserError as one line, ``fairseq_vqem: error: <message>``; exit status 1.

    Every other error goes to the hook that was there before.
    """
    previous = sys.excepthook
    if hasattr(previous, "vqem_original"):
        return

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        message = _user_message(error)
        if message is None:
            previous(kind, error, trace)
        else:
            print(f"fairseq_vqem: error: {message}", file=sys.stderr)

    hook.vqem_original = previous  # type: ignore[attr-defined]
    sys.excepthook = hook


def _user_message(error: BaseException) -> str | None:
    if isinstance(error, UserError):
        # An error in a data-loading process arrives with its stack trace for a message.
        return _last_user_error(str(error)) or str(error)
    if isinstance(error, torch.multiprocessing.ProcessRaisedException):
        return _last_user_error(str(error))
    # fairseq's trainer replaces an error on loading a model by a bare Exception.
    if type(error) is Exception and isinstance(error.__context__, UserError):
        return str(error.__context__)
    if type(error) in (Exception, FileNotFoundError, ValueError, AssertionError):
        return _fairseq_sentence(error)
    return None


def _fairseq_sentence(error: BaseException) -> str | None:
    for pattern, advice in _FAIRSEQ_SENTENCES.items():
        if re.match(pattern, str(error)):
            return f"{error}{advice}"
    missing = str(getattr(error, "filename", None) or "")
    if re.fullmatch(r"dict\..*\.txt", os.path.basename(missing)):
        return f"{missing} does not exist; give a folder of binarised data, and its -s and -t."
    return None


def _last_user_error(trace: str) -> str | None:
    last_line = trace.strip().rpartition("\n")[2]
    match = _USER_ERROR_LINE.match(last_line)
    return match[1] if match else None
