"""Errors that FlashDIP raises on purpose.

    FlashDIPError
    ├── InputError(ValueError)           something given cannot be used
    │   ├── ImageError                   an image file cannot be read as one image
    │   ├── ShapeError                   sizes or channels do not go together
    │   └── ConfigError                  unknown preset or field, or a value outside its range
    ├── OutputError(OSError)             a result cannot be written where it was asked for
    ├── UnavailableError(RuntimeError)   a backend, device or extra cannot be used here
    ├── DivergedError(RuntimeError)      a fit diverged before it had any image
    └── StoppedError(RuntimeError)       a fit was stopped before it had a whole image

Each message is one line: the name, what was expected, what came, and what to do about it.
"""


class FlashDIPError(Exception):
    """Base of all errors that FlashDIP raises on purpose."""


class InputError(FlashDIPError, ValueError):
    """Something given to FlashDIP cannot be used."""


class ImageError(InputError):
    """A file cannot be read as one image."""


class ShapeError(InputError):
    """Sizes or channels do not go together."""


class ConfigError(InputError):
    """A preset or field is unknown, or a value is outside its range."""


class OutputError(FlashDIPError, OSError):
    """A result cannot be written where it was asked for."""


class DivergedError(FlashDIPError, RuntimeError):
    """A fit diverged, retries included, before it had any image."""


class StoppedError(FlashDIPError, RuntimeError):
    """A fit was stopped before it had a whole image; what it had done is kept."""


class UnavailableError(FlashDIPError, RuntimeError):
    """A backend, device or optional dependency cannot be used on this machine."""
