// A CUDA device that is none: its tensors stand in host memory, and torch's CPU kernels compute what it is asked for.
// Tensors are torch's own, of device type CUDA, so whatever the dispatcher, autograd and Python say of them is what they
// say on a GPU. An operation that mixes devices raises; one that makes the host wait raises where that is forbidden.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/Resize.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <set>
#include <string>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::IValue;
using torch::jit::Stack;

const Device kDevice(DeviceType::CUDA, 0);
std::atomic<int64_t> held{0};   // bytes
thread_local bool forbidden = false;  // whether an operation may not wait
std::atomic<int64_t> waits{0};

// ---- memory -------------------------------------------------------------------------------------------------------

struct Held {
  c10::DataPtr data;
  int64_t bytes;
};

void release(void* context) {
  auto* memory = static_cast<Held*>(context);
  held -= memory->bytes;
  delete memory;
}

c10::DataPtr on_device(c10::DataPtr data, int64_t bytes) {
  held += bytes;
  void* place = data.get();
  return {place, new Held{std::move(data), bytes}, &release, kDevice};
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    return on_device(c10::GetCPUAllocator()->allocate(bytes), static_cast<int64_t>(bytes));
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }
};
Memory memory;

at::Tensor over(c10::Storage storage, const at::Tensor& like, c10::DispatchKey key) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  auto* impl = made.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.is_conj()) impl->_set_conj(true);
  if (like.is_neg()) impl->_set_neg(true);
  return made;
}

void keep_storage(void* context) { delete static_cast<c10::Storage*>(context); }

// The same memory as a tensor of the CPU.
at::Tensor host(const at::Tensor& tensor) {
  const auto& storage = tensor.storage();
  c10::DataPtr data(const_cast<void*>(storage.data()), new c10::Storage(storage), &keep_storage, Device(DeviceType::CPU));
  c10::Storage alias(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), c10::GetCPUAllocator(), true);
  return over(std::move(alias), tensor, c10::DispatchKey::CPU);
}

// A result of the CPU as a tensor of the device.
at::Tensor device(const at::Tensor& tensor) {
  auto bytes = tensor.storage().nbytes();
  c10::DataPtr data(const_cast<void*>(tensor.storage().data()), new c10::Storage(tensor.storage()), &keep_storage, Device(DeviceType::CPU));
  c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, on_device(std::move(data), bytes), &memory, true);
  return over(std::move(storage), tensor, c10::DispatchKey::CUDA);
}

// ---- what every operation goes through ------------------------------------------------------------------------------

void wait(const std::string& name) {
  ++waits;
  TORCH_CHECK(!forbidden, "called a synchronizing CUDA operation: ", name);
}

bool on(const at::Tensor& tensor, DeviceType type) { return tensor.defined() && tensor.device().type() == type; }

template <typename F>
void each_tensor(const IValue& value, F&& see) {
  if (value.isTensor()) see(value.toTensor());
  else if (value.isTensorList()) for (const at::Tensor& tensor : value.toTensorList()) see(tensor);
  else if (value.isList()) for (const IValue& entry : value.toListRef()) each_tensor(entry, see);
}

template <typename F>
IValue mapped(const IValue& value, F&& change) {
  if (value.isTensor()) return value.toTensor().defined() ? IValue(change(value.toTensor())) : value;
  if (value.isTensorList()) {
    c10::List<at::Tensor> found;
    for (const at::Tensor& tensor : value.toTensorList()) found.push_back(change(tensor));
    return found;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> found;
    for (std::optional<at::Tensor> tensor : value.toOptionalTensorList())
      found.push_back(tensor && tensor->defined() ? std::optional<at::Tensor>(change(*tensor)) : tensor);
    return found;
  }
  return value;
}

const std::set<std::string>& waiting() {
  static const std::set<std::string> names{
      "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2",
      "aten::unique_dim", "aten::unique_consecutive", "aten::repeat_interleave.Tensor", "aten::bincount"};
  return names;
}

