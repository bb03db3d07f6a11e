"""What score expressions may be, and what they say: on NumPy, as C++, and by Python's own eval."""

from __future__ import annotations

import re

import emulator
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from score_cases import Case, examples, expressions, some, some_arrays

import cuattn
from cuattn._arrays.expression import FUNCTIONS, OF_FLOATS, Indexed, parse
from cuattn._arrays.syntax import MAX_DEPTH, MAX_LENGTH, MAX_NODES
from cuattn._attention.numpy_score import Score
from cuattn._attention.plan_score import plan_score
from cuattn.reference._numerics import quiet
from cuattn.reference._score import score_of

ARRAYS = (Indexed("flag", "bool", 0), Indexed("one", "float", 1), Indexed("two", "int", 2))
Q = np.zeros((1, 2, 3, 4), np.float32)

# ---- What is refused ----

REFUSED = [
    # No expression of Python, or not one.
    *("s +", "(s", "s)", "s, q", "s; q", "s = 1", "s := 1", "import os", "return s", "def f(): 0"),
    *("'s", '"""', "s q", "1 2", "0x", "1__0", "09", "s\n+ 1", "s ? q : k", "s && q", "!s", "s++"),
    *("{", "}", "s\\", "$", "`s`", "s <> q", "@s", "a=", "*", "%s", "s if q", "else", "pass"),
    *("..s"),
    # Blanks alone, characters beyond ASCII, and such as do not print.
    *("", " ", "\n", "\t", "\0", "s\0", "\x0cs", "s\r", "s\x7f", "\u017f", "\u212a", "s + \u0440"),
    *("\ud800", "\U0001f600", "s\u00a0+ 1", "\u2028", "s \u2212 1", "\ufeffs", "\uff53", "\xb5"),
    # What Python has beside arithmetic.
    *("lambda: s", "(lambda: s)()", "s if q else k", "s and q", "s or q", "not s", "(x := s)"),
    *("[s]", "(s,)", "()", "{}", "{s}", "{s: q}", "[s for s in q]", "(s for s in q)", "(yield)"),
    *("await s", "'s'", "b's'", "f'{s}'", "f''", "'%s' % s", "None", "...", "Ellipsis", "1j"),
    *("s.real", "s.__class__", "one.shape", "one.__array__()", "().__class__", "(1).real"),
    *("s is q", "s in one", "s is not q", "s not in one", "s ** 2", "s ^ q", "q << 2", "q >> 2"),
    *("s @ s", "two @ two", "[*one]", "*one", "**one", "s[0]", "q[0]", "(one)[0][1]", "one[q][k]"),
    *("inf[0]", "abs[0]", "print", "int", "x" * 4000, "s." + "x" * 4000),
    # Names and calls.
    *("x", "S", "Q", "s_", "_", "__import__", "__builtins__", "score", "arrays", "v0", "Acc"),
    *("nan", "__import__('os')", "eval('s')", "open('x')", "exit()", "print(s)", "int(s)"),
    *("float(q)", "round(s)", "pow(s, 2)", "sum(one)", "abs", "where", "exp + 1", "abs()"),
    *("abs(s, s)", "exp(*one)", "min(s)", "min()", "where(flag, s)", "where(flag, s, s, s)"),
    *("exp(x=s)", "min(s, q, key=s)", "abs(s)(s)", "abs(abs)", "exp(exp)(s)", "two(q, k)", "s(q)"),
    *("one.sum()", "where(s=flag)", "exp(**two)", "(abs)(lambda: s)", "inf()", "True()", "1(s)"),
    # Types.
    *("True", "q < k", "flag", "~flag", "s + flag", "flag + flag", "-flag", "+flag", "flag < flag"),
    *("flag * 2", "s // 2", "s % 2", "q // 2.0", "2.5 // q", "s & 1", "s | s", "~s", "~1.5"),
    *("1 & flag", "flag & q", "q & 1.0", "where(q, s, s)", "where(s, s, s)", "where(1, s, s)"),
    *("where(flag, flag, s)", "where(flag, s, flag)", "min(flag, flag)", "abs(flag)", "exp(flag)"),
    *("s == flag", "flag == 1", "flag != s", "q < flag", "0 < q < flag", "tanh(True)"),
    *("max(s, flag)"),
    # Elements.
    *("one", "two", "one[s]", "one[flag]", "one[1.0]", "one[True]", "one[q, k]", "two[q]"),
    *("two[q, k, h]", "one[:]", "one[0:2]", "one[...]", "one[None]", "one[-1:]", "two[q, :]"),
    *("two[(q, k), 0]", "one[[0]]", "two[q][k]", "one[one[q]]", "flag[0]", "flag[q, k]", "two[()]"),
    *("one[()]", "one[q,][0]", "one[s > 0]", "one['a']", "two[*one]", "one[lambda: q]"),
    *("one[q := 1]"),
    # Numbers that are none, or too large.
    *("9223372036854775808", "-9223372036854775808", "1" * 4000, "0x" + "f" * 17, "1e309"),
    *("1e999 * s", "1" * MAX_LENGTH + "0", "1" * 20 + ".0j", "0b" + "1" * 64),
    *("s + 1_000_000_000_000_000_000_000"),
    # Large and deep.
    *("s" + " + s" * MAX_NODES, "(" * 300 + "s" + ")" * 300, "-" * 4000 + "s", "~" * 4000 + "q"),
    *("abs(" * 90 + "s" + ")" * 90, "one[" * 90 + "q" + "]" * 90, "s" + " " * MAX_LENGTH),
    *("s." * 1500 + "s", "0 < " * 1300 + "q", "min(" + "s, " * 1300 + "s)", "s" + "()" * 2000),
    *("s" + "[0]" * 1300, "(" * 2000, "[" * 4000, "-(" * 90 + "s" + ")" * 90),
    *("(s+" * 90 + "s" + ")" * 90, "not " * 1000 + "s", "lambda: " * 500 + "s"),
    *("s if s else " * 300 + "s", "s**" * 1000 + "s", "{" * 150 + "}" * 150),
    *("f'{" * 50 + "s" + "}'" * 50, "where(flag, " * 70 + "s" + ", s)" * 70, "s#" + "#" * 4100),
]  # fmt: skip


