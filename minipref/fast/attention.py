"""Disentangled attention without a gather, and without an L x L matrix kept for the backward pass.

The plain form in `model.py` multiplies every query with all R relative embeddings, then gathers for each pair of tokens
the product for its distance. The gather is the slow part of DeBERTa: it reads and writes L x L single elements, twice
per head, and autograd keeps them all. Four observations remove it.

**1. A table ordered by distance needs no index.** (Transformer-XL's relative shift.) L tokens have 2L - 1 distances.
Let t[m] be the embedding of the distance L - 1 - m, so that distances descend. One matrix product,
T[i, m] = q_i . t[m], gives every query's score for every distance; the key at j needs m = j - i + L - 1. Row i of T
starts at i * (2L - 1) in memory, so this element is at

    i * (2L - 1) + j - i + L - 1  =  (L - 1) + i * (2L - 2) + j * 1:

a matrix with strides (2L - 2, 1), which is a view of T (`relative_shift`). p2c is the transpose of the same with
queries and keys exchanged. A tile of c queries needs only L + c - 1 distances.

**2. One head at a time fits into the cache.** A block of scores, 4 MB in float32, is computed, used and overwritten.
Only q, k, v and the result are in main memory.

**3. The backward pass can recompute the scores.** A block holds complete rows, so its softmax can be recomputed from q,
k and the table. With S the scores, P = softmax(S), Z the dropout mask (0 or 1 / keep), O = (P * Z) V the result and dO
the incoming gradient:

    dV = (P * Z)^T dO         dP = (dO V^T) * Z         dS = P * (dP - rowsum(P * dP))

    dq_i = scale * sum_j dS[i, j] (k_j + pos_k[i - j])         dpos_k[m] = scale * sum_(i - j = m) dS[i, j] q_i
    dk_j = scale * sum_i dS[i, j] (q_i + pos_q[i - j])         dpos_q[m] = scale * sum_(i - j = m) dS[i, j] k_j

The sums over one distance are also matrix products: write dS into the `relative_shift` of a zeroed T; the formulas are
then T times the table, and T transposed times the queries. FlashAttention's row sum, over O * dO, is the same number
up to rounding, but only the sum over P * dP makes dS of a one-token sequence exactly 0.

**4. Far tokens need no table.** All distances from 506 on share one row. There the three products are one,
q_i . (k_j + pos_k) + k_j . pos_q, with one more number for each key. It is used in the forward pass of long sequences.

Dropout draws from its own generator, seeded from torch's global one. The backward pass seeds it again, so no mask is
stored, and a recomputed forward pass gives the same mask.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minipref.fast.layers import DropoutMask, draw_seed, without_autocast

BLOCK_SCORES = 2**20     # per block: the fastest from 512 tokens on, with 32 MB of third-level cache
LEAST_FAR = 128          # fewer far keys than this are not worth a product of their own
LANES = 32               # widths of products are rounded up to a multiple of this: 32 bfloat16 fill a cache line


def select_backend(device: torch.device) -> str:
    """The implementation of the attention: "blocks" or "batched".

    Blocks stay in the cache of a CPU. On a GPU, launching a kernel costs more than the work of a block, so all heads
    are computed in one batch.
    """
    return "blocks" if device.type == "cpu" else "batched"


def fast_attention(q: Tensor, k: Tensor, v: Tensor, pos_q: Tensor, pos_k: Tensor, attention_mask: Tensor,
                   buckets: Tensor, dropout: float = 0.0) -> Tensor:
    """Disentangled attention, implemented for the device of q.

    Shapes: q (B, H, L, d), or (B, H, 1, d) for [CLS] alone; the rest as in `blockwise_attention` -> the shape of q.
    """
    if q.shape[2] < k.shape[2]:
        attention = cls_attention
    else:
        attention = blockwise_attention if select_backend(q.device) == "blocks" else batched_attention
    return attention(q, k, v, pos_q, pos_k, attention_mask, buckets, dropout)


def cls_attention(q: Tensor, k: Tensor, v: Tensor, pos_q: Tensor, pos_k: Tensor, attention_mask: Tensor,
                  buckets: Tensor, dropout: float = 0.0) -> Tensor:
    """Disentangled attention of the first token only. With one query each key has one distance, so no L x L table:
    score[j] = k_j . (q + pos_q[0 - j]) + q . pos_k[0 - j].

    Shapes: q (B, H, 1, d), the rest as in `blockwise_attention` -> (B, H, 1, d).
    """
    L = k.shape[2]
    buckets = buckets[:L].flip(0)                                        # of the distances 0, -1, ... 1 - L
    q = q / math.sqrt(3 * q.shape[-1])
    pos_q = pos_q[:, buckets] / math.sqrt(3 * q.shape[-1])
    scores = (k * (q + pos_q)).sum(-1)[:, :, None] + q @ pos_k[:, buckets].mT                            # (B, H, 1, L)
    scores = scores.masked_fill(~attention_mask[:, None, None, :], torch.finfo(scores.dtype).min)
    probs = torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return F.dropout(probs, dropout).to(v.dtype) @ v


def batched_attention(q: Tensor, k: Tensor, v: Tensor, pos_q: Tensor, pos_k: Tensor, attention_mask: Tensor,
                      buckets: Tensor, dropout: float = 0.0) -> Tensor:
    """Disentangled attention of all heads at once, with c2p + p2c as the mask of torch's own fused attention.

    Shapes: as `blockwise_attention`.
    """
    (B, H, L), scale = q.shape[:3], 1 / math.sqrt(3 * q.shape[-1])
    q = q * scale
    c2p = relative_shift((q @ pos_k[:, buckets.flip(0)].mT).flatten(0, 1), L)                            # (BH, L, L)
    p2c = relative_shift((k @ (pos_q[:, buckets] * scale).mT).flatten(0, 1), L).mT
    bias = (c2p + p2c).unflatten(0, (B, H))
    bias = bias.masked_fill(~attention_mask[:, None, None, :], torch.finfo(bias.dtype).min)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=1.0)


def blockwise_attention(q: Tensor, k: Tensor, v: Tensor, pos_q: Tensor, pos_k: Tensor, attention_mask: Tensor,
                        buckets: Tensor, dropout: float = 0.0) -> Tensor:
    """Disentangled attention in blocks, with dropout on the probabilities. Differentiable once.

    Queries past the longest sequence of a block are not computed; their result is 0.

    Shapes: q, k, v (B, H, L, d); pos_q, pos_k (H, R, d); attention_mask (B, L) bool; buckets (2L - 1,) int64, the row
    of each distance as `model.distance_buckets` returns it; dropout a rate in [0, 1) -> (B, H, L, d).
    """
    seed = draw_seed() if dropout else 0
    return _BlockwiseAttention.apply(q, k, v, pos_q, pos_k, attention_mask, buckets, dropout, seed)


class _BlockwiseAttention(torch.autograd.Function):
    """The arguments are those of `blockwise_attention` and the seed of its dropout."""

    @staticmethod
    @without_autocast
    def forward(ctx, q, k, v, pos_q, pos_k, attention_mask, buckets, dropout, seed):
        ctx.save_for_backward(q, k, v, pos_q, pos_k, attention_mask, buckets)
        ctx.dropout, ctx.seed = dropout, seed
        mask, space = DropoutMask(dropout, seed), Workspace(q.dtype)
        out = torch.zeros_like(q)
        for block in blocks(q, k, pos_q, pos_k, attention_mask, buckets, space):
            probs = block.probs
            if dropout:
                probs *= mask.fill(space.take("mask", probs.shape))
            values = torch.bmm(probs, v[block.at_keys])
            out[block.at_queries] = values.div_(mask.keep) if dropout else values
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    @without_autocast
    def backward(ctx, d_out):
        q, k, v, pos_q, pos_k, attention_mask, buckets = ctx.saved_tensors
        (H, R, d), L = pos_q.shape, q.shape[2]
        scale = 1 / math.sqrt(3 * d)
        mask, space = DropoutMask(ctx.dropout, ctx.seed), Workspace(q.dtype)
        wide = torch.promote_types(q.dtype, torch.float32)               # sums over blocks are kept in float32
        narrow = q.dtype if is_one_block(L) else wide
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k, dtype=narrow), torch.zeros_like(v, dtype=narrow)
        d_table_q, d_table_k = (q.new_zeros(H, d, table_width(L), dtype=wide) for _ in range(2))

        for block in blocks(q, k, pos_q, pos_k, attention_mask, buckets, space):
            probs, d_block = block.probs, d_out[block.at_queries].contiguous() / mask.keep
            d_probs = torch.bmm(d_block, v[block.at_keys].contiguous().mT, out=space.take("d_probs", probs.shape))
            dropped = probs
            if ctx.dropout:
                kept = mask.fill(space.take("mask", probs.shape))
                d_probs *= kept
                dropped = kept.mul_(probs)
            d_values = torch.bmm(dropped.mT, d_block)
            d_scores = torch._softmax_backward_data(d_probs, probs, -1, probs.dtype, grad_input=d_probs)
            every = 0, block.keys.shape[1]
            d_queries, d_keys = torch.bmm(d_scores, block.keys), torch.bmm(d_scores.mT, block.queries)       # c2c
            for tile, near in block.query_tiles(*every):                                                   # c2p
                d_tile, d_table = tile_backward(d_scores[:, tile], block.queries[:, tile],
                                                  block.table_k[:, near], space)
                d_queries[:, tile] += d_tile
                d_table_k[block.head, :, near] += d_table
            for tile, near in block.key_tiles(*every):                                                     # p2c
                d_tile, d_table = tile_backward(d_scores[:, :, tile].mT, block.keys[:, tile],
                                                  block.table_q[:, near], space)
                d_keys[:, tile] += d_tile
                d_table_q[block.head, :, near] += d_table

            dq[block.at_queries] = d_queries
            if block.first == 0:                     # usually the only block, and writing is cheaper than adding
                dk[block.at_keys], dv[block.at_keys] = d_keys, d_values
            else:
                dk[block.at_keys] += d_keys
                dv[block.at_keys] += d_values

        d_pos_q, d_pos_k = (q.new_zeros(H, R, d, dtype=wide) for _ in range(2))
        d_pos_q.index_add_(1, buckets, d_table_q[:, :, :len(buckets)].mT, alpha=scale)
        d_pos_k.index_add_(1, buckets.flip(0), d_table_k[:, :, :len(buckets)].mT)
        gradients = dq.mul_(scale), dk, dv, d_pos_q, d_pos_k
        return *(gradient.to(q.dtype) for gradient in gradients), None, None, None, None


class Block(NamedTuple):
    """The queries first..first + m - 1 and the n keys of one head, in G sequences of the batch."""

    head: int
    batch: slice
    first: int
    L: int
    queries: Tensor          # (G, m, d), scaled
    keys: Tensor             # (G, n, d)
    table_q: Tensor          # (d, E): pos_q for the distances i - j, ascending, scaled
    table_k: Tensor          # (d, E): pos_k for the distances i - j, descending
    probs: Tensor            # (G, m, n)

    @property
    def at_queries(self) -> tuple:
        """The index of the queries in (B, H, L, d)."""
        return self.batch, self.head, slice(self.first, self.first + self.queries.shape[1])

    @property
    def at_keys(self) -> tuple:
        """The index of the keys and values in (B, H, L, d)."""
        return self.batch, self.head, slice(0, self.keys.shape[1])

    def query_tiles(self, start: int, stop: int) -> list[tuple[slice, slice]]:
        """Tiles of the queries, each with its columns of table_k for the keys start..stop - 1."""
        return tiles(self.first, self.queries.shape[1], start, stop - start, self.L, self.keys.dtype)

    def key_tiles(self, start: int, stop: int) -> list[tuple[slice, slice]]:
        """Tiles of the keys start..stop - 1, counted from start, each with its columns of table_q for the queries."""
        return tiles(start, stop - start, self.first, self.queries.shape[1], self.L, self.keys.dtype)

    def near_keys(self, reach: int) -> tuple[int, int]:
        """The keys start..stop - 1 nearer than `reach` to some query. Fewer than LEAST_FAR others count as near."""
        n, last = self.keys.shape[1], self.first + self.queries.shape[1] - 1
        start, stop = self.first - reach + 1, last + reach
        return start if start >= LEAST_FAR else 0, stop if stop <= n - LEAST_FAR else n

    def compute_probs(self, padding: Tensor | None, space: "Workspace", reach: int) -> None:
        """Fill `probs` with softmax(c2c + c2p + p2c). `padding` (G, 1, n) marks the keys that are padding.

        All distances of at least `reach` share one row of the table: there
        c2c + c2p + p2c = q_i . (k_j + pos_k) + k_j . pos_q, one product and a number for each key.
        """
        scores, (m, n) = self.probs, self.probs.shape[1:]
        start, stop = self.near_keys(reach)
        near, near_keys = scores[:, :, start:stop], self.keys[:, start:stop]
        for tile, columns in self.key_tiles(start, stop):
            near[:, :, tile] = tile_scores(near_keys[:, tile], self.table_q[:, columns], m, space).mT     # p2c
        near.baddbmm_(self.queries, near_keys.mT)                                                            # c2c
        for tile, columns in self.query_tiles(start, stop):
            near[:, tile] += tile_scores(self.queries[:, tile], self.table_k[:, columns], stop - start, space)    # c2p
        for keys, distance in ((slice(0, start), reach), (slice(stop, n), -reach)):
            if keys.start < keys.stop:
                pos_q, pos_k = self.table_q[:, self.L - 1 + distance], self.table_k[:, self.L - 1 - distance]
                far = self.keys[:, keys]
                scores[:, :, keys] = torch.baddbmm((far @ pos_q)[:, None], self.queries, (far + pos_k).mT)
        if padding is not None:
            scores.masked_fill_(padding, torch.finfo(scores.dtype).min)
        torch.softmax(scores, -1, out=scores)              # also for bfloat16 computed in float32, then rounded


def blocks(q: Tensor, k: Tensor, pos_q: Tensor, pos_k: Tensor, attention_mask: Tensor, buckets: Tensor,
           space: "Workspace") -> Iterator[Block]:
    """Yields every block of the attention with its probabilities; the order depends only on the batch.

    The next block overwrites `probs`.
    """
    H, L, d = q.shape[1:]
    scale = 1 / math.sqrt(3 * d)
    tables_q, tables_k = by_distance(pos_q * scale, buckets), by_distance(pos_k, buckets.flip(0))
    groups, reach = token_groups(attention_mask, BLOCK_SCORES), distance_of_last_bucket(buckets)
    for h in range(H):
        for batch, n, padding in groups:
            keys = k[batch, h, :n].contiguous()
            m = max(LANES, BLOCK_SCORES // (len(keys) * n))
            for first in range(0, n, m):
                queries = q[batch, h, first:min(first + m, n)].contiguous() * scale
                probs = space.take("probs", (len(keys), queries.shape[1], n))
                block = Block(h, batch, first, L, queries, keys, tables_q[h], tables_k[h], probs)
                block.compute_probs(padding, space, reach)
                yield block


def distance_of_last_bucket(buckets: Tensor) -> int:
    """The least r >= 1 such that, in each direction, all distances of at least r share one row of the table."""
    runs = []
    for outermost_first in (buckets, buckets.flip(0)):
        different = (outermost_first != outermost_first[0]).nonzero()
        runs.append(int(different[0]) if len(different) else len(buckets))
    return max(1, (len(buckets) + 1) // 2 - min(runs))


def is_one_block(L: int) -> bool:
    """Whether all queries of L tokens fit into one block."""
    return L * L <= BLOCK_SCORES


def token_groups(attention_mask: Tensor, most_scores: int) -> list[tuple[slice, int, Tensor | None]]:
    """Groups of consecutive sequences for one block: the slice of the batch, n, and which of the n keys are padding.

    n is the length of the longest sequence. The mask is None if no key is padding.
    """
    B, L = attention_mask.shape
    ends = (attention_mask * torch.arange(1, L + 1, device=attention_mask.device)).amax(1).tolist()
    groups, start = [], 0
    while start < B:
        n, stop = ends[start], start + 1
        while stop < B and max(n, ends[stop])**2 * (stop + 1 - start) <= most_scores:
            n, stop = max(n, ends[stop]), stop + 1
        padding = ~attention_mask[start:stop, None, :n]
        if n > 0:
            groups.append((slice(start, stop), n, padding if padding.any() else None))
        start = stop
    return groups


def table_width(L: int) -> int:
    """E, the columns of a table by distance: one per distance among L tokens, and space for rounding up."""
    return 2 * L - 1 + 2 * LANES


def by_distance(pos: Tensor, buckets: Tensor) -> Tensor:
    """Relative embeddings ordered by distance, one per column. Shapes: (H, R, d), (2L - 1,) -> (H, d, E)."""
    table = pos.new_zeros(len(pos), pos.shape[2], table_width((len(buckets) + 1) // 2))
    table[:, :, :len(buckets)] = pos.transpose(0, 1).index_select(0, buckets).permute(1, 2, 0)
    return table


@lru_cache(maxsize=4096)
def tiles(start: int, count: int, others_start: int, others: int, L: int, dtype: torch.dtype
           ) -> list[tuple[slice, slice]]:
    """Cut `count` positions from `start` on into tiles of c, for products with a table by distance.

    Column m of the table belongs to a position a of the tile and a position b of the others with m = b - a + L - 1.
    Together they need c + others - 1 columns. Short tiles waste fewer of them, long tiles need fewer products.

    Returns for each tile its slice of the `count` positions and its slice of the columns.
    """
    # Measured at 128 to 2,048 tokens. bfloat16 products are faster, so overhead weighs more and tiles are longer.
    c = min(max(others // 4, 64), 128) if dtype.itemsize > 2 else min(max(others, 64), 512)
    found = []
    for a in range(0, count, c):
        b = min(a + c, count)
        width = -(-(b - a + others - 1) // LANES) * LANES
        if width % 512 == 0:         # rows with such a stride compete for the same cache sets
            width += LANES
        column = others_start - (start + b) + L
        found.append((slice(a, b), slice(column, column + width)))
    return found


def tile_scores(tile: Tensor, table: Tensor, others: int, space: "Workspace") -> Tensor:
    """The scores of a tile's positions with all others. Shapes: (G, c, d), (d, width) -> (G, c, others)."""
    G, c, _ = tile.shape
    product, relative_shift = space.product("product", G, c, table.shape[1], others)
    torch.mm(tile.flatten(0, 1), table, out=product)
    return relative_shift


