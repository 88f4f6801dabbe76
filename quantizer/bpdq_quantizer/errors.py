"""Errors that the command line prints as one line; it exits with status 2 for bad input, and with 1 for workers."""


class InputError(ValueError):
    """The user's input can't be used; the message names it and says what to do."""


class WorkerError(Exception):
    """A worker of `--devices` failed, ended or never came."""