bool takes_indices_of_the_host(const std::string& name) {
  return name == "aten::index" || name == "aten::index_put_" || name == "aten::_index_put_impl_" || name == "aten::_unsafe_index";
}

at::Generator& generator() {
  static at::Generator made = at::detail::createCPUGenerator(0);
  return made;
}

std::set<c10::GeneratorImpl*>& generators() {
  static std::set<c10::GeneratorImpl*> found{generator().unsafeGetGeneratorImpl()};
  return found;
}

void check_devices(const c10::FunctionSchema& schema, at::ArrayRef<IValue> given) {
  const auto& name = schema.name();
  if (name == "aten::copy_") return;
  bool here = false;
  std::string strangers;
  for (size_t i = 0; i < given.size(); ++i) {
    if (i > 0 && takes_indices_of_the_host(name) && !given[i].isTensor()) continue;
    each_tensor(given[i], [&](const at::Tensor& tensor) {
      if (on(tensor, DeviceType::CUDA)) here = true;
      else if (tensor.defined() && tensor.dim() > 0) strangers += " " + schema.arguments()[i].name();
    });
  }
  TORCH_CHECK(!here || strangers.empty(), "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu (",
              name, ":", strangers, ")");
}

void compute(const c10::OperatorHandle& op, Stack* stack) {
  const auto& schema = op.schema();
  const auto count = schema.arguments().size();
  const std::string full = schema.overload_name().empty() ? schema.name() : schema.name() + "." + schema.overload_name();
  std::vector<IValue> given(stack->end() - count, stack->end());
  check_devices(schema, given);
  if (waiting().count(full)) wait(full);
  std::vector<std::pair<at::Tensor, at::Tensor>> written;  // on the device, and its alias
  for (size_t i = 0; i < count; ++i) {
    auto& value = (*stack)[stack->size() - count + i];
    const auto& argument = schema.arguments()[i];
    if (value.isDevice()) value = IValue(Device(DeviceType::CPU));
    if (value.isGenerator())
      TORCH_CHECK(generators().count(value.toGenerator().unsafeGetGeneratorImpl()), "Expected a 'cuda' device type for generator but found 'cpu'");
    if (value.isNone() && argument.type()->str() == "Generator?") value = IValue(generator());
    const bool indices = takes_indices_of_the_host(schema.name()) && i > 0;
    const bool writes = argument.alias_info() && argument.alias_info()->isWrite();
    value = mapped(value, [&](const at::Tensor& tensor) {
      if (!on(tensor, DeviceType::CUDA)) return tensor;
      if (indices && (tensor.scalar_type() == at::kBool || tensor.scalar_type() == at::kByte)) wait(full);
      auto alias = host(tensor);
      if (writes) written.emplace_back(tensor, alias);
      return alias;
    });
  }
  {
    at::AutoDispatchBelowADInplaceOrView below;
    op.callBoxed(stack);
  }
  for (auto& [tensor, alias] : written) {
    if (tensor.storage().data() == alias.storage().data() && tensor.sizes() == alias.sizes() && tensor.strides() == alias.strides())
      continue;
    auto moved = device(alias);  // the kernel gave its output another shape
    tensor.unsafeGetTensorImpl()->set_storage_keep_dtype(moved.storage());
    tensor.unsafeGetTensorImpl()->set_sizes_and_strides(moved.sizes(), moved.strides(), moved.storage_offset());
  }
  const auto returns = schema.returns().size();
  for (size_t i = 0; i < returns; ++i) {
    auto& value = (*stack)[stack->size() - returns + i];
    const auto* alias = schema.returns()[i].alias_info();
    const IValue* source = nullptr;
    for (size_t j = 0; alias && j < count; ++j) {
      const auto* other = schema.arguments()[j].alias_info();
      if (other && other->beforeSets() == alias->beforeSets()) source = &given[j];
    }
    if (source && alias->isWrite()) {
      value = *source;
    } else {
      value = mapped(value, [&](const at::Tensor& tensor) {
        return source && source->isTensor() ? over(source->toTensor().storage(), tensor, c10::DispatchKey::CUDA) : device(tensor);
      });
    }
  }
}

