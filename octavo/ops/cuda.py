"""The GPU's kernels, on torch's own GEMMs. Casts run the law itself, which is plain torch on any device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.ops import reference
from octavo.ops.schema import LIBRARY


def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """``torch._int_mm``, padded with zeros to the sizes cuBLAS takes: M above 16, K and N multiples of 8."""
    (m, k), n = a.shape, b.shape[0]
    if 0 in (m, k, n):
        return a.new_zeros((m, n), dtype=torch.int32)
    a = F.pad(a, (0, -k % 8, 0, max(0, 17 - m)))
    b = F.pad(b, (0, -k % 8, 0, -n % 8))
    return torch._int_mm(a.contiguous(), b.contiguous().t())[:m, :n].contiguous()


def float_mm(a: Tensor, b: Tensor) -> Tensor:
    """BF16 on cuBLAS with an FP32 result; float32 operands multiply as they are."""
    if a.dtype == b.dtype == torch.bfloat16 and 0 not in (*a.shape, *b.shape):
        with torch.autocast("cuda", enabled=False):  # which may be one to float16
            return torch.mm(a, b.mT, out_dtype=torch.float32)
    return reference.float_mm(a, b)


for _op in (int_mm, float_mm):
    LIBRARY.impl(_op.__name__, _op, "CUDA")
