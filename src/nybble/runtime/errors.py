"""What every refusal looks like: operation, argument, what was expected, what came, and the remedy.

A ``TypeError`` for a wrong type or dtype, a ``ValueError`` for a wrong shape, device or value. The text is built
in one place, so that it is the same on CPU, CUDA, under ``torch.compile`` and through ``torch.ops``.
"""

from __future__ import annotations


def _message(operation: str, argument: str, expected: object, got: object, remedy: str) -> str:
    text = f"{operation}: {argument}: expected {expected}, got {got}"
    return f"{text}. {remedy}" if remedy else text


def wrong_type(operation: str, argument: str, expected: object, got: object, remedy: str = "") -> TypeError:
    """The ``TypeError`` for an argument of the wrong Python type or tensor dtype."""
    return TypeError(_message(operation, argument, expected, got, remedy))


def wrong_value(operation: str, argument: str, expected: object, got: object, remedy: str = "") -> ValueError:
    """The ``ValueError`` for an argument of the wrong shape, device, stride or value."""
    return ValueError(_message(operation, argument, expected, got, remedy))


class CheckpointError(ValueError):
    """A checkpoint that can't be loaded: names the file, the tensor or key, and the reason.

    Attributes:
        file: path of the file at fault (or the folder).
        tensor: name of the tensor or configuration key at fault, ``""`` when it is the whole file.
        reason: what is wrong and what was expected.
    """

    def __init__(self, file: object, tensor: str, reason: str) -> None:
        self.file, self.tensor, self.reason = str(file), tensor, reason
        where = f"{file}: {tensor}" if tensor else f"{file}"
        super().__init__(f"{where}: {reason}")


class CompileError(RuntimeError):
    """A CUDA kernel that NVRTC refused. The text is the compiler's, with the real file and line."""


class UnsupportedError(RuntimeError):
    """Nothing here can run the request; the text lists every candidate and why it was refused."""


_TOLD = "_nybble_told"


def everywhere(error: BaseException, *, told: bool) -> BaseException:
    """Mark an error as one that every process has; ``told``: another one reports it."""
    error.__dict__[_TOLD] = told
    return error


def is_told(error: BaseException) -> bool | None:
    """Whether another process reports this error; ``None`` for one that may be of this process alone."""
    return error.__dict__.get(_TOLD)


class ElsewhereError(RuntimeError):
    """Another of the processes that share a model failed; the text says which and how."""