// ---- what no CPU kernel can do ----------------------------------------------------------------------------------------

at::Tensor& copy_(at::Tensor& to, const at::Tensor& from, bool non_blocking) {
  if (to.device() != from.device() && !non_blocking && to.numel()) wait("copy between host and device");
  auto target = on(to, DeviceType::CUDA) ? host(to) : to;
  target.copy_(on(from, DeviceType::CUDA) ? host(from) : from);
  return to;
}

const at::Tensor& resize_(const at::Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!format || *format == at::MemoryFormat::Contiguous, "only contiguous tensors are resized");
  at::native::resize_impl_cpu_(self.unsafeGetTensorImpl(), size, std::nullopt);
  return self;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  TORCH_CHECK(source.device() == kDevice, "Expected a storage of cuda:0, got one of ", source.device());
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(source);
  impl->set_storage_offset(offset);
  at::native::resize_impl_cpu_(impl, size, stride.empty() ? std::nullopt : std::optional<at::IntArrayRef>(stride));
  return self;
}

at::Tensor& set_whole(at::Tensor& self, at::Storage source) {
  return set_storage(self, source, 0, {static_cast<int64_t>(source.nbytes() / self.dtype().itemsize())}, {});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

at::Tensor& set_none(at::Tensor& self) { return set_whole(self, c10::Storage(c10::Storage::use_byte_size_t(), 0, memory.allocate(0), &memory, true)); }

int64_t by_plain_products(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, double, bool,
    std::optional<double>, bool) {
  return 0;
}

void record_stream(at::Tensor&, at::Stream) {}

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&compute>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("copy_", &copy_);
  library.impl("resize_", &resize_);
  library.impl("set_.source_Storage_storage_offset", &set_storage);
  library.impl("set_.source_Storage", &set_whole);
  library.impl("set_.source_Tensor", &set_tensor);
  library.impl("set_", &set_none);
  library.impl("_fused_sdp_choice", &by_plain_products);
  library.impl("record_stream", &record_stream);
}

// ---- what torch asks of a device ----------------------------------------------------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  Guard() = default;
  explicit Guard(DeviceType) {}
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return kDevice; }
  Device getDevice() const override { return kDevice; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  c10::Stream getStream(Device) const override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::Stream getDefaultStream(Device) const override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::Stream exchangeStream(c10::Stream) const override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(DeviceIndex) const override {}
  void record(void**, const c10::Stream&, DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  void deviceSynchronize(DeviceIndex) const override {}
  Device getDeviceFromPtr(void*) const override { return kDevice; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  c10::Allocator* getCUDADeviceAllocator() const override { return &memory; }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override { return generator(); }
  at::Generator getNewGenerator(DeviceIndex) const override {
    auto made = at::detail::createCPUGenerator();
    generators().insert(made.unsafeGetGeneratorImpl());
    return made;
  }
};
std::unique_ptr<at::CUDAHooksInterface> make_hooks(at::CUDAHooksArgs arguments) { return std::make_unique<Hooks>(arguments); }

struct Start {
  Start() {
    c10::SetAllocator(DeviceType::CUDA, &memory);
    at::CUDAHooksRegistry()->Register("CUDAHooks", &make_hooks);
  }
} start;

// ---- what the tests ask ---------------------------------------------------------------------------------------------

TORCH_LIBRARY(pretend_cuda, library) {
  library.def("host(Tensor tensor) -> Tensor", [](const at::Tensor& tensor) { return host(tensor); });
  library.def("allocated() -> int", [] { return held.load(); });
  library.def("waits() -> int", [] { return waits.load(); });
  library.def("forbid_waiting(bool forbid) -> ()", [](bool forbid) { forbidden = forbid; });
  library.def("seed(int seed) -> ()", [](int64_t seed) { generator().set_current_seed(static_cast<uint64_t>(seed)); });
  library.def("rng_state() -> Tensor", [] { return generator().get_state(); });
  library.def("set_rng_state(Tensor state) -> ()", [](const at::Tensor& state) { generator().set_state(state); });
}

}  // namespace
