// Losses of rows of hidden states whose logits are never in memory. A thread makes them a slice of classes at a time,
// for a group of rows, in its own cache; there each row's part of the slice goes into the row's state, as row.h reduces
// it, and is forgotten.
//
// The vocabulary is cut into segments, and each has states of its own, which are merged in the order of classes: a
// row's result does not depend on the rows around it or on the number of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "matmul.h"
#include "parallel.h"
#include "row.h"
#include "workspace.h"

namespace fastloss {
inline namespace FASTLOSS_ISA {

// Rows that share a packed block of the weight, as far as their hidden states stay small.
constexpr int64_t kGroup = 1024, kGroupBytes = int64_t(8) << 20;
// Classes whose logits exist at once: of fewer, what a row costs beside its exponentials shows.
constexpr int64_t kSlice = 256;
constexpr int64_t kSegments = 64;  // at most, and of whole slices

// What a segment says of a row: its state, its largest logit and the class of that.
template <class F>
struct Segment {
  RowState<double> state;
  F largest = -INFINITY;
  int64_t argmax = 0;

  void add(const Segment& later) {
    state = merge(state, later.state);
    if (later.largest > largest) largest = later.largest, argmax = later.argmax;
  }
};

template <class T>
class HeadLoss {
  using F = typename T::Sum;
  using Packed = typename T::Packed;

 public:
  HeadLoss(const Rows& rows, const Head& head, const RowOutputs& out)
      : rows_(rows),
        hidden_(head.hidden),
        weight_(transposed(head.weight)),
        bias_(static_cast<const F*>(head.bias)),
        out_(out),
        stats_{static_cast<F*>(out.stats), rows.input.rows},
        class_weights_(rows),
        V_(rows.input.cols),
        H_(steps_of<T>(head.hidden.cols)),
        depth_(depth_of<T>(head.hidden.cols)),
        block_(std::clamp<int64_t>(kBlockBytes / int64_t(sizeof(Packed)) / depth_ / kTileCols<F>, 1,
                                   kSlice / kTileCols<F>) *
               kTileCols<F>),
        segment_(round_up(std::max<int64_t>((V_ + kSegments - 1) / kSegments, 1), kSlice)),
        segments_((V_ + segment_ - 1) / segment_) {
    for (int64_t i = 0; i < rows.input.rows; ++i)
      if (!rows.ignored(i))
        which_.push_back(i);
      else
        write_row(rows, i, 0, {}, out, stats_);
  }

  void run() {
    const int64_t count = int64_t(which_.size());
    if (count == 0) return;
    const int64_t most =
        std::clamp<int64_t>(kGroupBytes / (std::max<int64_t>(H_, 1) * int64_t(sizeof(Packed))), kTileRows, kGroup);
    const int64_t groups = (count + most - 1) / most, group = (count + groups - 1) / groups;  // of equal size
    packed_ = aligned_array<Packed>(round_up(group, kTileRows) * H_);
    states_.resize(size_t(group * segments_));
    for (int64_t worker = 0; worker < std::min<int64_t>(rows_.threads, segments_); ++worker)
      scratch_.push_back(
          {aligned_array<Packed>(block_ * depth_), aligned_array<F>(round_up(group, kTileRows) * kSlice)});
    for (int64_t begin = 0; begin < count; begin += group)
      reduce_group(which_.data() + begin, std::min(group, count - begin));
  }

 private:
  const Rows& rows_;
  const Strided hidden_, weight_;
  const F* const bias_;
  const RowOutputs& out_;
  const Columns<F> stats_;
  const ClassWeights<F> class_weights_;
  const int64_t V_, H_, depth_, block_, segment_, segments_;
  std::vector<int64_t> which_;  // the rows that count
  // Of a group: its rows, their hidden states in panels, block of depth after block, and their states by segments.
  const int64_t* group_ = nullptr;
  int64_t count_ = 0;
  Aligned<Packed> packed_;
  std::vector<Segment<F>> states_;
  // Of a thread: a packed block of the weight, and a slice of the group's logits.
  struct Scratch {
    Aligned<Packed> block;
    Aligned<F> z;
  };
  std::vector<Scratch> scratch_;

  void reduce_group(const int64_t* which, int64_t count) {
    group_ = which, count_ = count;
    const int64_t panels = (count + kTileRows - 1) / kTileRows;
    parallel_for(panels, kTileRows * H_, rows_.threads, [&](int64_t from, int64_t to) {
      for (int64_t k = 0; k < H_; k += depth_)
        for (int64_t panel = from; panel < to; ++panel) pack_rows(panel * kTileRows, k);
    });
    std::atomic<int64_t> next{0};
    parallel_for(int64_t(scratch_.size()), V_ * count * std::max<int64_t>(H_, 1), rows_.threads,
                 [&](int64_t from, int64_t to) {
                   for (int64_t worker = from; worker < to; ++worker)
                     for (int64_t s; (s = next++) < segments_;) reduce_segment(s, scratch_[size_t(worker)]);
                 });
    parallel_for(count, segments_ * 16, rows_.threads, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) finish(i);
    });
  }

