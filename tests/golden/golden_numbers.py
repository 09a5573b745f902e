"""What every golden file is made of: one model, one text, and numbers that anyone can work out."""

from __future__ import annotations

import torch

FINGERPRINT = "0123456789abcdef" * 4
TOKEN_IDS = tuple((37 * position + position * position) % 32_000 for position in range(130))


def ramp(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Element i is (i mod 251 - 125) / 8, exact in every dtype."""
    return ((torch.arange(torch.Size(shape).numel()) % 251 - 125) / 8).reshape(shape).to(dtype)


def steps(bits: int, *shape: int) -> torch.Tensor:
    """Integers that `bits` can hold, as int8: element i is (7 i mod 255) - 127 at 8 bits, else that of code
    c = (7 i + i // 16) mod 2^bits, which stands for 2 c + 1 - 2^bits."""
    places = torch.arange(torch.Size(shape).numel())
    if bits == 8:
        return (7 * places % 255 - 127).reshape(shape).to(torch.int8)
    codes = (7 * places + places // 16) % 2**bits
    return (2 * codes + 1 - 2**bits).reshape(shape).to(torch.int8)
