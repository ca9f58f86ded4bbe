#include "../extended/launch.h"

namespace flash_attn::cuda::sm90::backward {
namespace {

struct D64 : single::Shape {
  static constexpr int kHeadDim = 64, kBlockM = 128, kStagesKV = 1;
  static constexpr DqPath kDqPath = DqPath::kRegisters;
};

}  // namespace

const Variant kD64Extended = extended::make_variant<D64>("wgmma d64 128x128 extended");

}  // namespace flash_attn::cuda::sm90::backward
