// PTX text to tokens.
#pragma once

#include <string>
#include <vector>

namespace ptx {

struct Token {
  std::string text;
  size_t begin, end;  // in the source
};

std::vector<Token> tokens_of(const std::string& source);

}  // namespace ptx
