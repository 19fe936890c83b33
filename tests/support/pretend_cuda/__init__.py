"""A CUDA device for tests on a machine that has none: host memory, torch's CPU kernels, Triton's interpreter.

Tensors on it are torch's own, of device "cuda:0": dispatch, autograd, autocast, Lightning and the library's own
questions go the ways that they go on a GPU. What mixes host and device raises, and so does what makes the host wait,
where `torch.cuda.set_sync_debug_mode("error")` forbids it. Times and memory mean nothing, nothing runs at the same
time, and what is compiled for a GPU (Triton's code, FlexAttention) is not.

    PYTHONPATH=tests python -m support.pretend_cuda SCRIPT ...
    PYTHONPATH=tests python -m support.pretend_cuda -m pytest ...
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import subprocess
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

SOURCE = Path(__file__).with_name("device.cpp")


def build() -> Path:
    """Compile the device with g++, in 20 seconds, once per source and build of torch."""
    torch = _torch()
    stamp = SOURCE.read_bytes() + (torch / "version.py").read_bytes()
    library = Path(tempfile.gettempdir()) / f"pretend_cuda_{os.getuid()}_{hashlib.sha256(stamp).hexdigest()[:16]}.so"
    if not library.exists():
        partial = library.with_suffix(f".{os.getpid()}")
        include, lib = torch / "include", torch / "lib"
        command = ["g++", "-std=c++20", "-O0", "-fPIC", "-shared", str(SOURCE), "-o", str(partial), f"-I{include}"]
        command += [f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}", f"-L{lib}", "-ltorch_cpu", "-lc10"]
        subprocess.run(command, check=True, capture_output=True, text=True)
        partial.rename(library)
    return library


def install() -> None:
    """Make the device there. Torch asks what there is when it is imported: call this before."""
    os.environ["TRITON_INTERPRET"] = "1"
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(_torch() / "lib" / name), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(build()), ctypes.RTLD_GLOBAL)
    import torch

    _answer(torch.cuda)
    torch.Tensor.pin_memory = lambda tensor, *_: tensor.clone()
    _interpret_on_the_device()


def _torch() -> Path:
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


class _Event:
    """A moment of a device that has done whatever it was given."""

    def __init__(self, enable_timing=False, **_) -> None:
        self.at = 0.0

    def record(self, stream=None) -> None:
        self.at = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...

    def wait(self, stream=None) -> None: ...

    def elapsed_time(self, end) -> float:
        return 1e3 * (end.at - self.at)


def _answer(cuda) -> None:
    """Let `torch.cuda` answer for the device, as an H100 would where it matters."""
    import torch

    device, stream = torch.ops.pretend_cuda, SimpleNamespace(query=lambda: True, synchronize=lambda: None)
    properties = SimpleNamespace(name="pretended", multi_processor_count=4, total_memory=1 << 30, major=9, minor=0)
    answers = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "_lazy_init": lambda: None,
        "_exchange_device": lambda index: 0,
        "_maybe_exchange_device": lambda index: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "current_stream": lambda device=None: stream,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: properties.name,
        "get_device_properties": lambda device=None: properties,
        "is_bf16_supported": lambda including_emulation=True: True,
        "is_current_stream_capturing": lambda: False,
        "memory_allocated": lambda gpu=None: device.allocated(),
        "max_memory_allocated": lambda gpu=None: device.allocated(),
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "set_sync_debug_mode": lambda mode: device.forbid_waiting(mode in ("error", 2)),
        "manual_seed": device.seed,
        "manual_seed_all": device.seed,
        "get_rng_state": lambda gpu=0: device.rng_state(),
        "get_rng_state_all": lambda: [device.rng_state()],
        "set_rng_state": lambda state, gpu=0: device.set_rng_state(state),
        "set_rng_state_all": lambda states: device.set_rng_state(states[0]),
        "_sleep": lambda cycles: None,
        "Event": _Event,
    }
    for name, answer in answers.items():
        for module in (cuda, cuda.random, cuda.memory):
            if module is cuda or hasattr(module, name):
                setattr(module, name, answer)


def _interpret_on_the_device() -> None:
    """Let kernels take tensors of the device only, in their own memory; bfloat16, which NumPy lacks, as float32."""
    import torch
    from triton import testing
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def on_host(value, storages):
        if not isinstance(value, torch.Tensor):
            return value
        if value.device.type != "cuda":
            raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        alias = torch.ops.pretend_cuda.host(value)
        if value.dtype != torch.bfloat16:
            return alias
        storage = alias.untyped_storage()
        if storage.data_ptr() not in storages:
            own = torch.empty(0, dtype=value.dtype).set_(storage)
            storages[storage.data_ptr()] = own, own.float()
        wide = storages[storage.data_ptr()][1]
        return wide.as_strided(alias.shape, alias.stride(), alias.storage_offset())

    def call(executor, *args, **kwargs):
        storages = {}
        with torch.no_grad():
            args = [on_host(value, storages) for value in args]
            launch(executor, *args, **{name: on_host(value, storages) for name, value in kwargs.items()})
            for own, wide in storages.values():
                own.copy_(wide)

    def bench(run, *args, **kwargs):
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)

    GridExecutor.__call__ = call
    testing.do_bench = bench
