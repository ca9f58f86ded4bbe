#include "below_autograd.h"

#include <cstdint>

// The stable ABI has no word for what keys a thread excludes: these are c10::parseDispatchKey() and
// c10::impl::tls_is_dispatch_key_excluded() and tls_set_dispatch_key_excluded(), in libc10, whose keys are an enum of
// 16 bits. Weak: under a torch that has them no more they are null and the library still loads.
extern "C" {
__attribute__((weak)) uint16_t torch_parse_dispatch_key(const std::string& name) __asm__(
    "_ZN3c1016parseDispatchKeyERKNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE");
__attribute__((weak)) bool torch_is_key_excluded(uint16_t key) __asm__(
    "_ZN3c104impl28tls_is_dispatch_key_excludedENS_11DispatchKeyE");
__attribute__((weak)) void torch_set_key_excluded(uint16_t key, bool excluded) __asm__(
    "_ZN3c104impl29tls_set_dispatch_key_excludedENS_11DispatchKeyEb");
}

namespace flash_attn {

bool can_go_below_autograd() {
  return torch_parse_dispatch_key != nullptr && torch_is_key_excluded != nullptr && torch_set_key_excluded != nullptr;
}

BelowAutograd::BelowAutograd(const std::string& key)
    : key_(torch_parse_dispatch_key(key)), was_excluded_(torch_is_key_excluded(uint16_t(key_))) {
  if (!was_excluded_) torch_set_key_excluded(uint16_t(key_), true);
}

BelowAutograd::~BelowAutograd() {
  if (!was_excluded_) torch_set_key_excluded(uint16_t(key_), false);
}

}  // namespace flash_attn
