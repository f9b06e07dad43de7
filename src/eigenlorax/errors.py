"""Exceptions and warnings. Every error that a user can cause is one of these; importing them does not import torch.

    EigenloraxError
    ├── FormatError           a file is truncated, malformed, a pickle, or has unknown tensors
    ├── ShapeError            tensors whose shapes must agree do not
    ├── BaseModelError        adapters of different base models
    ├── NonFiniteError        NaN or infinity in an adapter, or a dtype too narrow for its numbers
    ├── AdapterNameError      an adapter name that is invalid, unknown, or used twice
    ├── ModuleNameError       a module that the subspace lacks, or a name that fits two of its modules
    ├── OptionError           an option outside its range
    ├── BaselineError         a trained adapter that is no better than its baseline, and was not added
    ├── HubError              a repository or file that could not be read from the Hub
    ├── UrlError              a folder or file behind a URL that could not be read
    ├── MissingExtraError     an optional dependency is not installed
    ├── EngineError           worker processes that could not be started, or were killed repeatedly
    ├── ServingError          an adapter that cannot be served
    ├── CacheFullError        a server's cache has no room for one more adapter
    └── PackError
        ├── PackMissingError  there is no pack at the path
        ├── PackExistsError   the path is in use
        ├── PackDamagedError  a pack differs from what was written
        ├── PackVersionError  a pack of a newer format
        ├── LossError         an adapter's relative error is larger than the pack says
        └── PackBusyError     another process is writing, or has written in the meantime

Each class carries the exit code of the command line (docs/cli.md).
"""

_START, _END = 2000, 1000
"""Characters of a long message that remain: its start says what is wrong and where, its end what to do."""
MAX_MESSAGE = _START + _END + 40
"""Longest text of an error, including the note on how many characters were left out."""


def shortened(message: str) -> str:
    """Return the message, without its middle if it is longer than `MAX_MESSAGE`.

    Messages quote names and values from files, which may be of any length.
    """
    if len(message) <= MAX_MESSAGE:
        return message
    return f"{message[:_START]} … ({len(message) - _START - _END:,} characters left out) … {message[-_END:]}"


class EigenloraxError(Exception):
    """Base class of all errors that this package raises on purpose. Their text is at most `MAX_MESSAGE` long.

    Example:
        >>> try:
        ...     eigenlorax.Pack.open("nowhere/")
        ... except eigenlorax.EigenloraxError as error:
        ...     print(f"exit with {error.exit_code}")
        exit with 4
    """

    exit_code = 3

    def __str__(self) -> str:
        return shortened(Exception.__str__(self))


class FormatError(EigenloraxError, ValueError):
    """A file is truncated or malformed, or holds something unknown."""


class ShapeError(EigenloraxError, ValueError):
    """Tensors whose shapes must agree do not."""


class BaseModelError(EigenloraxError, ValueError):
    """Adapters of different base models."""


class NonFiniteError(EigenloraxError, ValueError):
    """NaN or infinity in an adapter, or numbers that are too large or too small for a dtype."""


class AdapterNameError(EigenloraxError, ValueError, KeyError):
    """An adapter name that is invalid, unknown, or used twice."""

    # KeyError, which mappings raise for unknown names, prints the repr of its message
    __str__ = EigenloraxError.__str__


class ModuleNameError(EigenloraxError, ValueError):
    """A module that the subspace lacks, or a name that fits two of its modules."""


class OptionError(EigenloraxError, ValueError):
    """An option outside its range."""


class BaselineError(EigenloraxError, ValueError):
    """A trained adapter that is no better than its untrained baseline, and was therefore not added to the pack."""


class HubError(EigenloraxError, OSError):
    """A repository or file that could not be read from the Hub."""


class UrlError(EigenloraxError, OSError):
    """A folder or file behind a URL that could not be read: no permission, no connection."""


class MissingExtraError(EigenloraxError, ImportError):
    """An optional dependency is not installed."""


class EngineError(EigenloraxError, RuntimeError):
    """Worker processes that could not be started, or were killed repeatedly."""


class ServingError(EigenloraxError, ValueError):
    """An adapter that cannot be served, because of its kind or because the server has another subspace."""


class CacheFullError(EigenloraxError, OSError):
    """The cache of a server has no room for one more adapter."""


class PackError(EigenloraxError):
    """Base class of errors about a pack."""

    exit_code = 4


class PackMissingError(PackError, FileNotFoundError):
    """There is no pack at the path."""


class PackExistsError(PackError, FileExistsError):
    """The path is in use."""


class PackDamagedError(PackError, ValueError):
    """A pack differs from what was written."""


class PackVersionError(PackError, ValueError):
    """A pack of a newer format."""


class LossError(PackError, ValueError):
    """The relative error of an adapter is larger than the pack says."""


class PackBusyError(PackError, RuntimeError):
    """Another process is writing to the pack, or has written to it since it was opened."""

    exit_code = 5


def reason(error: BaseException) -> str:
    """Return the first line of another library's exception, or the name of its class if it has no text."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class EigenloraxWarning(UserWarning):
    """Base class of all warnings. Their text is at most `MAX_MESSAGE` long."""

    def __str__(self) -> str:
        return shortened(super().__str__())


class SkippedAdapterWarning(EigenloraxWarning):
    """An adapter or folder was skipped, as the caller allowed."""


class SkippedVersionWarning(EigenloraxWarning):
    """A version of an adapter in training was not appended to its history. The training goes on."""


class SourceWarning(EigenloraxWarning):
    """A part of an adapter file is ambiguous; the warning says how it was read."""


class NothingSharedWarning(EigenloraxWarning):
    """Adapters without a module in common with the others, so that they share no basis."""


class RoundingWarning(EigenloraxWarning):
    """Rounding to a narrower dtype changes an adapter's update unusually much."""


class RowsWarning(EigenloraxWarning):
    """Rows of a data file were truncated or skipped, or a class has no rows."""


class UntrainedAdapterWarning(EigenloraxWarning):
    """An adapter whose delta weight is zero. It is stored in the pack but takes no part in the fit."""


class DuplicateAdapterWarning(EigenloraxWarning):
    """An adapter has the same update as another one of its pack."""


class RegistrationWarning(EigenloraxWarning):
    """The method could not be registered with PEFT, for example because PEFT is too old."""


class MissingPartWarning(EigenloraxWarning):
    """Adapters have coefficients for a model that the pipeline lacks."""


class WrappedModelWarning(EigenloraxWarning):
    """A model is wrapped by `torch.compile`, so that diffusers does not find its adapters."""


class RankWarning(EigenloraxWarning):
    """A rank above the number of components, which bounds the rank of the update."""


class BaseModelWarning(EigenloraxWarning):
    """A subspace is used on a model with another name than the one it was fitted for."""


class ProjectionWarning(EigenloraxWarning):
    """A part of an adapter lies outside of the subspace, and is lost by projection."""


class LossWarning(EigenloraxWarning):
    """Adapters whose relative error in the pack is above the limit for warnings."""


WARN_ABOVE = 0.5
"""Default limit of the relative error above which a `LossWarning` is given."""


class BaselineWarning(EigenloraxWarning):
    """A trained adapter is no better than predicting the most frequent class, or than the base model."""


class StaleReportWarning(EigenloraxWarning):
    """A report that is stored with a pack describes an earlier state of it."""


class UnknownBaseWarning(EigenloraxWarning):
    """An adapter that does not say which base model it belongs to."""
