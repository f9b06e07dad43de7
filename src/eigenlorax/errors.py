"""The exception tree, and the warnings. Every error that a user can cause is one of these; none of them imports torch.

    EigenloraxError
    ├── FormatError           a file is not what it should be: truncated, wrong JSON, a pickle, an unknown tensor
    ├── ShapeError            tensors that must agree in shape do not
    ├── BaseModelError        adapters of different base models
    ├── NonFiniteError        NaN or Inf in an adapter, or a dtype that has no room for its numbers
    ├── AdapterNameError      a name that is not allowed, not there, or there twice
    ├── ModuleNameError       a module that the subspace lacks, or a name that fits two of them
    ├── OptionError           an option outside its range
    ├── BaselineError         a trained adapter that is no better than its baseline, and was not added
    ├── HubError              a repository or file that could not be had from the Hub
    ├── UrlError              a folder or file behind a URL that could not be read
    ├── MissingExtraError     an optional dependency is not installed
    ├── EngineError           workers that are not there, or were killed again and again
    ├── ServingError          an adapter that cannot be served as the server runs
    ├── CacheFullError        no room for one more adapter in the cache of a server
    └── PackError
        ├── PackMissingError  no pack there
        ├── PackExistsError   something is there already
        ├── PackDamagedError  bytes that are not the ones that were written
        ├── PackVersionError  a pack of a newer format
        └── PackBusyError     another process writes, or wrote in the meantime

Each class carries the exit code that the command line leaves with (docs/cli.md).
"""

_START, _END = 2000, 1000
"""Characters of a long message that are kept: it begins with what is wrong and where, and ends with what to do."""
MAX_MESSAGE = _START + _END + 40
"""Characters of a message, with what says how many were left out."""


def shortened(message: str) -> str:
    """Return a message, without its middle where that quotes what no one would read to the end."""
    if len(message) <= MAX_MESSAGE:
        return message
    return f"{message[:_START]} … ({len(message) - _START - _END:,} characters left out) … {message[-_END:]}"


class EigenloraxError(Exception):
    """Base of every error this package raises on purpose. Its text is never longer than a few thousand characters."""

    exit_code = 3

    def __str__(self) -> str:
        return shortened(super().__str__())


class FormatError(EigenloraxError, ValueError):
    """A file is not what it should be."""


class ShapeError(EigenloraxError, ValueError):
    """Tensors that must agree in shape do not."""


class BaseModelError(EigenloraxError, ValueError):
    """Adapters of different base models."""


class NonFiniteError(EigenloraxError, ValueError):
    """NaN or Inf in an adapter, or a dtype that has no room for its numbers: too large for it, or too small."""


class AdapterNameError(EigenloraxError, ValueError):
    """An adapter name that is not allowed, not there, or there twice."""


class ModuleNameError(EigenloraxError, ValueError):
    """A module that the subspace lacks, or a name that fits two of its modules."""


class OptionError(EigenloraxError, ValueError):
    """An option outside its range."""


class BaselineError(EigenloraxError, ValueError):
    """A trained adapter that is no better than what needs no training, and so was not added to the pack."""


class HubError(EigenloraxError, OSError):
    """A repository or file that could not be had from the Hub."""


class UrlError(EigenloraxError, OSError):
    """A folder or file behind a URL that could not be read: no permission, no connection."""


class MissingExtraError(EigenloraxError, ImportError):
    """An optional dependency is not installed."""


class EngineError(EigenloraxError, RuntimeError):
    """Workers that are not there, or were killed again and again."""


class ServingError(EigenloraxError, ValueError):
    """An adapter that cannot be served: because of its kind, or because the server holds another subspace."""


class CacheFullError(EigenloraxError, OSError):
    """No room for one more adapter in the cache of a server."""


class PackError(EigenloraxError):
    """Base of what can be wrong with a pack."""

    exit_code = 4


class PackMissingError(PackError, FileNotFoundError):
    """No pack there."""


class PackExistsError(PackError, FileExistsError):
    """Something is there already."""


class PackDamagedError(PackError, ValueError):
    """Bytes that are not the ones that were written."""


class PackVersionError(PackError, ValueError):
    """A pack of a newer format."""


class LossError(PackError, ValueError):
    """An adapter of a pack has lost more than the pack says."""


class PackBusyError(PackError, RuntimeError):
    """Another process writes to the pack, or wrote to it since it was opened."""

    exit_code = 5


def reason(error: BaseException) -> str:
    """The first line of what another library's exception says, or its class where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class EigenloraxWarning(UserWarning):
    """Base of every warning: surprising, but fine. Its text is as short as that of an error."""

    def __str__(self) -> str:
        return shortened(super().__str__())


class SkippedAdapterWarning(EigenloraxWarning):
    """An adapter or folder was left out, because the caller said that it may be."""


class SourceWarning(EigenloraxWarning):
    """Something in an adapter's file that could be read in several ways, and in which it was."""


class NothingSharedWarning(EigenloraxWarning):
    """Adapters that have no module in common with the others, so that nothing is shared between them."""


class RoundingWarning(EigenloraxWarning):
    """Rounding to a narrower dtype changes an adapter's update by more than rounding should."""


class RowsWarning(EigenloraxWarning):
    """Rows of a file were cut or left out, or some class has none."""


class UntrainedAdapterWarning(EigenloraxWarning):
    """An adapter whose delta weight is zero: kept in the pack, left out of the fit."""


class RegistrationWarning(EigenloraxWarning):
    """PEFT could not be told of our method: it is too old, say."""


class MissingPartWarning(EigenloraxWarning):
    """A model that a pipeline was made without, and that adapters have coefficients for."""


class WrappedModelWarning(EigenloraxWarning):
    """A model that `torch.compile` has wrapped, so that diffusers does not know it for one with adapters."""


class RankWarning(EigenloraxWarning):
    """A rank above the number of components: the update's rank is at most the latter."""


class BaseModelWarning(EigenloraxWarning):
    """A subspace on a model that has another name than the one it was found for."""


class ProjectionWarning(EigenloraxWarning):
    """A part of an adapter lies outside the subspace it was put into, and is lost."""


class LossWarning(EigenloraxWarning):
    """Adapters of which the pack keeps less than the caller wants to hear nothing of."""


WARN_ABOVE = 0.5
"""The delta error above which a `LossWarning` is given, unless told otherwise."""


class BaselineWarning(EigenloraxWarning):
    """A trained adapter that is no better than the most frequent class, or than the base model."""


class StaleReportWarning(EigenloraxWarning):
    """A report that a pack was given is not about what the pack holds now."""


class UnknownBaseWarning(EigenloraxWarning):
    """An adapter that does not say which base model it belongs to."""
