// The Python module kdops._C. Importing it registers the CPU kernels (and the CUDA kernels, where they are built)
// with the dispatcher; its own functions are for bug reports, tests and benchmarks.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <map>
#include <string>

#include "cpu/isa.h"

#define KDOPS_TEXT(x) KDOPS_TEXT_OF(x)
#define KDOPS_TEXT_OF(x) #x

namespace {

std::map<std::string, std::string> build_info() {
  std::map<std::string, std::string> info;
  info["torch"] = KDOPS_TEXT(TORCH_VERSION_MAJOR) "." KDOPS_TEXT(TORCH_VERSION_MINOR) "." KDOPS_TEXT(TORCH_VERSION_PATCH);
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
#ifdef KDOPS_CUDA
  info["cuda"] = KDOPS_TEXT(KDOPS_CUDA);
#else
  info["cuda"] = "not built";
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled kernels of kdops.";
  m.def("build_info", &build_info, "What this extension was built with.");
  m.def("instruction_sets", &kdops::instruction_sets, "Instruction sets that this processor runs, the widest first.");
  m.def("use_instruction_set", &kdops::use_instruction_set, "Use another instruction set than the widest, to test it.");
}
