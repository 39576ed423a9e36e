// SPDX-License-Identifier: Apache-2.0
//
// The Python module mambablock._C: facts of the build, and the functions of common/math.h.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "math_arrays.h"
#include "common/cpu/simd_level.h"

namespace py = pybind11;

namespace mambablock {
namespace {

std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> items;
  std::istringstream stream(list);
  for (std::string item; std::getline(stream, item, ',');) items.push_back(item);
  return items;
}

std::string torch_version(unsigned long long target) {
  return std::to_string(target >> 56) + "." + std::to_string(target >> 48 & 0xff);
}

py::dict build_info() {
  py::dict info;
  info["version"] = MAMBABLOCK_VERSION;
  info["compiler"] = MAMBABLOCK_COMPILER;
  info["cxx_standard"] = __cplusplus / 100 % 100;
  info["torch_stable_abi"] = torch_version(TORCH_TARGET_VERSION);
  info["simd_levels_built"] = split(MAMBABLOCK_SIMD_LEVELS);
  info["simd_level"] = simd_level_name(simd_level());
  info["cuda"] = py::none();
#ifdef MAMBABLOCK_CUDA_VERSION
  py::dict cuda;
  cuda["version"] = MAMBABLOCK_CUDA_VERSION;
  cuda["architectures"] = split(MAMBABLOCK_CUDA_ARCHITECTURES);
  info["cuda"] = cuda;
#endif
  return info;
}

constexpr std::pair<const char*, MathFunction> kMathFunctions[] = {
    {"exp2", MathFunction::exp2},
    {"exp2_in_range", MathFunction::exp2_in_range},
    {"exp", MathFunction::exp},
    {"log1p_unit", MathFunction::log1p_unit},
    {"sigmoid", MathFunction::sigmoid},
    {"silu", MathFunction::silu},
    {"softplus", MathFunction::softplus},
    {"softplus_derivative", MathFunction::softplus_derivative},
};

MathFunction math_function(const std::string& name) {
  std::string names;
  for (const auto& [known, function] : kMathFunctions) {
    if (name == known) return function;
    names += (names.empty() ? "" : ", ") + std::string(known);
  }
  throw py::value_error("math: name must be one of " + names + "; got \"" + name + "\"");
}

using Array = py::array_t<float, py::array::c_style>;

Array math(const std::string& name, const Array& x, const std::optional<std::string>& level) {
  const MathFunction function = math_function(name);
  const SimdLevel used = level ? simd_level_from_name("math: level", level->c_str()) : simd_level();
  Array y(std::vector<py::ssize_t>(x.shape(), x.shape() + x.ndim()));
  MAMBABLOCK_SELECT_AT(used, apply_math)(function, x.data(), y.mutable_data(), x.size());
  return y;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Facts of the build, and the kernels' mathematical functions.";
  module.def("build_info", &build_info, "What was built, and the SIMD level in use.");
  module.def("math", &math, py::arg("name"), py::arg("x").noconvert(),
             py::arg("level") = py::none(),
             "A function of csrc/common/math.h over a contiguous float32 array.");
}

}  // namespace mambablock
