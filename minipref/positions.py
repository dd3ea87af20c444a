"""From the distance between two tokens to a row of the relative table.

DeBERTa-v3 has no absolute positions. All it knows of order is, for a query at i and a key at j, the distance i - j,
and that only roughly when it is large: distances up to span/2 each have a bucket of their own, farther ones share
logarithmically wider buckets, and everything from max_distance - 1 on shares the last.

    distance   0  1  2 ... 128 | 129 130 131 132 ... 150 ... 256 ... 506 ... 511 ...     span 256,
    bucket     0  1  2 ... 128 | 129 130 131 131 ... 143 ... 192 ... 255 ... 255 ...     max_distance 512

Negative distances mirror it. A bucket b in -span..span-1 is row b + span of the table, so R = 2 * span rows. Row 0
would be bucket -span, which no clamped distance reaches: it is never read, and its gradient is always zero.

Unusual here: everything is computed in float64, which autocast leaves alone. `ceil` turns a rounding error into a
different bucket: with the logarithm's ratio rounded to bfloat16, 74 of the 1,023 distances land in a wrong one.
"""

import torch
from torch import Tensor


def log_bucket(distance: Tensor, span: int = 256, max_distance: int = 512) -> Tensor:
    """The bucket of each distance i - j: itself when it is near, logarithmic when it is far.

    Shapes: any int64 tensor -> int64 of the same shape, in -(span - 1)..span - 1.
    Paper: DeBERTa-v2/v3 code, `make_log_bucket_position`; the papers give no formula.
    Differs: beyond max_distance - 1 Microsoft clamps the distance, and so do we; Hugging Face lets the formula run
    on, and past about max_distance tokens it meets table rows that no training ever reached.
    """
    half = span // 2
    distance = distance.clamp(1 - max_distance, max_distance - 1)
    far = distance.abs().clamp(min=half).double()          # near distances would have a negative logarithm
    reach = torch.tensor((max_distance - 1) / half, dtype=torch.float64, device=distance.device)
    # Where the ratio is a whole number (log 2 / log 8 * 3 is), a rounding error must not lift it to the next bucket.
    steps = torch.ceil(torch.log(far / half) / torch.log(reach) * (half - 1) - 1e-9).long()
    return torch.where(distance.abs() <= half, distance, (half + steps) * distance.sign())


def distance_rows(length: int, span: int, max_distance: int, device: torch.device | str | None = None) -> Tensor:
    """The table row of every distance that can occur among `length` tokens.

    Shapes: -> (2L - 1,) int64; entry i - j + L - 1 belongs to a query at i and a key at j.
    """
    distance = torch.arange(1 - length, length, device=device)
    return log_bucket(distance, span, max_distance) + span


def relative_index(rows: Tensor) -> Tensor:
    """`distance_rows` laid out for pairs of tokens: `rel_index[i, j]` is the table row of distance i - j.

    Shapes: (2L - 1,) -> (L, L) int64.
    """
    length = (len(rows) + 1) // 2
    i = torch.arange(length, device=rows.device)
    return rows[i[:, None] - i[None, :] + length - 1]
