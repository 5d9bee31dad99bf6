"""The one exception tree of Quire.

    QuireError
    |- InvalidRequest (ValueError)     400  a request's field is wrong
    |- NotFound (LookupError)          404  a named thing does not exist
    |- Refused                         403  this server does not do that, or not for this caller
    |- TooManyRequests                 429  this caller's quota
    |- Unavailable                     503  the whole server: starting, draining, full or dead
    |  |- Overloaded                        admission refused; comes with `retry_after`
    |  `- EngineDead                        the step loop has ended
    |- ConfigError (ValueError)             a flag or an option is wrong
    |  `- DoesNotFit                        the plan needs more memory than there is
    |- AdapterError (ValueError)       400  an adapter's folder, configuration or tensors are wrong
    |- DataError (ValueError)          400  a training file has bad lines
    `- ModelError                           a model folder is missing, damaged or of an unknown family

This room knows no HTTP beyond the status number that each class suggests, and imports nothing of Quire.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any


class QuireError(Exception):
    """Base of everything that Quire raises on purpose."""

    status = 500
    type = "InternalServerError"
    code: str | None = None
    """OpenAI's name of the fault, where it has one."""


class InvalidRequest(QuireError, ValueError):
    """A request is wrong, and the caller can mend it.

    `parameter` names the field, `value` is what was sent; both are part of the message so that a log line is enough.
    """

    status = 400
    type = "BadRequestError"

    def __init__(self, message: str, *, parameter: str | None = None, value: Any = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.parameter = parameter
        self.value = value
        self.code = code

    def __str__(self) -> str:
        facts = [f"parameter={self.parameter}"] if self.parameter is not None else []
        if self.value is not None:
            shown = repr(self.value)
            facts.append("value=" + (shown if len(shown) <= 100 else shown[:97] + "..."))
        return f"{self.message} ({', '.join(facts)})" if facts else self.message


class NotFound(QuireError, LookupError):
    """A model, adapter, file or job of that name does not exist."""

    status = 404
    type = "NotFoundError"

    def __init__(self, message: str, *, parameter: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.parameter = parameter
        self.code = code


class Refused(QuireError):
    """This server does not do what was asked, and asking again will not help."""

    status = 403
    type = "PermissionDeniedError"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code


class TooManyRequests(QuireError):
    """The caller has used up its own share; `retry_after` is in seconds."""

    status = 429
    type = "RateLimitError"

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Unavailable(QuireError):
    """The server as a whole cannot take the request now; `retry_after` is in seconds, None if waiting will not help."""

    status = 503
    type = "ServiceUnavailableError"

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Overloaded(Unavailable):
    """Admission was refused because a queue limit is reached."""

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message, retry_after=retry_after)


class EngineDead(Unavailable):
    """The engine's step loop has ended and will not answer again."""


class ConfigError(QuireError, ValueError):
    """An option given at start is wrong or contradicts another."""

    status = 400
    type = "BadRequestError"


class DoesNotFit(ConfigError):
    """The plan needs more memory than the machine can give; the message lists sized ways out."""


class AdapterError(QuireError, ValueError):
    """A LoRA adapter cannot be used: the message names the file or field, what was expected and what was found.

    `parameter` is the field of adapter_config.json or of the request, where there is one.
    """

    status = 400
    type = "BadRequestError"

    def __init__(self, message: str, *, parameter: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.parameter = parameter
        self.code = code


class DataError(QuireError, ValueError):
    """A training file has lines that cannot be trained on. problems: the first of them, with `line`, `field` and `message`;
    count: how many there are. The message lists them."""

    status = 400
    type = "BadRequestError"
    code = "invalid_training_file"

    def __init__(self, message: str, problems: Sequence[Any] = (), count: int = 0) -> None:
        super().__init__(message)
        self.message = message
        self.problems, self.count = problems, count


class ModelError(QuireError):
    """A model folder cannot be served: missing, damaged, incomplete or of a family that Quire does not know."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` Did you mean "x"?` for the nearest of `known`, or an empty string when nothing is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f' Did you mean "{near[0]}"?' if near else ""
