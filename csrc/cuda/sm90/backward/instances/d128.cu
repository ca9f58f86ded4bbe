#include "../single/launch.h"

namespace flash_attn::cuda::sm90::backward {
namespace {

struct D128 : single::Shape {};

}  // namespace

const Variant kD128 = single::make_variant<D128>("wgmma d128 64x128");
const Variant kD128Band = single::make_band_variant<D128>("wgmma d128 64x128 band");

}  // namespace flash_attn::cuda::sm90::backward
