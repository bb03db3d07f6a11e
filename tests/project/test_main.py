"""``python -m cuattn``: it runs everything there is on the sample, and it can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import cuattn
from cuattn import __main__ as job
from cuattn import reference
from cuattn.data import cases, words

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["lighthouse", "harbour", "daughter", "lamp", "sea", "ferry", "fog", "captain"]  # best ones


def run(*arguments, **environment):
    """Output of ``python -m cuattn`` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "cuattn", "--repeat", "1", *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **environment},
    )


def public_operations():
    """The functions of the package's ``__all__`` that compute."""
    functions = {n for n in cuattn.__all__ if isinstance(getattr(cuattn, n), types.FunctionType)}
    return functions - {"compile", "show_config"}


def test_json_has_every_operation_within_its_bound():
    done = run("--json")
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    rows = result["operations"]
    assert result["ok"] and result["version"] == cuattn.__version__
    assert len(public_operations()) >= 8
    assert {row["operation"] for row in rows} == public_operations()
    assert {row["dtype"] for row in rows} >= {"float16", "float32", "float64"}
    for row in rows:
        assert row["ok"] and 0 <= row["max_error"] <= row["bound"] <= 2**-6, row
        assert row["microseconds"] > 0 and row["device"], row


def test_json_predicts_the_stored_words():
    result = json.loads(run("--json").stdout)
    assert [row["predicted"][0][0] for row in result["top5"]] == WORDS
    for row in result["top5"]:
        predicted, stored = zip(*row["predicted"], strict=True), zip(*row["stored"], strict=True)
        (words, probs), (stored_words, stored_probs) = predicted, stored
        assert words == stored_words and len(words) == 5
        np.testing.assert_allclose(probs, stored_probs, rtol=1e-4)
    assert all(check["ok"] for check in result["stored"].values())


def test_json_has_the_perplexity_and_five_draws_of_the_kept_words():
    """Its own word is among the five stored ones of each token, whose probabilities are stored."""
    result = json.loads(run("--json").stdout)
    own = [dict(row["stored"])[row["token"]] for row in result["top5"]]
    value = np.exp(-np.mean(np.log(own)))
    assert result["perplexity"]["ok"] and result["draws"]["ok"]
    assert result["perplexity"]["value"] == pytest.approx(value, rel=1e-5)
    draws = {row["token"]: row["words"] for row in result["draws"]["rows"]}
    for row in result["top5"]:
        assert len(draws[row["token"]]) == 5
        assert set(draws[row["token"]]) <= {word for word, _ in row["stored"]}
    assert max(len(set(drawn)) for drawn in draws.values()) > 1


def test_json_has_the_links_of_the_kept_words():
    """Each is a head's largest probability among the other words of the text."""
    links = json.loads(run("--json").stdout)["links"]
    sample = np.load(ROOT / "cuattn" / "data" / "minilm.npz")
    tokens = sample["tokens"]
    assert links["ok"] and len(links["rows"]) == len(WORDS)
    for place, row in zip(sample["logit_rows"], links["rows"], strict=True):
        words, probs, heads = zip(*row["links"], strict=True)
        assert len(words) == len(set(heads)) == 5 and list(probs) == sorted(probs)[::-1]
        scores = np.exp(sample["q"][:, place, None] @ sample["k"].swapaxes(1, 2) / 32**0.5)[:, 0]
        scores[:, [not word.isalpha() or word == tokens[place] for word in tokens]] = 0
        assert row["token"] == tokens[place]
        for word, prob, head in row["links"]:
            assert tokens[np.argmax(scores[head])] == word
            assert prob == pytest.approx(scores[head].max() / scores[head].sum(), rel=1e-3)


def test_table():
    done = run()
    assert (done.returncode, done.stderr) == (0, "")
    header, blank, columns, *rows = done.stdout.splitlines()
    assert header.startswith(f"cuattn {cuattn.__version__}. ") and blank == ""
    assert columns.split() == "operation shape dtype device error bound µs".split()
    rows = rows[: rows.index("")]
    assert {row.split()[0] for row in rows} == public_operations()
    assert all(row.endswith("  ok") for row in rows)
    assert "WRONG" not in done.stdout
    assert "harbour 3.05 %  harbor 0.73 %" in done.stdout
    assert "Five draws from these five words, seed 0, offsets 0 to 4  ok\nlighthouse" in done.stdout


def test_without_a_gpu_it_says_so_in_one_line():
    header = run(CUDA_VISIBLE_DEVICES="-1").stdout.splitlines()[0]
    assert header.endswith("running the NumPy path.")


def test_version():
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"cuattn {cuattn.__version__}\n")


def test_info_is_show_config(monkeypatch, tmp_path, capsys):
    for name in ("CUATTN_CACHE_DIR", "CUPY_CACHE_DIR"):  # nobody else writes there meanwhile
        monkeypatch.setenv(name, str(tmp_path))
    done = run("--info")
    assert (done.returncode, done.stderr) == (0, "")
    cuattn.show_config()
    assert done.stdout == capsys.readouterr().out
    assert json.loads(run("--info", "--json").stdout) == cuattn.show_config("dicts")