def tile_backward(d_scores: Tensor, tile: Tensor, table: Tensor, space: "Workspace") -> tuple[Tensor, Tensor]:
    """The gradients of `tile_scores` for the tile and the table.

    Shapes: (G, c, others), (G, c, d), (d, width) -> (G, c, d), (d, width).
    """
    G, c, others = d_scores.shape
    d_product, relative_shift = space.product("d_product", G, c, table.shape[1], others)
    relative_shift.copy_(d_scores)
    return (d_product @ table.mT).unflatten(0, (G, c)), tile.flatten(0, 1).mT @ d_product


def relative_shift(product: Tensor, others: int) -> Tensor:
    """The view of a tile's products with a table; its entry (a, b) is product[a, b - a + c - 1].

    Shapes: (G, c, width), contiguous, width >= others + c - 1 -> (G, c, others).
    """
    G, c, width = product.shape
    assert product.is_contiguous() and width >= others + c - 1           # required by the strides below
    return product.as_strided((G, c, others), (c * width, width - 1, 1), product.storage_offset() + c - 1)


class Workspace:
    """Buffers that all blocks share, so that they stay in the cache and are allocated once."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.buffers: dict[str, Tensor] = {}
        self.products: dict[tuple, tuple[Tensor, Tensor]] = {}

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A contiguous, uninitialised tensor; the same memory for the same name."""
        size = math.prod(shape)
        if name not in self.buffers or len(self.buffers[name]) < size:
            self.buffers[name] = torch.empty(size, dtype=self.dtype)
        return self.buffers[name][:size].view(shape)

    def product(self, name: str, G: int, c: int, width: int, others: int) -> tuple[Tensor, Tensor]:
        """A tile's products with a table, (G * c, width), and their `relative_shift`, (G, c, others).

        New products are zero, and stay zero outside the relative_shift if only that is written.
        """
        key = name, G, c, width, others
        if key not in self.products:
            product = torch.zeros(G, c, width, dtype=self.dtype)
            self.products[key] = product.flatten(0, 1), relative_shift(product, others)
        return self.products[key]
