// What atomics leave in memory; asynchronous reductions do the same.
#pragma once

#include <string>

#include "machine.h"

namespace ptx {

u64 atomic_result(const std::string& operation, Type type, u64 old, u64 value);
// As a strong access, which other strong accesses do not race with.
void check_atomic(Machine& m, Warp& w, int lane, const Instruction& n, const Machine::Place& p, int size, bool same);

}  // namespace ptx