@pytest.mark.parametrize("text", REFUSED, ids=range(len(REFUSED)))
@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
def test_what_is_no_score_is_refused(text):
    args = {"flag": np.array(True), "one": np.ones(3), "two": np.ones((2, 3), np.int32)}
    with pytest.raises(ValueError, match=r"^score must [^\n]+, but [^\n]+") as caught:
        cuattn.attention(Q, Q, Q, score=text, score_args=args)
    assert len(str(caught.value)) < 600


def test_there_are_many_of_these():
    assert len({*REFUSED}) > 250


@pytest.mark.parametrize(
    ("text", "column", "words"),
    [
        ("s + x", 5, "pass an array of that name"),
        ("  s + x", 7, "no other names"),
        ("s if q else k", 1, "write where"),
        ("s + (q < k)", 6, "'q < k' is a bool"),
        ("abs(s) + (s and q)", 11, "write &"),
        ("where(flag, s, one[s])", 20, "'s' is a float"),
        ("min(s, 2, lambda: 3)", 11, "'lambda: 3'"),
        ("s + 3 +", 8, "Python says"),
        ("s $ 3", 3, "Python says"),
        ("s + two[q]", 5, "2 integers"),
        ("s + exp(x=s)", 11, "keyword"),
        ("abs(s) + 1e999", 10, "write inf"),
        ("s + \u212a", 5, "ASCII"),
        ("s + foo(s)", 5, "'foo' is none"),
    ],
)
def test_errors_point_at_a_column(text, column, words):
    with pytest.raises(ValueError, match=rf"at column {column}(;|$)") as caught:
        parse(text, ARRAYS)
    assert words in str(caught.value)


