"""Template arguments of every planned kernel: names, order and kinds are those of the heads in
cuda_src.
"""

from __future__ import annotations

import re

import pytest
from configurations import TARGETS, kernels
from test_layout import code, read
from test_layout import kernels as kernels_of_file

from cuattn._device.kernel import Instance, Kernel

FILES = read("cuda_src", "*")
KINDS = {"class": str, "int": int, "bool": bool}  # any other is an enum


def heads():
    """Template to its parameters, (kind, name) in order, of every kernel and struct."""
    macro = r"(?:__launch_bounds__|\b[A-Z_]+)\s*\((?:[^()]|\([^()]*\))*\)"
    head = r"template <([^<>=]*)>\s*(?:__global__ void|struct)\s+(\w+)\b(?!\s*<)"
    return {
        name: [tuple(parameter.split()) for parameter in parameters.split(",")]
        for text in FILES.values()
        for parameters, name in re.findall(head, re.sub(macro, "", code(text)))
    }


def enums():
    """Enum to its enumerators."""
    found = re.findall(r"\benum (\w+)[^{;]*\{([^}]*)\}", " ".join(map(code, FILES.values())))
    return {name: re.findall(r"\bk\w+", body) for name, body in found}


HEADS, ENUMS = heads(), enums()


def faults(instance):
    """Where an instance, or one among its arguments, is not as the template's head says."""
    parameters, arguments = HEADS[instance.template], instance.arguments
    if [name for _, name in parameters] != [*arguments]:
        return [f"{instance.template}: {[*arguments]}"]
    found = []
    for kind, name in parameters:
        value = arguments[name]
        if kind == "class" and isinstance(value, Instance):
            found += faults(value)
        elif type(value) is not KINDS[kind] if kind in KINDS else value not in ENUMS[kind]:
            found.append(f"{instance.template}: {kind} {name} = {value!r}")
    return found


@pytest.fixture(scope="module")
def planned():
    """Every kernel that some plan asks for, by its name."""
    return {
        name: kernel
        for capability in TARGETS.values()
        for name, kernel in kernels(capability).items()
    }


def test_arguments_are_those_of_the_template(planned):
    assert [fault for kernel in planned.values() for fault in faults(kernel)] == []


def test_every_kernel_is_planned(planned):
    found = {(kernel.header, kernel.template) for kernel in planned.values()}
    assert found == {(path, name) for path, text in FILES.items() for name in kernels_of_file(text)}


FORWARD = {
    "In": "float",
    "Acc": "float",
    "Out": "__half",
    "kResult": "kProb",
    "kMasked": True,
    "kWeighted": False,
    "kRowRank": 1,
    "kColRank": 3,
}
SPLIT = {
    "Op": Instance("SoftmaxForward", FORWARD),
    "kPass": "kReduce",
    "kThreadsPerRow": 256,
    "kRowsPerBlock": 1,
    "kFragments": 8,
}


@pytest.mark.parametrize(
    "changes",
    [
        {"kFragments": True},
        {"kFragments": "8"},
        {"kPass": "kProb"},
        {"kPass": 1},
        {"Op": 8},
        {"Op": Instance("SoftmaxForward", {**FORWARD, "kMasked": 1})},
        {"Op": Instance("SoftmaxForward", {**FORWARD, "kResult": "kReduce"})},
        {"Op": Instance("SoftmaxForward", dict(reversed(FORWARD.items())))},
        {"kItems": 8},
    ],
    ids=str,
)
def test_a_wrong_argument_is_seen(changes):
    assert faults(Instance("softmax_split", SPLIT)) == []
    assert len(faults(Instance("softmax_split", {**SPLIT, **changes}))) == 1


def test_wrong_names_are_seen():
    for name in SPLIT:
        others = {other: value for other, value in SPLIT.items() if other != name}
        for arguments in (others, {**others, "kOther": 1}, {**others, name: SPLIT[name]}):
            right = arguments == SPLIT and [*arguments] == [*SPLIT]
            assert (faults(Instance("softmax_split", arguments)) == []) == right


def test_name():
    kernel = Kernel("softmax_split", SPLIT, grid=4, block=256)
    op = "SoftmaxForward<float, float, __half, kProb, true, false, 1, 3>"
    assert kernel.name == f"softmax_split<{op}, kReduce, 256, 1, 8>"
    assert kernel.name is kernel.name  # a warm call only looks it up
    assert kernel.header == "softmax/split.cuh"
    same = Kernel("softmax_split", {**SPLIT}, grid=4, block=256)
    other = Kernel("softmax_split", {**SPLIT, "kFragments": 4}, grid=4, block=256)
    assert kernel == same and hash(kernel) == hash(same) and kernel != other
