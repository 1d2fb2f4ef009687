// The CUDA backend compiled for the host: fastloss._cuda with plain C++ kernels, and beside it (a second module in the
// same library) the strings a test may pull.
#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include "../csrc/cuda/bindings.cpp"

namespace {

// launcher(kernel, grid, block, cluster, shared bytes, parameters) instead of running kernels here.
void set_launcher(const py::object& callable) {
  if (callable.is_none()) {
    cuda_on_host::launcher = nullptr;
    return;
  }
  cuda_on_host::launcher = [callable](const char* kernel, dim3 grid, dim3 block, unsigned cluster, size_t shared,
                                      const void* params, size_t bytes) {
    callable(kernel, grid.x, block.x, cluster, shared, py::bytes(static_cast<const char*>(params), bytes));
  };
}

}  // namespace

PYBIND11_MODULE(cuda_on_host_control, m) {
  m.def("set_launcher", &set_launcher);
  m.def("set_device", [](int major, int minor, int shared_bytes) {
    cuda_on_host::device.major = major;
    cuda_on_host::device.minor = minor;
    cuda_on_host::device.shared_per_block_optin = shared_bytes;
  });
  m.def("set_schedule_seed", [](uint64_t seed) { cuda_on_host::schedule_seed = seed; });
  m.def("launches", [] { return cuda_on_host::launches; });
}
