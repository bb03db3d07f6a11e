"""Which module knows the loop over keys or queries of which kernel of attention."""

from __future__ import annotations

from bench.compiled import (
    attention_loop,
    attention_sm90_loop,
    backward_ds_loop,
    backward_loop,
    backward_sm90_loop,
    decode_loop,
    latent_sm90_loop,
)

WITH_A_HEADER = (
    attention_loop,
    attention_sm90_loop,
    backward_ds_loop,
    decode_loop,
    latent_sm90_loop,
)
LOOPS = {module.HEADER: module for module in WITH_A_HEADER} | {
    decode_loop.WIDE: decode_loop,
    backward_loop.Q: backward_loop,
    backward_loop.KV: backward_loop,
    backward_sm90_loop.Q: backward_sm90_loop,
    backward_sm90_loop.KV: backward_sm90_loop,
}
