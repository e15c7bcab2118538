// Special registers: who a thread is.
#include "machine.h"

namespace ptx {
namespace {

using Value = u64 (*)(const Machine&, const Warp&, int lane);
using M = const Machine&;
using W = const Warp&;

int thread(const Warp& w, int lane) { return w.index * kLanes + lane; }
int rank(const Machine& m, const Warp& w) { return w.block->rank % m.domain->cluster; }
u32 bit(int lane) { return 1u << lane; }

const std::map<std::string, Value> kValues = {
    {"%tid.x", [](M m, W w, int l) { return u64(thread(w, l) % m.launch.block[0]); }},
    {"%tid.y", [](M m, W w, int l) { return u64(thread(w, l) / m.launch.block[0] % m.launch.block[1]); }},
    {"%tid.z", [](M m, W w, int l) { return u64(thread(w, l) / m.launch.block[0] / m.launch.block[1]); }},
    {"%ntid.x", [](M m, W, int) { return u64(m.launch.block[0]); }},
    {"%ntid.y", [](M m, W, int) { return u64(m.launch.block[1]); }},
    {"%ntid.z", [](M m, W, int) { return u64(m.launch.block[2]); }},
    {"%ctaid.x", [](M, W w, int) { return u64(w.block->index[0]); }},
    {"%ctaid.y", [](M, W w, int) { return u64(w.block->index[1]); }},
    {"%ctaid.z", [](M, W w, int) { return u64(w.block->index[2]); }},
    {"%nctaid.x", [](M m, W, int) { return u64(m.launch.grid[0]); }},
    {"%nctaid.y", [](M m, W, int) { return u64(m.launch.grid[1]); }},
    {"%nctaid.z", [](M m, W, int) { return u64(m.launch.grid[2]); }},
    {"%laneid", [](M, W, int l) { return u64(l); }},
    {"%warpid", [](M, W w, int) { return u64(w.index); }},
    {"%nwarpid", [](M m, W, int) { return u64(m.warps_per_block); }},
    {"%smid", [](M, W w, int) { return u64(w.block->index[0] % 132); }},
    {"%nsmid", [](M, W, int) { return u64(132); }},
    {"%gridid", [](M, W, int) { return u64(1); }},
    // Clusters are along x.
    {"%cluster_ctarank", [](M m, W w, int) { return u64(rank(m, w)); }},
    {"%cluster_nctarank", [](M m, W, int) { return u64(m.domain->cluster); }},
    {"%cluster_ctaid.x", [](M m, W w, int) { return u64(rank(m, w)); }},
    {"%cluster_ctaid.y", [](M, W, int) { return u64(0); }},
    {"%cluster_ctaid.z", [](M, W, int) { return u64(0); }},
    {"%cluster_nctaid.x", [](M m, W, int) { return u64(m.domain->cluster); }},
    {"%cluster_nctaid.y", [](M, W, int) { return u64(1); }},
    {"%cluster_nctaid.z", [](M, W, int) { return u64(1); }},
    {"%clusterid.x", [](M m, W w, int) { return u64(w.block->index[0] / m.domain->cluster); }},
    {"%clusterid.y", [](M, W w, int) { return u64(w.block->index[1]); }},
    {"%clusterid.z", [](M, W w, int) { return u64(w.block->index[2]); }},
    {"%nclusterid.x", [](M m, W, int) { return u64(m.launch.grid[0] / m.domain->cluster); }},
    {"%nclusterid.y", [](M m, W, int) { return u64(m.launch.grid[1]); }},
    {"%nclusterid.z", [](M m, W, int) { return u64(m.launch.grid[2]); }},
    {"%is_explicit_cluster", [](M m, W, int) { return u64(m.domain->cluster > 1); }},
    {"%lanemask_eq", [](M, W, int l) { return u64(bit(l)); }},
    {"%lanemask_lt", [](M, W, int l) { return u64(bit(l) - 1); }},
    {"%lanemask_le", [](M, W, int l) { return u64((bit(l) - 1) | bit(l)); }},
    {"%lanemask_gt", [](M, W, int l) { return u64(~((bit(l) - 1) | bit(l))); }},
    {"%lanemask_ge", [](M, W, int l) { return u64(~(bit(l) - 1)); }},
    {"%dynamic_smem_size", [](M m, W, int) { return u64(m.launch.shared_bytes); }},
    {"%total_smem_size", [](M m, W, int) { return u64(m.entry.shared_bytes + m.launch.shared_bytes); }},
};

}  // namespace

void Machine::set_specials(Warp& w) {
  for (const auto& [name, slot] : entry.specials) {
    const auto found = kValues.find(name);
    if (found == kValues.end()) throw Unsupported("special register " + name);
    for (int l = 0; l < kLanes; ++l) w.registers[size_t(slot) * kLanes + l] = found->second(*this, w, l);
  }
}

}  // namespace ptx
