// A block's part of one row, and its way through shared memory.
//
// Two ways to count its elements: *groups* of sixteen bytes from the slice's first column, and *chunks* at the
// sixteen-byte boundaries of memory. Where a row starts on a boundary they are the same. Sums go by groups, so that a
// row's bits do not depend on where it lies; loads and stores go by chunks.
#pragma once

#include "elements.cuh"
#include "rows.h"

namespace fastloss {
inline namespace FASTLOSS_ISA {

constexpr int kStages = 8;  // groups of asynchronous copies in flight
// Chunks of a stage that a thread works on at once: 32 elements, less where they would not fit into registers.
template <class E>
constexpr int kBatch = E::kCount == 4 ? 8 : 4;
template <class E>
constexpr int kChunksPerThread = kStages * kBatch<E>;

// The bytes of shared memory that a slice of `columns` needs: every chunk it touches, and one of padding.
FASTLOSS_HD constexpr int64_t slice_bytes(int64_t columns, int64_t size) {
  return ((columns * size + 15) / 16 + 2) * 16;
}

// The bytes that a target's listed classes take after it (listed.cuh); `size`: of the compute type.
FASTLOSS_HD inline int64_t listed_bytes(const Rows& rows, int64_t size) {
  return rows.spec.listed() ? (rows.picks * (16 + 3 * size) + 15) / 16 * 16 : 0;
}

// Which row and which of its slices a block works on.
struct Place {
  int64_t row, begin, end;
  int slice;
  FASTLOSS_DEVICE Place(const Cut& cut, const Rows& rows)
      : row(blockIdx.x / unsigned(cut.slices)), slice(int(blockIdx.x % unsigned(cut.slices))) {
    begin = slice * cut.columns;
    end = begin + cut.columns < rows.input.cols ? begin + cut.columns : rows.input.cols;
  }
};

template <class E>
struct Slice {
  using T = typename E::Storage;
  using Chunk = typename E::Chunk;
  static constexpr int K = E::kCount;

  const T* data;         // the first column
  int count;             // columns
  int lead;              // elements from the boundary before it to the first column
  unsigned char* stage;  // shared memory

  FASTLOSS_DEVICE Slice(const char* row, int64_t begin, int64_t end, unsigned char* stage)
      : data(reinterpret_cast<const T*>(row) + begin),
        count(int(end > begin ? end - begin : 0)),
        lead(int(reinterpret_cast<uintptr_t>(data) % 16 / sizeof(T))),
        stage(stage) {}

  FASTLOSS_DEVICE int groups() const { return (count + K - 1) / K; }
  FASTLOSS_DEVICE int chunks() const { return (lead + count + K - 1) / K; }
  FASTLOSS_DEVICE int first_whole() const { return lead ? 1 : 0; }
  FASTLOSS_DEVICE int end_whole() const { return (lead + count) / K; }
  FASTLOSS_DEVICE bool whole(int chunk) const { return chunk >= first_whole() && chunk < end_whole(); }
  // Column (from the slice's first) of a chunk's first element; may be negative.
  FASTLOSS_DEVICE int column(int chunk) const { return chunk * K - lead; }
  FASTLOSS_DEVICE int chunk_of(int column) const { return (column + lead) / K; }
  // One where the first chunk lies in the middle of a sector of 32 bytes: a warp that began there would touch 17
  // for 16.
  FASTLOSS_DEVICE int skew() const { return int(reinterpret_cast<uintptr_t>(boundary()) / 16 % 2); }
  FASTLOSS_DEVICE const Chunk* boundary() const { return reinterpret_cast<const Chunk*>(data - lead); }
  FASTLOSS_DEVICE Chunk* staged() const { return reinterpret_cast<Chunk*>(stage); }

  // Starts all copies into shared memory: kStages commit groups, and the two ends that are no whole chunk.
  FASTLOSS_DEVICE void load() const {
    const int me = int(threadIdx.x), begin = first_whole(), end = end_whole();
    const int step = int(blockDim.x), stride = step * int(sizeof(Chunk));
    const char* from = reinterpret_cast<const char*>(boundary() + me);
    SharedPointer to = shared_pointer(staged() + me);
    const auto next = [&] {
      copy_async(to, from);
      advance(from, stride);
      advance(to, stride);
    };
    int chunk = me;
    if (chunk < begin) {  // not whole: see below
      advance(chunk, step), advance(from, stride), advance(to, stride);
    }
#pragma unroll 1
    for (int s = 0; s < kStages; ++s) {
      if (chunk + (kBatch<E> - 1) * step < end) {
        for (int k = 0; k < kBatch<E>; ++k) next();
        chunk += kBatch<E> * step;
      } else {
#pragma unroll 1
        for (; chunk < end; chunk += step) next();
      }
      copy_async_commit();
    }
    const int last = chunks() - 1;
    if (lead && me == 0) {
      staged()[0] = partial(0);
      staged()[last + 1] = nothing<E>();  // groups reach beyond the last chunk
    }
    if (last >= end && last >= begin && last % int(blockDim.x) == me) staged()[last] = partial(last);
  }

  // The groups first, first + step, ...; minus infinity after the last.
  template <bool kAligned>
  FASTLOSS_DEVICE void batch(int first, int step, Chunk (&c)[kBatch<E>]) const {
    const int n = groups();
    if (first + (kBatch<E> - 1) * step < n) {
      const Chunk* p = staged() + first;
      for (int k = 0; k < kBatch<E>; ++k, p += step)
        c[k] = kAligned ? fastloss::load(p) : group<false>(first + k * step);
    } else {
      for (int k = 0; k < kBatch<E>; ++k, first += step) c[k] = first < n ? group<kAligned>(first) : nothing<E>();
    }
  }

  // A group, once its copies have been waited for. Threads of a block whose slice has a lead need a barrier before.
  template <bool kAligned>
  FASTLOSS_DEVICE Chunk group(int g) const {
    if (kAligned) return fastloss::load(staged() + g);
    const int byte = lead * int(sizeof(T)) + g * 16;
    return E::shifted(reinterpret_cast<const uint32_t*>(stage + (byte & ~3)), byte % 4 * 8);
  }

  // K elements from any column on, likewise; before the first there is nothing.
  FASTLOSS_DEVICE Chunk elements(int column) const {
    const int byte = (lead + column) * int(sizeof(T));
    if (column >= 0 && byte % 16 == 0) return fastloss::load(staged() + byte / 16);
    if (column >= 0) return E::shifted(reinterpret_cast<const uint32_t*>(stage + (byte & ~3)), byte % 4 * 8);
    typename E::Compute v[K];
    for (int i = 0; i < K; ++i)
      v[i] = column + i >= 0 ? E::get(reinterpret_cast<const T*>(stage)[lead + column + i]) : -INFINITY;
    return E::pack(v);
  }

  // A chunk at an end of the slice, read element by element; minus infinity outside.
  FASTLOSS_DEVICE Chunk partial(int chunk) const {
    typename E::Compute v[K];
    for (int i = 0; i < K; ++i) {
      const int j = column(chunk) + i;
      v[i] = j >= 0 && j < count ? E::get(data[j]) : -INFINITY;
    }
    return E::pack(v);
  }
};

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
