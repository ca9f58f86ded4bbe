// How the ops refuse an argument: std::runtime_error with the text alone, which Python sees as RuntimeError.
#pragma once

#include <sstream>
#include <stdexcept>

namespace flash_attn {

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

}  // namespace flash_attn
