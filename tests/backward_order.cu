// The order of the Hopper backward kernels' tiles (csrc/cuda/sm90/backward/schedule/order.h) for random problems, on
// the host: no tile waits for one that comes after it, or the kernel would hang. The planner is the real one; what it
// launches is caught here.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../csrc/cuda/mask/band.h"
#include "../csrc/cuda/mask/packed_mask.h"
#include "../csrc/cuda/sm80/sm80.h"
#include "../csrc/cuda/sm90/backward/extended/classes.h"
#include "../csrc/cuda/sm90/backward/extended/reductions.h"
#include "../csrc/cuda/sm90/backward/launch.h"
#include "../csrc/cuda/sm90/backward/postprocess/postprocess.h"
#include "../csrc/cuda/sm90/backward/schedule/order.h"
#include "../csrc/cuda/sm90/hopper/tensor_map.h"

namespace flash_attn::cuda::sm90::backward {
namespace {

struct Caught {
  KernelParams kernel;
  PackedBlocksParams packed;
};
Caught caught;

void catch_kernel(const KernelParams& params, int, cudaStream_t) { caught.kernel = params; }

/// As the kernels' own files describe them, where planning looks.
constexpr Variant variant(const char* name, int head_dim, int head_dim_v, int block_m, int cluster) {
  Variant v{};
  v.name = name;
  v.head_dim = head_dim;
  v.head_dim_v = head_dim_v;
  v.dq_columns = head_dim > 128 ? 256 : (head_dim + 63) / 64 * 64;
  v.block_m = block_m;
  v.block_n = 128;
  v.map_rows = v.block_n / cluster;
  v.cluster = cluster;
  v.dq_path = cluster == 1 && block_m < v.block_n ? DqPath::kWarp : DqPath::kRegisters;
  v.descends = block_m < v.block_n;
  v.launch = v.launch_row_parts = {catch_kernel, catch_kernel};
  return v;
}

constexpr Variant extended_variant(const char* name, int head_dim, int block_m, int cluster, bool takes_bias = true) {
  Variant v = variant(name, head_dim, head_dim, block_m, cluster);
  v.extended = true;
  v.takes_bias = takes_bias;
  v.many_registers = block_m == 64;
  return v;
}

constexpr Variant fused_variant() {
  Variant v = variant("d64 fused", 64, 64, 128, 1);
  v.dq_path = DqPath::kOneCta;
  return v;
}

}  // namespace

extern const Variant kD64 = variant("d64", 64, 64, 128, 1);
extern const Variant kD64Fused = fused_variant();
extern const Variant kD96 = variant("d96", 96, 96, 64, 1);
extern const Variant kD128 = variant("d128", 128, 128, 64, 1);
extern const Variant kD64Extended = extended_variant("d64 extended", 64, 128, 1, false);
extern const Variant kD64Biased = extended_variant("d64 biased", 64, 128, 1);
extern const Variant kD96Extended = extended_variant("d96 extended", 96, 64, 1);
extern const Variant kD128Extended = extended_variant("d128 extended", 128, 64, 1);
extern const Variant kD192Extended = extended_variant("d192 extended", 192, 64, 2);
extern const Variant kD256Extended = extended_variant("d256 extended", 256, 64, 2);
extern const Variant kD192Dmask = extended_variant("d192 dmask", 192, 64, 2);
extern const Variant kD256Dmask = extended_variant("d256 dmask", 256, 64, 2);
extern const Variant kD192V128 = variant("d192-128", 192, 128, 64, 2);
extern const Variant kD192 = variant("d192", 192, 192, 64, 2);
extern const Variant kD256 = variant("d256", 256, 256, 64, 2);
extern const Variant kD64Band = variant("d64 band", 64, 64, 128, 1);
extern const Variant kD96Band = variant("d96 band", 96, 96, 64, 1);
extern const Variant kD128Band = variant("d128 band", 128, 128, 64, 1);
extern const Variant kD192Band = variant("d192 band", 192, 192, 64, 2);
extern const Variant kD256Band = variant("d256 band", 256, 256, 64, 2);

}  // namespace flash_attn::cuda::sm90::backward
namespace flash_attn::cuda::sm90 {

TensorMapSource query_rows(const ForwardParams&, const TensorView&, int64_t) { return {}; }
TensorMapSource key_rows(const ForwardParams&, const TensorView&, int64_t, int64_t) { return {}; }
CUtensorMap make_tensor_map(const TensorMapSource&, int) { return {}; }
CUtensorMap make_mask_map(const MaskView&, int) { return {}; }
bool has_mask_map(const ForwardParams&) { return false; }  // no problem here has a bias

}  // namespace flash_attn::cuda::sm90
namespace flash_attn::cuda {

// What only problems with attn_mask and gradients of slopes and sinks call.
namespace mask {
PackedMask pack(const MaskView&, void*, cudaStream_t, const KindPlace&) { return {}; }
KnownMask pack_with_kind(const MaskView&, void*, cudaStream_t, bool) { return {}; }
}  // namespace mask
namespace sm80 {
const BackwardKernel kBackward = {};
}  // namespace sm80
void check(cudaError_t, const char*) {}

}  // namespace flash_attn::cuda
namespace flash_attn::cuda::sm90::backward {

void launch_preprocess(const RowsParams& params, cudaStream_t) { caught.packed = params.packed_blocks; }
void launch_convert_dq(const RowsParams&, cudaStream_t) {}
void launch_add_parts(const PartsParams&, const mask::KindCondition&, cudaStream_t) {}
int64_t num_tile_classes(const MaskView&, int) { return 0; }
TileClasses place_tile_classes(const MaskView&, int, uint8_t*, uint32_t*) { return {}; }
void fill_tile_classes(const MaskView&, const mask::PackedMask&, int, const TileClasses&, const mask::KindCondition&,
                       cudaStream_t) {}
void reduce_slopes(const BackwardParams&, const SlopeSums&, cudaStream_t) {}
void reduce_sinks(const RowsParams&, cudaStream_t) {}

namespace {

void require(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(what);
}

/// Which paths the problems took, in this order in check_backward_order.
struct Counts {
  int turns, prepared, written, last_group, packed, packed_prepared, packed_written, row_parts;
};

class Random {
 public:
  explicit Random(unsigned seed) : generator_(seed) {}
  int64_t between(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator_); }
  bool one_in(int n) { return between(1, n) == 1; }

