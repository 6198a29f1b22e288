"""The folder of a model quantised for FlatQuant: int4 weights a channel, transforms of the activations, clip ratios.

Beside the tensors that stay as they are, ``model.safetensors`` holds::

    <module>.weight_int4    int32 [out, in / 8]    input feature i in bits 4 (i % 8) of word i / 8, two's complement
    <module>.weight_scale   float32 [out]
    <module>.bias           [out], where there is one
    <transform>.left_trans  [M, M]                 M * N = in
    <transform>.right_trans [N, N]

and ``quantization_config`` of ``config.json`` says ``{"quant_method": "flatquant", "format_version": 1, "bits": 4,
"modules": {<module>: {"transform": <transform>, "clip_ratio": <number>}}}``. The weight is of the transformed
activations: ``y = Q(x P) W'`` with P the Kronecker product of both transforms.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nybble.formats.channels import ChannelWeight
from nybble.formats.checkpoint import Checkpoint
from nybble.formats.parts import Cut
from nybble.runtime.errors import CheckpointError

METHOD, VERSION = "flatquant", 1
WEIGHT, SCALE, LEFT, RIGHT = "weight_int4", "weight_scale", "left_trans", "right_trans"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class FlatModule(NamedTuple):
    """One quantised module, as headers and JSON say.

    Attributes:
        name: the module's in the file. transform: the name of its transforms. clip_ratio: of its activations.
        in_features, out_features: K and N. bias: it has one.
    """

    name: str
    transform: str
    clip_ratio: float
    in_features: int
    out_features: int
    bias: bool

    @property
    def tensors(self) -> list[str]:
        """Their names in the file."""
        own = [f"{self.name}.{short}" for short in (WEIGHT, SCALE, *(("bias",) if self.bias else ()))]
        return [*own, f"{self.transform}.{LEFT}", f"{self.transform}.{RIGHT}"]


def is_flatquant(config: dict[str, Any]) -> bool:
    """Whether a ``config.json`` describes such a folder."""
    stated = config.get("quantization_config")
    return isinstance(stated, dict) and stated.get("quant_method") == METHOD


def read_flatquant(config: dict[str, Any], checkpoint: Checkpoint) -> dict[str, FlatModule]:
    """The quantised modules by name, checked by headers alone.

    Raises:
        CheckpointError: the configuration or a tensor is missing or not as it must be; it names file and tensor.
    """
    file, stated = checkpoint.folder / "config.json", config["quantization_config"]

    def refuse(key: str, reason: str) -> CheckpointError:
        return CheckpointError(file, f"quantization_config.{key}", reason)

    if stated.get("format_version") != VERSION:
        raise refuse("format_version", f"expected {VERSION}, got {stated.get('format_version')!r}")
    if stated.get("bits") != 4:
        raise refuse("bits", f"expected 4, got {stated.get('bits')!r}")
    modules = stated.get("modules")
    if not isinstance(modules, dict) or not modules:
        raise refuse("modules", "expected an object with a module or more")
    found: dict[str, FlatModule] = {}
    for name, own in modules.items():
        key = f"modules[{name!r}]"
        if not isinstance(own, dict) or not isinstance(own.get("transform"), str):
            raise refuse(key, "expected an object with the name of a transform")
        clip = own.get("clip_ratio", 1.0)
        if isinstance(clip, bool) or not isinstance(clip, int | float) or not 0.0 < clip <= 1.0:
            raise refuse(key, f"expected a clip_ratio in (0, 1], got {clip!r}")
        found[name] = _checked(checkpoint, name, own["transform"], float(clip))
    for name in checkpoint.names():
        module, _, short = name.rpartition(".")
        if short in (WEIGHT, SCALE) and module not in found:
            raise CheckpointError(checkpoint.file_of(name), name, "config.json does not name this module")
    return found


def _checked(checkpoint: Checkpoint, name: str, transform: str, clip: float) -> FlatModule:
    def shape(tensor: str, dtypes: tuple[torch.dtype, ...], dimensions: int) -> tuple[int, ...]:
        got, dtype = checkpoint.shape_dtype(tensor)
        if dtype not in dtypes or len(got) != dimensions:
            expected = f"{' or '.join(map(str, dtypes))} with {dimensions} dimensions"
            raise CheckpointError(checkpoint.file_of(tensor), tensor, f"expected {expected}, got {dtype} {list(got)}")
        return got

    def wrong(tensor: str, expected: object, got: object) -> CheckpointError:
        return CheckpointError(checkpoint.file_of(tensor), tensor, f"expected shape {expected}, got {got}")

    weight = f"{name}.{WEIGHT}"
    out_features, words = shape(weight, (torch.int32,), 2)
    in_features, bias = words * 8, f"{name}.bias" in checkpoint
    if out_features % 8 or not out_features * words:
        raise CheckpointError(
            checkpoint.file_of(weight), weight, f"{out_features} output features: not a multiple of 8"
        )
    vectors = {SCALE: (torch.float32,)} | ({"bias": (*_FLOATS, torch.float64)} if bias else {})
    for short, dtypes in vectors.items():
        got = shape(f"{name}.{short}", dtypes, 1)
        if got != (out_features,):
            raise wrong(f"{name}.{short}", [out_features], list(got))
    sizes = []
    for short in (LEFT, RIGHT):
        got = shape(f"{transform}.{short}", _FLOATS, 2)
        if got[0] != got[1] or not 1 <= got[0] <= 256:
            raise wrong(f"{transform}.{short}", "square, of 1 to 256 rows", list(got))
        sizes.append(got[0])
    if sizes[0] * sizes[1] != in_features:
        expected = f"sizes that multiply to the {in_features} input features of {name}"
        raise CheckpointError(checkpoint.file_of(f"{transform}.{LEFT}"), transform, f"expected {expected}, got {sizes}")
    return FlatModule(name, transform, clip, in_features, out_features, bias)


def load_weight(
    checkpoint: Checkpoint, module: FlatModule, device: torch.device | str = "cpu", outputs: Cut = None
) -> ChannelWeight:
    """The weight of a module, or of some of its output features, packed for the kernels.

    Raises:
        CheckpointError: a scale is not finite.
    """
    from nybble.ops.flatquant.reference import unpack

    scale = checkpoint.part(f"{module.name}.{SCALE}", outputs)
    if not bool(scale.isfinite().all()):
        name = f"{module.name}.{SCALE}"
        raise CheckpointError(checkpoint.file_of(name), name, "holds values that are not finite")
    q = unpack(checkpoint.part(f"{module.name}.{WEIGHT}", outputs, None).to(device))
    return ChannelWeight.from_values(q.t().contiguous(), scale.to(device))


def orthogonal(size: int, seed: int) -> Tensor:
    """A float32 orthogonal matrix ``[size, size]`` that spreads one feature over all: Hadamard's times random signs.

    For sizes with an odd factor that factor's is the cosine transform, and the whole their Kronecker product.
    """
    odd = size
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while odd % 2 == 0:
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)) / 2**0.5
        odd //= 2
    at = torch.arange(odd, dtype=torch.float64)
    cosine = torch.cos(torch.pi / odd * (at[:, None] + 0.5) * at) * (2.0 / odd) ** 0.5
    cosine[:, 0] /= 2**0.5
    signs = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
    return (signs[:, None] * torch.kron(matrix, cosine)).float()


def quantize_weight(weight: Tensor, left: Tensor, right: Tensor) -> dict[str, Tensor]:
    """A float weight ``[out, in]`` for transformed activations, rounded to the nearest: the file's tensors.

    ``x W^T = (x P) (W P^-T)^T`` with ``P`` the Kronecker product of ``left`` and ``right``: each of them is inverted.
    """
    from nybble.ops.flatquant.reference import pack

    m, n = left.shape[0], right.shape[0]
    inverses = [torch.linalg.inv(t.double()).t() for t in (left, right)]
    turned = inverses[0].t() @ weight.double().reshape(-1, m, n) @ inverses[1]
    turned = turned.reshape(weight.shape)
    largest = turned.abs().amax(1)
    scale = torch.where(largest == 0, torch.ones_like(largest), largest / 7.0)
    q = (turned / scale[:, None]).round().clamp(-8, 7).to(torch.int8)
    return {WEIGHT: pack(q), SCALE: scale.float()}


def describe(modules: dict[str, tuple[str, float]]) -> dict[str, Any]:
    """The ``quantization_config`` of modules, each with its transform and clip ratio."""
    own = {name: {"transform": transform, "clip_ratio": clip} for name, (transform, clip) in modules.items()}
    return {"quant_method": METHOD, "format_version": VERSION, "bits": 4, "modules": own}


def file_of(folder: Path) -> Path:
    """Where the tensors go."""
    return folder / "model.safetensors"
