// A make-believe NPU: torch's spare device "PrivateUse1" on the memory and kernels of the CPU.
//
// A tensor of it is a tensor of no other device: what mixes devices, takes a generator of another one, or runs
// on a device that isn't there fails, as on a real one. Every operator goes through one fallback, which lends
// the CPU kernel the same memory under the name of the CPU and gives the results back under the device's own;
// collectives ("hccl") are gloo's on memory lent in the same way. It proves where tensors are placed and
// through which backend ranks talk; it says nothing about the NPU's kernels, precision, memory or speed.

#include <ATen/Functions.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <cstdlib>
#include <set>
#include <unordered_map>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::IValue;
using c10::Storage;
using Tensors = std::vector<Tensor>;

constexpr auto kNpu = c10::DeviceType::PrivateUse1;
const Device kCpu(c10::DeviceType::CPU);
thread_local DeviceIndex current = 0;

DeviceIndex device_count() {
  const char* given = std::getenv("MAKE_BELIEVE_NPUS");
  return given ? std::atoi(given) : 0;
}

void set_device(DeviceIndex index) {
  TORCH_CHECK(index >= 0 && index < device_count(), "no such device: npu:", int(index));
  current = index;
}

// ---- memory: a storage of one device that keeps alive the storage of the other, whose memory it is

void forget(void* kept) {
  delete static_cast<Storage*>(kept);
}

Storage same_memory(const Storage& storage, Device device) {
  auto* allocator = c10::GetAllocator(device.type());
  c10::DataPtr memory(storage.mutable_data(), new Storage(storage), forget, device);
  return c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), storage.nbytes(), std::move(memory), allocator, true);
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto* kept = new c10::DataPtr(c10::GetCPUAllocator()->allocate(bytes));
    auto free = [](void* memory) { delete static_cast<c10::DataPtr*>(memory); };
    return {kept->get(), kept, free, Device(kNpu, current)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};
Memory memory;
REGISTER_ALLOCATOR(kNpu, &memory)

// ---- lending tensors to the CPU for the time of one call

class Loan {
 public:
  Tensor lend(const Tensor& tensor) {
    if (!tensor.defined() || tensor.device().type() != kNpu)
      return tensor;
    auto host = at::detail::make_tensor<c10::TensorImpl>(
        lend(tensor.storage()), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
    lent_.emplace_back(tensor, with_shape_of(tensor, host));
    return host;
  }

  Storage lend(const Storage& storage) {
    auto& host = hosts_[storage.unsafeGetStorageImpl()];
    if (!host) {
      host = same_memory(storage, kCpu);
      owners_.emplace(host.unsafeGetStorageImpl(), storage);
    }
    return host;
  }

  // The tensor of the device that was lent as `host`, a view of such a one, or a new one.
  Tensor give_back(const Tensor& host, Device device) {
    if (!host.defined())
      return host;
    const auto keys = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
    auto storage = owner(host.storage(), device);
    for (auto& [own, lent] : lent_) {
      if (lent.is_same(host))
        return own;
      if (own.storage().is_alias_of(storage))
        return with_shape_of(host, at::detail::make_tensor<c10::TensorImpl>(
            c10::TensorImpl::VIEW, std::move(storage), own.key_set(), host.dtype()));
    }
    return with_shape_of(host, at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, host.dtype()));
  }

  // Take over what the kernel did to shape and memory of what it was lent.
  void settle() {
    for (auto& [own, lent] : lent_) {
      const auto& storage = own.storage();
      const auto now = owner(lent.storage(), own.device());
      if (!now.is_alias_of(storage)) {
        own.unsafeGetTensorImpl()->set_storage_keep_dtype(now);
      } else if (lent.storage().data() != storage.data() || lent.storage().nbytes() != storage.nbytes()) {
        c10::DataPtr grown(lent.storage().mutable_data(), new Storage(lent.storage()), forget, own.device());
        storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(grown));
        storage.set_nbytes(lent.storage().nbytes());
      }
      if (own.sizes() != lent.sizes() || own.strides() != lent.strides() ||
          own.storage_offset() != lent.storage_offset())
        own.unsafeGetTensorImpl()->set_sizes_and_strides(lent.sizes(), lent.strides(), lent.storage_offset());
    }
  }

 private:
  static Tensor with_shape_of(const Tensor& tensor, Tensor made) {
    made.unsafeGetTensorImpl()->set_sizes_and_strides(
        tensor.sizes(), tensor.strides(), tensor.storage_offset());
    return made;
  }

  Storage owner(const Storage& host, Device device) {
    auto& found = owners_[host.unsafeGetStorageImpl()];
    if (!found)
      found = same_memory(host, device);
    return found;
  }

  std::unordered_map<c10::StorageImpl*, Storage> hosts_, owners_;
  std::vector<std::pair<Tensor, Tensor>> lent_;
};