 private:
  std::mt19937 generator_;
};

BackwardParams random_problem(Random& random) {
  BackwardParams params{};
  ForwardParams& p = params.forward;
  const int64_t longest = int64_t{1} << random.between(6, 13);
  p.seqlen_q = p.seqlen_k = random.between(1, longest);
  if (random.one_in(3)) p.seqlen_k = random.between(1, longest);
  constexpr int kHeadDims[] = {64, 96, 128, 192, 256};
  p.head_dim = p.head_dim_v = kHeadDims[random.between(0, 4)];
  if (p.head_dim == 192 && random.one_in(2)) p.head_dim_v = 128;
  p.num_heads_k = random.between(1, 16);
  p.num_heads = p.num_heads_k * (random.one_in(2) ? 1 : random.between(1, 8));
  p.batch = random.between(1, 1 + 250000 / (p.seqlen_k * p.num_heads_k));
  p.batch = std::min<int64_t>(p.batch, 64);
  if (random.one_in(5)) p.batch = 1, p.num_heads_k = p.num_heads = random.between(1, 4);  // few tiles
  p.total_q = p.batch * p.seqlen_q;
  p.total_k = p.batch * p.seqlen_k;
  if (random.one_in(4)) p.softcap = 1;  // a kernel of extended/
  p.window_left = p.window_right = -1;
  if (!random.one_in(3)) {
    p.window_right = 0;
    p.causal = random.one_in(2) ? Causal::kTopLeft : Causal::kBottomRight;
    if (random.one_in(4)) {
      p.window_left = random.one_in(2) ? -1 : random.between(0, 2000);
      p.window_right = random.between(0, 2000);
    }
  }
  p.deterministic = random.one_in(2);
  p.softcap = p.head_dim <= 128 && random.one_in(5) ? 30.0 : 0.0;
  p.dtype = DType::kBFloat16;
  p.softmax_scale = 0.1;
  static char somewhere[256];
  p.workspace = somewhere;  // nothing is written
  params.dq.data = params.dk.data = params.dv.data = somewhere;
  return params;
}

/// Of a head's tiles in their order: in a fixed order a tile waits for its neighbours on one side.
void check_turns(const KernelParams& kernel, const std::vector<TilePlace>& tiles, int64_t heads) {
  std::vector<int> last(heads, -1);
  for (const TilePlace& at : tiles) {
    const bool rising = !kernel.schedule.falling || at.in_last;
    int& before = last[at.batch_head];
    require(before < 0 || (rising ? at.n_block > before : at.n_block < before), "a tile waits for a later one's turn");
    before = at.n_block;
  }
}

void check_preparation(const KernelParams& kernel, const std::vector<TilePlace>& tiles) {
  const int ahead = kernel.preparation.ahead;
  for (int i = 0; i < static_cast<int>(tiles.size()); ++i) {
    const int end = tiles[i].first + tiles[i].count;
    if (end > ahead) require(end - 1 - ahead < i, "rows prepared by a later tile");
  }
}

void check_writing(const KernelParams& kernel, const std::vector<TilePlace>& tiles, const std::vector<int>& index_of) {
  const DqWriting& writing = kernel.dq_writing;
  for (int64_t i = 0; i + writing.lag < static_cast<int64_t>(tiles.size()); ++i) {
    const int end = writing.by_last_block ? tiles[i].number() + 1 : tiles[i].first + tiles[i].count;
    for (int number = tiles[i].first; number < end; ++number) {
      require(index_of[number] <= i + writing.lag, "a share to which a later tile adds");
    }
  }
}

/// `lengths`: rows of k of each sequence.
void check_tiles(const Plan& plan, const std::vector<int>& lengths, Counts& counts) {
  const KernelParams& kernel = caught.kernel;
  const int all_heads = kernel.split.heads.value, block_n = plan.variant->block_n;
  const int64_t heads = static_cast<int64_t>(lengths.size()) * all_heads;
  const int count = count_tiles(kernel);
  std::vector<TilePlace> tiles;
  std::vector<int> index_of(count, -1);
  for (int i = 0; i < count; ++i) {
    TilePlace at, same;
    require(find_place(kernel, i, at), "so many tiles");
    require(at.batch_head >= 0 && at.batch_head < heads, "no such head");
    require(at.count == (lengths[at.batch_head / all_heads] + block_n - 1) / block_n, "so many tiles of a head");
    require(at.n_block >= 0 && at.n_block < at.count, "no such tile");
    require(at.number() >= 0 && at.number() < count, "no such number");
    require(index_of[at.number()] < 0, "a tile twice");
    require(find_number(kernel, at.number(), same) && same.n_block == at.n_block && same.batch_head == at.batch_head &&
                same.first == at.first && same.count == at.count,
            "another tile has this number");
    index_of[at.number()] = i;
    tiles.push_back(at);
    counts.last_group += i > 0 && at.in_last && !tiles[i - 1].in_last;
  }
  if (plan.dq.is_ordered()) check_turns(kernel, tiles, heads);
  if (kernel.preparation.enabled() && plan.variant->dq_path != DqPath::kOneCta) check_preparation(kernel, tiles);
  if (kernel.dq_writing.enabled()) check_writing(kernel, tiles, index_of);
  counts.turns += plan.dq.is_ordered();
  counts.prepared += kernel.preparation.enabled();
  counts.written += kernel.dq_writing.enabled();
  counts.row_parts += plan.split.row_parts > 1;
}

void check_dense(const BackwardParams& params, const Plan& plan, Counts& counts) {
  const KernelParams& kernel = caught.kernel;
  const int64_t heads = params.forward.batch * kernel.split.heads.value;
  require(kernel.schedule.num_tiles == heads * kernel.schedule.num_n_blocks, "so many tiles");
  const int64_t parts = kernel.split.row_parts.value;
  require(heads * kernel.split.heads_of_tile == params.forward.batch * params.forward.num_heads * parts,
          "so many query heads");
  require(parts * kernel.split.part_blocks >= kernel.num_m_blocks, "rows of no part");
  require(parts == 1 || (parts - 1) * kernel.split.part_blocks < kernel.num_m_blocks, "a part without rows");
  require(parts == 1 || kernel.split.part_blocks % 2 == 0, "a turn of two parts");
  check_tiles(plan, std::vector<int>(params.forward.batch, static_cast<int>(params.forward.seqlen_k)), counts);
}

/// As the device lists them.
std::vector<PackedBlock> list_blocks(const std::vector<int>& lengths, const PackedBlocksParams& packed) {
  const auto blocks = [&](int rows) { return (rows + packed.block_n - 1) / packed.block_n; };
  int all = 0, first = 0;
  for (int rows : lengths) all += blocks(rows);
  std::vector<PackedBlock> list;
  for (int b = 0; b < static_cast<int>(lengths.size()); ++b) {
    const int count = blocks(lengths[b]);
    list.insert(list.end(), count, {b, first, count, all - first - count < packed.last_blocks});
    first += count;
  }
  require(all <= packed.num_blocks, "no room for the list");
  list.resize(packed.num_blocks, {-1, 0, 0, 0});
  list.push_back({-1, all, 0, 0});
  return list;
}

void check_packed(Random& random, const BackwardParams& params, const Plan& plan, Counts& counts) {
  const ForwardParams& p = params.forward;
  KernelParams& kernel = caught.kernel;
  std::vector<int> lengths(p.batch);
  for (int& rows : lengths) rows = static_cast<int>(random.one_in(4) ? 0 : random.between(1, p.seqlen_k));
  const std::vector<PackedBlock> list = list_blocks(lengths, caught.packed);
  kernel.schedule.packed_blocks = list.data();
  require(kernel.schedule.num_key_blocks == caught.packed.num_blocks, "so many blocks of keys");
  require(count_tiles(kernel) <= kernel.schedule.num_tiles, "too few tickets");
  const int prepared = counts.prepared, written = counts.written;
  check_tiles(plan, lengths, counts);
  ++counts.packed;
  counts.packed_prepared += counts.prepared - prepared;
  counts.packed_written += counts.written - written;
}

std::string describe(const BackwardParams& params, const DeviceInfo& device) {
  const ForwardParams& p = params.forward;
  char text[256];
  std::snprintf(text, sizeof text,
                "batch %d, heads %d on %d, %d x %d rows, head dim %d-%d, window (%d, %d)%s%s, %d SMs", int(p.batch),
                int(p.num_heads), int(p.num_heads_k), int(p.seqlen_q), int(p.seqlen_k), int(p.head_dim),
                int(p.head_dim_v), int(p.window_left), int(p.window_right), p.deterministic ? ", deterministic" : "",
                p.is_varlen_k() ? ", packed" : "", device.num_sms);
  return text;
}

}  // namespace
}  // namespace flash_attn::cuda::sm90::backward

