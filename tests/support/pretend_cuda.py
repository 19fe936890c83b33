"""A pretend CUDA device on a CPU: tensors that say `cuda:0`, compute on the CPU, and refuse what a GPU refuses.

An operation on tensors of two devices raises, as on a GPU, unless the one on the CPU is a number or an index. Kernels
are interpreted, and raise if a tensor is not on the device. What makes the host wait is counted in `Pretence.waits`.
"""

import contextlib
import types

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
TRANSFERS = {"aten::_to_copy", "aten::copy_", "aten::set_"}
TAKES_INDICES = {"aten::index", "aten::index_put_", "aten::index_put"}
WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2"}
KERNELS = ("forward_kernel", "dq_kernel", "dkdv_kernel", "probe_kernel", "decode_kernel", "combine_kernel")
"""Of `launch`; that of `influence` is apart."""


class OnDevice(torch.Tensor):
    """A tensor on the pretended device; `on_cpu` holds its values."""

    @staticmethod
    def __new__(cls, real):
        return torch.Tensor._make_wrapper_subclass(
            cls, real.shape, strides=real.stride(), storage_offset=real.storage_offset(), dtype=real.dtype,
            device=CUDA, requires_grad=False,
        )  # fmt: skip

    def __init__(self, real):
        self.on_cpu = real

    def __repr__(self):
        return f"OnDevice({self.on_cpu!r})"

    def __tensor_flatten__(self):
        return ["on_cpu"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return OnDevice(inner["on_cpu"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {}, None)


def real(value):
    return value.on_cpu if isinstance(value, OnDevice) else value


def on_cuda(device):
    return device is not None and torch.device(device).type == "cuda"


def dispatch(func, args, kwargs, pretence):
    name, tensors = func._schema.name, [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    held = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    others = [tensor for tensor in tensors if not isinstance(tensor, OnDevice) and tensor.dim() and not tensor.is_meta]
    if held and others and name not in TRANSFERS and not (name in TAKES_INDICES and isinstance(args[0], OnDevice)):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, found cuda:0 and cpu")
    target = kwargs.get("device")
    fetched = name == "aten::_to_copy" and target is not None and not on_cuda(target)
    if pretence is not None and held and (name in WAITS or fetched):
        pretence.waits.append(name)
    kwargs = {
        key: torch.device("cpu") if key == "device" and on_cuda(value) else value for key, value in kwargs.items()
    }
    result = func(*tree_map(real, args), **tree_map(real, kwargs))
    if name.endswith("_") and args and isinstance(args[0], torch.Tensor):
        return args[0]
    stays = on_cuda(target) if target is not None else bool(held)
    return tree_map(lambda leaf: OnDevice(leaf) if stays and isinstance(leaf, torch.Tensor) else leaf, result)


class Pretence(TorchDispatchMode):
    """While it is entered, what is made on "cuda" is made on the pretended device."""

    def __init__(self):
        super().__init__()
        self.waits = []
        """Operations that made the host wait, in order."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "sparse_prune":  # the project's operators run by their own code, as on a GPU
            with self:
                return OPERATORS()[func._schema.name](*args, **(kwargs or {}))
        return dispatch(func, args, kwargs or {}, self)


def OPERATORS():
    from sparse_prune.kernels.triton import ops

    found = (ops.block_sparse_attention, ops.block_sparse_attention_backward)
    return {definition._qualname: definition._init_fn for definition in found}


class Interpreted:
    """A kernel that takes tensors of the pretended device alone."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            away = [
                place
                for place, arg in enumerate(args)
                if isinstance(arg, torch.Tensor) and not isinstance(arg, OnDevice)
            ]
            if away:
                raise RuntimeError(f"{self.kernel.__name__} gets tensors of the CPU at {away}")
            self.launches.append(self.kernel.__name__)
            with torch.utils._python_dispatch._disable_current_modes():
                return self.kernel[grid](*map(real, args), **kwargs)

        return launch


class Event:
    """Of a device that is never behind its host."""

    def __init__(self, enable_timing=False):
        self.at = 0.0

    def record(self, stream=None):
        import time

        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def query(self):
        return True

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


@contextlib.contextmanager
def pretend_cuda(monkeypatch):
    """A pretended device with the kernels on it, as a `Pretence`; `launches` are the names of kernels that ran."""
    from sparse_prune.kernels.triton import influence, launch

    torch._C._ensureCUDADeviceGuardSet()
    pretence = Pretence()
    pretence.launches = []
    for module, names in ((launch, KERNELS), (influence, ("influence_kernel",))):
        for name in names:
            monkeypatch.setattr(module, name, Interpreted(getattr(module, name), pretence.launches))
    launch._stand_ins.cache_clear()
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator())
    properties = types.SimpleNamespace(multi_processor_count=132, name="pretended", total_memory=80 << 30)
    stream = types.SimpleNamespace(query=lambda: True, synchronize=lambda: None)
    nothing = {
        "_lazy_init": lambda: None, "is_available": lambda: True, "synchronize": lambda device=None: None,
        "device": lambda device: contextlib.nullcontext(), "device_of": lambda tensor: contextlib.nullcontext(),
        "get_device_capability": lambda device=None: (9, 0), "get_device_name": lambda device=None: "pretended",
        "get_device_properties": lambda device=None: properties, "current_stream": lambda device=None: stream,
        "_sleep": lambda cycles: None, "Event": Event, "empty_cache": lambda: None,
        "memory_allocated": lambda device=None: 0, "is_bf16_supported": lambda including_emulation=True: True,
        "get_rng_state": lambda: torch.get_rng_state(), "set_rng_state": lambda state: torch.set_rng_state(state),
    }  # fmt: skip
    for name, stand_in in nothing.items():
        monkeypatch.setattr(torch.cuda, name, stand_in, raising=False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, device=None: self)
    with pretence:
        yield pretence
    launch._stand_ins.cache_clear()