def test_errors_point_at_a_line():
    with pytest.raises(ValueError, match="there is x at line 3, column 4;"):
        parse("\nwhere(flag,\n   x, s)\n", ARRAYS)


@pytest.mark.parametrize("count", [MAX_DEPTH - 1, MAX_DEPTH])
def test_limits_are_where_they_are_said_to_be(count):
    """Both are there, one less is not."""
    text = f"{'-' * count}s"
    if count < MAX_DEPTH:
        assert len(parse(text, ()).steps) == MAX_DEPTH
        assert len(parse("s" + " " * (MAX_LENGTH - 1), ()).steps) == 1
        assert (
            parse(f"min({', '.join('s' * (MAX_NODES - 2))})", ()).steps[-1].operation == "minimum"
        )
        return
    for refused in (text, f"min({', '.join('s' * (MAX_NODES - 1))})", "s" + " " * MAX_LENGTH):
        with pytest.raises(ValueError, match="score must (be nested at|have at) most"):
            parse(refused, ())


def test_a_chain_in_a_chain_stays_small():
    """Each part is looked at once, and is one step."""
    text = "s"
    for _ in range(14):
        text = f"where(0 < {text} < 1, s, 0)"
    assert len(parse(text, ()).steps) < 100


@pytest.mark.parametrize(
    ("args", "error", "words"),
    [
        ([np.ones(3)], TypeError, "a dict of arrays, but it is list"),
        ({1: np.ones(3)}, TypeError, "names for keys, but one is int"),
        *[({name: np.ones(3)}, ValueError, "keys") for name in ("s", "q", "inf", *FUNCTIONS)],
        *[({name: np.ones(3)}, ValueError, "keys") for name in ("", "1a", "a b", "a-b", "_a")],
        *[({name: np.ones(3)}, ValueError, "keys") for name in ("__a__", "lambda", "\u017f")],
        ({"a" * 65: np.ones(3)}, ValueError, "keys"),
        ({f"a{i}": np.ones(3) for i in range(7)}, ValueError, "at most 6 arrays, but it has 7"),
        ({"t": None}, TypeError, r"\['t'\] must be a cupy.ndarray"),
        ({"t": [1.0]}, TypeError, r"\['t'\] must be a cupy.ndarray"),
        ({"t": np.ones(3, np.uint64)}, TypeError, r"\['t'\] must be one of .* uint64"),
        ({"t": np.ones(3, complex)}, TypeError, r"\['t'\] must be one of .* complex128"),
        ({"t": np.ones(3, ">f4")}, TypeError, r"\['t'\] must be in native byte order"),
        ({"t": np.ones((1,) * 5)}, ValueError, r"\['t'\] must have at most 4 dimensions"),
        ({"t": np.ones((3, 0))}, ValueError, r"\['t'\] must have elements"),
        ({"t": np.ones(3), "u": np.ones(3)}, ValueError, "use every array, but u is not in it"),
        ({}, ValueError, "there is t at column 5"),
        (None, ValueError, "there is t at column 5"),
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit(args, error, words):
    with pytest.raises(error, match="^score(_args)?.* must .*, but .*") as caught:
        cuattn.attention(Q, Q, Q, score="s + t[q]", score_args=args)
    assert re.search(words, str(caught.value))


def test_a_score_is_a_str():
    for score in (3, b"s", ["s"], True):
        with pytest.raises(TypeError, match="^score must be a str, but it is "):
            cuattn.attention(Q, Q, Q, score=score)
    with pytest.raises(ValueError, match="^score_args must come with score, but t came without"):
        cuattn.attention(Q, Q, Q, score_args={"t": np.ones(3)})
    plain = cuattn.attention(Q, Q, Q)
    np.testing.assert_array_equal(cuattn.attention(Q, Q, Q, score_args={}), plain)
    np.testing.assert_array_equal(cuattn.attention(Q, Q, Q, score=np.str_("s")), plain)


def test_names_that_mean_something_elsewhere():
    """In C++, in what is generated, in NumPy."""
    names = ["int", "template", "asm", "arrays", "v0", "np"]
    score = " + ".join(["s", *(f"{name}[q]" for name in names)])
    zeros = dict.fromkeys(names, np.zeros(2))
    with emulator.activate(arch="sm_80"):
        got = cuattn.attention(Q, Q, Q + 1, score=score, score_args=zeros)
    np.testing.assert_array_equal(got, Q + 1)


@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
@examples(250, "any text")
@given(
    st.lists(
        st.sampled_from(
            [
                *"sqkbh()[]+-*/%&|~<>=!,.: \n0123456789'e_",
                "abs",
                "where",
                "one",
                "two",
                "flag",
                "inf",
                "True",
                "not ",
                " if ",
                " else ",
                "lambda ",
            ]
        )
    )
)
def test_any_text_is_a_score_or_refused(parts):  # fmt: skip
    try:
        assert parse("".join(parts), ()).steps
    except ValueError as error:
        assert str(error).startswith("score must ")


# ---- What they say ----


def grid(rng, acc):
    """s, b, h, q and k as (B, G, g, M, N), with special scores."""
    shape = 2, 2, 3, 5, 7
    s = (rng.standard_normal(shape) * rng.choice([1, 1e3, 1e30], shape)).astype(acc)
    special = rng.random(shape)
    for i, value in enumerate((np.nan, np.inf, -np.inf, 0.0)):
        s[special * 40 // 1 == i] = value
    b, h = np.arange(2).reshape(2, 1, 1, 1, 1), np.arange(6).reshape(1, 2, 3, 1, 1)
    return s, b, h, int(rng.integers(-9, 9)), slice(3, 10)


@quiet
def by_numpy(case, s, b, h, place, j):
    found = s.copy()
    arrays = tuple(array for _, array in sorted(case.arrays.items()))
    Score(case.expression, arrays, b, h, s.dtype).change(found, place, j)
    return found


@quiet
def by_python(case, s, b, h, place, j):
    q, k = np.arange(place, place + s.shape[3])[:, None], np.arange(j.start, j.stop)
    return np.broadcast_to(score_of(case.text, case.arrays)(s, b, h, q, k), s.shape)


KERNEL = """
#include <attention/expression.cuh>
struct Params { const void* s; void* y; const long long* arrays; long long place, first; };
template <class Acc, class Score>
__device__ void evaluate_one(const Params& p, int number) {
  if (blockIdx.x != number) return;
  ScoreArrays arrays;
  const int words = sizeof(arrays) / 8;
  for (int i = 0; i < words; ++i) {
    reinterpret_cast<long long*>(&arrays)[i] = ptx::ld_global(p.arrays + words * number + i);
  }
  const int all = 2 * 6 * 5 * 7;
  for (int i = threadIdx.x; i < all; i += blockDim.x) {
    const Acc s = ptx::ld_global(static_cast<const Acc*>(p.s) + i);
    const long long q = i / 7 % 5 + p.place, k = i % 7 + p.first;
    const Acc y = Score::score(s, i / 210, i / 35 % 6, q, k, arrays);
    ptx::st_global(static_cast<Acc*>(p.y) + all * number + i, y);
  }
}
template <class Acc, class... Scores>
__global__ void evaluate(const __grid_constant__ Params p) {
  int number = 0;
  (evaluate_one<Acc, Scores>(p, number++), ...);
}
"""


def by_kernel(cases, s, place, j):
    """All of them by one kernel."""
    scores, structs = [], []
    for case in cases:
        arrays = [array for _, array in sorted(case.arrays.items())]
        scores.append(plan_score(case.expression, tuple(array.dtype.name for array in arrays)))
        lack, ones = 6 - len(arrays), [(1,) * (4 - array.ndim) for array in arrays]
        sizes = [(*array.shape, *one) for array, one in zip(arrays, ones, strict=True)]
        strides = [
            (*(stride // array.itemsize for stride in array.strides), *one)
            for array, one in zip(arrays, ones, strict=True)
        ]
        parts = [*map(emulator.address, arrays), *[0] * lack]
        parts += [*np.ravel(sizes), *[0] * 4 * lack, *np.ravel(strides), *[0] * 4 * lack]
        structs.append([int(part) for part in parts])
    texts = dict.fromkeys(score.text for score in scores)
    acc = "float" if s.dtype == np.float32 else "double"
    name = f"evaluate<{', '.join((acc, *(score.name for score in scores)))}>"
    y, arrays = emulator.empty((len(cases), *s.shape), s.dtype), np.array(structs, np.int64)
    params = emulator.pack(s, y, arrays, np.int64(place), np.int64(j.start))
    reads = [s, arrays, *(array for case in cases for array in case.arrays.values())]
    emulator.launch_source(
        KERNEL + "".join(texts), name, len(cases), 64, params, reads=reads, writes=[y]
    )
    return y


LEAST = "(-9223372036854775807 - 1)"
CORNERS = [
    *(f"{LEAST} {word} {other}" for word in ("//", "%") for other in ("(k - 4)", "-1", "0", "3")),
    *(f"{one} {word} (k - 5)" for word in ("//", "%") for one in ("7", "-7", "6", "-6", "q")),
    *(f"abs({LEAST})", f"-{LEAST}", f"{LEAST} - 1", f"{LEAST} * k", "-(s * 0)", "1 / (0 * s)"),
    *("s / 0", "min(s, 0)", "min(0, s)", "max(s, 0, 1)", "max(0, s)", "sqrt(s)", "abs(s)"),
    *("where(s < 0, 1, 2)", "where(s <= s, 1, 2)", "where(s != s, 1, 2)", "where(~(s > 0), 1, 2)"),
    *("q & k | ~q", "where(True | (s > 0), b, h)", "where(-1 < q < 3 != k > 1 == 1, 1, 2)"),
    *("where(s == s, 0, 1)", "1e300 * s"),
]  # fmt: skip


def test_corners(rng):
    cases = [Case(text, {}) for text in CORNERS]
    for acc in (np.float32, np.float64):
        s, *rest = grid(rng, acc)
        for case, got in zip(cases, by_kernel(cases, s, *rest[2:]), strict=True):
            np.testing.assert_array_equal(got, by_numpy(case, s, *rest), case.text)
            if acc == np.float64:
                np.testing.assert_array_equal(got, by_python(case, s, *rest), case.text)


def test_functions(rng):
    """To the last places, which libraries round in their own ways."""
    cases = [Case(f"{name}(s)", {}) for name in OF_FLOATS]
    for acc in (np.float32, np.float64):
        s, *rest = grid(rng, acc)
        s.flat[:90] = np.linspace(-90, 90, 90)
        for case, got in zip(cases, by_kernel(cases, s, *rest[2:]), strict=True):
            close = {"rtol": 8 * np.finfo(acc).eps, "atol": 0, "err_msg": case.text}
            np.testing.assert_allclose(got, by_numpy(case, s, *rest), **close)
            with np.errstate(all="ignore"):
                exact = by_python(case, s.astype(float), *rest).astype(acc)
            np.testing.assert_allclose(got, exact, **close)


def test_random_expressions_by_numpy(rng):
    """Bit for bit what Python makes of them."""
    arrays, (s, *rest) = some_arrays(rng), grid(rng, np.float64)

    @examples(400, "expressions by NumPy")
    @given(expressions(arrays))
    def compare(case):
        np.testing.assert_array_equal(by_numpy(case, s, *rest), by_python(case, s, *rest))

    compare()


def test_random_expressions_by_kernels(rng):
    """Bit for bit what NumPy makes of them, in both accumulators; one kernel has them all."""
    cases = some(expressions(some_arrays(rng)), 24, "expressions by kernels")
    for acc in (np.float32, np.float64):
        s, *rest = grid(rng, acc)
        for case, got in zip(cases, by_kernel(cases, s, *rest[2:]), strict=True):
            np.testing.assert_array_equal(got, by_numpy(case, s, *rest), case.text)
