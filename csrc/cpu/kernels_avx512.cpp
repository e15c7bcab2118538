// Kernels for AVX-512. Only code inside the target region may use its instructions. No header of the standard library
// is included there, as the linker could keep that copy of an inline function for all processors.
#include "isa.h"

#ifdef KDOPS_X86
#include <immintrin.h>

#include <cmath>

KDOPS_TARGET_BEGIN_AVX512
namespace kdops {
namespace avx512 {
#define KDOPS_LANES 16
using ::exp2;
#include "vec.h"

#include "gather_kernels.h"
#include "row_kernels.h"
}  // namespace avx512
}  // namespace kdops
KDOPS_TARGET_END

namespace kdops {

Kernels<float> avx512_float_kernels() { return avx512::float_kernels("avx512"); }
Kernels<double> avx512_double_kernels() { return avx512::double_kernels("avx512"); }

}  // namespace kdops
#endif
