// The passes on the instruction set that FLASH_ATTN_ISA names.
#include "backward/backward.h"
#include "forward/forward.h"
#include "isa.h"

namespace flash_attn::cpu {

template <>
Passes passes<Isa::FLASH_ATTN_ISA>() {
  return {run_forward, run_backward};
}

}  // namespace flash_attn::cpu
