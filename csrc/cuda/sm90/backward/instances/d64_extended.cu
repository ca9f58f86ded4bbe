#include "../extended/launch.h"

namespace flash_attn::cuda::sm90::backward {
namespace {

struct D64 : single::Shape {
  static constexpr int kHeadDim = 64, kBlockM = 128, kStagesKV = 2;
  static constexpr DqPath kDqPath = DqPath::kRegisters;
};

struct D64Biased : D64 {
  static constexpr int kStagesKV = 1;
};

}  // namespace

const Variant kD64Extended = extended::make_variant<D64, false>("wgmma d64 128x128 extended");
const Variant kD64Biased = extended::make_variant<D64Biased>("wgmma d64 128x128 extended biased");

}  // namespace flash_attn::cuda::sm90::backward
