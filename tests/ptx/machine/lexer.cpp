#include "lexer.h"

#include <cctype>

#include "types.h"

namespace ptx {
namespace {

bool part_of_word(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%' || c == '.';
}

// Past a word that starts at i; "::" belongs to it, as in .shared::cluster.
size_t end_of_word(const std::string& s, size_t i) {
  while (i < s.size()) {
    if (part_of_word(s[i])) ++i;
    else if (s.compare(i, 2, "::") == 0 && i + 2 < s.size() && part_of_word(s[i + 2])) i += 2;
    else break;
  }
  return i;
}

// Past a comment or blank at i, or i itself.
size_t past_blank(const std::string& s, size_t i) {
  if (std::isspace(static_cast<unsigned char>(s[i]))) return i + 1;
  if (s.compare(i, 2, "//") == 0) return std::min(s.find('\n', i), s.size());
  if (s.compare(i, 2, "/*") == 0) {
    const size_t end = s.find("*/", i);
    if (end == std::string::npos) throw ParseError("a comment without an end");
    return end + 2;
  }
  return i;
}

}  // namespace

std::vector<Token> tokens_of(const std::string& s) {
  std::vector<Token> out;
  for (size_t i = 0; i < s.size();) {
    if (const size_t next = past_blank(s, i); next != i) {
      i = next;
      continue;
    }
    size_t end = i + 1;
    if (s[i] == '"') {
      end = s.find('"', i + 1);
      if (end == std::string::npos) throw ParseError("a string without an end");
      ++end;
    } else if (part_of_word(s[i])) {
      end = end_of_word(s, i);
    }
    out.push_back({s.substr(i, end - i), i, end});
    i = end;
  }
  return out;
}

}  // namespace ptx
