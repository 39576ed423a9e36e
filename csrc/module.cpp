// SPDX-License-Identifier: Apache-2.0
//
// The Python module mambablock._C: the functions of common/math.h over arrays, for the tests that
// hold them to their bounds. The package itself does not import it.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/cpu/math_arrays.h"
#include "common/cpu/simd_level.h"

namespace py = pybind11;

namespace mambablock {
namespace {

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
  module.doc() = "The kernels' mathematical functions.";
  module.def("math", &math, py::arg("name"), py::arg("x").noconvert(),
             py::arg("level") = py::none(),
             "A function of csrc/common/math.h over a contiguous float32 array.");
}

}  // namespace mambablock
