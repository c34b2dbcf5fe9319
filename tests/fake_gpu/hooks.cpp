// What a CPU build of torch needs so that it accepts tensors that say they are on CUDA: a device guard (device and stream
// bookkeeping that does nothing), the hooks that answer "is there CUDA?", and the functions of at::accelerator that
// autograd asks for a device's threads and streams. Loaded with RTLD_GLOBAL before torch, so that these are found first.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/DeviceAccelerator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

c10::Device card() { return {c10::DeviceType::CUDA, 0}; }
c10::Stream only_stream() { return c10::Stream(c10::Stream::DEFAULT, card()); }

// There is one device with one stream, and all work on it is done when it is asked for.
struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device exchangeDevice(c10::Device) const override { return card(); }
  c10::Device getDevice() const override { return card(); }
  c10::Stream getStream(c10::Device) const noexcept override { return only_stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return only_stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return only_stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return only_stream(); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
  bool isStreamCapturing(const c10::Stream&) const override { return false; }
};

c10::impl::DeviceGuardImplRegistrar registered(c10::DeviceType::CUDA, new Guard());

struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  bool isPinnedPtr(const void*) const override { return false; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
};

}  // namespace

namespace at {
using ::CUDAHooks;
REGISTER_CUDA_HOOKS(CUDAHooks)  // found by this name
}  // namespace at

namespace at::accelerator {
std::optional<c10::DeviceType> getAccelerator(bool) { return c10::DeviceType::CUDA; }
bool isAccelerator(c10::DeviceType type) { return type == c10::DeviceType::CUDA; }
c10::DeviceIndex deviceCount() { return 1; }
c10::DeviceIndex getDeviceIndex() { return 0; }
c10::DeviceIndex exchangeDevice(c10::DeviceIndex) { return 0; }
c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) { return 0; }
c10::Stream getCurrentStream(c10::DeviceIndex) { return only_stream(); }
void setDeviceIndex(c10::DeviceIndex) {}
void setCurrentStream(c10::Stream) {}
void synchronizeDevice(c10::DeviceIndex) {}
}  // namespace at::accelerator
