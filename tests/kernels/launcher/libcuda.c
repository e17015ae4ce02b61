/* A CUDA driver that runs nothing and remembers what it was asked for, so that Triton's own loader and launcher work on
   a machine without a GPU. Whatever is not here, Triton does not find, and says so. */
#include <stdint.h>
#include <stddef.h>
#include <string.h>

enum { SUCCESS = 0, MOST_ARGUMENTS = 64 };

typedef struct {
    unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared;
    void *stream;
    void *attributes;
    unsigned attribute_count;
} LaunchConfig;

/* The last launch: what the tests read. */
static struct {
    unsigned grid, block, shared;
    uint64_t stream;
    uint64_t arguments[MOST_ARGUMENTS];
} last;
static long launches, modules;
static int sizes[MOST_ARGUMENTS], size_count;
static int fail_load, fail_launch, fail_capture;
static uint64_t capture;

/* --- for the tests --- */
void fake_expect(int count, const int *bytes) {
    size_count = count;
    memcpy(sizes, bytes, count * sizeof(int));
}
void fake_fail(int load, int launch) {
    fail_load = load;
    fail_launch = launch;
}
void fake_capture(uint64_t number, int error) {
    capture = number;
    fail_capture = error;
}
long fake_launches(void) { return launches; }
long fake_modules(void) { return modules; }
unsigned fake_grid(void) { return last.grid; }
unsigned fake_block(void) { return last.block; }
uint64_t fake_stream(void) { return last.stream; }
uint64_t fake_argument(int index) { return last.arguments[index]; }

static int launched(unsigned grid, unsigned block, unsigned shared, void *stream, void **parameters) {
    if (fail_launch)
        return fail_launch;
    launches++;
    last.grid = grid;
    last.block = block;
    last.shared = shared;
    last.stream = (uint64_t)stream;
    memset(last.arguments, 0, sizeof last.arguments);
    for (int i = 0; i < size_count; i++)
        memcpy(&last.arguments[i], parameters[i], sizes[i]);
    return SUCCESS;
}

/* --- the driver --- */
int cuInit(unsigned flags) { return SUCCESS; }
int cuDriverGetVersion(int *version) { *version = 13000; return SUCCESS; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return SUCCESS; }
int cuDeviceGetCount(int *count) { *count = 1; return SUCCESS; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
    case 10: *value = 32; break;     /* threads of a warp */
    case 12: *value = 65536; break;  /* registers of a block */
    case 16: *value = 132; break;    /* multiprocessors */
    case 75: *value = 9; break;      /* compute capability */
    case 76: *value = 0; break;
    case 8:                          /* shared memory of a block */
    case 97: *value = 232448; break; /* the same, if asked for */
    default: *value = 1;
    }
    return SUCCESS;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return SUCCESS; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return SUCCESS; }
int cuCtxSetCurrent(void *context) { return SUCCESS; }
int cuCtxGetDevice(int *device) { *device = 0; return SUCCESS; }
int cuCtxGetLimit(size_t *value, int limit) { *value = 0; return SUCCESS; }
int cuCtxSetLimit(int limit, size_t value) { return SUCCESS; }
int cuModuleLoadData(void **module, const void *image) {
    if (fail_load)
        return fail_load;
    *module = (void *)++modules;
    return SUCCESS;
}
int cuStreamGetCaptureInfo_v2(void *stream, int *status, uint64_t *number, void *graph, void *nodes, size_t *count) {
    *status = capture != 0;
    *number = capture;
    return fail_capture;
}
int cuStreamIsCapturing(void *stream, int *status) { *status = capture != 0; return fail_capture; }
int cuModuleUnload(void *module) { return SUCCESS; }
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = module; return SUCCESS; }
int cuFuncGetAttribute(int *value, int attribute, void *function) {
    *value = attribute == 0 ? 1024 : attribute == 4 ? 64 : 0; /* most threads; registers */
    return SUCCESS;
}
int cuFuncSetAttribute(void *function, int attribute, int value) { return SUCCESS; }
int cuFuncSetCacheConfig(void *function, int config) { return SUCCESS; }
int cuGetErrorString(int error, const char **text) { *text = "the fake driver was told to fail"; return SUCCESS; }
int cuPointerGetAttribute(void *value, int attribute, uint64_t pointer) { *(uint64_t *)value = pointer; return SUCCESS; }
int cuOccupancyMaxActiveClusters(int *count, void *function, const LaunchConfig *config) { *count = 1; return SUCCESS; }
int cuTensorMapEncodeTiled(void) { return 1; }
int cuTensorMapEncodeIm2col(void) { return 1; }
int cuLaunchKernelEx(const LaunchConfig *config, void *function, void **parameters, void **extra) {
    return launched(config->grid_x, config->block_x, config->shared, config->stream, parameters);
}
int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **parameters, void **extra) {
    return launched(gx, bx, shared, stream, parameters);
}
