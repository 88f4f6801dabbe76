"""Errors that the command line prints as one line; it exits with status 2 for bad input, and with 1 for workers."""

from bpdq_kernels.errors import InputError as InputError


class WorkerError(Exception):
    """A worker of `--devices` failed, ended or never came."""
