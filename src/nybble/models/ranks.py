"""The processes that share a model, what they say to each other, and the layers of which each has a part."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers.pytorch_utils import Conv1D

from nybble.formats.parts import Cut, Ranges, length
from nybble.runtime.errors import ElsewhereError, UnsupportedError, everywhere, wrong_value

T = TypeVar("T")

TIMEOUT = timedelta(minutes=10)
"""How long a process waits for another: longer than one compiles kernels or reads a model."""

_RANKS = "_nybble_ranks"

_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Its name before PyTorch 2.13."""


_MADE: weakref.WeakSet[Ranks] = weakref.WeakSet()


class Ranks:
    """The processes of a one-dimensional mesh. All of them call the same things in the same order.

    Args:
        mesh: of one dimension, made of all processes that share the model.

    Attributes:
        rank, size: the place of this process, and how many there are.

    Raises:
        ValueError: the mesh has more dimensions.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        if mesh.ndim != 1:
            remedy = "Take one of its dimensions: mesh['tp']."
            raise wrong_value("load", "mesh", "one dimension", mesh.ndim, remedy)
        self.mesh, self.group = mesh, mesh.get_group()
        self.rank, self.size = mesh.get_local_rank(), mesh.size()
        _MADE.add(self)

    def sum(self, x: Tensor) -> Tensor:
        """``x`` of all processes added up, in place; the same bits everywhere."""
        dist.all_reduce(x, group=self.group)
        return x

    def side_by_side(self, x: Tensor) -> Tensor:
        """``[..., n]`` of all processes as ``[..., size * n]``."""
        every = x.new_empty(self.size * x.numel())
        _all_gather(every, x.reshape(-1), group=self.group)
        return every.view(self.size, *x.shape).movedim(0, -2).reshape(*x.shape[:-1], -1)

    def follow(self, x: Tensor) -> Tensor:
        """``x`` of the first process, in place."""
        dist.broadcast(x, group=self.group, group_src=0)
        return x

    def exchange(self, value: Any) -> list[Any]:
        """A Python object of each process."""
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, value, group=self.group)
        return every

    def agreed(self, work: Callable[[], T]) -> T:
        """What ``work`` returns. Its error on one process is an error on all, so that none waits for one that is gone.

        Raises:
            ElsewhereError: on processes that had no error of their own.
        """
        mine, made = None, []
        try:
            made.append(work())
        except Exception as error:
            mine = error
        found = self.exchange(None if mine is None else f"{type(mine).__name__}: {mine}")
        for rank, text in enumerate(found):
            if text is not None:
                mine = mine or ElsewhereError(f"process {rank} of {self.size} failed: {text}")
        if mine is not None:
            raise everywhere(mine, told=self.rank > 0)
        return made[0]

    def __deepcopy__(self, _: Any) -> Ranks:
        return self

    def __reduce__(self) -> Any:
        raise UnsupportedError("pickle: what a process has of a shared model can't be pickled.")


def join(device: torch.device) -> Ranks:
    """The processes that ``torchrun`` started.

    On CUDA every process takes the device of its place on its machine, and products are added up by NCCL; on a CPU by
    gloo.

    Args:
        device: ``cpu`` or ``cuda``, the same for all.

    Raises:
        ValueError: a CUDA device with a number. UnsupportedError: a machine has fewer devices than processes.
    """
    if device.index is not None:
        remedy = "Each process takes the one of its number."
        raise wrong_value("torchrun", "device", "cpu, cuda or auto", device, remedy)
    cuda = device.type == "cuda"
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
    size = dist.get_world_size()
    if cuda:
        local, found = dist.get_node_local_rank(fallback_rank=dist.get_rank()), torch.cuda.device_count()
        texts: list[Any] = [None] * size
        lacking = f"a machine has {found} CUDA devices and {local + 1} processes or more" if local >= found else None
        dist.all_gather_object(texts, lacking)
        if any(texts):
            error = UnsupportedError(f"torchrun: {next(text for text in texts if text)}. Start fewer processes.")
            raise everywhere(error, told=dist.get_rank() > 0)
        torch.cuda.set_device(local)
    return Ranks(init_device_mesh(device.type, (size,), mesh_dim_names=("tp",)))


def leave() -> None:
    """Take leave of the other processes, once all do. A model that they shared can't be called any more."""
    if dist.is_initialized():
        dist.all_gather_object([None] * dist.get_world_size(), None)
        # A group that is still held when the interpreter ends takes its threads down with a crash.
        for ranks in _MADE:
            for name in ("mesh", "group"):
                ranks.__dict__.pop(name, None)
        gc.collect()
        dist.destroy_process_group()


def ranks_of(model: nn.Module) -> Ranks | None:
    """The processes that share a model; ``None`` where this one has all of it."""
    return model.__dict__.get(_RANKS)


def set_ranks(model: nn.Module, ranks: Ranks) -> None:
    """Remember who shares the model."""
    model.__dict__[_RANKS] = ranks


class Share(NamedTuple):
    """This process's part of a linear layer.

    Attributes:
        style: of ``parallel.STYLES``.
        outputs: of the output features.
        inputs: (first, behind the last) of the input features, sorted by group where the layer is in act-order.
        bias: whether this process adds it.
    """

    style: str
    outputs: Cut = None
    inputs: tuple[int, int] | None = None
    bias: bool = True

    def of_weight(self, module: nn.Module) -> tuple[Cut, Cut]:
        """The cut of a layer's own weight: [in, out] in a Conv1D, else [out, in]."""
        inputs: Ranges | None = None if self.inputs is None else (self.inputs,)
        return (inputs, self.outputs) if isinstance(module, Conv1D) else (self.outputs, inputs)

    def sizes(self, in_features: int, out_features: int) -> tuple[int, int]:
        """What is left of them."""
        inputs: Ranges | None = None if self.inputs is None else (self.inputs,)
        return length(inputs, in_features), length(self.outputs, out_features)


WHOLE = Share("column")


class Shared(nn.Module):
    """A linear layer of which each process computes a part.

    Args:
        linear: this process's part. ranks: the processes.
    """

    def __init__(self, linear: nn.Module, ranks: Ranks) -> None:
        super().__init__()
        self.linear, self.ranks = linear, ranks
        self.train(linear.training)

    def extra_repr(self) -> str:
        return f"{self.ranks.rank} of {self.ranks.size}"


class RowParallel(Shared):
    """Some of the input features: products that are added up. The bias is the first process's."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features / size]`` to the whole ``[..., out_features]``."""
        return self.ranks.sum(self.linear(x))


class Gathered(Shared):
    """Some of the output features, of inputs that lie in parts: both are put together.

    For weights whose input features can't be divided: in act-order behind attention, where a head's features belong to
    groups of every process; or behind a transform of the whole row.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features / size]`` to the whole ``[..., out_features]``."""
        return self.ranks.side_by_side(self.linear(self.ranks.side_by_side(x)))


class Vocabulary(Shared):
    """Some of the tokens' logits, put together."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., hidden]`` to ``[..., vocabulary]``."""
        return self.ranks.side_by_side(self.linear(x))


def bare(module: nn.Module) -> nn.Module:
    """The linear layer itself."""
    return module.linear if isinstance(module, Shared) else module
