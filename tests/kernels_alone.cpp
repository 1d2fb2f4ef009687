// The CPU kernels without Python or torch, against the textbook in double: for processors that are only emulated here.
// `make aarch64` compiles it for NEON and runs it under qemu, `make avx512` for AVX-512 by what AVX2 has. Prints what
// is wrong; exits with 1 if anything is.
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "../csrc/cpu/rows.h"

#if defined(__aarch64__)
typedef __fp16 Binary16;
#else
typedef _Float16 Binary16;
#endif

namespace fastloss {
namespace FASTLOSS_ISA {
extern const Kernels kernels_float32;
extern const Kernels kernels_float64;
}  // namespace FASTLOSS_ISA

void run_team(void (*body)(void*), void* context, int) { body(context); }

namespace {

template <class To, class From>
To bits(From from) {
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

double read(const char* p, DType dtype) {
  uint16_t half;
  std::memcpy(&half, p, sizeof half);
  switch (dtype) {
    case DType::kFloat64:
      return *reinterpret_cast<const double*>(p);
    case DType::kFloat32:
      return *reinterpret_cast<const float*>(p);
    case DType::kBFloat16:
      return bits<float>(uint32_t(half) << 16);
    default:
      return bits<Binary16>(half);
  }
}

// Rounded to nearest; `x` is left with the value that was written.
void write(char* p, DType dtype, double& x) {
  if (dtype == DType::kFloat64) {
    std::memcpy(p, &x, 8);
  } else if (dtype == DType::kFloat32) {
    const float f = float(x);
    std::memcpy(p, &f, 4);
  } else {
    const uint32_t wide = bits<uint32_t>(float(x));
    const uint16_t brain = uint16_t((wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16);
    const uint16_t half = dtype == DType::kBFloat16 ? brain : bits<uint16_t>(Binary16(float(x)));
    std::memcpy(p, &half, 2);
  }
  x = read(p, dtype);
}

const Kernels& kernels_of(DType dtype) {
  return dtype == DType::kFloat64 ? FASTLOSS_ISA::kernels_float64 : FASTLOSS_ISA::kernels_float32;
}

struct Case {
  DType dtype;
  int64_t N, V;
  double softcap, label_smoothing;
};

// The mean loss, and its gradient in `g`; rows of negative targets are ignored.
double textbook(const Case& c, const std::vector<double>& x, const std::vector<int64_t>& y, std::vector<double>& g) {
  double loss = 0;
  for (int64_t i = 0; i < c.N; ++i) {
    if (y[size_t(i)] < 0) continue;
    std::vector<double> z(x.begin() + i * c.V, x.begin() + (i + 1) * c.V);
    double top = -INFINITY, sum = 0;
    for (double& v : z) {
      if (c.softcap > 0) v = c.softcap * std::tanh(v / c.softcap);
      top = std::fmax(top, v);
    }
    for (const double v : z) sum += std::exp(v - top);
    const double lse = top + std::log(sum), smooth = c.label_smoothing / double(c.V);
    loss -= (1 - c.label_smoothing) * (z[size_t(y[i])] - lse);
    for (int64_t j = 0; j < c.V; ++j) {
      if (smooth > 0) loss -= smooth * (z[size_t(j)] - lse);
      double d = std::exp(z[size_t(j)] - lse) - smooth - (j == y[i] ? 1 - c.label_smoothing : 0);
      if (c.softcap > 0) d *= 1 - (z[size_t(j)] / c.softcap) * (z[size_t(j)] / c.softcap);
      g[size_t(i * c.V + j)] = d / double(c.N);
    }
  }
  return loss / double(c.N);
}

bool agrees(const Case& c, std::mt19937& random) {
  std::normal_distribution<double> normal(0, 3);
  const int64_t size = size_of(c.dtype);
  std::vector<double> x(size_t(c.N * c.V)), want(x.size());
  std::vector<char> logits(x.size() * size_t(size)), grad(logits.size());
  std::vector<int64_t> y(size_t(c.N), 0);
  for (auto& t : y) t = int64_t(random() % uint64_t(c.V));
  for (int64_t k = 0; k < c.N * c.V; ++k) {
    const bool masked = c.softcap == 0 && c.label_smoothing == 0 && k % 7 == 3 && k % c.V != y[size_t(k / c.V)];
    x[size_t(k)] = masked ? -INFINITY : normal(random);
    write(&logits[size_t(k * size)], c.dtype, x[size_t(k)]);
  }
  Rows rows;
  rows.input = {logits.data(), c.N, c.V, c.V, c.dtype};
  rows.target = y.data();
  rows.spec.softcap = c.softcap;
  rows.spec.label_smoothing = c.label_smoothing;
  Reduced reduced;
  reduced.grad = {grad.data(), c.N, c.V, c.V, c.dtype};
  const double loss = kernels_of(c.dtype).row_loss_grad(rows, reduced), truth = textbook(c, x, y, want);
  double largest = 1 / double(c.N), error = 0;
  for (const double v : want) largest = std::fmax(largest, std::fabs(v));
  for (size_t k = 0; k < want.size(); ++k) {
    const double off = std::fabs(read(&grad[k * size_t(size)], c.dtype) - want[k]) / largest;
    error = off > error || off != off ? off : error;
  }
  constexpr double kTolerance[] = {1e-6, 1e-13, 5e-3, 1e-3};
  const double loss_error = std::fabs(loss - truth) / std::fmax(1, std::fabs(truth));
  if (error <= kTolerance[int(c.dtype)] && loss_error <= (c.dtype == DType::kFloat64 ? 1e-13 : 2e-6)) return true;
  std::printf("dtype %d, V %ld, softcap %g, smoothing %g: loss off by %g, gradient by %g\n", int(c.dtype), long(c.V),
              c.softcap, c.label_smoothing, loss_error, error);
  return false;
}

enum class Layout { kRows, kColumns, kEveryOther };

// A matrix of a dtype, its numbers in `values` as they are rounded. Between those of kEveryOther are NaNs, and
// after the last of them in any layout as many as a row or a column has numbers.
struct Numbers {
  std::vector<double> values;
  std::vector<char> stored;
  Strided matrix;

  Numbers(DType dtype, int64_t rows, int64_t cols, Layout layout, std::mt19937& random, double scale = 1)
      : values(size_t(rows * cols)) {
    std::normal_distribution<double> normal(0, scale);
    const bool columns = layout == Layout::kColumns;
    const int64_t step = layout == Layout::kEveryOther ? 2 : 1, size = size_of(dtype);
    stored.assign(size_t((rows * cols + rows + cols) * step * size), char(0xff));
    matrix = {stored.data(), rows, cols, columns ? step : cols * step, columns ? rows * step : step, dtype};
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j) {
        double& x = values[size_t(i * cols + j)] = normal(random);
        write(const_cast<char*>(matrix.at(i, j)), dtype, x);
      }
  }

  Strided transposed() const {
    return {matrix.data, matrix.cols, matrix.rows, matrix.col_stride, matrix.row_stride, matrix.dtype};
  }
};

// a (M, K) and b (N, K), transposed, in double.
std::vector<double> product(const Numbers& a, const Numbers& b) {
  const int64_t M = a.matrix.rows, N = b.matrix.rows, K = a.matrix.cols;
  std::vector<double> c(size_t(M * N), 0.0);
  for (int64_t i = 0; i < M; ++i)
    for (int64_t j = 0; j < N; ++j)
      for (int64_t k = 0; k < K; ++k) c[size_t(i * N + j)] += a.values[size_t(i * K + k)] * b.values[size_t(j * K + k)];
  return c;
}

// The kernels' product of a and b, transposed, `times` over: start + a b, then C + a b.
std::vector<double> multiply(const Numbers& a, const Numbers& b, const Numbers& start, int times) {
  const DType summed = start.matrix.dtype;
  const int64_t size = size_of(summed);
  std::vector<double> sums(size_t(a.matrix.rows * b.matrix.rows));
  std::vector<char> out(sums.size() * size_t(size));
  Product p;
  p.a = a.matrix, p.b = b.transposed();
  p.out = out.data(), p.stride = b.matrix.rows;
  p.start = start.stored.data();
  for (int i = 0; i < times; ++i, p.start = nullptr, p.add = true) kernels_of(summed).matmul(p);
  for (size_t k = 0; k < sums.size(); ++k) sums[k] = read(&out[k * size_t(size)], summed);
  return sums;
}

// A product of (M, K) and, transposed, (N, K), against sums in double.
bool multiplies(DType left, DType right, std::array<int64_t, 3> shape, Layout layout, std::mt19937& random) {
  const auto [M, N, K] = shape;
  const DType summed = left == DType::kFloat64 ? left : DType::kFloat32;
  const Numbers a(left, M, K, layout, random), b(right, N, K, layout, random),
      start(summed, 1, N, Layout::kRows, random);
  const std::vector<double> sums = multiply(a, b, start, 2), want = product(a, b);
  double error = 0;
  for (size_t k = 0; k < sums.size(); ++k) {
    const double off = std::fabs(sums[k] - (2 * want[k] + start.values[k % size_t(N)]));
    error = off > error || off != off ? off : error;
  }
  if (error <= std::sqrt(double(K)) * (summed == DType::kFloat64 ? 2e-14 : 8e-6)) return true;
  std::printf("dtypes %d and %d, layout %d, product of (%ld, %ld) and (%ld, %ld): off by %g\n", int(left), int(right),
              int(layout), long(M), long(K), long(K), long(N), error);
  return false;
}

// Numbers below the normal range count; where the processor multiplies bfloat16 as they are, they are zeros.
bool keeps_subnormals(std::mt19937& random) {
  const DType dtype = DType::kBFloat16;
  const Numbers a(dtype, 5, 7, Layout::kRows, random, 0x1p-131), b(dtype, 9, 7, Layout::kRows, random, 0x1p120),
      start(DType::kFloat32, 1, 9, Layout::kRows, random, 0);
  const std::vector<double> sums = multiply(a, b, start, 1), want = product(a, b);
  const bool zeros = std::strcmp(kernels_of(dtype).isa, "avx512_bf16") == 0;
  double error = 0;
  for (size_t k = 0; k < sums.size(); ++k) error = std::fmax(error, std::fabs(sums[k] - (zeros ? 0 : want[k])));
  if (error <= 0x1p-11 * 1e-5) return true;
  std::printf("products of bfloat16 below the normal range: off by %g\n", error);
  return false;
}

// Losses of hidden states (N, H) whose logits are not written.
bool scores(const Case& c, int64_t H, std::mt19937& random) {
  const Numbers hidden(c.dtype, c.N, H, Layout::kRows, random), weight(c.dtype, c.V, H, Layout::kRows, random);
  std::vector<double> unused(size_t(c.N * c.V));
  std::vector<int64_t> y(size_t(c.N), 0);
  for (size_t i = 0; i < y.size(); ++i) y[i] = i % 5 == 2 ? -100 : int64_t(random() % uint64_t(c.V));
  Rows rows;
  rows.input = {nullptr, c.N, c.V, 0, c.dtype};
  rows.target = y.data();
  rows.spec.softcap = c.softcap;
  rows.spec.label_smoothing = c.label_smoothing;
  std::vector<double> losses(size_t(c.N)), stats(size_t(c.N * kStats)), listed(size_t(c.N));  // of floats the half
  RowOutputs out{losses.data(), stats.data()};
  out.listed = listed.data();
  kernels_of(c.dtype).head_loss(rows, {hidden.matrix, weight.transposed()}, out);
  const DType summed = c.dtype == DType::kFloat64 ? c.dtype : DType::kFloat32;
  double loss = 0;
  for (int64_t i = 0; i < c.N; ++i)
    loss += read(reinterpret_cast<const char*>(losses.data()) + i * size_of(summed), summed) / double(c.N);
  const double truth = textbook(c, product(hidden, weight), y, unused), off = std::fabs(loss - truth);
  if (off <= std::fmax(1, std::fabs(truth)) * (c.dtype == DType::kFloat64 ? 1e-13 : 2e-6)) return true;
  std::printf("dtype %d, hidden states (%ld, %ld), %ld classes, softcap %g, smoothing %g: loss off by %g\n",
              int(c.dtype), long(c.N), long(H), long(c.V), c.softcap, c.label_smoothing, off);
  return false;
}

}  // namespace
}  // namespace fastloss

int main() {
  using namespace fastloss;
  std::mt19937 random(1);
  int count = 0, wrong = 0;
  for (int dtype = 0; dtype < 4; ++dtype)
    for (const int64_t V : {1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 64, 65, 2047, 2048, 2049, 5003})
      for (const double softcap : {0.0, 5.0})
        for (const double smoothing : {0.0, 0.1}) {
          ++count;
          wrong += !agrees({DType(dtype), 3, V, softcap, smoothing}, random);
        }
  // Whole register tiles and parts of them, sums longer than what is added up at once, an odd number of terms.
  for (const auto shape : {std::array<int64_t, 3>{1, 1, 1}, {6, 8, 4}, {24, 64, 257}, {7, 33, 135}, {40, 5, 2051}})
    for (const Layout layout : {Layout::kRows, Layout::kColumns, Layout::kEveryOther})
      for (const auto [left, right] :
           {std::array<int, 2>{0, 0}, {1, 1}, {2, 2}, {3, 3}, {0, 2}, {2, 0}, {2, 3}, {3, 2}}) {
        ++count;
        wrong += !multiplies(DType(left), DType(right), shape, layout, random);
      }
  ++count;
  wrong += !keeps_subnormals(random);
  for (int dtype = 0; dtype < 4; ++dtype)
    for (const auto [N, H, V] : {std::array<int64_t, 3>{1, 1, 1}, {7, 5, 300}, {13, 2051, 33}, {3, 8, 20000}})
      for (const double option : {0.0, 0.1}) {
        ++count;
        wrong += !scores({DType(dtype), N, V, 50 * option, option}, H, random);
      }
  std::printf("%s: %d cases, %d wrong\n", FASTLOSS_ISA_NAME, count, wrong);
  return wrong > 0;
}
