#include "cache.h"

#include "../gathered_cache.h"
#include "arguments/cache_arguments.h"
#include "arguments/given.h"
#include "run.h"

namespace flash_attn {

namespace {

/// Over caches in q's dtype.
void run_over_cache(const Backend& backend, ForwardParams& params, const TensorInfo& q_given) {
  if (!gathers_cache(params, backend.forward, backend.device_info(params.device_index))) {
    return run(backend.forward, backend, params, q_given);
  }
  GatheredCache gathered(params);
  const NewTensor copies = empty_contiguous(1, &gathered.bytes, DType::kOther, q_given, "copies of the cache's rows");
  gathered.place(copies.info.data);
  {
    const DeviceScope scope(backend, params.device_index);
    backend.gather_keys(gathered.gather, scope.stream());
  }
  run(backend.forward, backend, gathered.params, q_given);
}

void run_over_cache(const Backend& backend, Float8Params& params, const TensorInfo& q_given) {
  run(backend.float8, backend, params, q_given);
}

template <typename Params>
Results attend(const Backend& backend, Params params, const TensorInfo& q_given) {
  Results results = empty_results(params, q_given, /*heads_first=*/false);
  if (results.lse.numel() > 0) run_over_cache(backend, params, q_given);
  return results;
}

}  // namespace

void attend_cache(StableIValue* values, uint64_t, uint64_t) {
  Given<CacheArguments> given(values);
  given.describe();
  const TensorInfo q_given = given.arguments().q;
  given.make_unit_stride("q");
  const CacheArguments& arguments = given.arguments();
  const ForwardParams params = make_cache_params(arguments);
  const Backend& backend = backend_of(params.device);
  Results results = is_float8(arguments.k_cache) ? attend(backend, make_float8_params(arguments, params), q_given)
                                                 : attend(backend, params, q_given);
  put_results(values, std::move(results.out), std::move(results.lse));
}

void append_and_attend(StableIValue* values, uint64_t, uint64_t) {
  Given<AppendArguments> given(values);
  given.describe();
  const TensorInfo q_given = given.arguments().q;
  for (const char* name : {"q", "k", "v", "rotary_cos", "rotary_sin"}) given.make_unit_stride(name);
  const AppendArguments& arguments = given.arguments();
  const CacheArguments attention = arguments.attention();
  // All that may be refused is, before the cache is written to.
  const RowCopies append = make_append_params(arguments);
  ForwardParams params = make_cache_params(attention);
  RowCopies turn = make_turned_query_params(arguments);
  const Backend& backend = backend_of(params.device);
  const bool float8 = is_float8(arguments.k_cache);
  if (float8) {  // which not every GPU takes, and no head dimension but some
    select_kernel(backend.float8, make_float8_params(attention, params), backend.device_info(params.device_index));
  }
  if (append.batch * append.rows > 0) copy_rows(append, arguments.k_cache);
  NewTensor turned_q;
  if (turn.count > 0 && turn.batch * turn.rows > 0) {
    turned_q = empty_like_dense(q_given, q_given.size[3], "the turned queries");
    params.q = turn.copies[0].to = tensor_view(turned_q.info, false);
    copy_rows(turn, arguments.q);
  }
  Results results =
      float8 ? attend(backend, make_float8_params(attention, params), q_given) : attend(backend, params, q_given);
  put_results(values, std::move(results.out), std::move(results.lse));
}

}  // namespace flash_attn
