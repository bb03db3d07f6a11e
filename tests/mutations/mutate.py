"""Breaks the kernels in one place after another and sees that the tests notice.

``python tests/mutations/mutate.py [--list] [--only WORD]``: the tables beside it hold mutations of
``cuda_src/``, one table per family, each mutation with the few tests of which one must fail. All
happens in a copy of the tree. Exits with 1 if a mutation survives. pytest does not collect this
file, and CI does not run it: it takes more than an hour.

Tests run on the emulator, but those of ptx.txt on the software device: the twins of ``ptx/`` stand
before those headers, so only there does inline assembly run. What no test can reach: cache hints,
and a row number beyond 32 bits, which needs as many rows.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("bench", "cuda_src", "cuattn", "tests", "setup.cfg", "pyproject.toml")
LIMIT = 30  # seconds; a kernel that never ends counts as noticed
DEVICE_LIMIT = 90  # the same on the software device, where NVRTC compiles


class Mutation(NamedTuple):
    """`old`, which occurs `count` times in `file`, becomes `new`; one of `tests` must fail."""

    file: str
    breaks: str
    old: str
    new: str
    tests: tuple[str, ...]
    count: int = 1


FILES = {path.stem: path.relative_to(ROOT).as_posix() for path in ROOT.glob("tests/*/test_*.py")}


def of(name, test, *parameters, arch="sm_90a"):
    """Node ID of one case of a test of test_<name>.py, on the emulator."""
    case = "-".join(("emulator", arch, *map(str, parameters)))
    return f"{FILES[f'test_{name}']}::{test}[{case}]"


def ampere(name, test, *parameters):
    """The same where Hopper has a kernel of its own."""
    return of(name, test, *parameters, arch="sm_80")


def on_device(node, capability):
    """A test that the software device of this compute capability runs."""
    return f"{node}@{capability}"


def device(name, test, *parameters, capability=80):
    """Node ID of one case of a test of test_<name>.py, on the software device."""
    case = "-".join((f"device-sm_{capability}", *map(str, parameters)))
    return on_device(f"{FILES[f'test_{name}']}::{test}[{case}]", capability)


def hopper(name, test, *parameters):
    """The same on the software device of compute capability 9.0."""
    return device(name, test, *parameters, capability=90)


# ---- selections: which configuration of which kernel runs, on what ------------------------------

# softmax_rows: part of a warp, a warp, a block of several warps, a cluster.
PART = (of("softmax", "test_length", 33, "softmax"),)
WARP = (of("softmax", "test_length", 1000, "softmax"),)
BLOCK = (of("softmax", "test_length", 1025, "softmax"),)
BLOCK_OF_16 = (of("softmax", "test_long_rows", 1, 32767, arch="sm_80"),)
CLUSTER = (of("softmax", "test_long_rows", 1, 32767),)
CLUSTER_LOADS = ("tests/device/test_compile.py::test_rows_of_clusters_wait_for_no_memory",)
CLUSTER_OF_8 = (of("softmax", "test_long_rows", 1, 70001),)
LOG = (of("softmax", "test_length", 33, "log_softmax"),)
DOUBLE = (
    of("softmax", "test_dtype", "float64", 33, "softmax"),
    of("softmax", "test_dtype", "float64", 33, "log_softmax"),
    of("softmax_backward", "test_dtype", "float64", 33, "softmax"),
)
DOUBLE_LOG = (of("softmax_topk", "test_scale_dtype", "float64"),)
# Ends of the range, rows alone, and products that a compiler may fuse.
NEAR_ONE = (of("magnitudes", "test_sums_next_to_one", "float32", 33),)
NEAR_ONE_BLOCK = (of("magnitudes", "test_sums_next_to_one", "float32", 5000),)
NEAR_ONE_REST = (of("magnitudes", "test_sums_next_to_one", "float32", 3000),)
NEAR_ONE_COLUMNS = (of("magnitudes", "test_sums_next_to_one", "float32", 1000),)
MAXIMA = (of("magnitudes", "test_maxima_that_occur_often", 3),)
SUBNORMAL = (of("magnitudes", "test_subnormal_probabilities", 300, "float32"),)
SCALED = (of("magnitudes", "test_scaled_scores_beyond_the_range", "x1-1e+20", 1),)
COLUMNS_ALONE = ("tests/softmax/test_batch_invariance.py::test_columns[log_softmax-sm_90a]",)
ALONE = ("tests/softmax/test_batch_invariance.py::test_rows[softmax-sm_90a]",)
CONTRACTED = ("tests/softmax/test_contraction.py::test_states[float32]",)
# softmax_split: rows of a warp, of a block, slices of a row; and with them softmax_merge.
LSE = (of("logsumexp", "test_length", 33),)
LSE_BLOCK = (of("logsumexp", "test_length", 4097),)
WHOLE_ROWS = ("tests/mutations/test_mutants.py::test_whole_rows_of_several_parts[shape0-1-sm_90a]",)
WHOLE_COLUMNS = (
    "tests/mutations/test_mutants.py::test_whole_rows_of_several_parts[shape1-0-sm_90a]",
)
LSE_SLICES = (of("logsumexp", "test_long_rows", 2, 300001),)
SLICES = (of("softmax", "test_long_rows", 2, 300001),)
LONG_FALL = (of("mutants", "test_falling_rows", "shape0", 1),)
SLICES_FALL = (of("mutants", "test_falling_rows", "shape0", 1, arch="sm_80"),)
EVEN_SLICES = (of("mutants", "test_every_slice_counts", 1),)
MANY_SLICES = (
    of("mutants", "test_more_slices_than_threads", "softmax-shape0"),
    of("mutants", "test_more_slices_than_threads", "softmax-shape1"),
)
MANY_MERGED = (of("mutants", "test_more_slices_than_threads", "logsumexp-shape2"),)
# softmax_strided: 32 columns in a warp, in four warps; one row in four warps; one pass and a rest;
# slices.
COLUMNS = (of("softmax", "test_first_axis", "float32", "shape0"),)
COLUMNS_OF_4_WARPS = (of("softmax", "test_first_axis", "float32", "shape1"),)
ONE_COLUMN = (of("softmax", "test_layout", "strided", 1025),)
COLUMNS_AND_REST = (of("softmax", "test_first_axis", "float32", "shape2"),)
COLUMN_SLICES = (of("softmax", "test_first_axis", "float32", "shape3"),)
COLUMN_PARTS_OF_2 = (of("softmax", "test_first_axis", "float32", "shape4"),)
HALF_COLUMNS_OF_4_WARPS = (of("softmax", "test_first_axis", "float16", "shape1"),)
COLUMN_FALL = (
    of("mutants", "test_falling_rows", "shape1", 0),
    of("mutants", "test_falling_rows", "shape2", 0),
)
RAGGED = (of("mutants", "test_ragged_columns"),)
BAD_OFFSETS = (of("mutants", "test_offsets_outside", "None", "int64"),)
# Places and layouts.
SHIFTED = (
    of("softmax", "test_layout", "misaligned", 33),
    of("softmax", "test_layout", "misaligned", 1025),
)
SHIFTED_LSE = (of("logsumexp", "test_layout", "misaligned", 33),)
SHIFTED_OUT = (
    of("softmax", "test_out", 1025, "misaligned", "softmax"),
    of("softmax", "test_out", 33, "misaligned", "softmax"),
)
SHIFTED_HALVES = tuple(of("softmax", "test_every_alignment", shift) for shift in range(8))
MIDDLE = (of("softmax", "test_middle_axis", 1),)
HALF_FRAGMENTS = (
    "tests/device/test_primitives.py::test_fragments_move_any_row[__half-__half-8-true]",
)
ANY_STRIDES = (of("softmax", "test_not_collapsible", 2), of("softmax", "test_not_collapsible", 0))
FAR = (of("large_offsets", "test_input", 0), of("large_offsets", "test_input", 1))
OUT_STRIDES = (
    of("softmax", "test_out_axis", 0),
    of("softmax", "test_out", 33, "misaligned", "softmax"),
    of("softmax", "test_out_with_lse", -1),
)
# Options and corners.
SCALE = (of("softmax", "test_scale", 0.125, "softmax"),)
SCALES = (of("softmax", "test_scale_array", "float32", "shape6"),)
SCALES_AXIS = (of("softmax", "test_scale_array_axis", 0, "shape0"),)
STATE_SCALES = (of("softmax_state", "test_scale"),)
WHERE = (
    of("softmax", "test_where", 33, "softmax"),
    of("softmax", "test_where", 33, "log_softmax"),
    of("softmax", "test_where_dtype", "float64"),
)
HIDDEN = (of("softmax", "test_where_hides_anything", "nan", "softmax"),)
WEIGHTS = (of("logsumexp", "test_weights", 33),)
WEIGHTS_FALL = (of("mutants", "test_weights_of_more_parts_than_lanes", 2000),)
WEIGHTS_RISE = (of("mutants", "test_weights_of_more_parts_than_lanes", -2000),)
MASKED_WEIGHTS = (of("logsumexp", "test_where_with_weights"),)
ZERO_WEIGHTS = (of("logsumexp", "test_weight_zero_takes_out"),)
SPECIAL = (
    of("softmax", "test_special_values", 33, "softmax"),
    of("softmax", "test_special_values", 1025, "softmax"),
    of("softmax", "test_special_values", 33, "log_softmax"),
    of("logsumexp", "test_special_values", 33, "float32"),
    of("logsumexp", "test_special_values", 1025, "float32"),
)
SPECIAL_STATE = (of("softmax_state", "test_special_values", 33),)
MERGE = (of("softmax_state", "test_merge_of_two_parts", "float32", 64),)
MERGE_SPECIAL = (of("softmax_state", "test_merge_special_values"),)
NEGATIVE = (of("mutants", "test_maximum_of_a_negative_row", "float32"),)
OFFSET = (of("softmax", "test_large_offset", "float32", "softmax"),)
# softmax_with_state: rows of a few lanes, tiles of a block, columns; strides of a state.
GIVEN = "softmax_of_state"
GIVEN_ROWS = (of(GIVEN, "test_rows", 33), of(GIVEN, "test_many_tiles", "softmax"))
GIVEN_TILES = (
    of(GIVEN, "test_length", 4097, "softmax"),
    of(GIVEN, "test_length", 32769, "softmax"),
)
GIVEN_ONCE = (f"{FILES['test_traffic']}::test_state_reads_once[2-70001-softmax-odd]",)
GIVEN_COLUMNS = (of(GIVEN, "test_long_columns", 300),)
GIVEN_COLUMNS_SHIFTED = (of(GIVEN, "test_long_columns", 96),)
GIVEN_SHIFTED = tuple(
    of(GIVEN, "test_layout", n, layout) for n in (50, 1550) for layout in ("misaligned", "short")
)
GIVEN_LSE = (of(GIVEN, "test_lse"),)
GIVEN_STRIDES = tuple(of(GIVEN, "test_strides_of_a_state", n, "strided") for n in (3, 129, 1025))
GIVEN_SCALES = (of(GIVEN, "test_scale", "softmax"), of(GIVEN, "test_scale", "log_softmax"))
GIVEN_LOG = (of(GIVEN, "test_length", 33, "log_softmax"),)
# Rows of logits: losses, entropies, states; slices, columns, labels.
LOSS = (of("cross_entropy", "test_length", 33), of("cross_entropy", "test_labels", "int32"))
LOSS_SCALE = (of("cross_entropy", "test_scale"),)
LOSS_IGNORED = (of("cross_entropy", "test_ignored_rows", 2, 3),)
LOSS_SMALL = (of("cross_entropy", "test_small_losses_keep_their_digits", "float32", 33),)
LOSS_HUGE = (of("cross_entropy", "test_huge_scores", 1, 300),)
LABELS = (of("cross_entropy", "test_labels_of_any_strides"),)
LABELS_OUTSIDE = (of("cross_entropy", "test_labels_outside", "int64"),)
LOSS_GRADIENT = (of("cross_entropy", "test_gradient_length", 33),)
LOSS_GRADIENT_PARTS = (of("cross_entropy", "test_gradient_of_parts", "float32", 1),)
LOSS_GRADIENT_SCALE = (of("cross_entropy", "test_gradient_scale"),)
LOSS_GRADIENT_SPECIAL = (of("cross_entropy", "test_gradient_special_values", 3),)
LOSS_GRADIENTS = (of("cross_entropy", "test_gradients_of_losses", "float32"),)
LOSS_GRADIENT_READS = (f"{FILES['test_traffic']}::test_loss_gradient_reads_once[33-100-odd]",)
ENTROPY = (of("entropy", "test_length", 33), of("entropy", "test_length", 4097))
ENTROPY_SLICES = (of("entropy", "test_long_rows", 2, 300001),)
ENTROPY_SCALE = (of("entropy", "test_scale"),)
ENTROPY_WHERE = (of("entropy", "test_where", "float32", 33),)
ENTROPY_LEAST = (of("entropy", "test_least_numbers_are_not_nothing"),)
ENTROPY_SMALL = (of("entropy", "test_small_entropies_keep_their_digits", "float32", 1000),)
LOGITS_OUTSIDE = (of("logits_state", "test_labels_outside", 1, "int64"),)
LOGITS_SPECIAL = (of("logits_state", "test_special_values", "float32", 33),)
LOGITS_MERGE = (of("logits_state", "test_any_split_is_the_whole", "float32", 7),)
LOGITS_INFINITE = (
    of("logits_state", "test_infinite_beside_huge", 1025),
    of("logits_state", "test_merge_of_infinite_and_huge"),
)
LOSS_GRADIENT_STRIDES = (of("cross_entropy", "test_gradient_of_rows_of_any_strides"),)
BACK = (
    of("softmax_backward", "test_length", 33, "softmax"),
    of("softmax_backward", "test_length", 33, "log_softmax"),
)
BACK_BLOCK = (of("softmax_backward", "test_length", 1025, "softmax"),)
BACK_COLUMNS = (
    of("softmax_backward", "test_first_axis", "shape1", "softmax"),
    of("softmax_backward", "test_first_axis", "shape3", "softmax"),
)
BACK_SLICES = (of("softmax_backward", "test_long_rows", 2, 300001, "softmax"),)
BACK_STRIDES = (
    of("softmax_backward", "test_layout", "strided", 33, "softmax"),
    of("softmax_backward", "test_out", "strided", "softmax"),
    of("softmax_backward", "test_layout", "padded", 33, "softmax"),
    of("softmax_backward", "test_out", "misaligned", "softmax"),
)
BACK_SCALE = (of("softmax_backward", "test_scale", "softmax"),)
BACK_WHERE = (
    of("softmax_backward_where", "test_dtype", "float32", 33, "softmax"),
    of("softmax_backward_where", "test_dtype", "float32", 33, "log_softmax"),
    of("softmax_backward_where", "test_broadcast", "log_softmax"),
    of("softmax_backward_where", "test_first_axis", "shape1", "softmax"),
)
BACK_WHERE_SHIFTED = tuple(
    of("softmax_backward_where", "test_layout", "misaligned", n, "softmax") for n in (33, 128)
)
# Costs.
TRAFFIC = "tests/softmax/test_traffic.py::test_"
VECTORS = (
    TRAFFIC + "softmax[a-block-sliced]",
    TRAFFIC + "reductions_read_once[2-300001-logsumexp-odd]",
    TRAFFIC + "softmax[split-without-clusters-sliced]",
)
PREDICATES = ("tests/benchmarks/test_kernel_report.py::test_a_thread_has_its_whole_tile_in_flight",)
READ_ONCE = (
    TRAFFIC + "reductions_read_once[33-100-logsumexp-aligned]",
    TRAFFIC + "reduced_axis_not_last[60-200-1]",
)
EXPONENTIALS = tuple(
    of("mutants", "test_one_exponential_an_element", f"shape{i}-{parameters}")
    for i, parameters in enumerate(("1-1-128", "1-1-1052", "0-1-5632", "1-2-None"))
)


SHARED_SLOTS = (of("softmax", "test_long_rows", 2, 50257),)
SHIFTED_GRADIENTS = (of("softmax_backward", "test_layout", "misaligned", 33, "softmax"),)
DOUBLE_MAXIMUM = (of("mutants", "test_maximum_of_a_float64_state"),)
DOUBLE_CORNERS = (of("softmax", "test_special_values_dtype", "float64"), *WHERE)
FAR_MASK = (of("large_offsets", "test_mask"),)
DOUBLE_SCALE = (of("mutants", "test_scale_of_float64"),)
GRADIENT_VECTORS = (of("mutants", "test_misaligned_gradients_move_as_vectors"),)
FEW_COLUMNS = (of("mutants", "test_few_columns", 8),)
TWO_COLUMNS = (of("mutants", "test_few_columns", 2),)
SEVEN_COLUMNS = (of("softmax", "test_first_axis", "float32", "shape5"),)
EVEN_COLUMN_SLICES = (of("mutants", "test_every_slice_counts", 0),)
IN_PLACE_COLUMNS = (of("softmax", "test_in_place_axis", 0),)
MANY_MERGES = (of("mutants", "test_merge_of_many_states"),)


# Selection by radix: one sort; runs that are merged; rows of one block; and the merge of lists.
def radix(test, *parameters, arch="sm_90"):
    """Node IDs of cases of tests/topk/test_radix.py, which run on the emulator only."""
    return (f"tests/topk/test_radix.py::test_{test}[{'-'.join(map(str, (arch, *parameters)))}]",)


RADIX = radix("k", 1000)
RADIX_RUNS = radix("k", 5002)
RADIX_INTEGERS = radix("dtype", "int8", 300)
RADIX_CONSTANT = radix("constant", 2000) + radix("constant", 20000)
RADIX_INT32 = radix("dtype", "int32", 300)
RADIX_NAN = ("tests/topk/test_radix.py::test_ranking[float32-4098]",)
RADIX_NARROW = radix("narrow_range", 700, "float32")
RADIX_WHOLE = radix("the_bin_is_taken_whole")
RADIX_SLICES = radix("slices", 2, 50257, 5)
RADIX_GROUPS = radix("groups_of_rows", 300)
RADIX_RUN_GROUPS = radix("groups_of_rows", 2500)
RADIX_RENORMALIZED = radix("softmax", 5003, 300, "prob", True)
RADIX_SHORT_SOFTMAX = radix("softmax", 2047, 300, "prob", False)
RADIX_STORE = radix("softmax", 5003, 5000, "prob", False)
RADIX_BEYOND = radix("state_beyond_the_row", 700, 500)
RADIX_BEYOND_RUNS = radix("state_beyond_the_row", 700, 3001)
RADIX_READS = ("tests/topk/test_radix.py::test_reads[float32-4-50257-2.25]",)


# Draws: noise, lists by noise and by score, and cuts.
def drawn(test, *parameters):
    """Node IDs of cases of tests/topk/test_sample_traffic.py without a backend."""
    return (f"tests/topk/test_sample_traffic.py::test_{test}[{'-'.join(map(str, parameters))}]",)


SAMPLE_NOISE = (of("sample", "test_noise_is_what_is_defined", 1),)
SAMPLE_FIRST = (of("sample", "test_noise_is_what_is_defined", 3),)
SAMPLE_PAST = tuple(
    of("sample_traffic", "test_counters_that_fragments_do_not_begin_with", *case)
    for case in ((1, 2), (3, 3))
)
SAMPLE_SEED = (of("sample", "test_seed", 2**32),)
SAMPLE_OFFSET = (of("sample", "test_offset", 2**32),)
SAMPLE_ROWS = (of("sample_traffic", "test_numbers_of_rows_have_64_bits"),)
SAMPLE_AXIS = (of("sample", "test_axis", "float32", 0),)
SAMPLE_NUMBERS = (of("sample", "test_numbers_of_columns", 0),)
SAMPLE_HUGE = (of("sample", "test_huge_logits", "float32"),)
SAMPLE_SKIPPED = tuple(
    drawn("noise_that_is_not_drawn_would_not_be_selected", most, "float32", "sm_80", 1)[0]
    for most in (0, 2.0**25)
)
SAMPLE_SPECIAL = (
    of("sample", "test_special_values", 310, 2),
    of("sample", "test_rows_without_probabilities", "options0"),
    of("sample", "test_where", "shape3"),
)
SAMPLE_NUM = (of("sample", "test_num", 33),)
SAMPLE_MORE = (of("sample", "test_top_k", 2),)
SAMPLE_TOP_P = (of("sample", "test_top_p", 0.9),)
SAMPLE_FLAT = (of("sample", "test_top_p_of_flat_rows", 0.95),)
SAMPLE_ORDER = (of("sample", "test_order_of_filters"),)
SAMPLE_MIN_P = (of("sample", "test_min_p", 0.05),)
SAMPLE_READS = drawn("only_rows_that_need_it_are_read_again", "sm_80", 4, "filters0", 5)
SAMPLE_MIN_P_READS = drawn("one_read", "min_p", "a-block-a-row")
SAMPLE_CUT = (of("sample", "test_top_k", 257),)
SAMPLE_CUT_TIES = (of("sample", "test_top_k_of_ties", 300),)
SAMPLE_CUT_BOTH = drawn("no_bit_depends_on_the_device", {"top_k": 400, "top_p": 0.5})
SAMPLE_CUT_ROUNDED = (of("sample_traffic", "test_min_p_between_two_numbers"),)
SAMPLE_UNIT = (of("sample_traffic", "test_rows_have_the_numbers_of_their_shape", "order0"),)
SAMPLE_MERGED = (of("sample", "test_any_split_has_the_draws_of_the_whole", "float32", 2),)
SAMPLE_LOST = (of("sample", "test_merge_of_rows_without_probabilities"),)
WALK = tuple(
    f"tests/device/test_primitives.py::test_walk_to_the_last_candidate_that_a_count_can_tell[{case}]"
    for case in ("255-NarrowCandidate", "193-WideCandidate")
)
LISTS_MERGED = radix("merge", 7, 100, "float32", "special")
LISTS_BITS = radix("merge_keeps_bits")
LISTS_STATES = radix("merge_of_states")


# Selection by lists: a warp a row, a block, a cluster, slices that a second launch merges.
def reads(name, k, regime):
    """Node ID of a case of test_topk_traffic.py, which also verifies what is selected."""
    return f"tests/topk/test_topk_traffic.py::test_one_read[{name}-{k}-{regime}]"


LISTS_WARP = tuple(reads("top_k", k, "a-warp-a-row") for k in (5, 64, 256))
LISTS_BLOCK = (reads("top_k", 256, "a-block-a-row"), reads("top_k", 5, "a-block-a-row"))
LISTS_CLUSTER = (of("top_k", "test_long_rows", 64), of("softmax_topk", "test_long_rows", 8))
LISTS_SPLIT = (
    reads("top_k", 50, "a-row-over-the-chip"),
    reads("top_k", 256, "a-row-over-the-chip"),
)
LISTS_STATES_SPLIT = (of("softmax_topk", "test_long_rows", 8, arch="sm_80"),)
LISTS_STATES_BLOCK = (reads("softmax_topk", 5, "a-block-a-row"),)
LISTS_NEGATIVE = (of("top_k", "test_misaligned_rows_below_zero", 1025),)
LISTS_TAIL = (of("top_k", "test_misaligned_rows_below_zero", 4096),)
LISTS_SHIFTED = (of("top_k", "test_layout", "misaligned"),)
LISTS_SPECIAL = tuple(
    of("softmax_topk", "test_special_values", n, k, flag, output)
    for n, k in ((3, 3), (33, 9), (310, 9))
    for flag in (False, True)
    for output in ("prob", "log_prob")
)
LISTS_HIDDEN = tuple(
    of("softmax_topk", "test_where_beside_special_values", flag, output)
    for flag in (False, True)
    for output in ("prob", "log_prob")
)
LISTS_STATE = tuple(of("softmax_topk_state", "test_length", n) for n in (33, 129))
LISTS_COST = tuple(
    f"tests/topk/test_topk_traffic.py::test_no_order_costs_much_more_than_a_random_one[{case}]"
    for case in ("5-a-warp-a-row", "256-a-block-a-row", "5-a-row-over-the-chip")
)
LISTS_TIES = ("tests/topk/test_topk_traffic.py::test_ties[12-a-warp-a-row]",)
LISTS_OFFSET = (of("softmax_topk_state", "test_index_offset", 50257),)
LISTS_READ = (reads("softmax_topk", 5, "a-warp-a-row"),)
KEYS = (
    of("top_k", "test_every_bit_pattern", "bfloat16", 100),
    of("top_k", "test_subnormals", "float32", "largest"),
    of("top_k", "test_dtype", "float64"),
    of("top_k", "test_dtype", "int32"),
    of("top_k", "test_dtype", "uint64"),
    of("top_k", "test_integers_beyond_float64", "int64", "smallest"),
)


# topk_lanes: rows of a router, groups of every size, several tiles, columns.
LANES_TEST = "tests/topk/test_lanes.py::test_"
LANES = (LANES_TEST + "every_k[257-7]", LANES_TEST + "every_group[4-8]")
LANES_WIDE = (LANES_TEST + "dtype[300-int64]", LANES_TEST + "dtype[300-float64]")
LANES_FEW = (LANES_TEST + "every_k[8-3]",)
LANES_GROUP = tuple(
    f"{LANES_TEST}every_group[{shape}]" for shape in ("2-8", "4-8", "8-8", "32-8", "32-2")
)
LANES_COLUMNS = (LANES_TEST + "first_axis[3-1100]", LANES_TEST + "first_axis[8-100]")
LANES_SHIFTED = (LANES_TEST + "misaligned[float32]", LANES_TEST + "misaligned[int8]")
LANES_NAN = tuple(f"{LANES_TEST}state[1-{n}]" for n in (5, 9)) + (LANES_TEST + "every_k[257-8]",)
LANES_MANY = (LANES_TEST + "rows[64-33]", LANES_TEST + "rows[64-2049]")
LANES_TILES = tuple(
    f"{LANES_TEST}many_tiles[{softmax}-{kind}]"
    for softmax in (False, True)
    for kind in ("ascending", "random")
)
LANES_TILES_SHIFTED = tuple(f"{LANES_TEST}every_group[{group}-8]" for group in (1, 4, 16))
LANES_TILES_FALL = (LANES_TEST + "many_tiles[True-descending]", LANES_TEST + "first_axis[70-1100]")
LANES_SOFTMAX = (LANES_TEST + "output[log_prob-False]",)
LANES_VECTORS = (LANES_TEST + "misaligned_rows_move_as_vectors[257]",)
LANES_NORM = (LANES_TEST + "output[prob-True]",)
LANES_ROW = (LANES_TEST + "output[prob-False]",)


# ---- the tables -------------------------------------------------------------------


# attention: each multiplication, edges, many tiles, every option.
ATTENTION_OPS = ("float16", "bfloat16", "tf32", "float32", "float64")
ATTENTION = (
    ampere("attention", "test_lengths", True, "(113, 203)"),
    ampere("attention", "test_lengths", False, "(300, 799)"),
)
ATTENTION_HALF = tuple(ampere("attention", "test_many_keys", op) for op in ATTENTION_OPS[:2])
ATTENTION_TF32, ATTENTION_FLOAT, ATTENTION_DOUBLE = (
    (ampere("attention", "test_many_keys", op), ampere("attention", "test_ones", op))
    for op in ATTENTION_OPS[2:]
)
# Score expressions: by themselves, and in attention.
SCORE_LANGUAGE = ("tests/attention/test_score_language.py::test_random_expressions_by_kernels",)
SCORE_CORNERS = ("tests/attention/test_score_language.py::test_corners",)
SCORE = (ampere("score", "test_uses", 4), ampere("score", "test_uses", 0))
SCORE_SM90, SCORE_SM90_RAGGED, SCORE_SM90_COST = (
    (f"tests/attention/test_score_sm90.py::{test}",)
    for test in ("test_packed_heads[(48, 3)]", "test_ragged", "test_what_it_costs")
)
KVCACHE_SCORE = (
    ampere("score_kvcache", "test_uses", 4, 5),
    ampere("score_kvcache", "test_uses", 0, 5),
)
SCORE_PRODUCTS = ("tests/softmax/test_contraction.py::test_products_of_scores",)
ATTENTION_WINDOW = (
    ampere("attention", "test_window", "(150, 150)", "(9, 12)"),
    ampere("attention", "test_window", "(37, 83)", "(17, None)"),
)
ATTENTION_OFFSET = tuple(ampere("attention", "test_q_offset", n) for n in (-36, 5, 200))
# The best keys of queries: of many equal scores, of all orders; in passes, in parts.
TOPK = "attention_topk"
TOPK_TIES = tuple(ampere(TOPK, "test_ties", op) for op in ("float16", "float32", "float64"))
TOPK_OPTIONS = tuple(ampere(TOPK, "test_every_option", op) for op in ("float16", "float64"))
TOPK_RANDOM = (ampere(TOPK, "test_random_scores", "float32", "prob"),)
TOPK_ORDERS = tuple(ampere(TOPK, "test_orders", order) for order in ("ascending", "teeth"))
TOPK_PASSES = (ampere(TOPK, "test_passes", "float32"),)
TOPK_SPECIAL = tuple(
    ampere(TOPK, "test_special_scores", output) for output in ("prob", "log_prob", "state")
)
TOPK_SHARED = (ampere(TOPK, "test_few_queries_many_keys", "float16"),)
TOPK_SHARDS = (ampere(TOPK, "test_shards"),)
TOPK_STATE = (ampere(TOPK, "test_random_scores", "float16", "state"),)
TOPK_NAN = (ampere(TOPK, "test_nothing_but_nan_in_later_tiles"),)
TOPK_VOTES = (f"{FILES['test_attention_topk_traffic']}::test_a_tile_that_no_row_wants[float16-64]",)
TOPK_BITS = (f"{FILES['test_attention_topk_traffic']}::test_blocks_share_keys",)
ATTENTION_OFFSETS = (ampere("attention", "test_q_offset_of_each_sequence"),)
ATTENTION_MANY = (ampere("attention_varlen", "test_lengths", "many"),)
ATTENTION_LENS = (ampere("attention", "test_lens"), ampere("attention", "test_sinks", "float16"))
ATTENTION_SINKS = (ampere("attention", "test_sinks", "float16"),)
ATTENTION_SCALE = tuple(ampere("attention", "test_scale", n) for n in (1, -0.4, 0))
ATTENTION_SOFTCAP = (ampere("attention", "test_softcap", 3),)
ATTENTION_MASK = tuple(ampere("attention", "test_mask", f"shape{i}") for i in (0, 4, 5))
BLOCK_TILES = (ampere("block_mask", "test_random_tiles", "float16"),)
BLOCK_POSITIONS = (ampere("block_mask", "test_positions", "128x256"),)
BLOCK_POSITIONS_OF_384 = (ampere("block_mask", "test_positions", "384x384"),)
BLOCK_FULL = (ampere("block_mask", "test_a_mask_is_no_part_of_full_and_of_empty_tiles", "float32"),)
BLOCK_OUTSIDE = (ampere("block_mask", "test_lists_lead_nowhere_else", "float32"),)
BLOCK_WINDOW = ("tests/attention/test_block_mask.py::test_lists_are_searched",)
MASK_PLACES = (ampere("block_mask_expression", "test_uses", 0),)
MASK_NUMBERS = (ampere("block_mask_expression", "test_uses", 3),)
MASK_ALL = (ampere("block_mask_expression", "test_uses", 6),)
MASK_ROWS = (ampere("block_mask_expression", "test_uses", 7),)
MASK_GRID = (ampere("block_mask_expression", "test_more_tiles_than_blocks"),)
ATTENTION_BIAS = (ampere("attention", "test_bias", "float32"),)
ATTENTION_ALIBI = (ampere("attention", "test_alibi", "float32"),)
ATTENTION_GROUPS = tuple(
    ampere("attention", "test_groups_of_heads", 3, n) for n in ("(4, 2)", "(3, 3)")
)
ATTENTION_LAYOUT = tuple(ampere("attention", "test_layout", n) for n in ("strided", "misaligned"))
ATTENTION_PARTS = (ampere("attention", "test_head_dims", "(321, 59)"),)
ATTENTION_DIMS = tuple(ampere("attention", "test_head_dims", n) for n in ("(59, 59)", "(192, 128)"))
ATTENTION_WIDE = (ampere("attention", "test_head_dims", "(64, 200)"),)
ATTENTION_CHUNK = (ampere("attention", "test_head_dims", "(40, 40)"),)
ATTENTION_CHUNKS = (ampere("attention", "test_dtypes", "(256, 256)", "float64"),)
ATTENTION_UNSEEN = tuple(
    ampere("attention", "test_what_nobody_sees_changes_nothing", "float16", how)
    for how in ("{'is_causal': True, 'q_offset': 10}", "{'mask': True}", "{'window': (15, 3)}")
)
ATTENTION_DTYPE = (
    *(ampere("attention_dtype", "test_out", dims, layout)
      for dims, layout in (("(64, 64)", "padded"), ("(128, 35)", "misaligned"))),
    *(ampere("attention_dtype", "test_kernels", "BHSD", how)
      for how in ("two blocks of columns", "padding", "few queries, no chunks")),
)  # fmt: skip
ATTENTION_BANKS = tuple(
    f"tests/attention/test_attention_traffic.py::test_no_bank_conflicts[{dim}-{op}]"
    for dim, op in ((64, "float16"), (96, "float16"), (64, "float64"), (160, "tf32"))
)
ATTENTION_BYTES = tuple(
    f"tests/attention/test_attention_traffic.py::test_every_byte[{window}-float16]"
    for window in ("None-None", "100-0", "70-90")
)
ATTENTION_VARLEN = (
    ampere("attention_varlen", "test_dtypes", True, "float32"),
    ampere("attention_varlen", "test_lens"),
    ampere("attention_varlen", "test_packed"),
)
RAGGED_ORDER = tuple(
    f"{FILES['test_attention_traffic']}::test_order_of_ragged_blocks[{batch}-1]"
    for batch in (7, 33)
)
ATTENTION_BAD = (ampere("attention_varlen", "test_bad_values_on_a_device_stay_inside"),)
ATTENTION_BAD_LENS = (ampere("attention", "test_bad_lens_on_a_device_are_clamped"),)


def sm90(*cases, test="test_schedules"):
    """Cases of a test of tests/attention/test_attention_sm90.py."""
    return tuple(f"tests/attention/test_attention_sm90.py::{test}[{case}]" for case in cases)


SM90 = sm90("three warpgroups", "two warpgroups", "out in the place of Q")
SM90_DTYPE = (
    *(of("attention_dtype", "test_out", dims, layout)
      for dims, layout in (("(64, 64)", "padded"), ("(64, 64)", "misaligned"))),
    *(of("attention_dtype", "test_kernels", "BHSD", how)
      for how in ("packed heads", "padding", "in the place of Q")),
    "tests/attention/test_attention_dtype.py::test_blocks_after_one_another",
)  # fmt: skip
SM90_SECTIONS = sm90(2, 3, test="test_sections")
SM90_RAGGED = sm90("False-(64, 64)", "False-(192, 192)", test="test_ragged_schedules")
SM90_UNSEEN = sm90("values that nobody sees", "values beyond a window")
LISTED = tuple(
    f"tests/attention/test_block_mask_sm90.py::test_schedules[{case}]"
    for case in ("four stages", "panels of 32 columns", "two stages", "widest, modified")
)
LISTED_LENS = tuple(
    f"tests/attention/test_block_mask_sm90.py::test_schedules[{case}]" for case in ("wide", "wider")
)
LISTED_EDGES = tuple(
    f"tests/attention/test_block_mask_sm90.py::test_edges_of_full_tiles[{window}]"
    for window in ("(150, None)", "(None, 30)")
)
LISTED_FULL = (of("block_mask", "test_a_mask_is_no_part_of_full_and_of_empty_tiles", "float16"),)
SM90_PACKED = sm90("packed heads", "packed heads with sinks")
SM90_MODIFIED = sm90("scores are more than scaled", "packed heads with sinks")
SM90_OUT = (*SM90, *sm90("a turn has one tile", "out wider than Q"))
SM90_PADDED = ("tests/attention/test_attention_sm90.py::test_ragged_into_padded_rows",)
SM90_PADDED_DENSE = sm90(35, test="test_odd_head_dimensions_in_padded_rows")
SM90_ONE_ROW = sm90(35, test="test_one_row_that_ends_anywhere")
SM90_CODE = ("tests/device/test_compile.py::test_all_configurations_of_hopper_alone[0]",)
SM90_EXPS = ("tests/attention/test_attention_sm90.py::test_one_exponential_a_score",)
SM90_FAR = ("tests/attention/test_attention_sm90.py::test_weights_far_above_one_stay_finite",)
SM90_GROWTH = sm90("8.1-float16", "60.0-float16", test="test_scores_that_grow_from_tile_to_tile")
MAGNITUDES_TEST = "attention_magnitudes"
MAGNITUDES = (
    *(ampere(MAGNITUDES_TEST, "test_padding_by_scores", "float16", flag, kind)
      for flag in (False, True) for kind in ("left", "documents")),
    *(ampere(MAGNITUDES_TEST, "test_where_exponents_change_their_form", op, order)
      for op in ("float16", "float32") for order in ("rising", "mixed")),
)  # fmt: skip
MAGNITUDES_SM90 = (
    of(MAGNITUDES_TEST, "test_where_exponents_change_their_form", "float16", "mixed"),
)
MAGNITUDES_SINKS = tuple(
    ampere(MAGNITUDES_TEST, "test_sinks", "float32", size) for size in ("1e+30", "-1e+30")
) + (ampere(MAGNITUDES_TEST, "test_where_exponents_change_their_form", "float32", "mixed"),)
MAGNITUDES_SINKS += (ampere(MAGNITUDES_TEST, "test_sinks_alone", "float32"),)
MAGNITUDES_SM90_CAP = (of(MAGNITUDES_TEST, "test_softcap", "1e-300", "float16"),)
SM90_TANH = (of(MAGNITUDES_TEST, "test_softcap", "64.0", "float16"),)
SM90_NAN_CAP = (of("attention", "test_nan_in_a_query", "float16"),)
MAGNITUDES_BIAS = (ampere(MAGNITUDES_TEST, "test_bias_beyond_the_accumulator"),)
ATTENTION_ALONE = (
    ampere("attention", "test_a_query_alone", "(37, 5)", "float16"),
    of("attention", "test_a_query_alone", "(37, 5)", "float16"),
)
ATTENTION_EXPS = (
    "tests/attention/test_attention_traffic.py::test_one_exponential_per_score[float16]",
    ampere(MAGNITUDES_TEST, "test_where_exponents_change_their_form", "float32", "rising"),
)
SM90_PANELS = sm90("panels of 32 columns")
SM90_BYTES = sm90("128-128-None-0", "64-64-100-0", test="test_every_byte")
MERGE_FLOAT = (of("merge_attention", "test_two", 20, "float32"),)
MERGE_ATTENTION = (
    of("merge_attention", "test_two", 20, "float64"),
    of("merge_attention", "test_states", 3, "bfloat16"),
    of("merge_attention", "test_corners", "float64"),
    of("merge_attention", "test_layout", "strided"),
    *(of("merge_attention", "test_empty", f"shape{i}") for i in range(4)),
)
# kv_append: where rows lie, what lengths and tables hold, and numbers of 8 bits.
APPEND = tuple(
    of("kv_append", "test_append", size, "BHSD", op)
    for size, op in ((5, "float32"), (None, "float64"))
)
APPEND_TRUSTED = tuple(
    of("kv_append", "test_values_that_a_device_is_trusted_with", size, dtype)
    for size in (4, None)
    for dtype in ("int64", "int32")
)
APPEND_FAR = (of("kv_append", "test_offsets_of_more_than_32_bits", "new"),)
APPEND_ROWS = tuple(of("kv_append", "test_one_cache", dim, "None") for dim in (36, 7))
APPEND_CODES = tuple(of("kv_append", "test_one_cache", dim, "int8") for dim in (576, 36, 7))
APPEND_BITS = tuple(
    of("kv_append", "test_bits_of_eight_bits", dtype, kind)
    for dtype in ("float32", "float64")
    for kind in ("e4m3", "int8")
)
APPEND_SCALES = tuple(
    of("kv_append", "test_bits_of_computed_scales", "float32", kind) for kind in ("e4m3", "int8")
)
APPEND_SCALES64 = (of("kv_append", "test_bits_of_computed_scales", "float64", "e4m3"),)
APPEND_WIDE = (of("kv_append", "test_one_cache", 576, "None"),)
APPEND_BYTES = (of("kv_append", "test_each_byte_once", "int8"),)


# attention_kvcache: lengths and pages, what is missing, new keys, each option, and costs.
def kvcache(test, *cases, arch="sm_80"):
    """Cases of a test of tests/attention/test_kvcache.py."""
    return tuple(of("kvcache", test, case, arch=arch) for case in cases)


KVCACHE = kvcache("test_lengths", "tiles-16", "some without-None", "alike-5", "one-16")
KVCACHE_MANY = kvcache("test_many_sequences", 33, 100)
KVCACHE_ALL = (of("kvcache", "test_no_lengths", arch="sm_80"),)
KVCACHE_TABLES = (of("kvcache", "test_tables", arch="sm_80"),)
KVCACHE_FAR = (of("kvcache", "test_offsets_of_more_than_32_bits", arch="sm_80"),)
KVCACHE_MISSING = kvcache("test_missing_pages", 5, 16)
KVCACHE_TRUSTED = kvcache("test_lengths_that_a_device_is_trusted_with", "None", 4)
KVCACHE_NEW = (
    *kvcache("test_new_keys", "16-float16", "None-float16"),
    *kvcache("test_layouts", "5-apart-BSHD"),
)
KVCACHE_NEW_MISSING = kvcache("test_new_keys_without_a_page", 4)
KVCACHE_FLIPPED = kvcache("test_layouts", "5-flipped-BHSD")
KVCACHE_COLUMNS = kvcache("test_layouts", "5-columns-BHSD")
KVCACHE_OPTIONS = kvcache(
    "test_options", *(f"5-{name}" for name in ("window ahead", "offset", "offsets", "q_lens"))
)
KVCACHE_RULES = kvcache(
    "test_options", *(f"16-{name}" for name in ("softcap", "alibi", "sinks", "scale", "all"))
)
KVCACHE_MASK = kvcache(
    "test_tree_masks", "8-(4, 9)", "8-(2, 4, 4, 100)", "None-(1, 4, 4, 7)", "8-(5,)"
)
KVCACHE_UNSEEN = kvcache("test_what_nobody_sees_changes_nothing", "float16")
KVCACHE_ROWS = kvcache("test_many_queries", 17, 64)
KVCACHE_GROUPS = kvcache("test_groups_of_heads", "5-(6, 2)", "2-(8, 1)")
KVCACHE_PARTS_OF_WINDOW, KVCACHE_PARTS_OF_ROWS, LATENT_WIDE_PARTS, KVCACHE_PARTS_OF_NONE = (
    kvcache("test_parts", name) for name in ("window", "rows", "columns", "no keys")
)
KVCACHE_EXTREMES = kvcache("test_extremes", "float16")
KVCACHE_DIMS = kvcache("test_head_dims", "(40, 40)", "(59, 59)")
KVCACHE_WIDE = kvcache("test_head_dims", "(64, 200)", "(128, 128)", "(192, 128)")
KVCACHE_COLUMN_TILES = (
    "tests/attention/test_kvcache_device.py::test_blocks_with_little_shared_memory[(200, None)]",
)
KVCACHE_MLA = kvcache("test_values_of_keys", "float16-(576, 512)")
KVCACHE_CODES = kvcache("test_eight_bits", "None-token-e4m3", "16-head-int8", "16-token-int8")
KVCACHE_CODES_OF_KEYS = kvcache(
    "test_values_of_keys_of_eight_bits", "token-(48, 32)", "token-(576, 512)"
)
KVCACHE_CODES_ODD = kvcache("test_alignment_of_eight_bits", 8)
KVCACHE_FACTORS = kvcache("test_eight_bits", "16-number-int8")
KVCACHE_OUT = kvcache("test_out", "strided", "padded", "fortran")
KVCACHE_STRIDES = tuple(
    ampere("kvcache_device", "test_nothing_is_allocated", "int64", how) for how in ("new", "many")
)
KVCACHE_REPLAY = (ampere("kvcache_device", "test_replay", 2, "None", 16),)
KVCACHE_TRAFFIC = "tests/attention/test_kvcache_traffic.py::test_"
KVCACHE_BYTES = (
    KVCACHE_TRAFFIC + "every_byte_of_the_cache_once[24]",
    KVCACHE_TRAFFIC + "a_window_is_all_that_is_read",
)
KVCACHE_PRODUCTS = (KVCACHE_TRAFFIC + "products_are_those_of_the_keys",)
KVCACHE_SHARES = tuple(f"{KVCACHE_TRAFFIC}shares[{case}]" for case in ("33-0", "33-8", "1-0"))
KVCACHE_BITS = tuple(
    f"tests/attention/test_kvcache_device.py::test_bits_are_the_same_on_every_run[{n}]"
    for n in (3, 8)
)
LATENT = kvcache("test_options_of_latent_attention", "window", "rows", "tree")
LATENT_EXTREMES = kvcache("test_options_of_latent_attention", "large scores")
LATENT_WIDE = kvcache("test_values_of_keys", "float16-(576, 576)")
LATENT_DOUBLE = kvcache("test_values_of_keys", "float64-(576, 512)")
LATENT_BITS = (
    "tests/attention/test_kvcache_device.py::test_bits_are_the_same_on_every_run[latent]",
)
MANY, MANY_NEW, MANY_COLUMNS, MANY_WINDOW, MANY_GROWS, MANY_PAGES = (
    kvcache("test_latent_attention_of_many_rows", *names, arch="sm_90a")
    for names in (
        ("ends of tiles", "tiles of rows"),
        ("new keys",),
        ("all columns",),
        ("window",),
        ("large scores",),
        ("no page",),
    )
)
MANY_PARTS = (
    "tests/attention/test_kvcache_device.py::test_bits_are_the_same_on_every_run[many rows]",
)
MANY_RACES = (*MANY, *MANY_WINDOW, *MANY_PARTS)
MANY_TRAFFIC = (KVCACHE_TRAFFIC + "traffic_of_many_rows[40]",)
LATENT_RULES = kvcache("test_options_of_latent_attention", "softcap", "all")
LATENT_MASK = kvcache("test_options_of_latent_attention", "all", "tree")
LATENT_DOUBLE_ROWS = kvcache("test_values_of_keys_of_eight_bits", "token-(576, 512)")
LATENT_EIGHT = LATENT_DOUBLE_ROWS
KVCACHE_SHARED = kvcache("test_values_of_keys", "float16-(24, 16)")
LATENT_TWICE = (KVCACHE_TRAFFIC + "keys_that_hold_values_once[576-576-16]",)
LATENT_ALIAS = (KVCACHE_TRAFFIC + "keys_that_hold_values_once[128-96-None]",)
KVCACHE_ALONE = (
    "tests/attention/test_kvcache_device.py"
    "::test_bits_do_not_depend_on_the_batch[144-float32-sm_80]",
)

# ptx: on the software device.
DEVICE_SOFTMAX = (device("softmax", "test_length", 33, "softmax"),)
DEVICE_SHIFTED = (device("softmax", "test_every_alignment", 3),)
DEVICE_BYTES = (device("top_k", "test_dtype", "uint8"),)
DEVICE_CLUSTER = (hopper("softmax", "test_long_rows", 1, 32767),)
DEVICE_CLUSTERS = (hopper("softmax", "test_long_rows", 2, 50257),)
DEVICE_TOPK_CLUSTER = (hopper("top_k", "test_long_rows", 64),)
DEVICE_HALF = (device("attention", "test_many_keys", "float16"),)
DEVICE_BFLOAT16 = (device("attention", "test_many_keys", "bfloat16"),)
DEVICE_TF32 = (device("attention", "test_many_keys", "tf32"),)
DEVICE_DOUBLE = (device("attention", "test_many_keys", "float64"),)
DEVICE_SM90_WIDE = (hopper("attention", "test_head_dims", "(128, 128)"),)
DEVICE_SM90 = (hopper("attention", "test_lengths", "False", "(300, 799)"),)


def wrapper(test, *cases):
    """Cases of a test of tests/software_device_tests/test_wrappers.py."""
    file = FILES["test_wrappers"]
    nodes = [f"{file}::test_{test}[{case}]" for case in cases] or [f"{file}::test_{test}"]
    return tuple(on_device(node, 90) for node in nodes)


def backward(test, *parameters):
    """A case of a test of the gradients of attention, on the emulator."""
    case = "-".join([*map(str, parameters), "emulator", "sm_80"])
    return f"{FILES['test_attention_backward']}::{test}[{case}]"


def hopper_backward(test, *parameters):
    """The same by the kernels of Hopper."""
    return backward(test, *parameters).replace("sm_80]", "sm_90a]")


# Gradients of attention: of one type, of blocks with some columns, of tiles of one slot.
BACKWARD = (backward("test_dtypes", 64, "float16"), backward("test_dtypes", 128, "float32"))
BACKWARD_COLUMNS = (backward("test_dtypes", 128, "float64"),)
BACKWARD_SMALLER = tuple(
    backward("test_devices_of_less_shared_memory", 256, op) for op in ("float16", "float64")
)
BACKWARD_TF32 = tuple(backward("test_every_option_at_once", dim, "tf32") for dim in (64, 256))
BACKWARD_EVERY = tuple(backward("test_every_option_at_once", 64, op) for op in ATTENTION_OPS[::3])
BACKWARD_ALONE = (backward("test_options_alone"),)
BACKWARD_WINDOW = tuple(
    backward("test_window", lengths, window)
    for lengths, window in (("(150, 150)", "(9, 12)"), ("(37, 83)", "(17, None)"))
)
SCORE_GRADIENT = (ampere("score_gradient", "test_with_every_other_option", "float16"),)
SCORE_GRADIENT_CALLS = (ampere("score_gradient", "test_calls"),)
ARRAY_GRADIENTS = (ampere("score_argument_gradient", "test_buckets_of_distances"),)
ARRAY_GRADIENTS_NUMBERS = (ampere("score_argument_gradient", "test_numbers"),)
ARRAY_GRADIENTS_MANY = (ampere("score_argument_gradient", "test_several_references"),)
ARRAY_GRADIENTS_OFFSETS = (ampere("score_argument_gradient", "test_clamped_distances"),)
ARRAY_GRADIENTS_RAGGED = (ampere("score_argument_gradient", "test_varlen"),)
ARRAY_GRADIENTS_NOTHING = (
    ampere("score_argument_gradient", "test_what_does_not_count_is_nothing"),
    ampere("score_argument_gradient", "test_calls"),
)
BACKWARD_GROUPS = (backward("test_groups_of_heads", 3, "(6, 2)"),)
BACKWARD_MASK = (*BACKWARD_EVERY, backward("test_twice_is_the_same", "float16"))
BACKWARD_BIAS = tuple(backward("test_shapes_of_bias", op) for op in ("float16", "float32"))
BACKWARD_LAYOUT = tuple(
    backward("test_layouts", "float16", layout) for layout in ("strided", "padded")
)
BACKWARD_RAGGED = (backward("test_sequences", "float16"),)
BACKWARD_UNSEEN = (backward("test_what_nobody_sees_changes_nothing", "float16"),)
BACKWARD_SIZES = (backward("test_weights_are_at_most_one", "float32"),)
BACKWARD_LENGTHS = (backward("test_lengths", "(113, 203)"),)
HOPPER_BACKWARD = (
    hopper_backward("test_dtypes", 128, "float16"),
    hopper_backward("test_dtypes", 64, "float16"),
)
HOPPER_BACKWARD_LONG = (
    hopper_backward("test_lengths", "(300, 799)"),
    hopper_backward("test_many_tiles", 128),
)
HOPPER_BACKWARD_ROUNDS = tuple(hopper_backward("test_persistent_blocks", dim) for dim in (64, 128))
HOPPER_BACKWARD_WIDE = (hopper_backward("test_dtypes", 256, "float16"),)
HOPPER_BACKWARD_SIZES = (
    hopper_backward("test_weights_are_at_most_one", "bfloat16"),
    hopper_backward("test_nan_that_takes_part", "float16"),
)
HOPPER_BACKWARD_GROUPS = (hopper_backward("test_groups_of_heads", 3, "(6, 2)"),)
HOPPER_BACKWARD_EDGES = tuple(
    hopper_backward("test_window", lengths, window)
    for lengths, window in (("(150, 150)", "(9, 12)"), ("(37, 83)", "(17, None)"))
)
HOPPER_BACKWARD_UNSEEN = (
    hopper_backward("test_what_nobody_sees_changes_nothing", "float16"),
    hopper_backward("test_sequences", "float16"),
)


def storing(test, *parameters):
    """A case of a test of kernels of Hopper that store gradients of scores."""
    case = "-".join([*map(str, parameters), "emulator", "sm_90a"])
    return f"{FILES['test_attention_backward_ds']}::{test}[{case}]"


STORING = tuple(storing("test_head_dims", f"({dim}, {dim})", "float16") for dim in (64, 128))
STORING_LONG = tuple(storing("test_lengths", f"({m}, {n})") for m, n in ((300, 500), (513, 90)))
STORING_PERSISTENT = tuple(storing("test_persistent_blocks", dim) for dim in (64, 128))
STORING_ROUNDS = (storing("test_rounds", "(6, 2)"),)
STORING_EDGES = tuple(
    storing("test_window", lengths, window)
    for lengths, window in (("(150, 310)", "(64, 64)"), ("(310, 150)", "(17, None)"))
)
STORING_TILES = tuple(
    f"{FILES['test_attention_backward_traffic']}::test_hopper_with_stored_gradients_of_scores[{case}]"
    for case in ("64-None-0", "128-None-None")
)
STORING_UNSEEN = (
    storing("test_what_nobody_sees_changes_nothing"),
    storing("test_options"),
)
BACKWARD_BYTES = (
    "tests/attention/test_attention_backward_traffic.py::test_every_byte[70-90-float16]",
)


def sums(test, *parameters):
    """A case of a test of the sums of probabilities, on the emulator."""
    return ampere("column_sums", test, *parameters)


SUMS = tuple(sums("test_dtypes", op, dim) for op, dim in (("float16", 64), ("float32", 111)))
SUMS_GROUPS = (sums("test_groups_of_heads", "(6, 2)"),)
SUMS_EVERY = tuple(sums("test_every_option_at_once", 63, op) for op in ATTENTION_OPS[::3])
SUMS_WINDOW = (
    sums("test_window", "(9, 12)", 64),
    sums("test_window", "(64, None)", 30),
    sums("test_window", "(None, 5)", -60),
)
SUMS_UNSEEN = (sums("test_what_nobody_sees_changes_nothing", "float16"),)
SUMS_ALONE = (sums("test_options_alone"),)
SUMS_NOTHING = (sums("test_queries_that_see_nothing"),)
SUMS_MANY = (sums("test_many_queries"),)
SUMS_BYTES = ("tests/attention/test_column_sums_traffic.py::test_every_byte[70-90-float16]",)

SUBNORMALS = wrapper("exponential_and_reciprocal_flush_subnormals")
FMA = wrapper("multiply_add_is_rounded_once")
FMA_DOUBLE = wrapper("multiply_add_of_float64")
TO_TF32 = wrapper("rounding_to_tf32")
TO_FLOAT16 = wrapper("two_values_in_a_word", "__half")
TO_BFLOAT16 = wrapper("two_values_in_a_word", "__nv_bfloat16")
RELAXED_4 = wrapper("relaxed_accesses_may_race", "u4-unsigned int")
RELAXED_8 = wrapper("relaxed_accesses_may_race", "u8-unsigned long long")
LAST_4, LAST_8, LAST_16, LAST_SOME = (
    wrapper("last_block_reads_what_all_wrote", case)
    for case in ("1-all", "2-all", "4-all", "1-some")
)
ONE_WORD = wrapper("values_sent_in_a_cluster", 1)
FOUR_WORDS = wrapper("values_sent_in_a_cluster", 4)
SS_64, SS_80, SS_96, SS_112, SS_128, SS_192, SS_256 = (
    wrapper("wgmma", f"__half-{n}-128-0") for n in (64, 80, 96, 112, 128, 192, 256)
)
RS_64, RS_80, RS_96, RS_112, RS_128, RS_192, RS_256 = (
    wrapper("wgmma", f"__half-{n}-128-1") for n in (64, 80, 96, 112, 128, 192, 256)
)
BFLOAT16_64 = wrapper("wgmma", "__nv_bfloat16-64-128-0")
BY_COLUMNS = wrapper("wgmma", "__half-64-128-2", "__half-96-32-2")
SWIZZLE_64 = wrapper("wgmma", "__half-64-64-0")
SWIZZLE_32 = wrapper("wgmma", "__half-96-32-0")
# What no run can show today.
ASSEMBLY = tuple(
    f"tests/device/test_inline_assembly.py::"
    f"test_assembly_that_touches_or_orders_memory_says_so[{path.name}]"
    for path in sorted((ROOT / "cuda_src" / "ptx").glob("*.cuh"))
)

FILE = re.compile(r"@ (\S+)")
HEAD = re.compile(r"# (.*) \[([A-Z0-9_ +]+)\](?: x(\d+))?")


def read_table(path):
    """Mutations: under ``@ file``, ``# words [TESTS + TESTS] x2`` and lines with - and +.

    What stands before the first file is a comment.
    """
    mutations, file = [], None
    for block in path.read_text().strip().split("\n\n"):
        if new_file := FILE.fullmatch(block):
            file = new_file[1]
        if new_file or file is None:
            continue
        head, *lines = block.split("\n")
        breaks, selections, count = HEAD.fullmatch(head).groups()
        old, new = ("\n".join(line[1:] for line in lines if line[0] == sign) for sign in ("-", "+"))
        tests = sum((globals()[name] for name in selections.split(" + ")), ())
        mutations.append(Mutation(file, breaks, old, new, tests, int(count or 1)))
    return mutations


TABLES = sorted(Path(__file__).parent.glob("*.txt"))
MUTATIONS = [mutation for table in TABLES for mutation in read_table(table)]


# ---- running ------------------------------------------------------------------------------------


class Invalid(Exception):
    """A mutation that breaks nothing, or too much: the table must be corrected."""


def replaced(path, old, new, count=1):
    """The text of `path` with `old`, which it holds `count` times, replaced."""
    text = path.read_text()
    if text.count(old) != count:
        raise Invalid(f"{path.name} holds {text.count(old)} times, not {count} times: {old}")
    return text.replace(old, new)


def copy_tree(tree):
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, tree / part)


def device_cache(cache):
    """The software device as it is built already, but kernels of its own."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from software_device import build

    kept = cache / "software_device"
    kept.mkdir(parents=True, exist_ok=True)
    for path in build.cache_dir().iterdir():
        if path.name != "kernels" and not (kept / path.name).exists():
            (kept / path.name).symlink_to(path)
    return kept


