"""The structs of cuattn/_device/params.py are the headers': fields, types, offsets and sizes.

The headers are read by a small parser, which lays structs out as C does; a C++ compiler says that
it does. What no parser understands is an error.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

import emulator
import numpy as np
import pytest
import test_layout as layout

from cuattn._arrays import row_layout
from cuattn._arrays.results import LogitsState, SampleState, SoftmaxTopKState
from cuattn._attention import views
from cuattn._device import params as device_params
from cuattn._device import tensor_map
from cuattn._device.params import Params

SOURCES = layout.read("cuda_src", "*.cuh")
RANKS = [(rows, cols) for rows in row_layout.RANKS for cols in row_layout.RANKS]
TENSOR_MAP = Params("TensorMap", "16Q: words")  # as the driver packs it


def rows(row_rank, col_rank=1):
    return [device_params.SOFTMAX_HEAD, device_params.softmax_geometry(row_rank, col_rank)]


def sampled(rank):
    parts = [device_params.TOPK, device_params.SAMPLE, device_params.sample_strides(rank)]
    return [*rows(rank), *parts]


ATTENTION = [
    device_params.ATTENTION_POINTERS,
    device_params.ATTENTION_TAIL,
    device_params.SCORE_ARRAYS,
]
BLOCKED = [
    *ATTENTION,
    device_params.ATTENTION_BLOCKED_POINTERS,
    device_params.ATTENTION_BLOCKED_TAIL,
    device_params.SCORE_ARRAYS,
]
BACKWARD = [*ATTENTION, device_params.ATTENTION_BACKWARD]

# Struct -> what the host hands over, one after the other.
PACKED = {
    **{f"SoftmaxParams<{r}, {c}>": rows(r, c) for r, c in RANKS},
    **{f"TopKParams<{r}>": [*rows(r), device_params.TOPK] for r in row_layout.RANKS},
    **{f"SampleParams<{r}>": sampled(r) for r in row_layout.RANKS},
    **{
        f"RadixParams<SampleParams<{r}>>": [
            *sampled(r),
            device_params.RADIX_WORKSPACE,
            device_params.RADIX_GEOMETRY,
        ]
        for r in row_layout.RANKS
    },
    **{
        f"RadixParams<TopKParams<{r}>>": [
            *rows(r),
            device_params.TOPK,
            device_params.RADIX_WORKSPACE,
            device_params.RADIX_GEOMETRY,
        ]
        for r in row_layout.RANKS
    },
    "StateMergeParams": [device_params.STATE_MERGE],
    "TopKStateMergeParams": [device_params.TOPK_STATE_MERGE],
    "AttentionParams": ATTENTION,
    "AttentionBlockedParams": BLOCKED,
    "AttentionSm90Params<AttentionParams>": [
        *[TENSOR_MAP] * 4,
        *ATTENTION,
        device_params.ATTENTION_SM90,
    ],
    "AttentionSm90Params<AttentionBlockedParams>": [
        *[TENSOR_MAP] * 4,
        *BLOCKED,
        device_params.ATTENTION_BLOCKED_SM90,
    ],
    "AttentionBlockMaskParams": [device_params.ATTENTION_BLOCK_MASK, device_params.SCORE_ARRAYS],
    "AttentionTopKParams": [*ATTENTION, device_params.ATTENTION_TOPK],
    "AttentionBackwardParams": BACKWARD,
    "AttentionBackwardBiasParams": [*BACKWARD, device_params.ATTENTION_BACKWARD_BIAS],
    "AttentionBackwardScoreParams": [*BACKWARD, device_params.ATTENTION_BACKWARD_SCORE],
    "AttentionBackwardSumsParams": [*BACKWARD, device_params.ATTENTION_BACKWARD_SUMS],
    "AttentionBackwardSm90Params": [
        *[TENSOR_MAP] * 4,
        *BACKWARD,
        device_params.SCORE_GRADIENTS,
        device_params.ATTENTION_BACKWARD_SM90,
    ],
    "AttentionBackwardDsParams": [
        *[TENSOR_MAP] * 2,
        *BACKWARD,
        device_params.SCORE_GRADIENTS,
        device_params.ATTENTION_BACKWARD_DS,
    ],
    "AttentionColumnSumsParams": [*ATTENTION, device_params.ATTENTION_COLUMN_SUMS],
    "AttentionMergeParams": [device_params.ATTENTION_MERGE],
    "DecodeParams": [
        device_params.DECODE_POINTERS,
        device_params.DECODE_TAIL,
        device_params.SCORE_ARRAYS,
    ],
    "KvAppendParams": [device_params.KV_APPEND_POINTERS, device_params.KV_APPEND_TAIL],
}


# -- the headers -----------------------------------------------------------------------------------

CODES = {
    "double": "d",
    "long long": "q",
    "unsigned long long": "Q",
    "int": "i",
    "unsigned int": "I",
}
FUNCTION = r"(?:template <[^<>]*> )?(?:static )?__device__ .*\)(?: const)?|static constexpr [^*&]*"
NAMES = r"[\w\[\]]+(?:, [\w\[\]]+)*"
FIELD = rf"(?P<type>(?:const )?[\w ]+?(?:<.+>)?)(?P<pointer>\*)? (?P<names>{NAMES})"


class Field(NamedTuple):
    path: str  # in the struct, "row.x"
    code: str  # "q", "4q"
    offset: int


class Layout(NamedTuple):
    fields: list[Field]
    size: int
    align: int


def definition(name, files):
    """What stands in angle brackets before a struct, in parentheses of alignas, behind a colon, and
    in braces."""
    head = r"(?:template <([^<>]*)>\s*)?struct (?:alignas\((\d+)\) )?"
    head += rf"{name}(?: : ([\w<>]+))? \{{(.*?)^\}};"
    text = "\n".join(layout.code(text) for text in files.values() if f" {name} " in text)
    found = re.findall(head, text, re.DOTALL | re.MULTILINE)
    assert len(found) == 1, f"{len(found)} structs {name}"
    return found[0]


def statements(body):
    """Declarations of a struct's body, without those of functions and of constants."""
    body = re.sub(r"^ *#.*$|\b(?:public|private|protected):", "", body, flags=re.MULTILINE)
    while (shorter := re.sub(r"\{[^{}]*\}", ";", body)) != body:
        body = shorter
    found = (" ".join(statement.split()) for statement in body.split(";"))
    return [text for text in found if text and not re.fullmatch(FUNCTION, text)]