  void reduce_segment(int64_t s, const Scratch& scratch) {
    Segment<F>* const states = states_.data() + s * count_;
    std::fill(states, states + count_, Segment<F>{});
    for (int64_t first = s * segment_, end = std::min(V_, first + segment_); first < end; first += kSlice) {
      const int64_t n = std::min(kSlice, end - first);
      multiply(first, n, scratch.block.get(), scratch.z.get());
      reduce(first, n, scratch.z.get(), states);
    }
  }

  const Packed* packed(int64_t i, int64_t k) const {
    return packed_.get() + k * round_up(count_, kTileRows) + i * std::min(depth_, H_ - k);
  }

  // The panel of the group's rows from i, over one block of depth.
  void pack_rows(int64_t i, int64_t k) {
    const int64_t n = std::min<int64_t>(kTileRows, count_ - i), depth = std::min(depth_, H_ - k);
    Packed* const out = const_cast<Packed*>(packed(i, k));
    if (group_[i + n - 1] - group_[i] == n - 1) return pack<T, kTileRows>(hidden_, group_[i], n, k, depth, out);
    const int64_t first = k * T::kTerms, terms = std::min(depth * T::kTerms, hidden_.cols - first);
    T::visit(hidden_.dtype, [&](auto read) {
      using R = decltype(read);
      for (int64_t r = 0; r < kTileRows; ++r) {  // beyond n the last row again, whose results are not used
        const char* p = hidden_.at(group_[i + std::min(r, n - 1)], first);
        pack_row<R, kTileRows>(reinterpret_cast<const typename R::Storage*>(p), terms, hidden_.col_stride, out + r);
      }
    });
  }

  // The logits of the group's rows for n classes, in rows of kSlice.
  void multiply(int64_t first, int64_t n, Packed* block, F* z) const {
    for (int64_t j = 0; j < n; j += block_)
      for (int64_t k = 0; k == 0 || k < H_; k += depth_) {
        const int64_t cols = std::min(block_, n - j), depth = std::min(depth_, H_ - k);
        pack<T, kTileCols<F>>(weight_, first + j, cols, k, depth, block);
        for (int64_t i = 0; i < count_; i += kTileRows)
          for (int64_t l = 0; l < cols; l += kTileCols<F>)
            tile_product<T>(packed(i, k), block + l * depth, depth, z + i * kSlice + j + l, kSlice, kTileRows,
                            int(std::min<int64_t>(kTileCols<F>, cols - l)), k > 0,
                            bias_ ? bias_ + first + j + l : nullptr);
      }
  }

  // From logits to states.
  void reduce(int64_t first, int64_t n, F* z, Segment<F>* states) const {
    Rows slice = rows_;
    slice.input = {z, count_, n, kSlice, sizeof(F) == 8 ? DType::kFloat64 : DType::kFloat32};
    Row<F> row(slice, class_weights_, Workspace<F>::get(kSlice, false), first);
    for (int64_t i = 0; i < count_; ++i) {
      keep_listed(group_[i], first, n, z + i * kSlice);
      Segment<F> part;
      const F before = states[i].largest;
      part.state = out_.extras ? row.template reduce<true, false>(i, &part.argmax, before)
                               : row.template reduce<false, false>(i, nullptr, before);
      part.largest = row.largest();
      part.argmax += first;
      states[i].add(part);
    }
  }

  void keep_listed(int64_t row, int64_t first, int64_t n, const F* z) const {
    F* const listed = static_cast<F*>(out_.listed);
    for (int64_t k = row * rows_.picks; k < (row + 1) * rows_.picks; ++k)
      if (rows_.target[k] >= first && rows_.target[k] < first + n) listed[k] = z[rows_.target[k] - first];
  }

  void finish(int64_t i) const {
    Segment<F> whole;
    for (int64_t s = 0; s < segments_; ++s) whole.add(states_[size_t(s * count_ + i)]);
    const int64_t at = group_[i];
    Row<F> row(rows_, class_weights_, Workspace<F>::get(kSlice, false));
    row.begin(at, static_cast<const F*>(out_.listed) + at * rows_.picks);
    double loss = 0;
    const RowStats<double> stats = row.finish(whole.state, &loss);
    write_row(rows_, at, loss, stats, out_, stats_);
    if (out_.argmax) out_.argmax[at] = whole.argmax;
  }
};

template <class F>
void head_loss(const Rows& rows, const Head& head, const RowOutputs& out) {
  visit<F>(head.hidden.dtype, head.weight.dtype, [&](auto terms) { HeadLoss<decltype(terms)>(rows, head, out).run(); });
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
