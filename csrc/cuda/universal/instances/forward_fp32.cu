#include "../forward_kernel.h"

namespace flash_attn::cuda::universal {

template void launch_forward<float>(const ForwardParams&, const int*, cudaStream_t);

}  // namespace flash_attn::cuda::universal