def number(text, files):
    """An array's length: digits, or an enumerator."""
    if text.isdigit():
        return int(text)
    enums = re.findall(r"\benum \w+ \{([^{}=]*)\};", "\n".join(map(layout.code, files.values())))
    lists = ([name.strip() for name in enum.split(",")] for enum in enums)
    (value,) = (names.index(text) for names in lists if text in names)
    return value


def lay_out(type_, files):
    """Fields, size and alignment of a struct of C, with template arguments if it has parameters."""
    name, _, arguments = type_.partition("<")
    parameters, alignas, base, body = definition(name, files)
    parameters = re.findall(r"(\w+)(?:,|$)", parameters)
    arguments = arguments[:-1].split(", ") if arguments else []
    for parameter, argument in zip(parameters, arguments, strict=True):
        base, body = (re.sub(rf"\b{parameter}\b", argument, text) for text in (base, body))

    inner = lay_out(base, files) if base else Layout([], 0, 1)
    fields, end, align = [*inner.fields], inner.size, max(inner.align, int(alignas or 1))
    for statement in statements(body):
        declared = re.fullmatch(FIELD, statement)
        assert declared, f"{name}: what is `{statement}`?"
        base = declared["type"].removeprefix("const ")
        assert not declared["pointer"] or "," not in declared["names"], statement
        for declarator in declared["names"].split(", "):
            field, *lengths = re.findall(r"\w+", declarator)
            count = int(np.prod([number(length, files) for length in lengths], dtype=int))
            if declared["pointer"] or base in CODES:
                code = "Q" if declared["pointer"] else CODES[base]
                code = f"{count}{code}" if lengths else code
                inner = Layout(
                    [Field("", code, 0)], struct.calcsize(code), struct.calcsize(code[-1])
                )
            else:
                assert not lengths, f"{name}: an array of structs"
                inner = lay_out(base, files)
            align = max(align, inner.align)
            end += -end % inner.align
            fields += [
                Field(f"{field}.{path}".rstrip("."), code, end + offset)
                for path, code, offset in inner.fields
            ]
            end += inner.size
    return Layout(fields, end + -end % align, align)


def given(parts):
    """(name, code, offset) of each field, and the size, as the host joins them."""
    found, start = [], 0
    for part in parts:
        before = ""
        for name, code in part.codes.items():
            found.append((name, code, start + struct.calcsize(f"{before}0{code[-1]}")))
            before += code
        assert re.fullmatch(r"(\d+x)?", part.struct.format.removeprefix(before))
        start += part.struct.size
    return found, start


def differences(files):
    """Structs that the host hands over otherwise than kernels read them."""
    wrong = []
    for name, parts in PACKED.items():
        try:
            read = lay_out(name, files)
        except (AssertionError, ValueError) as error:
            wrong.append(f"{name}: {error}")
            continue
        fields = [(field.path.split(".")[-1], *field[1:]) for field in read.fields]
        if (fields, read.size) != given(parts):
            wrong.append(name)
    return wrong


