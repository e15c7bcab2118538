#include "capi.h"

#include <cstdlib>
#include <cstring>

#include "machine.h"

namespace ptx {
namespace {

std::string quoted(const std::string& s) {
  std::string out = "\"";
  for (const char c : s) {
    if (c == '"' || c == '\\') out += '\\';
    out += static_cast<unsigned char>(c) < 32 ? ' ' : c;
  }
  return out + "\"";
}
template <class List, class F>
std::string json_list(const List& list, F&& f) {
  std::string out;
  for (const auto& x : list) out += (out.empty() ? "" : ",") + f(x);
  return "[" + out + "]";
}
std::string field(const char* name, const std::string& value) { return "\"" + std::string(name) + "\":" + value; }
template <class T>
std::string number(const char* name, T value) { return field(name, std::to_string(value)); }

std::string described(const Entry& e) {
  std::vector<std::string> unknown;
  for (const auto& n : e.code)
    if (!n.unsupported.empty()) unknown.push_back(n.unsupported + ": " + n.text);
  return quoted(e.name) + ":{" + number("parameter_bytes", e.parameter_bytes) + "," +
         number("shared_bytes", e.shared_bytes) + "," + number("instructions", e.code.size()) + "," +
         field("parameters", json_list(e.parameters, [](const Parameter& p) {
                 return "[" + std::to_string(p.offset) + "," + std::to_string(p.size) + "]";
               })) + "," + field("unsupported", json_list(unknown, quoted)) + "}";
}

// An instruction's place in the source.
std::string place(const Machine& m, int pc) {
  const Instruction& n = m.entry.code[pc];
  const auto file = m.module.files.find(n.file);
  return number("pc", pc) + "," + field("text", quoted(n.text)) + "," + number("line", n.line) + "," +
         field("file", quoted(file == m.module.files.end() ? "" : file->second));
}
std::string finding(const Machine& m, const Finding& f) {
  std::string out = "{" + field("kind", quoted(f.kind)) + "," + field("what", quoted(f.what)) + "," +
                    number("count", f.count) + "," + place(m, f.pc);
  const bool known = f.other_pc >= 0 && f.other_pc < static_cast<int>(m.entry.code.size());
  return out + "," + field("other", known ? "{" + place(m, f.other_pc) + "}" : "null") + "}";
}
std::string counted(const Machine& m, const Instruction& n) {
  const Counter& c = m.counters[n.pc];
  return "{" + place(m, n.pc) + "," + number("executed", c.executed) + "," + number("lanes", c.lanes) + "," +
         number("bytes", c.bytes) + "," + number("sectors", c.sectors) + "," +
         number("dense_sectors", c.dense_sectors) + "," + number("waves", c.waves) + "," +
         number("dense_waves", c.dense_waves) + "}";
}
std::string outcome(const Machine& m, const std::string& fatal) {
  std::vector<Instruction> executed;
  for (const auto& n : m.entry.code)
    if (m.launch.count && m.counters[n.pc].executed) executed.push_back(n);
  return "{" + number("steps", m.steps) + "," + number("same_values", m.same_values) + "," +
         field("fatal", quoted(fatal)) + "," +
         field("findings", json_list(m.findings, [&](const Finding& f) { return finding(m, f); })) + "," +
         field("instructions", json_list(executed, [&](const Instruction& n) { return counted(m, n); })) + "}";
}

}  // namespace
}  // namespace ptx

extern "C" {

char* ptx_load(const char* text, void** out) {
  auto module = std::make_unique<ptx::Module>();
  try {
    ptx::parse(text, *module);
  } catch (const std::exception& error) {
    return strdup(error.what());
  }
  *out = module.release();
  return nullptr;
}

char* ptx_describe(void* handle) {
  std::string out;
  for (const auto& [name, entry] : static_cast<ptx::Module*>(handle)->entries)
    out += (out.empty() ? "" : ",") + ptx::described(*entry);
  return strdup(("{" + out + "}").c_str());
}

char* ptx_launch(void* handle, const char* name, const PtxLaunch* launch) {
  auto& module = *static_cast<ptx::Module*>(handle);
  ptx::Machine machine(module, *module.entries.at(name), *launch);
  std::string fatal;
  try {
    machine.run();
  } catch (const std::exception& error) {
    fatal = error.what();
  }
  return strdup(ptx::outcome(machine, fatal).c_str());
}

void ptx_free(char* text) { std::free(text); }
void ptx_unload(void* handle) { delete static_cast<ptx::Module*>(handle); }
}
