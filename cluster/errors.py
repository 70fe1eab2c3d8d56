"""What can go wrong in the control plane, each with the exit code that `shoal` ends with.

Not the errors of the data plane (`serve.errors`): nothing here crosses a process. A message says
what is wrong, the hint what to do about it::

    CommandError                 1  it failed
    +-- StartError               1  Ray, Serve or a model did not come up
    +-- LostError                1  a part of a running Shoal is gone
    +-- ClusterError             1  Kubernetes or Helm refused, or did not answer
    |   +-- ForbiddenError       1  RBAC refused; the hint holds the missing rule
    +-- DownloadError            1  weights could not be fetched
    +-- DeniedError              1  a server does not accept the API key, or got none
    +-- InterruptedStartError  130  Ctrl-C before it was ready
    +-- UsageError               2  the command line or the configuration cannot be used
    +-- AlreadyRunningError      3  a Shoal of that name runs
    +-- NotRunningError          4  no Shoal of that name runs
"""

from __future__ import annotations

from typing import ClassVar


class CommandError(Exception):
    """Root of the tree; `hint` may be empty."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class StartError(CommandError):
    """Ray, Serve or a model did not come up; the message is the root cause."""


class LostError(CommandError):
    """A part of a running Shoal is gone."""


class ClusterError(CommandError):
    """Kubernetes or Helm refused, or did not answer."""


class ForbiddenError(ClusterError):
    """RBAC refused; the hint holds the missing rule as YAML."""


class DownloadError(CommandError):
    """Weights could not be fetched from a hub."""


class DeniedError(CommandError):
    """A server does not accept the API key, or got none."""


class InterruptedStartError(CommandError):
    """The user ended the start."""

    exit_code = 130


class UsageError(CommandError):
    """The command line or the configuration cannot be used."""

    exit_code = 2


class AlreadyRunningError(CommandError):
    """A Shoal of that name runs."""

    exit_code = 3


class NotRunningError(CommandError):
    """No Shoal of that name runs."""

    exit_code = 4
