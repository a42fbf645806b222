// Whether there is anything to launch on. Importing the extension calls nothing here.

#include "launch.h"

#include <cuda_runtime.h>

int64_t dc_cuda_devices() {
    int version = 0, devices = 0;
    if (cudaDriverGetVersion(&version) != cudaSuccess || version == 0) return 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess) devices = 0;
    cudaGetLastError();                     // a missing driver is an answer, not an error for the next launch to find
    return devices;
}

int64_t dc_cuda_capability(int64_t device) {
    int major = 0, minor = 0;
    const int index = static_cast<int>(device);
    const bool known = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index) == cudaSuccess &&
                       cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index) == cudaSuccess;
    cudaGetLastError();
    return known ? 10 * major + minor : 0;
}

int64_t dc_cuda_current_device() {
    int device = -1;
    return cudaGetDevice(&device) == cudaSuccess ? device : -1;
}
