#include "forced.h"

#include <cstdlib>
#include <sstream>
#include <stdexcept>

namespace flash_attn::cuda::sm90::backward {

Forced Forced::from_environment() {
  Forced forced;
  const char* const text = std::getenv("FLASH_ATTN_BACKWARD_PLAN");
  if (text == nullptr || *text == '\0') return forced;
  forced.text = std::string("FLASH_ATTN_BACKWARD_PLAN=") + text;
  const struct {
    const char* name;
    int* value;
    int least, most;
  } decisions[] = {
      {"head_parts", &forced.head_parts, 1, 1 << 20},
      {"row_parts", &forced.row_parts, 1, 1 << 20},
      {"one_cta", &forced.one_cta, 0, 1},
      {"dq_writing", &forced.dq_writing, 0, 1},
      {"preparation", &forced.preparation, 0, 1},
  };
  std::istringstream items(text);
  for (std::string item; std::getline(items, item, ',');) {
    const size_t equals = item.find('=');
    const std::string name = item.substr(0, equals),
                      number = equals == std::string::npos ? "" : item.substr(equals + 1);
    char* end = nullptr;
    const long value = std::strtol(number.c_str(), &end, 10);
    bool found = false;
    std::string names;
    for (const auto& decision : decisions) {
      names += std::string(names.empty() ? "" : ", ") + decision.name;
      if (name != decision.name || number.empty() || *end != '\0') continue;
      if (value < decision.least || value > decision.most) continue;
      *decision.value = static_cast<int>(value);
      found = true;
    }
    if (!found) {
      throw std::runtime_error(forced.text + ": '" + item + "' is no decision and its number; there are: " + names);
    }
  }
  return forced;
}

void Forced::require(const char* name, int wanted, int64_t chosen) const {
  if (wanted < 0 || wanted == chosen) return;
  throw std::runtime_error(text + ": this problem does not take " + name + "=" + std::to_string(wanted) +
                           ", the nearest is " + std::to_string(chosen));
}

}  // namespace flash_attn::cuda::sm90::backward
