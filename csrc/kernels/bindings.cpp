// Python's door to the CUDA launchers: launch(name, arguments...). Pointers travel as integers (Tensor.data_ptr(), 0 for
// none), and so do streams.
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "launch.h"

namespace {

int launch(const std::string& name, const pybind11::args& values) {
  for (const auto& entry : megatron_mm::kEntries) {
    if (name != entry.name) continue;
    if (values.size() != entry.arguments) throw pybind11::type_error(name + ": wrong number of arguments");
    std::vector<megatron_mm::Argument> arguments(values.size());
    for (size_t place = 0; place < values.size(); ++place) {
      if (pybind11::isinstance<pybind11::float_>(values[place])) {
        arguments[place].real = values[place].cast<double>();
      } else {
        arguments[place].whole = values[place].cast<int64_t>();
      }
    }
    return entry.call(arguments.data());
  }
  throw pybind11::key_error(name);
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "CUDA kernels of megatron_mm; megatron_mm.kernels.native calls them.";
  module.attr("SOURCES") = MM_SOURCES;
  module.def("launch", &launch);
}
