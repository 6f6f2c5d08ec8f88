// Compiles the kernels of a file once per instruction set, each time inside its own namespace, and picks one at run time.
//
//   #ifndef GK_TARGET           // launchers: compiled once
//   #define GK_FILE "op.cpp"
//   #include "foreach_target.h"
//   ... GK_BEST(kernel)(args) ...
//   #else                       // kernels: compiled once per target
//   namespace GK_TARGET { static void kernel(args) {...} }
//   #endif
//
// Everything in the per-target part must be static (or in an anonymous namespace): the linker keeps one copy of an
// inline function shared between targets, and it could be the AVX-512 one, which kills an older CPU. For the same
// reason kernels use no std:: functions.
//
// On other architectures, and with compilers that lack the target pragma, there is `base` alone.

#include "isa.h"

#define GK_TARGET base
#define GK_BYTES 16
#include GK_FILE
#undef GK_TARGET
#undef GK_BYTES

#if GK_X86_TARGETS
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define GK_TARGET avx2
#define GK_BYTES 32
#include GK_FILE
#undef GK_TARGET
#undef GK_BYTES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")
#define GK_TARGET avx512
#define GK_BYTES 64
#include GK_FILE
#undef GK_TARGET
#undef GK_BYTES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")
#define GK_TARGET avx512_bf16
#define GK_BYTES 64
#define GK_BF16 1
#include GK_FILE
#undef GK_TARGET
#undef GK_BYTES
#undef GK_BF16
#pragma GCC pop_options
#define GK_BEST(...)                                  \
  (::gk::isa_level >= 3   ? &avx512_bf16::__VA_ARGS__ \
   : ::gk::isa_level == 2 ? &avx512::__VA_ARGS__      \
   : ::gk::isa_level == 1 ? &avx2::__VA_ARGS__        \
                          : &base::__VA_ARGS__)
#else
#define GK_BEST(...) (&base::__VA_ARGS__)
#endif
