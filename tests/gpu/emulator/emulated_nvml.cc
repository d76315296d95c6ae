// NVIDIA's management library as far as worker/machine/gpu_usage.cc asks it: every GPU is 37 % busy
// and uses 5 GiB.
namespace {

struct Utilization {
  unsigned gpu, memory;
};
struct MemoryInfo {
  unsigned long long total, free, used;
};

}  // namespace

extern "C" {

int nvmlInit_v2() { return 0; }
int nvmlDeviceGetHandleByUUID(const char* uuid, void** device) {
  *device = const_cast<char*>(uuid);
  return uuid[0] == 'G' ? 0 : 6;
}
int nvmlDeviceGetUtilizationRates(void* device, Utilization* utilization) {
  utilization->gpu = 37;
  utilization->memory = 1;
  return device != nullptr ? 0 : 2;
}
int nvmlDeviceGetMemoryInfo(void* device, MemoryInfo* memory) {
  memory->total = 8ull << 30;
  memory->used = 5ull << 30;
  memory->free = memory->total - memory->used;
  return device != nullptr ? 0 : 2;
}

}  // extern "C"
