"""Self-attention over the batch: projections, rotation, and the choice between the paged cache and the batch itself."""

from __future__ import annotations

from torch import Tensor, nn

from quire import ops
from quire.batch import Batch
from quire.layers.linear import products

Rotation = tuple[Tensor, Tensor]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: Batch,
    layer: int,
    *,
    rotation: Rotation | None = None,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention of q [T, H, D] with this batch's k, v [T, K, D]: through the cache, or packed when there is none.

    rotation: turn q and k by it first; q may be overwritten.
    """
    if batch.kv is None:
        if rotation is not None:
            q, k = ops.rope(q, *rotation), ops.rope(k, *rotation)
        return ops.packed_attention(q, k, v, batch.starts, scale=scale, window=window, softcap=softcap)
    keys, values = batch.kv.keys[layer], batch.kv.values[layer]
    scales = None if batch.kv.scales is None else batch.kv.scales[layer]
    if rotation is None:
        ops.write_kv(keys, values, k, v, batch.slots, scales)
    else:
        q = ops.rope_and_write(q, k, v, *rotation, keys, values, batch.slots, scales)
    return ops.paged_attention(
        q,
        keys,
        values,
        batch.block_tables,
        batch.starts,
        batch.lengths,
        scale=scale,
        window=window,
        softcap=softcap,
        scales=scales,
    )


class Attention(nn.Module):
    """The attention of Llama and its kin. Families set what differs: the projections and norms they own."""

    def __init__(
        self,
        layer: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        q_proj: nn.Module,
        k_proj: nn.Module,
        v_proj: nn.Module,
        o_proj: nn.Module,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        self.layer, self.heads, self.kv_heads, self.head_dim = layer, heads, kv_heads, head_dim
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = q_proj, k_proj, v_proj, o_proj
        self.q_norm, self.k_norm = q_norm, k_norm
        self.scale = head_dim**-0.5 if scale is None else scale
        self.window, self.softcap = window, softcap

    def project(self, x: Tensor, adapters: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, E] -> q [T, H, D], k [T, K, D], v [T, K, D], before norm and rotation."""
        size = self.head_dim
        q, k, v = products(x, adapters, self.q_proj, self.k_proj, self.v_proj)
        return q.view(-1, self.heads, size), k.view(-1, self.kv_heads, size), v.view(-1, self.kv_heads, size)

    def forward(self, x: Tensor, rotation: Rotation | None, batch: Batch) -> Tensor:
        q, k, v = self.project(x, batch.adapters)
        if self.q_norm is not None:
            q, k = self.q_norm(q, batch.adapters), self.k_norm(k, batch.adapters)
        out = attend(
            q, k, v, batch, self.layer, rotation=rotation, scale=self.scale, window=self.window, softcap=self.softcap
        )
        return self.o_proj(out.flatten(1), batch.adapters)
