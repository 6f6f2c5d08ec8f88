// A driver without a GPU for Triton's launcher: it runs nothing, tells a hook of every launch and refuses what a driver refuses.
#include <cuda.h>
#include <stdio.h>
#include <string.h>

enum { KERNELS = 4096, DEFAULT_SHARED = 48 * 1024 };
static int capability, shared_limit, processors;
static struct {
  char name[128];
  int shared;
} kernels[KERNELS];
static int count;
static void** parameters;
static char reason[256];
static void (*hook)(int, unsigned, unsigned, unsigned, unsigned);

#define REFUSE(...) return snprintf(reason, sizeof reason, __VA_ARGS__), CUDA_ERROR_INVALID_VALUE
// clang-format off
#define YES(...) { __VA_ARGS__; return CUDA_SUCCESS; }

void pretend(int cc, int shared, int sms, void (*h)(int, unsigned, unsigned, unsigned, unsigned)) {
  capability = cc, shared_limit = shared, processors = sms, hook = h;
}
const char* pretend_reason(void) { return reason; }
const char* pretend_name(int kernel) { return kernels[kernel].name; }
void pretend_read(int i, void* to, int bytes) { memcpy(to, parameters[i], bytes); }

CUresult cuInit(unsigned flags) YES()
CUresult cuDriverGetVersion(int* v) YES(*v = 13000)
CUresult cuDeviceGetCount(int* n) YES(*n = 1)
CUresult cuDeviceGet(CUdevice* d, int i) YES(*d = i)
CUresult cuDeviceGetAttribute(int* v, CUdevice_attribute a, CUdevice d) {
  switch (a) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *v = capability / 10; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *v = capability % 10; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *v = processors; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *v = 32; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *v = 65536; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *v = shared_limit; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *v = shared_limit + 1024; break;
    default: *v = 1;
  }
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* c) YES(*c = (CUcontext)1)
CUresult cuCtxSetCurrent(CUcontext c) YES()
CUresult cuCtxGetDevice(CUdevice* d) YES(*d = 0)
CUresult cuCtxGetLimit(size_t* v, CUlimit l) YES(*v = 0)
CUresult cuCtxSetLimit(CUlimit l, size_t v) YES()
CUresult cuDevicePrimaryCtxRetain(CUcontext* c, CUdevice d) YES(*c = (CUcontext)1)
CUresult cuStreamIsCapturing(CUstream s, CUstreamCaptureStatus* v) YES(*v = CU_STREAM_CAPTURE_STATUS_NONE)
CUresult cuModuleLoadData(CUmodule* m, const void* image) YES(*m = (CUmodule)1)
CUresult cuModuleUnload(CUmodule m) YES()
CUresult cuModuleGetFunction(CUfunction* f, CUmodule m, const char* name) {
  if (++count == KERNELS) REFUSE("more than %d kernels", KERNELS);
  snprintf(kernels[count].name, sizeof kernels[count].name, "%s", name);
  kernels[count].shared = DEFAULT_SHARED;
  *f = (CUfunction)(size_t)count;
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* v, CUfunction_attribute a, CUfunction f) YES(*v = a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0)
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) {
  if (a == CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED) return CUDA_SUCCESS;
  if (a != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) REFUSE("attribute %d, of a newer driver", (int)a);
  if (v > shared_limit) REFUSE("%d bytes of shared memory asked for, the limit is %d", v, shared_limit);
  kernels[(size_t)f].shared = v;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache c) YES()
CUresult cuGetErrorString(CUresult e, const char** s) YES(*s = reason)
CUresult cuPointerGetAttribute(void* v, CUpointer_attribute a, CUdeviceptr p) YES(*(CUdeviceptr*)v = p)
CUresult cuOccupancyMaxActiveClusters(int* n, CUfunction f, const CUlaunchConfig* c) YES(*n = 1)
CUresult cuTensorMapEncodeIm2col(CUtensorMap* m, CUtensorMapDataType type, cuuint32_t rank, void* base, const cuuint64_t* size,
    const cuuint64_t* stride, const int* low, const int* high, cuuint32_t channels, cuuint32_t pixels, const cuuint32_t* step,
    CUtensorMapInterleave i, CUtensorMapSwizzle w, CUtensorMapL2promotion p, CUtensorMapFloatOOBfill f) {
  REFUSE("no kernel here uses im2col");
}
// the rules of the driver API's manual; the map holds what was asked for
CUresult cuTensorMapEncodeTiled(CUtensorMap* m, CUtensorMapDataType type, cuuint32_t rank, void* base, const cuuint64_t* size,
    const cuuint64_t* stride, const cuuint32_t* box, const cuuint32_t* step, CUtensorMapInterleave i, CUtensorMapSwizzle swizzle,
    CUtensorMapL2promotion p, CUtensorMapFloatOOBfill f) {
  int bytes = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 ? 2 : 4;
  if (capability < 90) REFUSE("a tensor map on sm_%d", capability);
  if ((size_t)m % 64) REFUSE("tensor map at %p, not a multiple of 64", (void*)m);
  if ((size_t)base % 16) REFUSE("base at %p, not a multiple of 16", base);
  if (rank < 1 || rank > 5) REFUSE("rank %u", rank);
  unsigned width = box[0] * bytes, span = swizzle == CU_TENSOR_MAP_SWIZZLE_32B ? 32 : swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 64
      : swizzle == CU_TENSOR_MAP_SWIZZLE_128B ? 128 : 0;
  if (width % 16 || (span && width > span)) REFUSE("a box %u bytes wide in a swizzle of %u", width, span);
  memset(m, 0, sizeof *m);
  memcpy(m, &base, 8);
  unsigned* rest = (unsigned*)m + 2;
  *rest++ = rank << 16 | type << 8 | swizzle;
  for (unsigned d = 0; d < rank; d++) {
    if (size[d] < 1 || size[d] > 1ull << 32) REFUSE("size %llu of dimension %u", (unsigned long long)size[d], d);
    if (box[d] < 1 || box[d] > 256 || step[d] != 1) REFUSE("box %u, step %u of dimension %u", box[d], step[d], d);
    if (d + 1 < rank && (stride[d] % 16 || stride[d] >= 1ull << 40)) REFUSE("stride %llu", (unsigned long long)stride[d]);
    *rest++ = size[d], *rest++ = box[d], *rest++ = d + 1 < rank ? stride[d] : 0;
  }
  return CUDA_SUCCESS;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction f, void** params, void** extra) {
  unsigned threads = c->blockDimX * c->blockDimY * c->blockDimZ;
  if (!c->gridDimX || !c->gridDimY || !c->gridDimZ || c->gridDimX > 2147483647u || c->gridDimY > 65535 || c->gridDimZ > 65535)
    REFUSE("grid %u %u %u", c->gridDimX, c->gridDimY, c->gridDimZ);
  if (!threads || threads > 1024) REFUSE("%u threads", threads);
  if ((int)c->sharedMemBytes > kernels[(size_t)f].shared)
    REFUSE("%u bytes of shared memory, %d were asked for", c->sharedMemBytes, kernels[(size_t)f].shared);
  parameters = params;
  if (hook) hook((int)(size_t)f, c->gridDimX, threads, c->sharedMemBytes, (unsigned)(size_t)c->hStream);
  return CUDA_SUCCESS;
}
// clang-format on
