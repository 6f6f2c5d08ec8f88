// The one way to launch a kernel, on a GPU and in csrc/sim; nothing of torch.
#pragma once
#include <tuple>

#include "ptx.cuh"

namespace gk {

template <class... P> struct Kernel {
  const char* name;
  void (*function)(P...);
};
template <class... P> Kernel<P...> named(const char* name, void (*function)(P...)) { return {name, function}; }
#define GK_KERNEL(...) ::gk::named(#__VA_ARGS__, __VA_ARGS__)  // gk::launch(GK_KERNEL(softmax_fwd<T, 4>), grid, block, ...)

void launch_raw(const char* name, const void* function, dim3 grid, dim3 block, size_t shared, cudaStream_t stream, void** args);

// The one way to launch. An empty grid is no launch; a refused one is an exception that names kernel, grid, block, memory.
template <class... P, class... A>
void launch(const Kernel<P...>& kernel, dim3 grid, dim3 block, size_t shared, cudaStream_t stream, const A&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  std::tuple<P...> values(static_cast<P>(args)...);
  const auto start = [&](auto... pointer) {
    void* pointers[] = {pointer...};
    launch_raw(kernel.name, reinterpret_cast<const void*>(kernel.function), grid, block, shared, stream, pointers);
  };
#ifdef GK_SIM
  auto body = [&] { std::apply(kernel.function, values); };
  sim::Call call{kernel.name, [](void* f) { (*static_cast<decltype(body)*>(f))(); }, &body};
  start(&call);
#else
  std::apply([&](auto&... value) { start(const_cast<void*>(static_cast<const void*>(&value))...); }, values);
#endif
}

}  // namespace gk
