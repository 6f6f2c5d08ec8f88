// The only header that names torch's C++ API, and of that only the LibTorch stable ABI:
// one binary serves every torch >= 2.10. Launchers include it; kernels never do.
#pragma once
#include <algorithm>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

// csrc/cuda is being compiled: for a GPU, or for its model on the CPU
#if defined(__CUDACC__) || defined(GK_SIM)
#define GK_CUDA
#endif

namespace gk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;
using Shape = torch::headeronly::IntHeaderOnlyArrayRef;

// ---- errors: op, argument, value, limit; no file names, so that a build path never reaches a user ----
template <class... Args> [[noreturn]] inline void fail(const Args&... args) {
  std::ostringstream message;
  (message << ... << args);
  throw std::runtime_error(message.str());
}
#define GK_CHECK(condition, ...)                                    \
  do {                                                              \
    if (__builtin_expect(!(condition), 0)) ::gk::fail(__VA_ARGS__); \
  } while (0)

// A call of torch's C interface, not by torch's own macro: its name is another in 2.10 than in 2.13, and it tells file names.
#define GK_TORCH(call) GK_CHECK((call) == 0, "torch failed in " #call "; what it says of it stands on stderr")

// Tensor::scalar_type(), which asks torch for the number of one dtype after the other at every call.
inline ScalarType dtype_of(const Tensor& t) {
  static const std::pair<int32_t, ScalarType> known[] = {
      {aoti_torch_dtype_float32(), ScalarType::Float}, {aoti_torch_dtype_bfloat16(), ScalarType::BFloat16},
      {aoti_torch_dtype_float16(), ScalarType::Half},  {aoti_torch_dtype_float64(), ScalarType::Double},
      {aoti_torch_dtype_int64(), ScalarType::Long},    {aoti_torch_dtype_bool(), ScalarType::Bool}};
  int32_t number = 0;
  GK_TORCH(aoti_torch_get_dtype(t.get(), &number));
  for (const auto& [code, dtype] : known)
    if (code == number) return dtype;
  return t.scalar_type();
}

inline const char* dtype_name(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Bool: return "bool";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    default: return "another dtype";
  }
}
inline bool is_float_dtype(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::Double || t == ScalarType::BFloat16 || t == ScalarType::Half;
}
// Statistics, accumulators and partial sums: float32, float64 for float64 inputs.
inline ScalarType stat_dtype(ScalarType t) { return t == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

inline std::string shape_text(const Tensor& t) {
  std::ostringstream s;
  s << '(';
  for (int64_t i = 0; i < t.dim(); i++) s << (i ? ", " : "") << t.size(i);
  s << (t.dim() == 1 ? ",)" : ")");
  return s.str();
}

// ---- allocation ----
// Outputs of several megabytes are fresh pages from the system on every call; with 4 KB pages the faults cost more
// than the arithmetic of a memory-bound op. Huge pages are asked for (csrc/cpu/isa.cpp), where the system grants them.
void advise_huge_pages(void* data, int64_t bytes);

inline int64_t element_size(ScalarType t) {
  return t == ScalarType::Double || t == ScalarType::Long ? 8
         : t == ScalarType::Float || t == ScalarType::Int ? 4
         : t == ScalarType::Bool                          ? 1
                                                          : 2;
}
// Uninitialised, on the device of `like`. Not by torch::stable::empty_like, new_empty and transpose: these look their op up by
// name at each call, which takes longer than all of a small op's work; nor is anything asked of torch here that is known.
inline Tensor new_strided(const Tensor& like, Shape shape, Shape strides, ScalarType dtype) {
  AtenTensorHandle handle = nullptr;
#ifdef __CUDACC__
  int32_t device = 0;
  GK_TORCH(aoti_torch_get_device_type(like.get(), &device));
  const int32_t index = like.get_device_index();
#else
  const int32_t device = 0, index = -1;  // the CPU: each launcher has checked its arguments
  (void)like;
#endif
  GK_TORCH(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                                    torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device, index,
                                    &handle));
  Tensor t(handle);
#ifndef GK_CUDA  // csrc/cuda: the memory is a GPU's
  int64_t bytes = element_size(dtype);
  for (const int64_t n : shape) bytes *= n;
  if (bytes >= (int64_t{4} << 20)) advise_huge_pages(t.mutable_data_ptr(), bytes);
#endif
  return t;
}
constexpr size_t most_dims = 64;  // torch's own limit
// The same, contiguous
inline Tensor new_tensor(const Tensor& like, Shape shape, ScalarType dtype) {
  int64_t strides[most_dims], stride = 1;
  for (size_t d = shape.size(); d-- > 0; stride *= std::max<int64_t>(shape[d], 1)) strides[d] = stride;
  return new_strided(like, shape, {strides, shape.size()}, dtype);
}
inline Tensor new_like(const Tensor& like) { return new_tensor(like, like.sizes(), dtype_of(like)); }

using torch::stable::get_num_threads;

}  // namespace gk
