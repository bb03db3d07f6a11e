"""How much attention each key gets, without the matrix of probabilities."""

from __future__ import annotations

from typing import Any, overload

from numpy.typing import NDArray

from cuattn._arrays.attention_types import ColumnSums, Layout, Precision, Window
from cuattn._arrays.types import Host, Other, Unpack
from cuattn._attention import request_column_sums
from cuattn._attention.run_column_sums import prepare
from cuattn._device.signatures import remembered


@overload
def attention_column_sums(
    q: Host, k: Host, lse: Host, /, **options: Unpack[ColumnSums]
) -> NDArray[Any]: ...
@overload
def attention_column_sums(
    q: Other, k: Other, lse: Other, /, **options: Unpack[ColumnSums]
) -> Any: ...
@remembered()
def attention_column_sums(
    q: Any,
    k: Any,
    lse: Any,
    /,
    *,
    is_causal: bool = False,
    q_offset: Any = None,
    window: Window | None = None,
    scale: Any = None,
    softcap: Any = None,
    mask: Any = None,
    bias: Any = None,
    alibi_slopes: Any = None,
    q_lens: Any = None,
    kv_lens: Any = None,
    layout: Layout = "BHSD",
    precision: Precision | None = None,
    out: Any = None,
) -> Any:
    """The probabilities of each key, added up over the queries: how much attention it gets.

    With these sums, caches drop the keys that matter least [1]_ [2]_. The scores are computed again
    from q, k and lse, block by block, and never written.

    Parameters
    ----------
    q : cupy.ndarray or numpy.ndarray, shape (B, H, S_q, D), (H, S_q, D) or (S_q, D)
        As in the forward call; D is at most 256.
    k : array, shape (B, H_kv, S_k, D), dtype of q
        Likewise.
    lse : array, shape (B, H, S_q) in both layouts (leading axes as q has them)
        What it returned beside its result: ``_, lse = attention(q, k, v, return_lse=True)``.
        float32, or float64 where q is float64.
    is_causal, q_offset, window, scale, softcap, mask, bias, alibi_slopes
        As in the forward call: with others the result is wrong, which cannot be checked. Sinks have
        left their share in lse.
    q_lens, kv_lens, layout, precision
        Likewise.
    out : array, optional
        Where to write: exactly the shape and dtype of the result, any strides, apart from every
        input.

    Returns
    -------
    sums : array, shape (B, H, S_k) in both layouts (leading axes as q has them), dtype of lse
        Of each head of q; those of heads that share keys are not added up.

    Raises
    ------
    TypeError, ValueError
        As `attention`.

    See Also
    --------
    attention : The forward pass.

    Notes
    -----
    A query that sees no key, or is padding, adds 0; a key that no query sees, or is padding, gets
    0. What nobody sees may hold anything. NaN in a query or its lse reaches the keys that it sees,
    NaN in a key that key. Of the last n queries alone pass ``q[..., -n:, :]`` and
    ``lse[..., -n:]``, and if it was given ``q_offset + S_q - n``.

    Results are bitwise the same on every run and do not depend on other sequences and heads.

    References
    ----------
    .. [1] Z. Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large
       Language Models", arXiv:2306.14048.
    .. [2] Y. Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation",
       arXiv:2404.14469.

    Examples
    --------
    >>> q = k = v = numpy.zeros((2, 4))
    >>> y, lse = cuattn.attention(q, k, v, is_causal=True, return_lse=True)
    >>> cuattn.attention_column_sums(q, k, lse, is_causal=True)
    array([1.5, 0.5])
    """
    arrays = {"mask": mask, "bias": bias, "alibi_slopes": alibi_slopes}
    arrays |= {"q_lens": q_lens, "kv_lens": kv_lens}
    numbers = is_causal, window, scale, softcap, precision
    required = {"q": q, "k": k, "lse": lse}
    return prepare(
        request_column_sums.column_sums(required, arrays, q_offset, layout, numbers, out)
    )
