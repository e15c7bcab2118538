// Kernels for AVX2. Only code inside the target region may use its instructions. No header of the standard library
// is included there, as the linker could keep that copy of an inline function for all processors.
#include "isa.h"

#ifdef KDOPS_X86
#include <immintrin.h>

#include <cmath>

KDOPS_TARGET_BEGIN_AVX2
namespace kdops {
namespace avx2 {
#define KDOPS_LANES 8
using ::exp2;
#include "vec.h"

#include "gather_kernels.h"
#include "row_kernels.h"
}  // namespace avx2
}  // namespace kdops
KDOPS_TARGET_END

namespace kdops {

Kernels<float> avx2_float_kernels() { return avx2::float_kernels("avx2"); }
Kernels<double> avx2_double_kernels() { return avx2::double_kernels("avx2"); }

}  // namespace kdops
#endif
