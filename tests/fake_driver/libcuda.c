/* A libcuda that launches nothing: it counts, remembers, and fails when told to.

   Triton's own launcher links against it. NUM_DEVICES devices, a context for each. As on a GPU a thread has a
   current context, and a kernel or a stream of another one is refused. A stream's handle is its device + 1. */
#include <stdint.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, INVALID_HANDLE = 400 };
enum { NUM_DEVICES = 2, MAX_KERNELS = 4096, MAX_LAUNCHES = 1 << 16, MAX_NAME = 128 };

typedef int CUresult;
/* the head of CUlaunchConfig */
typedef struct {
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared;
  void *stream;
} Config;
typedef struct {
  char name[MAX_NAME];
  int device;
} Kernel;
typedef struct {
  int kernel, device;
  unsigned grid, threads, shared;
} Launch;

static __thread uintptr_t current; /* device + 1, or 0 before the first */
static int num_kernels;
static Kernel kernels[MAX_KERNELS];
static long num_launches;
static Launch launches[MAX_LAUNCHES];
static int load_error, launch_error;

/* what tests ask for */
void fake_set_device(int device) { current = device + 1; }
int fake_get_device(void) { return current ? current - 1 : 0; }
long fake_num_launches(void) { return num_launches; }
const Launch *fake_launch(long i) { return &launches[i % MAX_LAUNCHES]; }
const char *fake_kernel_name(int kernel) { return kernels[kernel].name; }
void fake_fail(int load, int launch) { load_error = load, launch_error = launch; }

/* what Triton asks for */
CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = error == INVALID_HANDLE ? "invalid resource handle" : error == 2 ? "out of memory" : "error of the fake driver";
  return SUCCESS;
}
CUresult cuDriverGetVersion(int *version) {
  *version = 13000;
  return SUCCESS;
}
CUresult cuDeviceGet(int *device, int ordinal) {
  *device = ordinal;
  return ordinal < NUM_DEVICES ? SUCCESS : INVALID_VALUE;
}
CUresult cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case 8: *value = 48 * 1024; break;   /* shared memory of a program */
    case 97: *value = 227 * 1024; break; /* the same, opted in */
    case 10: *value = 32; break;         /* threads of a warp */
    case 16: *value = 132; break;        /* multiprocessors */
    default: *value = 65536;
  }
  return SUCCESS;
}
CUresult cuCtxGetCurrent(void **context) {
  *context = (void *)current;
  return SUCCESS;
}
CUresult cuCtxSetCurrent(void *context) {
  current = (uintptr_t)context;
  return SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(void **context, int device) {
  *context = (void *)(uintptr_t)(device + 1);
  return SUCCESS;
}
CUresult cuModuleLoadData(void **module, const void *image) {
  *module = (void *)current;
  return load_error;
}
CUresult cuModuleGetFunction(void **function, void *module, const char *name) {
  if (num_kernels + 1 == MAX_KERNELS) return INVALID_VALUE;
  Kernel *kernel = &kernels[++num_kernels]; /* 0 would be no handle */
  strncpy(kernel->name, name, MAX_NAME - 1);
  kernel->device = (uintptr_t)module - 1;
  *function = (void *)(uintptr_t)num_kernels;
  return SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, int attribute, void *function) {
  *value = attribute == 0 ? 1024 : 0; /* threads of a program */
  return SUCCESS;
}
CUresult cuFuncSetAttribute(void *function, int attribute, int value) { return SUCCESS; }
CUresult cuFuncSetCacheConfig(void *function, int config) { return SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, int limit) {
  *value = 0;
  return SUCCESS;
}
CUresult cuCtxSetLimit(int limit, size_t value) { return SUCCESS; }
CUresult cuPointerGetAttribute(void *value, int attribute, uint64_t pointer) {
  *(uint64_t *)value = pointer;
  return SUCCESS;
}
CUresult cuLaunchKernelEx(const Config *config, void *function, void **parameters, void **extra) {
  int number = (uintptr_t)function;
  if (launch_error) return launch_error;
  if (number <= 0 || number > num_kernels) return INVALID_HANDLE;
  if (kernels[number].device + 1 != (int)current || config->stream != (void *)current) return INVALID_HANDLE;
  Launch *launch = &launches[num_launches++ % MAX_LAUNCHES];
  launch->kernel = number;
  launch->device = kernels[number].device;
  launch->grid = config->grid_x * config->grid_y * config->grid_z;
  launch->threads = config->block_x;
  launch->shared = config->shared;
  return SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int *count, void *function, const void *config) {
  *count = 132;
  return SUCCESS;
}
CUresult cuTensorMapEncodeTiled(void *map, ...) {
  memset(map, 0, 128);
  return SUCCESS;
}
CUresult cuTensorMapEncodeIm2col(void *map, ...) {
  memset(map, 0, 128);
  return SUCCESS;
}
