"""How an operation becomes a torch operator: one function per dispatch key, and an explicit autograd error.

``Library.define`` + ``impl`` rather than ``custom_op``, which costs 10 us and more of host time on top.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("nybble", "DEF")
_BELOW_AUTOGRAD = torch._C._AutoDispatchBelowAutograd
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._functorch.peek_interpreter_stack  # pyright: ignore[reportAttributeAccessIssue]


def register(
    schema: str,
    *,
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    fake: Callable[..., Any],
) -> Callable[..., Any]:
    """Define ``torch.ops.nybble.<name>`` and return the quickest correct way to call it.

    Args:
        schema: as ``Library.define`` takes it, ``"layernorm(Tensor x, ...) -> Tensor"``.
        cpu, cuda: the implementations; each begins with the operation's ``check``.
        fake: shapes and dtypes only, for tracing; begins with the same ``check``.

    Returns:
        A function of the operator's positional arguments: ``cuda`` itself where :func:`eager` allows it, else through
        the dispatcher. The backward of a result raises ``RuntimeError``: the operations are for inference only.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, cpu, "CPU")
    _LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"nybble::{name}", fake, lib=_LIBRARY)
    operator = getattr(torch.ops.nybble, name).default

    class InferenceOnly(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            with _BELOW_AUTOGRAD():
                return operator(*arguments)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            raise RuntimeError(
                f"nybble::{name} has no backward: Nybble's operations are for inference only. "
                "Run them under torch.no_grad(), or call requires_grad_(False) on the model."
            )

    def autograd(*arguments: Any) -> Any:
        if torch.is_grad_enabled() and _needs_gradient(arguments):
            return InferenceOnly.apply(*arguments)
        with _BELOW_AUTOGRAD():
            return operator(*arguments)

    _LIBRARY.impl(name, autograd, "Autograd")

    def call(*arguments: Any) -> Any:
        if eager(arguments):
            return cuda(*arguments)
        try:
            return operator(*arguments)
        except RuntimeError as error:
            # The dispatcher's own word for an argument that is no tensor or number; a TypeError everywhere else.
            if "Expected a value of type" in str(error):
                raise TypeError(str(error)) from None
            raise

    return call


def eager(arguments: tuple[Any, ...]) -> bool:
    """Whether nothing but the CUDA implementation could see this call, so that it may step past the dispatcher.

    The dispatcher with its Python autograd key costs 6 us of host time, more than the launch. It is needed under
    ``torch.compile``, a dispatch mode (fake tensors, tracing), a functorch transform, for tensor subclasses, and where
    a gradient is asked for.
    """
    x = arguments[0]
    return (
        type(x) is torch.Tensor
        and x.is_cuda
        and not torch.compiler.is_compiling()
        and _dispatch_modes() == 0
        and _transforms() is None
        and not (torch.is_grad_enabled() and _needs_gradient(arguments))
    )


def _needs_gradient(arguments: tuple[Any, ...]) -> bool:
    return any(isinstance(a, torch.Tensor) and a.requires_grad for a in arguments)
