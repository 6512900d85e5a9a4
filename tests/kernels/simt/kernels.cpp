// The project's launchers and kernels, compiled for the host.
#include "simt.h"

#include "launch.cu"

int main() { simt::serve(megatron_mm::kEntries); }
