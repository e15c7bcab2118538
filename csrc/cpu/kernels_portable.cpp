// Kernels for the compiler's baseline: any processor.
#include <cmath>

#include "half.h"
#include "isa.h"

namespace kdops {
namespace portable {
#define KDOPS_LANES 4
using ::exp2;
#include "vec.h"

#include "gather_kernels.h"
#include "row_kernels.h"
}  // namespace portable

Kernels<float> portable_float_kernels() { return portable::float_kernels("portable"); }
Kernels<double> portable_double_kernels() { return portable::double_kernels("portable"); }

}  // namespace kdops
