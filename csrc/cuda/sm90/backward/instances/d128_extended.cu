#include "../extended/launch.h"

namespace flash_attn::cuda::sm90::backward {
namespace {

struct D128 : single::Shape {};

}  // namespace

const Variant kD128Extended = extended::make_variant<D128>("wgmma d128 64x128 extended");

}  // namespace flash_attn::cuda::sm90::backward
