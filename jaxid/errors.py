"""The errors that jaxid raises on purpose: each message names what was wrong, where, and what to do."""


class JaxidError(Exception):
    """Base of every error that jaxid raises on purpose."""


class InputError(JaxidError):
    """An argument, array, picture or intervention that does not fit what it is used with."""


class CheckpointError(JaxidError):
    """A checkpoint or identifier file that is missing, incomplete, or of another model."""


class PromptError(JaxidError):
    """A prompt that cannot be used: a word that is not in it, or an answer of several tokens."""


class DataError(JaxidError):
    """A dataset file or folder that is missing or not in the documented format."""


class OutputError(JaxidError):
    """A result that cannot be written: an unwritable folder, a file in the way, a full disk."""


class InUseError(OutputError):
    """A folder in which another process is working."""


class OutOfMemoryError(JaxidError):
    """The memory of the device does not suffice for the smallest batch, or for a training step."""


class JaxidWarning(UserWarning):
    """Base of every warning that jaxid gives about results which deserve a second look."""


class UnknownWordsWarning(JaxidWarning):
    """A question or caption holds words that are not in the model's vocabulary."""
