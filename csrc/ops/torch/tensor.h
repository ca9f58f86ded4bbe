// A tensor of torch's that the ops own. torch::stable::Tensor is one that is shared, which a small call has no use for:
// each of a dozen would allocate a count of its owners.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <utility>

namespace flash_attn {

class Tensor {
 public:
  /// None, which Python sees as such where the schema has a tensor.
  Tensor() = default;
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {}
  Tensor(Tensor&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  ~Tensor() {
    if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
  }

  AtenTensorHandle handle() const { return handle_; }
  AtenTensorHandle release() && { return std::exchange(handle_, nullptr); }

  /// Whether it is one: what autograd saved may be a tensor of torch's that is none.
  bool is_defined() const {
    bool is_defined = false;
    if (handle_ != nullptr) check(aoti_torch_is_defined(handle_, &is_defined));
    return is_defined;
  }
  void* data() const {
    void* data = nullptr;
    check(aoti_torch_get_data_ptr(handle_, &data));
    return data;
  }
  int64_t numel() const {
    int64_t numel = 0;
    check(aoti_torch_get_numel(handle_, &numel));
    return numel;
  }

  /// Another owner of the same tensor, for torch's own ops.
  torch::stable::Tensor shared() const {
    AtenTensorHandle handle = nullptr;
    check(aoti_torch_new_tensor_handle(handle_, &handle));
    return torch::stable::Tensor(handle);
  }
  explicit Tensor(const torch::stable::Tensor& tensor) { check(aoti_torch_new_tensor_handle(tensor.get(), &handle_)); }

  /// Of a function of torch's that answers by a code: what went wrong it has printed.
  static void check(AOTITorchError error) {
    if (error != 0) throw std::runtime_error("flash_attn: torch does not say what a tensor is");
  }

 private:
  AtenTensorHandle handle_ = nullptr;
};

using OptionalTensor = std::optional<Tensor>;

}  // namespace flash_attn
