"""Non-autoregressive translation with discrete latent variables for fairseq.

Importing the package (fairseq does so through ``--user-dir``) applies the compatibility fixes and
registers models, criterion, task and learning-rate scheduler.
"""

import logging

# fairseq asks for tensorboardX whenever it is imported
logging.getLogger("fairseq.tasks.text_to_speech").setLevel(logging.WARNING)
# one of fairseq's models sets the root logger to DEBUG, so that every library prints its details
_root = logging.getLogger()
_level, _handlers = _root.level, list(_root.handlers)

from fairseq_vqem import compat  # noqa: E402

compat.apply()

from fairseq_vqem import criterions, images, models, peers, schedulers, tasks  # noqa: E402
from fairseq_vqem.errors import UserError  # noqa: E402
from fairseq_vqem.generation.api import Translator  # noqa: E402
from fairseq_vqem.plugins import load_plugins  # noqa: E402

load_plugins()  # last: they build on all of the above

_root.setLevel(_level)
_root.handlers[:] = _handlers

__version__ = "0.1.0"

__all__ = [
    "Translator",
    "UserError",
    "criterions",
    "images",
    "models",
    "peers",
    "schedulers",
    "tasks",
]
