#include "../single/launch.h"

namespace flash_attn::cuda::sm90::backward {
namespace {

struct D64 : single::Shape {
  static constexpr int kHeadDim = 64, kBlockM = 128, kStagesKV = 2;
  static constexpr DqPath kDqPath = DqPath::kRegisters;
};

struct D64Fused : D64 {
  static constexpr DqPath kDqPath = DqPath::kOneCta;
};

}  // namespace

const Variant kD64 = single::make_variant<D64>("wgmma d64 128x128");
const Variant kD64Fused = single::make_variant<D64Fused>("wgmma d64 128x128 fused dq");
const Variant kD64Band = single::make_band_variant<D64>("wgmma d64 128x128 band");

}  // namespace flash_attn::cuda::sm90::backward
