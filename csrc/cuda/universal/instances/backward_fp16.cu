#include "../mask_gradient_kernel.h"

namespace flash_attn::cuda::universal {

template void launch_backward<__half>(const BackwardParams&, const int*, cudaStream_t);
template void launch_mask_gradient<__half>(const BackwardParams&, const int*, cudaStream_t);

}  // namespace flash_attn::cuda::universal
