// What a thread needs beside the rows themselves: scratch memory for one row, and the class weights in a form for
// vectors.
#pragma once

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
  double* centre = nullptr;  // the running maximum each tile's exponentials are relative to

  static Workspace& get(int64_t V) {
    thread_local Workspace w;
    if (V > w.capacity_) w.grow(V);
    return w;
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> memory_;
  int64_t capacity_ = -1;

  void grow(int64_t V) {
    const int64_t tiles = V / kTile + 1, row_bytes = (tiles + 2) * kTile * int64_t(sizeof(F));
    const int64_t bytes = row_bytes + (tiles * int64_t(sizeof(double)) + 63) / 64 * 64;
    memory_.reset(std::aligned_alloc(64, size_t(bytes)));
    if (!memory_) std::abort();
    row = static_cast<F*>(memory_.get());
    tile = row + tiles * kTile;
    probs = tile + kTile;
    centre = reinterpret_cast<double*>(probs + kTile);
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
