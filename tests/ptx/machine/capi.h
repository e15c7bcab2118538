// The interface to Python's ctypes.
#pragma once

#include <cstdint>

extern "C" {

struct PtxAllocation {
  uint64_t begin, end;
};

struct PtxLaunch {
  int32_t grid[3], block[3];
  int32_t cluster, cooperative, shared_bytes, parameter_bytes;
  const uint8_t* parameters;
  int64_t allocation_count;
  const PtxAllocation* allocations;
  uint64_t seed;
  int64_t most_steps;
  int32_t quantum;        // an upper bound of the instructions between two switches of warps; 0: until it must wait
  int32_t races;          // look for races
  int32_t perturb;        // approximate instructions are off within their documented bounds
  int32_t count;          // fill the counters
  int32_t poisoned;       // fresh global memory holds kPoison
  int32_t reversed;       // of lanes that write one address in one instruction, the lowest wins
};

// Each returns a string to be freed with ptx_free: null or an error, and JSON.
char* ptx_load(const char* text, void** module);
char* ptx_describe(void* module);
char* ptx_launch(void* module, const char* entry, const PtxLaunch* launch);
void ptx_free(char* text);
void ptx_unload(void* module);
}
