// SPDX-License-Identifier: Apache-2.0
//
// mambablock.build_info(), which reads it through ctypes.
#include <exception>
#include <sstream>
#include <string>

#include "common/cpu/simd_level.h"

namespace mambablock {
namespace {

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (const char c : text)
    result += c == '"' || c == '\\' ? std::string("\\") + c : std::string(1, c);
  return result + "\"";
}

// "a,b" as a JSON list.
std::string list_of(const std::string& names) {
  std::string result;
  std::istringstream stream(names);
  for (std::string name; std::getline(stream, name, ',');) {
    result += (result.empty() ? "" : ", ") + quoted(name);
  }
  return "[" + result + "]";
}

std::string build_info() {
  constexpr unsigned long long torch = TORCH_TARGET_VERSION;
  std::ostringstream info;
  info << "{\"version\": " << quoted(MAMBABLOCK_VERSION)
       << ", \"compiler\": " << quoted(MAMBABLOCK_COMPILER)
       << ", \"cxx_standard\": " << __cplusplus / 100 % 100  //
       << ", \"torch_stable_abi\": \"" << (torch >> 56) << "." << (torch >> 48 & 0xff) << "\""
       << ", \"simd_levels_built\": " << list_of(MAMBABLOCK_SIMD_LEVELS)
       << ", \"simd_level\": " << quoted(simd_level_name(simd_level())) << ", \"cuda\": "
#ifdef MAMBABLOCK_CUDA_VERSION
       << "{\"version\": " << quoted(MAMBABLOCK_CUDA_VERSION)
       << ", \"architectures\": " << list_of(MAMBABLOCK_CUDA_ARCHITECTURES) << "}"
#else
       << "null"
#endif
       << "}";
  return info.str();
}

}  // namespace
}  // namespace mambablock

// JSON, with an error alone where there is one.
extern "C" [[gnu::visibility("default")]] const char* mambablock_build_info() {
  static std::string info;
  try {
    info = mambablock::build_info();
  } catch (const std::exception& error) {
    info = "{\"error\": " + mambablock::quoted(error.what()) + "}";
  }
  return info.c_str();
}
