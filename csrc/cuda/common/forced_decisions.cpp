#include "forced_decisions.h"

#include <cstdlib>
#include <sstream>
#include <stdexcept>

namespace flash_attn::cuda {

ForcedDecisions::ForcedDecisions(const char* variable, std::initializer_list<ForcedDecision> decisions) {
  const char* const text = std::getenv(variable);
  if (text == nullptr || *text == '\0') return;
  text_ = std::string(variable) + "=" + text;
  std::istringstream items(text);
  for (std::string item; std::getline(items, item, ',');) {
    const size_t equals = item.find('=');
    const std::string name = item.substr(0, equals),
                      number = equals == std::string::npos ? "" : item.substr(equals + 1);
    char* end = nullptr;
    const long value = std::strtol(number.c_str(), &end, 10);
    bool found = false;
    std::string names;
    for (const ForcedDecision& decision : decisions) {
      names += std::string(names.empty() ? "" : ", ") + decision.name;
      if (name != decision.name || number.empty() || *end != '\0') continue;
      if (value < decision.least || value > decision.most) continue;
      *decision.value = static_cast<int>(value);
      found = true;
    }
    if (!found) {
      throw std::runtime_error(text_ + ": '" + item + "' is no decision and its number; there are: " + names);
    }
  }
}

void ForcedDecisions::require(const char* name, int wanted, int64_t chosen) const {
  if (wanted < 0 || wanted == chosen) return;
  throw std::runtime_error(text_ + ": this problem does not take " + name + "=" + std::to_string(wanted) +
                           ", the nearest is " + std::to_string(chosen));
}

}  // namespace flash_attn::cuda
