"""What stands at the border of an engine: the name, element type and dims of an input or output.

An engine of ours and a model loaded by another provider describe themselves with the same record.
"""

from __future__ import annotations

from dataclasses import dataclass

from vivace.base.dims import Dim
from vivace.base.dtypes import DType


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output, written `images: f32[N,3,224,224]`. A symbolic dim is any size at run time."""

    name: str
    dtype: DType
    shape: tuple[Dim, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{','.join(map(str, self.shape))}]"
