"""Retries with backoff for requests to object stores and web servers, and whose fault an error is.

What may pass by itself (a reset connection, a 503, a timeout) is tried again. What stays is about one file, which then
gets an error row, or about the whole store: one that does not answer, or no longer takes the credentials, ends the job
before images that are fine become error rows.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from mgpu_ddp.errors import StateError

ATTEMPTS = 9
FIRST_PAUSE_S = 0.1
"""Before the second attempt. Each later pause is twice as long; up to half of each is left out at random."""
FILE_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
PASSING_4XX = (408, 425, 429)
"""Request timeout, too early, too many requests."""
REFUSED = (
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "NoCredentials",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
)
"""Error codes of refused credentials. Source: "Error responses" in Amazon's S3 API reference."""

Answer = TypeVar("Answer")


async def with_retries(request: Callable[[], Awaitable[Answer]], url: str) -> Answer:
    """Send a request until it is answered.

    Raises:
        StateError: the store does not answer or refuses the credentials, so no file of it can be read. Any other
            exception is about this file alone.
    """
    for attempt in range(ATTEMPTS):
        if attempt:
            await asyncio.sleep(FIRST_PAUSE_S * 2 ** (attempt - 1) * random.uniform(0.5, 1))
        try:
            return await request()
        except Exception as error:
            if is_about_one_file(error):
                raise
            said = one_line(error)
            if is_refused(error):
                raise StateError(
                    f"{url!r} cannot be read with these credentials ({said}). Renew them and start again: what was"
                    " committed stays."
                ) from None
    raise StateError(
        f"{url!r} could not be read in {ATTEMPTS} attempts ({said}). Start again later: what was committed stays."
    )


def is_refused(error: BaseException) -> bool:
    """Tell whether a store refuses the credentials."""
    causes = [cause for cause in (error, error.__cause__) if cause is not None]
    words = " ".join(f"{type(cause).__name__} {cause} {getattr(cause, 'response', '')}" for cause in causes)
    return any(word in words for word in REFUSED) or http_status(error) == 401


def is_about_one_file(error: BaseException) -> bool:
    """Tell whether an error is about one file alone, and would come again."""
    if is_refused(error):
        return False
    status = http_status(error)
    if status is not None:
        return 400 <= status < 500 and status not in PASSING_4XX
    # fsspec raises FileNotFoundError from the real cause for a web server that does not answer.
    return isinstance(error.__cause__ or error, FILE_ERRORS)


def http_status(error: BaseException) -> int | None:
    """The HTTP status that an error of any client library comes from."""
    for cause in (error, error.__cause__):
        response = getattr(cause, "response", None)
        metadata = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
        for found in (
            metadata.get("HTTPStatusCode"),
            getattr(response, "status_code", None),
            getattr(cause, "status", None),
        ):
            if isinstance(found, int):
                return found
    # gcsfs has it here. Not so in a cause, which may be a parser's error: 400 for a body that breaks off.
    code = getattr(error, "code", None)
    return code if isinstance(code, int) else None


def one_line(error: BaseException) -> str:
    """An error in one line, in the store's own words."""
    error = error.__cause__ or error
    return " ".join(f"{type(error).__name__}: {error}".split())[:300].rstrip(": .")