@pytest.mark.parametrize(
    ("unbuffered", "arguments"),
    [
        ("", []),
        ("1", []),
        ("", ["--json"]),
        ("", ["--info"]),
        ("", ["--version"]),
        ("", ["--help"]),
    ],
)
def test_nobody_reads_the_output(arguments, unbuffered):
    """As ``| head``, but for sure: the pipe's other end is closed before the first word."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "cuattn", "--repeat", "1", *arguments],
        stdout=write,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )
    os.close(write)
    assert done.stderr == b""
    assert done.returncode == 141  # as a shell has it of `yes | head`


def wrong(module, name):
    """A stand-in for `module` whose function `name` is off by one part in fifty."""
    stand_in = types.SimpleNamespace(**{n: getattr(module, n) for n in dir(module)})

    def off(*args, **options):
        result = getattr(module, name)(*args, **options)
        if isinstance(result, tuple):
            make = getattr(result, "_make", tuple)
            return make(
                part if part is None or part.dtype.kind == "i" else part * 1.02 for part in result
            )
        return result + 1 if result.dtype.kind == "i" else result * 1.02

    setattr(stand_in, name, off)
    return stand_in


@pytest.mark.drawn
@pytest.mark.parametrize(
    "name",
    [
        "softmax",
        "logsumexp",
        "softmax_backward",
        "segment_softmax",
        "segment_softmax_backward",
        "cross_entropy",
        "cross_entropy_backward",
        "entropy",
        "top_k",
        "softmax_topk",
        "sample",
        "logits_state",
        "sample_state",
        "attention",
        "attention_varlen",
        "attention_backward",
        "attention_backward_varlen",
        "attention_topk",
    ],
)
@pytest.mark.parametrize("module", [cuattn, reference], ids=["cuattn", "reference"])
def test_a_wrong_result_is_an_error(monkeypatch, capsys, module, name):
    """Wrong results and wrong expectations both end in exit code 1, and the table says where."""
    for user in (cases, words):
        monkeypatch.setattr(user, module.__name__.split(".")[-1], wrong(module, name))
    assert job.main(["--json", "--repeat", "1"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert not result["ok"]
    assert not any(row["ok"] for row in result["operations"] if row["operation"] == name)
    assert all(row["ok"] for row in result["operations"] if row["operation"] == "log_softmax")


@pytest.mark.drawn
@pytest.mark.parametrize(
    ("name", "what"),
    [("cross_entropy", "perplexity"), ("sample", "draws"), ("attention_topk", "links")],
)
@pytest.mark.parametrize("module", [cuattn, reference], ids=["cuattn", "reference"])
def test_wrong_words_are_an_error(monkeypatch, capsys, module, name, what):
    monkeypatch.setattr(words, module.__name__.split(".")[-1], wrong(module, name))
    assert job.main(["--json", "--repeat", "1"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert not result[what]["ok"]
    assert all(row["ok"] for row in result["operations"])


def test_a_wrong_gradient_is_an_error(monkeypatch, capsys):
    """Beside central differences, too: by a millionth."""
    right = cuattn.attention_backward
    monkeypatch.setattr(
        job, "cuattn", types.SimpleNamespace(**{**vars(cuattn), "attention_backward":
            lambda *args: (got := right(*args))._replace(dq=got.dq * (1 + 1e-5))})
    )  # fmt: skip
    assert job.main(["--repeat", "1"]) == 1
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith("against central differences of attention") and last.endswith("WRONG")


def test_a_wrong_index_is_an_error(monkeypatch, capsys):
    right = cuattn.top_k
    monkeypatch.setattr(
        cuattn, "top_k", lambda x, k: right(x, k)._replace(indices=right(x, k)[1] + 1)
    )
    assert job.main(["--json", "--repeat", "1"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert [row["operation"] for row in result["operations"] if not row["ok"]] == ["top_k"]


@pytest.mark.parametrize(
    ("stored", "check"), [("lse", "lse"), ("top5_indices", "top5_probs"), ("out", "attention")]
)
def test_a_wrong_stored_value_is_an_error(monkeypatch, capsys, stored, check):
    sample = dict(np.load(ROOT / "cuattn" / "data" / "minilm.npz"))
    sample[stored] = np.roll(sample[stored], 1)

    class File(dict):
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(job.np, "load", lambda path: File(sample))
    assert job.main(["--repeat", "1"]) == 1
    assert f"against the stored {check}: error" in (printed := capsys.readouterr().out)
    assert printed.count("WRONG") == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_are_errors(bad):
    got, expected = np.array([0.5, bad], np.float32), np.array([0.5, 0.5])
    check = job.compare(got, expected)
    assert not check["ok"] and json.loads(json.dumps(check, allow_nan=False)) == check
    assert job.compare(expected.astype(np.float32), expected)["ok"]
