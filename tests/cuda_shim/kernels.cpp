// The kernels and their tables, compiled for the shim.
#include "cuda/cwd_loss.cu"
#include "cuda/pkd_loss.cu"
#include "cuda/cwd_lanes.cu"
#include "cuda/pkd_lanes.cu"
