"""What a call is told whose arguments do not fit the signature: our names, whoever's it used.

Python itself finds that they do not fit; only then anything here is looked up.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

# What other libraries (torch, JAX, SciPy, TensorFlow, flash-attn, cuDNN) call an option: our name,
# and how to pass it where that is not the same.
RENAMED = {
    "dim": ("axis", ""),
    "dims": ("axis", ""),
    "axes": ("axis", ""),
    "keepdim": ("keepdims", ""),
    "keep_dims": ("keepdims", ""),
    "weight": ("b", ""),
    "weights": ("b", ""),
    "mask": ("where", "True takes part"),
    "temperature": ("scale", "scale=1 / temperature"),
    "beta": ("scale", ""),
    "softmax_scale": ("scale", ""),
    "sm_scale": ("scale", ""),
    "attn_scale": ("scale", ""),
    "scaling": ("scale", ""),
    "logit_scale": ("scale", ""),
    "target": ("labels", ""),
    "targets": ("labels", ""),
    "y_true": ("labels", ""),
    "ignore": ("ignore_index", ""),
    "ignored_index": ("ignore_index", ""),
    "ignore_label": ("ignore_index", ""),
    "ignore_class": ("ignore_index", ""),
    "vocab_start_index": ("index_offset", ""),
    "largest": ("mode", 'mode="largest" or mode="smallest"'),
    "descending": ("mode", 'mode="largest" or mode="smallest"'),
    "topk": ("k", ""),
    "top_k": ("k", ""),
    "num_samples": ("num", ""),
    "size": ("num", ""),
    "generator": ("seed", "an int, or an integer for each row"),
    "rng": ("seed", "an int, or an integer for each row"),
    "random_state": ("seed", "an int, or an integer for each row"),
    "seeds": ("seed", ""),
    "philox_seed": ("seed", ""),
    "philox_offset": ("offset", ""),
    "topp": ("top_p", ""),
    "minp": ("min_p", ""),
    "return_logprobs": ("return_log_prob", ""),
    "logprobs": ("return_log_prob", ""),
    "normalize": ("renormalize", ""),
    "norm_topk_prob": ("renormalize", ""),
    "return_softmax_lse": ("return_lse", ""),
    "return_logsumexp": ("return_lse", ""),
    "return_attn_probs": ("return_lse", "probabilities are never stored"),
    "causal": ("is_causal", ""),
    "use_causal_mask": ("is_causal", ""),
    "attn_mask": ("mask", "a bool one, True attends; what is added to the scores is bias"),
    "attention_mask": ("mask", "a bool one, True attends; what is added to the scores is bias"),
    "key_padding_mask": ("kv_lens", "or mask=~key_padding_mask[:, None, None, :]"),
    "attn_bias": ("bias", ""),
    "attention_bias": ("bias", ""),
    "alibi": ("alibi_slopes", ""),
    "score_mod": ("score", "an expression as a str, such as 's + table[h, q - k]'"),
    "mask_mod": ("score", "an expression as a str, such as 'where(k <= q, s, -inf)'"),
    "soft_cap": ("softcap", ""),
    "logits_soft_cap": ("softcap", ""),
    "attn_logits_soft_cap": ("softcap", ""),
    "window_size": ("window", "(left, right), in which None and not -1 has no bound"),
    "local_window_size": ("window", "(left, right), in which None and not -1 has no bound"),
    "sliding_window": ("window", "(n - 1, 0) is n keys up to the query's own"),
    "sink": ("sinks", ""),
    "s_aux": ("sinks", ""),
    "seqused_q": ("q_lens", ""),
    "query_seq_lengths": ("q_lens", ""),
    "seqused_k": ("kv_lens", ""),
    "cache_seqlens": ("kv_lens", ""),
    "key_value_seq_lengths": ("kv_lens", ""),
    "seq_lens": ("kv_lens", ""),
    "block_size": ("block", "(queries, keys)"),
    "BLOCK_SIZE": ("block", "(queries, keys)"),
    "block_table": ("page_table", ""),
    "block_tables": ("page_table", ""),
    "k_descale": ("k_scale", ""),
    "v_descale": ("v_scale", ""),
    "qkv_format": ("layout", ""),
    "tensor_layout": ("layout", ""),
    "allow_tf32": ("precision", 'precision="tf32"'),
    "input_precision": ("precision", ""),
    "cu_seqlens_kv": ("cu_seqlens_k", ""),
    "max_seqlen_kv": ("max_seqlen_k", ""),
    "query": ("q", ""),
    "key": ("k", ""),
    "value": ("v", ""),
}
# The same of names that have another counterpart above.
OTHERWISE = {
    "key": RENAMED["generator"],
    "topk": ("top_k", ""),
    "mask_mod": ("mask", "an expression as a str, such as 'doc[q] == doc[k]'"),
}
FIRST = ("input", "a", "logits", "query")  # the first array, whatever it is called here
# What has no counterpart, and why.
ABSENT = {
    "dropout_p": "there is no dropout",
    "dropout": "there is no dropout",
    "dropout_rate": "there is no dropout",
    "enable_gqa": "heads of k and v are shared wherever their number divides that of q",
    "deterministic": "every result has the same bits on every run",
    "num_splits": "how keys are split is chosen by shape",
    "replacement": "num elements of a row are different; draw again with another offset",
    "replace": "num elements of a row are different; draw again with another offset",
    "reduction": "there is a loss for each row; take their sum or mean",
    "label_smoothing": "there is no label smoothing",
    "weight": "multiply losses by weight[labels]",
    "class_weight": "multiply losses by class_weight[labels]",
    "lse_square_scale": "add lse_square_scale * lse**2, with return_lse=True",
    "z_loss": "add z_loss * lse**2, with return_lse=True",
    "return_z_loss": "add a multiple of lse**2, with return_lse=True",
    "return_sign": "a negative sum gives NaN",
    "stream": "kernels run on CuPy's current stream",
    "device": "kernels run where the arrays are",
    "rotary_cos": "rotate q and the new keys before the call",
    "rotary_sin": "rotate q and the new keys before the call",
}
# What a function of ours has not, but another one has.
ELSEWHERE = {
    (function, option): "attention"
    for option, functions in {
        "bias": ("attention_kvcache", "attention_cascade"),
        "sinks": ("attention_column_sums", "attention_topk"),
        "score": ("attention_cascade", "attention_column_sums", "attention_topk"),
        "block_mask": (
            "attention_backward",
            "attention_backward_varlen",
            "attention_cascade",
            "attention_column_sums",
            "attention_kvcache",
            "attention_topk",
            "attention_varlen",
        ),
    }.items()
    for function in functions
}

# What other libraries call a function of ours.
FUNCTIONS = {
    "topk": "top_k",
    "multinomial": "sample",
    "categorical": "sample",
    "top_k_top_p_sampling_from_logits": "sample",
    "nll_loss": "cross_entropy",
    "cross_entropy_loss": "cross_entropy",
    "softmax_cross_entropy": "cross_entropy",
    "softmax_cross_entropy_with_integer_labels": "cross_entropy",
    "sparse_softmax_cross_entropy_with_logits": "cross_entropy",
    "sparse_categorical_crossentropy": "cross_entropy",
    "softmax_entropy": "entropy",
    "scaled_dot_product_attention": "attention",
    "dot_product_attention": "attention",
    "flash_attn_func": "attention",
    "create_block_mask": "block_mask",
    "flash_attn_varlen_func": "attention_varlen",
    "flash_attn_with_kvcache": "attention_kvcache",
    "append_paged_kv_cache": "kv_append",
}


def explained(function: Callable[P, R]) -> Callable[P, R]:
    """The function; where arguments do not fit its signature, with a TypeError in our words."""

    @functools.wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> R:
        try:
            return function(*args, **options)
        except TypeError as error:
            trace = error.__traceback__
            if trace is not None and trace.tb_next is not None:  # raised inside of the function
                raise
            reason = _reason(function, args, options)
        raise TypeError(reason)

    return call


def _reason(function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> str:
    name, signature = function.__name__, inspect.signature(function)
    parameters = signature.parameters
    arrays = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_ONLY]
    places = [p.name for p in parameters.values() if p.kind is not p.KEYWORD_ONLY]
    for option in options:
        if option in arrays:
            return (
                f"{option} must be given by position, but it came as a keyword; "
                f"call {name}({', '.join(arrays)}, ...)"
            )
        if option in places[: len(args)]:
            return f"{option} must be given once, but it came by position and as a keyword"
        if option not in parameters:
            return _unknown(option, name, list(parameters), arrays)
    lacking = [p.name for p in parameters.values() if p.default is p.empty]
    lacking = [option for option in lacking if option not in (*arrays, *options)]
    needed = [name for name in arrays if parameters[name].default is signature.empty]
    if len(needed) <= len(args) <= len(arrays) and lacking:
        return (
            f"{lacking[0]} must be given, but it was left out; "
            f"call {name}({', '.join(arrays)}, {lacking[0]}=...)"
        )
    if len(args) < len(needed):
        return (
            f"{arrays[len(args)]} must be given, but {len(args)} arguments came; "
            f"call {name}({', '.join(arrays)}, ...)"
        )
    return (
        f"{', '.join(places)} must be all that is given by position, but {len(args)} arguments "
        f"came; name the others, as in {name}({', '.join(arrays)}, {list(parameters)[-1]}=...)"
    )


def _unknown(option: str, name: str, known: list[str], arrays: list[str]) -> str:
    ours, remedy = RENAMED.get(option, ("", ""))
    if ours not in known:
        ours, remedy = OTHERWISE.get(option, (ours, remedy))
    if option in FIRST:
        ours = "x" if "x" in arrays else arrays[0]
    if ours in arrays:
        call = f"{name}({', '.join(arrays)}, ...)"
        return f"{ours} must be given by position, but it came as {option}; call {call}"
    if ours in known:
        told = f"; {remedy}" if remedy else ""
        return f"{ours} must be given by this name, but it came as {option}{told}"
    if (name, option) in ELSEWHERE:
        other = ELSEWHERE[name, option]
        return f"{option} must be left out of {name}, but it was given; {other} has it"
    if option in ABSENT:
        return f"{option} must be left out of {name}, but it was given; {ABSENT[option]}"
    options = [n for n in known if n not in arrays]
    close = difflib.get_close_matches(option, options, 1)
    meant = f"; is it {close[0]}?" if close else ""
    return (
        f"{option} must be an option of {name} ({', '.join(options)}), "
        f"but it is none of them{meant}"
    )
