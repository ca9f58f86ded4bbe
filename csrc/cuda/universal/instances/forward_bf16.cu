#include "../forward_kernel.h"

namespace flash_attn::cuda::universal {

template void launch_forward<__nv_bfloat16>(const ForwardParams&, const int*, cudaStream_t);

}  // namespace flash_attn::cuda::universal
