"""Every error and warning this project raises on purpose. Messages say what was wrong, where, and what to do next."""


class ReftError(Exception):
    """Root of all expected failures; the command line prints its message and exits with 1."""


class AdapterError(ReftError):
    """An adapter artifact is malformed, truncated, altered, or does not fit its base model."""


class BaseMismatchError(AdapterError):
    """An adapter was made for another base model than the one it is about to run on."""


class PositionsError(ReftError, ValueError):
    """A positions specification does not parse."""


class UnknownReferenceError(ReftError, LookupError):
    """No adapter is found under a reference (path, `name:tag`, digest)."""


class UnknownPluginError(ReftError, LookupError):
    """No plugin registered a method, format, runtime or exporter of this name."""


class UnsupportedProgramError(ReftError):
    """A runtime or exporter cannot execute a node of the program; the message names the node and the way out."""


class BaseModelError(ReftError):
    """A base model cannot be found, read, or has a structure that is not understood."""


class DataError(ReftError):
    """Training or calibration data cannot be used; the message names file and line."""


class TrainingError(ReftError):
    """Training had to stop, for example on a loss that is not finite."""


class TrainingInterruptedError(TrainingError):
    """Training was stopped by a signal; the message says how to go on from the checkpoint."""


class ExportError(ReftError):
    """An export failed or would not be faithful; no file that looks finished is left behind."""


class StoreError(ReftError):
    """The adapter store is missing, damaged, or was asked for something it must refuse."""


class UntrustedError(StoreError):
    """The trust policy does not admit an adapter, or cannot be read; nothing of it is handed out."""


class VersionConflictError(StoreError):
    """Two different contents claim the same version of the same name, for example on two machines."""


class ReftWarning(RuntimeWarning):
    """Something went on otherwise than asked for; the message says how."""
