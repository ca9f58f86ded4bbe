#include "backward_launch.h"

namespace flash_attn::sm90 {
namespace {

struct Shape : BackwardShape {
  static constexpr int kHeadDim = 64, kBlockM = 128, kStagesKV = 2;
  static constexpr bool kDqWarp = false;
};

struct Fused : Shape {
  static constexpr bool kFusedDq = true;
};

}  // namespace

const BackwardVariant kBackwardD64 = backward_variant<Shape>("wgmma d64 128x128");
const BackwardVariant kBackwardD64Fused = backward_variant<Fused>("wgmma d64 128x128 fused dq");

}  // namespace flash_attn::sm90