/// What is wrong, and with which problem; empty if nothing. `counts` (8) as in Counts.
extern "C" __attribute__((visibility("default"))) const char* check_backward_order(int problems, unsigned seed,
                                                                                   int* counts) {
  using namespace flash_attn;
  using namespace flash_attn::cuda::sm90::backward;
  static std::string wrong;
  Random random(seed);
  Counts counted{};
  for (int i = 0; i < problems; ++i) {
    DeviceInfo device{90, random.one_in(3) ? int(random.between(1, 140)) : 132, 232448, 60 << 20};
    BackwardParams params = random_problem(random);
    static const int lengths = 0;  // planning looks at the pointer alone
    if (random.one_in(3)) {
      ForwardParams& p = params.forward;
      p.cu_seqlens_q = p.cu_seqlens_k = &lengths;
      if (random.one_in(2)) p.seqlen_q = p.seqlen_k, p.total_q = p.total_k;
    }
    const Plans plans = choose_plans(params, device);
    const auto& plan = plans.plan;
    try {
      launch_plans(plans, params, device, nullptr);
      params.forward.is_varlen_k() ? check_packed(random, params, plan, counted) : check_dense(params, plan, counted);
    } catch (const std::exception& error) {
      wrong = std::string(error.what()) + ": " + describe(params, device);
      return wrong.c_str();
    }
  }
  const int all[] = {counted.turns,  counted.prepared,        counted.written,        counted.last_group,
                     counted.packed, counted.packed_prepared, counted.packed_written, counted.row_parts};
  std::copy(std::begin(all), std::end(all), counts);
  return "";
}
