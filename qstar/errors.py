"""The one exception that means "the user can mend this"."""


class UserError(Exception):
    """A mistake in what the user gave: a file, a config value, a shape.

    The message is one line that names the culprit (file and line, key, or shape) and says what to do about
    it. The command line prints it without a traceback and exits with code 2; everything that is *not* a
    ``UserError`` is a bug of ours and keeps its traceback.
    """