def taken(files):
    """Structs that kernels take as parameters, without template arguments."""
    found = set()
    for path, text in files.items():
        text = layout.code(text)
        kernels = re.findall(r"__global__[^{};]*\(([^()]*)\)\s*\{", text)
        assert len(kernels) == text.count("__global__"), path
        for parameters in kernels:
            one = re.fullmatch(r"\s*const __grid_constant__ ([\w:<> ]+) \w+\s*", parameters)
            assert one, f"{path}: {parameters}"
            found |= set(re.findall(r"\w+", one[1])) - {"typename", "kRowRank", "Tiles"}
    if {"Op", "Params"} <= found:
        found -= {"Op", "Params"}
        for text in files.values():
            found |= set(re.findall(r"\busing Params = (\w+)", text))
    return found


def described():
    return {name.partition("<")[0] for name in PACKED}


# -- declarations and headers ----------------------------------------------------------------------


def test_params_are_those_of_the_headers():
    assert differences(SOURCES) == []


def test_every_struct_of_a_kernel_is_described():
    assert taken(SOURCES) == described()


def test_every_declaration_is_compared():
    declared = {id(value) for value in vars(device_params).values() if isinstance(value, Params)}
    compared = {id(part) for parts in PACKED.values() for part in parts}
    assert declared <= compared
    for name, parts in PACKED.items():
        embedded = ["TensorMap", "SoftmaxParams", "TopKParams", "AttentionParams"]
        embedded += ["AttentionBackwardParams", "ScoreGradients", "SampleParams", "ScoreArrays"]
        embedded += ["AttentionBlockedParams"]
        last = next(part for part in reversed(parts) if part is not device_params.SCORE_ARRAYS)
        assert last.name == name.partition("<")[0]
        assert {part.name for part in parts} <= {last.name, *embedded}


def test_a_compiler_lays_them_out_so():
    """Offsets and sizes, of the compiler that the emulator has."""
    expressions, expected = [], []
    for index, name in enumerate(PACKED):
        fields, size, align = lay_out(name, SOURCES)
        expressions += [f"__builtin_offsetof(S{index}, {field.path})" for field in fields]
        expected += [field.offset for field in fields]
        expressions += [f"sizeof(S{index})", f"alignof(S{index})"]
        expected += [size, align]
    source = "".join(f"#include <{name}.cuh>\n" for name in HEADERS)
    source += "".join(f"using S{index} = {name};\n" for index, name in enumerate(PACKED))
    source += f"""
    struct Params {{ long long* found; }};
    __global__ void kernel(const __grid_constant__ Params params) {{
      const long long found[] = {{{", ".join(expressions)}}};
      for (int i = 0; i < {len(expressions)}; ++i) ptx::st_global(params.found + i, found[i]);
    }}
    """
    found = emulator.empty(len(expected), np.int64)
    params = emulator.pack(found)
    emulator.launch_source(source, "kernel", 1, 1, params, writes=(found,))
    np.testing.assert_array_equal(found, expected)


HEADERS = (
    *("topk/radix", "attention/params", "attention/key_tiles", "attention/block_mask"),
    *(
        "attention/backward_params",
        "attention/merge",
        "attention/topk_rows",
        "attention/decode_params",
        "attention/new_rows",
        "softmax/state_merge",
        "topk/state_merge",
    ),
)


