#include "arguments/checks.h"
#include "arguments/given.h"
#include "arguments/refuse.h"
#include "arguments/rotary_arguments.h"
#include "cache.h"
#include "run.h"

namespace flash_attn {

namespace {

RowCopies checked(Given<RotaryArguments>& given) {
  for (const char* name : {"cos", "sin"}) given.make_unit_stride(name);
  return make_rotary_params(given.arguments());
}

}  // namespace

void rotary(StableIValue* values, uint64_t, uint64_t) {
  Given<RotaryArguments> given(values);
  given.describe();
  const TensorInfo x_given = given.arguments().x;
  given.make_unit_stride("x");
  RowCopies copies = checked(given);
  const TensorInfo& x = given.arguments().x;
  NewTensor turned = empty_like_dense(x_given, x.size[x.ndim - 1], "the turned rows");
  copies.copies[0].to = tensor_view(turned.info, false);
  if (turned.tensor.numel() > 0) copy_rows(copies, x);
  put_results(values, std::move(turned.tensor));
}

void rotary_in_place(StableIValue* values, uint64_t, uint64_t) {
  Given<RotaryArguments> given(values);
  given.describe();
  RowCopies copies = checked(given);
  const TensorInfo& x = given.arguments().x;
  if (x.size[x.ndim - 1] > 1 && x.stride[x.ndim - 1] != 1) {
    refuse("x must have a last stride of 1 to be turned in place, but has ", x.stride[x.ndim - 1]);
  }
  check_written("x", x);
  copies.copies[0].to = copies.copies[0].from;
  if (given.first().numel() > 0) copy_rows(copies, x);
}

}  // namespace flash_attn
