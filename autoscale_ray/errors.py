"""The error tree: every error a user can cause, each one clear line that survives a process boundary."""

from __future__ import annotations

import errno
import os
import re


class AutoScaleError(Exception):
    """Base of all errors this package raises on purpose; pickles with its message alone."""


EXIT_FAILED, EXIT_BAD_INPUT = 1, 2


def exit_code(error: AutoScaleError) -> int:
    """Return how a program ends after an error: 2 where the user's input broke a rule, else 1."""
    return EXIT_BAD_INPUT if isinstance(error, InvalidInputError) else EXIT_FAILED


class InvalidInputError(AutoScaleError, ValueError):
    """A value from outside breaks a rule.

    Args:
        where: Path, field or object the value came from, for example ``run.yaml: loop.num_rounds``.
        rule: What must hold, for example ``must be an integer >= 1``.
        value: What was found; shortened in the message.
    """

    def __init__(self, where: str, rule: str, value: object = None) -> None:
        self.where, self.rule, self.value = where, rule, value
        super().__init__(where, rule, value)

    def __str__(self) -> str:
        """Return ``where: rule (found value)`` on one line."""
        found = "" if self.value is None else f" (found {_short(self.value)})"
        return f"{self.where}: {self.rule}{found}".replace("\n", " ")


class ConfigError(InvalidInputError):
    """A configuration value is unknown or out of range."""


class InvalidSceneError(InvalidInputError):
    """A scene breaks a rule of the scene schema or of the scorer; ``where`` names the scene and field."""


class PoolError(InvalidInputError):
    """A scene pool cannot be used: missing, empty, damaged or of another schema version."""


class SplitLeakError(PoolError):
    """Two sides of a split share a log."""


class InputRejectedError(InvalidInputError):
    """A file from outside was refused before its content was used (attack, damage or budget)."""


class StorageError(AutoScaleError):
    """A storage failed; nothing is wrong with what the user asked for, and the same call may go well later.

    Args:
        where: File, folder or URL.
        problem: What happened, and what to do.
    """

    def __init__(self, where: str, problem: str) -> None:
        self.where, self.problem = where, problem
        super().__init__(where, problem)

    def __str__(self) -> str:
        """Return ``where: problem`` on one line."""
        return f"{self.where}: {self.problem}".replace("\n", " ")


class SourceReadError(StorageError):
    """The storage of a source failed while it was read; nothing is wrong with the data, so nothing is refused."""


class StorageUnavailableError(StorageError):
    """No usable answer from the storage of a run in time; nothing is assumed about what it holds."""


class ArtifactError(InvalidInputError):
    """A stored artifact is missing, damaged or belongs to another run."""


class PathError(InvalidInputError):
    """The operating system refused a file or folder: not there, not permitted, no room left."""


_FILE_IN_WORDS = re.compile(r"local file '(.+)'\. Detail")
"""How Arrow names the file of an error of the operating system."""


def path_error(error: OSError) -> PathError | None:
    """Return an error of the operating system as one line, or None where it names nothing that a user could mend."""
    name, problem = error.filename, error.strerror
    if name is None and error.errno and (in_words := _FILE_IN_WORDS.search(str(problem))):
        name, problem = in_words[1], os.strerror(error.errno)
    if name is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    return PathError(str(name or "storage"), str(problem))


def extra(name: str) -> str:
    """Return how to install an extra of this package, which is in no package index."""
    return f"pip install '.[{name}]' in a clone of AutoScale on Ray"


class MissingExtraError(AutoScaleError, ImportError):
    """An optional package is needed for what was asked.

    Args:
        package: Import name, for example ``faiss``.
        install: How to get it, see `extra`.
    """

    def __init__(self, package: str, install: str) -> None:
        self.package, self.install = package, install
        super().__init__(package, install)

    def __str__(self) -> str:
        """Return the missing package and the command that installs it."""
        return f"{self.package} is not installed: {self.install}"


def _short(value: object, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
