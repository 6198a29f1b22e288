"""The linear layer with 4-bit or 8-bit weights: a packed weight that behaves as a torch module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nybble.formats.tiles import PackedWeight
from nybble.ops.w4a16.op import w4a16_linear


class W4A16Linear(nn.Module):
    """``y = x @ W + bias`` with a weight of 4 or 8 bits in the kernels' tile layout. For inference only.

    The tensors are Parameters without gradient, so ``state_dict``, ``deepcopy`` and ``.to(device)`` carry them;
    ``.half()`` and ``.bfloat16()`` change the scales and the bias only.

    Args:
        weight: the packed weight; its tensors are used as they are, not copied.
        bias: ``[out_features]`` or ``None``.

    Attributes:
        qweight, scales, qzeros, perm: the tensors of :class:`~nybble.formats.tiles.PackedWeight`; ``qzeros`` is
            ``None`` when every zero point is 8 (of 8 bits: 128), ``perm`` is ``None`` without act-order.
        bias: ``[out_features]`` or ``None``.
        in_features, out_features, group_size, bits: as in the packed weight.
    """

    in_features: int
    out_features: int
    group_size: int
    bits: int
    qweight: Tensor
    scales: Tensor
    qzeros: Tensor | None
    perm: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: PackedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.group_size, self.bits = weight.group_size, weight.bits
        for name in ("qweight", "scales", "qzeros", "perm"):
            self.register_parameter(name, _constant(getattr(weight, name)))
        self.register_parameter("bias", _constant(bias))
        self._held: PackedWeight | None = None

    @classmethod
    def from_packed(cls, weight: PackedWeight, bias: Tensor | None = None) -> W4A16Linear:
        """A layer around ``weight``."""
        return cls(weight, bias)

    def packed(self) -> PackedWeight:
        """The weight as the operation takes it, sharing this layer's tensors."""
        if torch.compiler.is_compiling():  # what is held would be a guard, and recompile once it changes
            return self._pack()
        held, own = self._held, self._parameters
        # Making one checks every tensor, which takes longer than a launch: keep it while the parameters are the same.
        if (
            held is None
            or held.qweight is not own["qweight"]
            or held.scales is not own["scales"]
            or held.qzeros is not own["qzeros"]
            or held.perm is not own["perm"]
        ):
            held = self._held = self._pack()
        return held

    def _pack(self) -> PackedWeight:
        return PackedWeight(
            qweight=self.qweight,
            scales=self.scales,
            qzeros=self.qzeros,
            perm=self.perm,
            in_features=self.in_features,
            out_features=self.out_features,
            group_size=self.group_size,
            bits=self.bits,
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``, the dtype of ``x``."""
        return w4a16_linear(x, self.packed(), bias=self.bias)

    def extra_repr(self) -> str:
        flags = [name for name, on in (("zero points", self.qzeros), ("act-order", self.perm)) if on is not None]
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, group_size={self.group_size}, "
            f"bits={self.bits}, bias={self.bias is not None}" + "".join(f", {flag}" for flag in flags)
        )


def _constant(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False)
