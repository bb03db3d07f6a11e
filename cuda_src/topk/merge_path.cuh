// Merging two sorted sequences by independent threads, one per element of the result.
#pragma once

// How many of the first `place` elements of a and b, merged, come from a. a has `size_a` elements and b `size_b`, and
// place <= size_a + size_b. a_first(i, j): a[i] comes before b[j]. Never asks for an element out of range, even if the
// input is unsorted.
// Green, McColl & Bader, GPU Merge Path, ICS'12, doi 10.1145/2304576.2304621.
template <class First>
__device__ __forceinline__ long long merge_path(long long place, long long size_a, long long size_b,
                                                const First& a_first) {
  long long low = place > size_b ? place - size_b : 0;
  long long high = place < size_a ? place : size_a;
  while (low < high) {
    const long long middle = (low + high) / 2;
    if (a_first(middle, place - 1 - middle)) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}
