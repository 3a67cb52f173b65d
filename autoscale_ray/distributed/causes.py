"""Errors of workers: what a user can mend, from under the layers that Ray puts around it."""

from __future__ import annotations

from ray.exceptions import RayError

from autoscale_ray.errors import AutoScaleError, path_error


def own_error(error: BaseException) -> AutoScaleError | None:
    """Return the error of this package that Ray tells of, or that this one is; None where it is another.

    An error of the operating system that names a file, or a full disk, is one of ours too.
    """
    found: BaseException | None = error
    # Ray's class of a task's error may be one of ours as well, with a traceback in its words.
    while isinstance(found, RayError):
        found = getattr(found, "cause", None) or found.__cause__
    if isinstance(found, OSError):
        return path_error(found)
    return found if isinstance(found, AutoScaleError) else None
