"""What the user's input can do wrong; the command line prints it as one line and exits with status 2."""


class InputError(ValueError):
    """The user's input can't be used; the message names it and says what to do."""