def run_tests(tree, cache, tests, limited=False):
    """Exit status and output of pytest; None where it ran longer than the limit.

    One process for the emulator and one for each compute capability, until one has failed.
    """
    groups = {}
    for test in dict.fromkeys(tests):
        node, _, capability = test.partition("@")
        groups.setdefault(capability, []).append(node)
    outputs = []
    for capability, nodes in groups.items():
        status, output = run_group(tree, cache, capability, nodes, limited)
        outputs.append(output)
        if status != 0:
            break
    return status, "".join(outputs)


def run_group(tree, cache, capability, nodes, limited):
    environment = os.environ | {
        "CUATTN_CACHE_DIR": str(cache),
        "CUATTN_TEST_SEED": os.environ.get("CUATTN_TEST_SEED", "1"),
        "COLUMNS": "1000",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    options = "-x -q --tb=short -rfE -p no:cacheprovider -p no:xdist".split()
    if capability:
        environment |= {
            "CUATTN_REQUIRE_GPU": "1",
            "PYTHONPATH": f"{tree}{os.pathsep}{tree / 'tests'}",
            "SOFTWARE_DEVICE_CACHE": str(device_cache(cache)),
            "SOFTWARE_DEVICE_CC": capability,
        }
        options += ["-p", "software_device.plugin"]
    command = [sys.executable, "-m", "pytest", *options, *nodes]
    limit = (DEVICE_LIMIT if capability else LIMIT) if limited else None
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return None, ""
    return done.returncode, done.stdout + done.stderr


def verdict(status, output, constraint=False):
    """What noticed a mutation: a test and its error; None where nothing has.

    A compiler that refuses it counts for a wrong constraint only.
    """
    if status is None:
        return "ran too long"
    if status < 0:
        return f"signal {-status}"
    refused = "does not compile" in output or "CompileError" in output
    if refused and constraint:
        return "the compiler refuses it"
    if refused:
        raise Invalid("it does not compile:\n" + output[-4000:])
    if status == 0:
        return None
    failed = re.search(r"^FAILED tests/\w+/test_(\S+?\.py::.*?(?= - |$))(?: - (.*))?", output, re.M)
    if status != 1 or not failed:
        raise Invalid(f"pytest ended with {status}:\n" + output[-4000:])
    test, error = failed[1].replace(".py::", "::").replace("emulator-", ""), failed[2] or ""
    error = " ".join(error.split()).removeprefix("emulator.")
    return f"{test}: {re.sub('kernel .*?, thread [0-9]+: ', '', error)}"


def progress(mutations):
    """The mutations, with a line for each; tqdm's bar where there is tqdm."""
    try:
        from tqdm import tqdm
    except ImportError:
        for i, mutation in enumerate(mutations):
            print(f"[{i + 1}/{len(mutations)}] {mutation.file}: {mutation.breaks}", flush=True)
            yield mutation
        return
    with tqdm(total=len(mutations)) as bar:
        for mutation in mutations:
            bar.set_description(f"{mutation.file}: {mutation.breaks}"[:60].ljust(60))
            yield mutation
            bar.update()


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", metavar="WORD", help="mutations whose file or words hold WORD")
    parser.add_argument("--list", action="store_true", help="print the table and run nothing")
    return parser.parse_args()


def try_mutation(mutation, tree, cache):
    """Its verdict; the tree is as it was in the end."""
    path = tree / "cuda_src" / mutation.file
    whole = path.read_text()
    path.write_text(replaced(path, mutation.old, mutation.new, mutation.count))
    try:
        return verdict(
            *run_tests(tree, cache, mutation.tests, limited=True), "constraint" in mutation.breaks
        )
    finally:
        path.write_text(whole)


def main():
    arguments, start = parse(), time.monotonic()
    chosen = [m for m in MUTATIONS if (arguments.only or "") in f"{m.file}: {m.breaks}"]
    for mutation in MUTATIONS:
        replaced(ROOT / "cuda_src" / mutation.file, mutation.old, mutation.new, mutation.count)
    if arguments.list:
        for mutation in chosen:
            print(f"{mutation.file}: {mutation.breaks}")
        print(f"{len(chosen)} mutations")
        return 0
    rows, survivors = [], 0
    with tempfile.TemporaryDirectory() as work:
        tree, cache = Path(work) / "tree", Path(work) / "cache"
        copy_tree(tree)
        status, output = run_tests(tree, cache, [test for m in chosen for test in m.tests])
        if status != 0:
            raise Invalid("the tests do not pass on kernels as they are:\n" + output[-4000:])
        print("kernels as they are:", output.strip().splitlines()[-1], flush=True)
        for mutation in progress(chosen):
            try:
                caught = try_mutation(mutation, tree, cache)
                survivors += caught is None
                rows.append((mutation, caught or "SURVIVED"))
            except Invalid as error:
                survivors += 1
                rows.append((mutation, f"INVALID: {error}"))
    for mutation, result in rows:
        print(f"{mutation.file}: {mutation.breaks}\n    {result[:300]}")
    minutes = (time.monotonic() - start) / 60
    print(f"\n{len(rows)} mutations, {survivors} not caught, {minutes:.1f} minutes")
    return 1 if survivors else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Invalid as error:
        sys.exit(f"{error}")
