"""The one exception for mistakes that the user can mend."""


class UserError(Exception):
    """Bad input, a wrong flag combination, a missing file or an unfit checkpoint.

    Its message is one sentence that says what is wrong and what to do. The command line prints the
    message alone, without a stack trace (see ``compat.install_error_hook`` and ``cli.main``).
    """
