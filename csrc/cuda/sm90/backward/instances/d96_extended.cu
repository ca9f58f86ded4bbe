#include "../extended/launch.h"

namespace flash_attn::cuda::sm90::backward {
namespace {

struct D96 : single::Shape {
  static constexpr int kHeadDim = 96;
};

}  // namespace

const Variant kD96Extended = extended::make_variant<D96>("wgmma d96 64x128 extended");

}  // namespace flash_attn::cuda::sm90::backward