// ---- the one fallback

const std::set<std::string> kMixing = {  // indices may be on the CPU, as on other devices
    "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"};

class Call {
 public:
  Call(const c10::OperatorHandle& op) : name_(op.schema().name()) {}

  IValue to_host(const IValue& value) {
    if (value.isTensor())
      return lend(value.toTensor());
    if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : value.toTensorList())
        list.push_back(lend(tensor));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor> tensor : value.toOptionalTensorList())
        list.push_back(tensor ? std::optional<Tensor>(lend(*tensor)) : std::nullopt);
      return list;
    }
    if (value.isStorage() && value.toStorage().device_type() == kNpu)
      return loan_.lend(value.toStorage());
    if (value.isDevice() && value.toDevice().type() == kNpu) {
      use(value.toDevice().has_index() ? value.toDevice() : Device(kNpu, current));
      return kCpu;
    }
    TORCH_CHECK(!value.isGenerator(), name_, ": expected a generator of npu, got one of another device");
    return value;
  }

  IValue to_device(const IValue& value) {
    auto device = device_.value_or(Device(kNpu, current));
    if (value.isTensor())
      return loan_.give_back(value.toTensor(), device);
    if (!value.isTensorList())
      return value;
    c10::List<Tensor> list;
    for (const Tensor& tensor : value.toTensorList())
      list.push_back(loan_.give_back(tensor, device));
    return list;
  }

  void settle() {
    loan_.settle();
  }

 private:
  Tensor lend(const Tensor& tensor) {
    if (tensor.defined() && tensor.device().type() == kNpu)
      use(tensor.device());
    else
      TORCH_CHECK(
          !tensor.defined() || tensor.dim() == 0 || kMixing.count(name_),
          name_, ": expected all tensors on the same device, found one of ", tensor.device(), " beside npu");
    return loan_.lend(tensor);
  }

  void use(Device device) {
    TORCH_CHECK(device.index() < device_count(), "no such device: ", device);
    TORCH_CHECK(!device_ || *device_ == device, name_, ": found tensors on ", *device_, " and ", device);
    device_ = device;
  }

  std::string name_;
  std::optional<Device> device_;
  Loan loan_;
};

void on_host(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  at::AutoDispatchBelowADInplaceOrView below;
  Call call(op);
  const auto arguments = op.schema().arguments().size();
  const auto first = stack->size() - arguments;
  for (size_t i = first; i < stack->size(); ++i)
    (*stack)[i] = call.to_host((*stack)[i]);
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  call.settle();
  for (size_t i = first; i < stack->size(); ++i)
    (*stack)[i] = call.to_device((*stack)[i]);
}

// What `copy_` is made of between any two devices.
Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  Loan loan;
  loan.lend(to).copy_(loan.lend(from));
  return to;
}

