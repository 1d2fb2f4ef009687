// What a thread needs beside the rows themselves: scratch memory for one row, and the class weights in a form for
// vectors.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <vector>

#include "rows.h"
#include "tiles.h"

namespace fastloss {
inline namespace FASTLOSS_ISA {

// Per-thread memory, kept between calls: O(V) bytes a thread.
template <class F>
struct Workspace {
  F *row = nullptr, *tile = nullptr, *probs = nullptr;
  F* target_row = nullptr;  // what is kept of target logits
  // What each tile's exponentials are relative to.
  double *centre = nullptr, *target_centre = nullptr;

  static Workspace& get(int64_t V, bool paired) {
    thread_local Workspace w;
    if (V > w.capacity_ || (paired && !w.target_row)) w.grow(std::max(V, w.capacity_), paired || w.target_row);
    return w;
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> memory_;
  int64_t capacity_ = -1;

  void grow(int64_t V, bool paired) {
    const int64_t columns = (V / kTile + 1) * kTile, tiles = V / kTile + 2;  // what is left of a row may be two
    const int64_t count = (paired ? 2 : 1) * columns + 2 * kTile;
    const int64_t bytes = count * int64_t(sizeof(F)) + 2 * tiles * int64_t(sizeof(double));
    memory_.reset(std::aligned_alloc(64, size_t((bytes + 63) / 64 * 64)));
    if (!memory_) std::abort();
    row = static_cast<F*>(memory_.get());
    tile = row + columns;
    probs = tile + kTile;
    target_row = paired ? probs + kTile : nullptr;
    centre = reinterpret_cast<double*>(row + count);
    target_centre = centre + tiles;
    capacity_ = V;
  }
};

// Class weights padded with zeros to whole vectors, and their sum; without weights: null and V.
template <class F>
struct ClassWeights {
  std::vector<F> padded_values;
  double sum;
  explicit ClassWeights(const Rows& rows) : sum(double(rows.input.cols)) {
    if (!rows.weight.present()) return;
    const F* w = static_cast<const F*>(rows.weight.data);
    padded_values.assign(w, w + rows.input.cols);
    padded_values.resize(size_t(padded<F>(rows.input.cols)), F(0));
    sum = 0;
    for (const F v : padded_values) sum += v;
  }
  const F* at(int64_t j) const { return padded_values.empty() ? nullptr : padded_values.data() + j; }
  double of(int64_t j) const { return padded_values.empty() ? 1 : padded_values[size_t(j)]; }
};

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
