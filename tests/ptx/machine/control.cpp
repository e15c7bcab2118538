// Fences, and what has no effect on values.
#include "lanes.h"

namespace ptx {
namespace {

void nothing(Machine&, Warp&, const Instruction&, u32) {}
void run_fence(Machine& m, Warp& w, const Instruction&, u32) { m.fence(w); }
// Makes what has happened visible to asynchronous copies.
void run_proxy_fence(Machine&, Warp& w, const Instruction& n, u32) {
  const bool all = n.space == Space::Generic;
  if (all || n.space == Space::Shared) w.knows.to_async_shared.join(w.knows.seen);
  if (all || n.space == Space::Global) w.knows.to_async_global.join(w.knows.seen);
}
// The initialisation of mbarriers, for copies and for the cluster.
void run_barrier_fence(Machine& m, Warp& w, const Instruction&, u32) {
  m.fence(w);
  w.knows.to_async_shared.join(w.knows.seen);
}
void active_mask(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  each(lanes, [&](int l) { m.target(w, n.to[0])[l] = lanes; });
}
void trap(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  m.report("trap", n.pc, m.where(w, std::countr_zero(lanes)));
  m.stop = true;
}
void policy(Machine& m, Warp& w, const Instruction& n, u32 lanes) {
  each(lanes, [&](int l) { m.target(w, n.to[0])[l] = 0; });
}

Handler fence_handler(const Instruction& n) {
  if (n.says("mbarrier_init")) return run_barrier_fence;
  if (!n.says("proxy")) return run_fence;
  if (!n.says("async")) throw Unsupported("proxy of a fence");
  return run_proxy_fence;
}

}  // namespace

Handler control_handler(const Instruction& n) {
  if (n.name == "membar" || n.name == "fence") return fence_handler(n);
  if (n.name == "activemask") return active_mask;
  if (n.name == "trap") return trap;
  if (n.name == "createpolicy") return policy;
  // The end of the launch before is not modelled, nor registers.
  if (n.name == "griddepcontrol" || n.name == "setmaxnreg" || n.name == "pmevent") return nothing;
  return nullptr;
}

}  // namespace ptx