// Whether `.to(device)` may keep a parameter, and with it what is tied to it; torch-npu says so too.
bool may_become(const Tensor& one, const Tensor& other) {
  const auto ours = [](const Tensor& tensor) { return tensor.is_cpu() || tensor.device().type() == kNpu; };
  return ours(one) && ours(other);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_host>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("_copy_from", copy_from);
  m.impl("record_stream", +[](Tensor&, c10::Stream) {});
  m.impl("_has_compatible_shallow_copy_type", may_become);
  for (const auto* name : {"convolution", "convolution_backward"})  // torch has a way round the fallback
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&on_host>());
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(bmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(conv2d, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(scaled_dot_product_attention, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(layer_norm, fp32)
  KERNEL_PRIVATEUSEONE(softmax, int, fp32)
  KERNEL_PRIVATEUSEONE(log_softmax, int, fp32)
  KERNEL_PRIVATEUSEONE(cross_entropy_loss, fp32)
}

// ---- what torch asks a device

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override {
    return kNpu;
  }
  Device exchangeDevice(Device device) const override {
    const auto before = getDevice();
    setDevice(device);
    return before;
  }
  Device getDevice() const override {
    return Device(kNpu, current);
  }
  void setDevice(Device device) const override {
    set_device(device.index());
  }
  void uncheckedSetDevice(Device device) const noexcept override {
    current = device.index();
  }
  c10::Stream getStream(Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, device.has_index() ? device : getDevice());
  }
  c10::Stream getDefaultStream(Device device) const override {
    return getStream(device);
  }
  c10::Stream getNewStream(Device device, int) const override {
    return getStream(device);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return stream;
  }
  DeviceIndex deviceCount() const noexcept override {
    return device_count();
  }
  // Work is done when a call returns: there is nothing to wait for.
  void record(void**, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override {
    return true;
  }
  bool queryStream(const c10::Stream&) const override {
    return true;
  }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return device_count() > 0;
  }
  bool hasPrimaryContext(DeviceIndex) const override {
    return true;
  }
  DeviceIndex deviceCount() const override {
    return device_count();
  }
  void setCurrentDevice(DeviceIndex index) const override {
    set_device(index);
  }
  DeviceIndex getCurrentDevice() const override {
    return current;
  }
  DeviceIndex exchangeDevice(DeviceIndex index) const override {
    return std::exchange(current, index);
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override {
    return std::exchange(current, index);
  }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    return c10::GetCPUAllocator();
  }
  void resizePrivateUse1Bytes(const Storage& storage, size_t bytes) const override {
    auto resized = memory.allocate(bytes);
    memory.copy_data(resized.get(), storage.data(), std::min(bytes, storage.nbytes()));
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(resized));
    storage.set_nbytes(bytes);
  }
};

// ---- "hccl": gloo on lent memory

class Hccl final : public c10d::Backend {
 public:
  using Work = c10::intrusive_ptr<c10d::Work>;

  Hccl(c10::intrusive_ptr<c10d::Backend> gloo)
      : Backend(gloo->getRank(), gloo->getSize()), gloo_(std::move(gloo)) {}

  const std::string getBackendName() const override {
    return "hccl";
  }
  Work broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override {
    auto lent = lend(tensors);
    return gloo_->broadcast(lent, options);
  }
  Work allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override {
    auto lent = lend(tensors);
    return gloo_->allreduce(lent, options);
  }
  Work reduce(Tensors& tensors, const c10d::ReduceOptions& options) override {
    auto lent = lend(tensors);
    return gloo_->reduce(lent, options);
  }
  Work allgather(std::vector<Tensors>& to, Tensors& from, const c10d::AllgatherOptions& options) override {
    auto lent_to = lend(to);
    auto lent_from = lend(from);
    return gloo_->allgather(lent_to, lent_from, options);
  }
  Work _allgather_base(Tensor& to, Tensor& from, const c10d::AllgatherOptions& options) override {
    auto lent_to = lend(to), lent_from = lend(from);
    return gloo_->_allgather_base(lent_to, lent_from, options);
  }
  Work _reduce_scatter_base(Tensor& to, Tensor& from, const c10d::ReduceScatterOptions& options) override {
    auto lent_to = lend(to), lent_from = lend(from);
    return gloo_->_reduce_scatter_base(lent_to, lent_from, options);
  }
  Work barrier(const c10d::BarrierOptions&) override {
    return gloo_->barrier(c10d::BarrierOptions());
  }

 private:
  static Tensor lend(const Tensor& tensor) {
    TORCH_CHECK(tensor.device().type() == kNpu, "hccl: got a tensor of ", tensor.device());
    return Loan().lend(tensor);
  }
  static Tensors lend(const Tensors& tensors) {
    Tensors lent;
    for (const auto& tensor : tensors)
      lent.push_back(lend(tensor));
    return lent;
  }
  static std::vector<Tensors> lend(const std::vector<Tensors>& lists) {
    std::vector<Tensors> lent;
    for (const auto& list : lists)
      lent.push_back(lend(list));
    return lent;
  }

  c10::intrusive_ptr<c10d::Backend> gloo_;
};

} // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  m.def("device_count", &device_count);
  m.def("current_device", [] { return current; });
  m.def("set_device", &set_device);
  m.def("hccl", [](const c10::intrusive_ptr<c10d::Backend>& gloo) -> c10::intrusive_ptr<c10d::Backend> {
    return c10::make_intrusive<Hccl>(gloo);
  });
}
