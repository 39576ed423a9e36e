// SPDX-License-Identifier: Apache-2.0
//
// generate FOLDER libmambablock.so: run the packages that export.py wrote, first over a prompt,
// then step by step with its state, and print the last output of the prompt and that of each step.
#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <string>

namespace {

constexpr int64_t kModel = 16, kInner = 32, kStates = 16, kPast = 3, kBatch = 2;
constexpr int64_t kPrompt = 70, kSteps = 5;

void print_row(const at::Tensor& y) {
  const at::Tensor flat = y.flatten();
  for (int64_t i = 0; i < flat.numel(); ++i) {
    std::printf(i == 0 ? "%.6f" : " %.6f", flat[i].item<float>());
  }
  std::printf("\n");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s FOLDER libmambablock.so\n", argv[0]);
    return 2;
  }
  // Loading the library registers the operators, which the packages call by name.
  if (dlopen(argv[2], RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  const std::string folder = argv[1];
  const c10::InferenceMode inference;
  torch::inductor::AOTIModelPackageLoader prefill(folder + "/prefill.pt2");
  torch::inductor::AOTIModelPackageLoader decode(folder + "/decode.pt2");

  const int64_t length = kPrompt + kSteps;
  const at::Tensor x = at::arange(kBatch * length * kModel).sin().view({kBatch, length, kModel});
  const at::Tensor conv = at::zeros({kBatch, kPast, kInner});
  const at::Tensor ssm = at::zeros({kBatch, kInner, kStates});

  const auto after = prefill.run({x.slice(1, 0, kPrompt).contiguous(), conv, ssm});
  print_row(after[0].select(1, kPrompt - 1));
  for (int64_t t = kPrompt; t < length; ++t) {
    // The state, after[1] and after[2], moves on in place.
    print_row(decode.run({x.select(1, t).contiguous(), after[1], after[2]})[0]);
  }
  return 0;
}