@pytest.mark.drawn
@pytest.mark.parametrize(
    ("header", "old", "new"),
    [
        # The order of two fields, of one type each.
        (
            "softmax/state_merge",
            "const void* logit_a;\n  const void* m_b;",
            "const void* m_b;\n  const void* logit_a;",
        ),
        ("topk/radix", "source, target", "target, source"),
        ("softmax/params", "row_size[kRowRank]", "col_size[kRowRank]"),
        ("attention/params", "double softcap;", ""),
        ("attention/params", "batch, heads, sharing", "batch, sharing, heads"),
        # Types, lengths, and what moves all that follows.
        ("attention/params", "int heads_in_l2", "long long heads_in_l2"),
        ("attention/params", "alibi_stride[2]", "alibi_stride[3]"),
        ("attention/params", "const void* array[6]", "const void* array[5]"),
        ("attention/params", "size[6][4], stride[6][4]", "stride[6][4], size[6][4]"),
        ("attention/params", "TensorMap q, k, v, out", "TensorMap q, k, v"),
        ("attention/params", "int pack_log2;", "int pack_log2, more;"),
        ("softmax/params", "kOut, kStat,", "kOut, kMore, kStat,"),
        ("softmax/params", "row_stride[kNumOperands][kRowRank]", "row_stride[kRowRank]"),
        ("topk/ops", "long long output; ", "long long output; int more; "),
        ("topk/ops", "<kRowRank, 1> row;", "<kRowRank, kRowRank> row;"),
        ("topk/state_merge", "long long k;", "int k;"),
        ("topk/sample", "long long num;", "int num;"),
        ("topk/sample", " : TopKParams<kRowRank>", ""),
        ("ptx/cp_async_bulk", "alignas(128)", "alignas(1024)"),
        ("attention/merge", "outs_stride[5]", "outs_stride[4]"),
        # What the parser does not know.
        ("attention/merge", "void* out;", "void* out[2];"),
        ("attention/merge", "void* out;", "void (*out)(int);"),
        ("attention/merge", "void* out;", "float out;"),
        ("attention/merge", "void* out;", "void* out = nullptr;"),
        ("attention/merge", "struct AttentionMergeParams", "struct Other"),
    ],
)
def test_a_difference_is_seen(header, old, new):
    path = f"{header}.cuh"
    changed = SOURCES[path].replace(old, new, 1)
    assert changed != SOURCES[path]
    assert differences(SOURCES | {path: changed}) != []


def test_a_struct_that_is_not_described_is_seen():
    kernel = "__global__ void __launch_bounds__(32, f(1)) k(const __grid_constant__ {} params) {{}}"
    for type_ in ("More", "RadixParams<More>", "More<typename Op::Params>"):
        assert taken({"k.cuh": kernel.format(type_)}) - described() == {"More"}
    op = "template <int k>\nstruct Op {\n  using Params = More<k>;\n};"
    found = taken({"k.cuh": kernel.format("typename Op::Params"), "primitives/op.cuh": op})
    assert found == {"More"}
    with pytest.raises(AssertionError, match="More params, int n"):
        taken({"k.cuh": kernel.format("More params, int n").replace("n params", "n")})


# -- names -----------------------------------------------------------------------------------------


def test_fields_are_called_as_their_arrays():
    """By whose names their addresses are packed; a field without an array is 0."""
    names = [*device_params.ATTENTION_POINTERS.codes]
    names += device_params.ATTENTION_BLOCKED_POINTERS.codes
    arrays = list(views.Arrays._fields)
    assert names == [*arrays[:3], "out", "lse", *arrays[3:]]
    assert [*names, "score_args", "mask_args"] == list(views.Operands._fields)
    for kind, params, sizes in (
        (LogitsState, device_params.STATE_MERGE, ["n"]),
        (SampleState, device_params.TOPK_STATE_MERGE, ["rows", "k"]),
    ):
        pointers = [field + of for of in ("_a", "_b", "") for field in kind._fields]
        assert list(params.codes) == pointers + sizes
    assert {*SoftmaxTopKState._fields} < {*SampleState._fields}


def test_numbers_of_the_headers():
    assert device_params.OPERANDS == len(row_layout.OPERANDS) == number("kNumOperands", SOURCES)
    assert TENSOR_MAP.struct.size == tensor_map.BYTES


# -- Params ----------------------------------------------------------------------------------------

POINT = Params("Point", "i: id", "2d: xy", "1q: tags", "4x:", "i: last")


def test_fields_by_name():
    packed = POINT.pack(last=5, xy=(0.5, 1.5), id=True, tags=[-1])
    assert packed == struct.pack("=i4x2dq4xi", 1, 0.5, 1.5, -1, 5)
    assert POINT.struct.size == len(packed)
    found = POINT.unpack(b"before" + packed, 6)
    assert found == {"id": 1, "xy": (0.5, 1.5), "tags": (-1,), "last": 5}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"more": 1}, TypeError, r"Point.pack\(\) .* 'more'"),
        ({"id": None}, TypeError, r"Point.pack\(\) missing .* 'id'"),
        ({"xy": (1.0,)}, ValueError, "Point.xy must have 2 elements, but it has 1"),
        ({"tags": ()}, ValueError, "Point.tags must have 1 elements, but it has 0"),
        ({"xy": 1.0}, TypeError, "len"),
        ({"id": 0.5}, struct.error, "integer"),
        ({"id": 2**31}, struct.error, "range|format"),
    ],
)
def test_wrong_fields(change, error, message):
    values = {"id": 1, "xy": (0.5, 1.5), "tags": (1,), "last": 5} | change
    with pytest.raises(error, match=message):
        POINT.pack(**{name: value for name, value in values.items() if value is not None})
    with pytest.raises(TypeError):
        POINT.pack(1, (0.5, 1.5), (1,), 5)
