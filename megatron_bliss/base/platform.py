"""Device, backend and precision of a run, and what megatron-core needs to run where there is no GPU.

megatron-core 0.16 asks for CUDA in places where any device would do. Each ``patch_*`` function below replaces one such
place, says why, and when it can go. They act only where ``torch.cuda.is_available()`` is false; what they replace would
raise there.
"""

from __future__ import annotations

import ctypes
import os
import platform as python_platform
import resource
import sys
import warnings
from functools import wraps
from importlib import metadata
from types import ModuleType

import torch
import torch.distributed as dist

from megatron_bliss.config.platform import PlatformConfig, Precision

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def choose_device(config: PlatformConfig, local_rank: int) -> torch.device:
    """The device of this process; ValueError where CUDA is asked for and there are too few GPUs."""
    available = torch.cuda.is_available()
    if config.device == "cpu" or (config.device == "auto" and not available):
        if available:
            raise ValueError(
                "found a CUDA device and platform.device=cpu, expected megatron-core to use the GPU it sees: hide it "
                "with CUDA_VISIBLE_DEVICES= (empty) in the environment, or set platform.device=auto"
            )
        return torch.device("cpu")
    if not available:
        raise ValueError("found no CUDA device, expected one for platform.device=cuda: set platform.device=auto or cpu")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"found {torch.cuda.device_count()} CUDA devices, expected one for local rank {local_rank}: lower "
            "torchrun's --nproc-per-node"
        )
    return torch.device("cuda", local_rank)


def choose_dtype(config: PlatformConfig) -> torch.dtype:
    """Precision of the target's weights in its forward and backward pass."""
    return DTYPES[config.params_dtype]


def available_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_threads(local_world_size: int) -> None:
    """Give each of the machine's ranks its share of the cores, unless OMP_NUM_THREADS says otherwise.

    Two ranks with two threads each on two cores run about ten times slower than with one thread each.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, available_cores() // local_world_size))


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if python_platform.libc_ver()[0] == "glibc" else None


def keep_freed_memory() -> bool:
    """Let glibc reuse large freed blocks instead of returning each to the system; False where there is no glibc.

    By default a tensor of 32 MiB and more is mapped anew, and its pages zeroed one by one, every time it is made: up to
    a third of a CPU training step in which logits are such a tensor.
    """
    libc = _glibc()
    if libc is None:
        return False
    return bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def set_deterministic(enabled: bool, device: torch.device) -> None:
    """Ask torch for kernels that give the same bits twice.

    A kernel that has no such form raises on CUDA, where torch takes the deterministic backward pass of attention only
    then, and warns and goes on elsewhere.
    """
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(enabled, warn_only=device.type != "cuda")
    # Filling every new tensor with NaN finds reads of unset memory, but costs time and changes no result here.
    torch.utils.deterministic.fill_uninitialized_memory = False


def silence_megatron_core() -> None:
    """Drop warnings about megatron-core 0.16's insides, which nobody here can act on.

    Collectives under names that torch 2.13 deprecates (torch 2.11 has no others), the fp32 distributed optimizer, which
    keeps gradients on views of the weights, and advice on recomputing Transformer Engine's attention. Goes when
    megatron-core no longer does so.
    """
    warnings.filterwarnings("ignore", message="If you are using transformer_engine as the transformer implementation")
    warnings.filterwarnings("ignore", message=r".*`torch\.distributed\..*` is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")


def prepare(config: PlatformConfig, local_rank: int, local_world_size: int) -> torch.device:
    """Set this process up (threads, determinism, CUDA device or CPU memory and patches) and return its device."""
    # megatron-core relies on it for the order of kernels when it overlaps communication with computation. The driver
    # reads it once, when it is first asked for devices.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    device = choose_device(config, local_rank)
    silence_megatron_core()
    set_threads(local_world_size)
    set_deterministic(config.deterministic, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
        patch_megatron_core_for_cpu()
    return device


def patch_megatron_core_for_cpu() -> None:
    """Apply every patch once; does nothing where there is a GPU."""
    if torch.cuda.is_available() or getattr(torch.cuda, "_megatron_bliss_patched", False):
        return
    patch_current_device()
    patch_moves_to_the_gpu()
    patch_synchronize()
    patch_random_states()
    patch_type_names()
    patch_explicit_cuda_devices()
    patch_pipeline_exchanges()
    torch.cuda._megatron_bliss_patched = True


def patch_current_device() -> None:
    """megatron-core allocates buffers on ``torch.cuda.current_device()``: answer with the CPU.

    Goes when megatron-core takes the device from its tensors or from the process group.
    """
    torch.cuda.current_device = lambda: torch.device("cpu")


def patch_moves_to_the_gpu() -> None:
    """Shared embeddings call ``tensor.cuda()``: leave the tensor where it is.

    Goes when megatron-core writes ``tensor.to(device)``.
    """
    torch.Tensor.cuda = lambda self, *_, **__: self


def patch_synchronize() -> None:
    """Pipeline communication synchronises the GPU after each exchange: there is nothing to wait for.

    Goes when megatron-core guards the call.
    """
    torch.cuda.synchronize = lambda *_, **__: None


def patch_random_states() -> None:
    """The tensor-parallel tracker keeps CUDA generator states, also where no dropout ever draws: keep the CPU's.

    Goes when the tracker takes a generator.
    """
    from megatron.core.tensor_parallel import random as tracker

    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    tracker._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    tracker._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


def patch_type_names() -> None:
    """The optimizers compare ``tensor.type()`` with names such as ``torch.cuda.FloatTensor``: add the ``cuda``.

    Goes when megatron-core compares dtypes.
    """
    original = torch.Tensor.type
    names = {f"torch.{kind}Tensor": f"torch.cuda.{kind}Tensor" for kind in ("Float", "BFloat16", "Half")}

    @wraps(original)
    def type_name(self, *args, **kwargs):
        answer = original(self, *args, **kwargs)
        return names.get(answer, answer) if isinstance(answer, str) else answer

    torch.Tensor.type = type_name


class _TorchWithoutCuda(ModuleType):
    """``torch`` with factories that read ``device="cuda"`` as the CPU."""

    def __init__(self) -> None:
        super().__init__("torch")
        for name in ("zeros", "tensor"):
            setattr(self, name, self._on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str):
        return getattr(torch, name)

    @staticmethod
    def _on_cpu(factory):
        @wraps(factory)
        def make(*args, device=None, **kwargs):
            return factory(*args, device="cpu" if device == "cuda" else device, **kwargs)

        return make


def patch_explicit_cuda_devices() -> None:
    """Schedules and optimizers make counters with ``device="cuda"``: hand these modules a torch that ignores it.

    A TorchFunctionMode would do the same for every call of the program, at a cost in each of them. Goes when
    megatron-core names no device there.
    """
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, optimizer
    from megatron.core.pipeline_parallel import schedules

    without_cuda = _TorchWithoutCuda()
    for module in (utils, clip_grads, optimizer, schedules):
        module.torch = without_cuda


def patch_pipeline_exchanges() -> None:
    """In an interleaved pipeline of two ranks both neighbours are the same rank, and what one sends "back" would be
    taken for what it sends "on": give the two directions tags of their own, which gloo has and NCCL has not.

    megatron-core avoids the mix-up on NCCL by exchanges that do not wait (``overlap_p2p_comm``); these hang on gloo,
    where a send ends only when its receiver has come. Goes when megatron-core tags its exchanges.
    """
    from megatron.core.pipeline_parallel import p2p_communication

    forward, backward = 1, 2

    def exchange(
        *, tensor_send_prev, tensor_recv_prev, tensor_send_next, tensor_recv_next, group, prev_pipeline_rank,
        next_pipeline_rank,
    ) -> list[dist.Work]:  # fmt: skip
        plan = [
            (dist.isend, tensor_send_prev, prev_pipeline_rank, backward),
            (dist.irecv, tensor_recv_prev, prev_pipeline_rank, forward),
            (dist.isend, tensor_send_next, next_pipeline_rank, forward),
            (dist.irecv, tensor_recv_next, next_pipeline_rank, backward),
        ]
        return [start(tensor, rank, group, tag) for start, tensor, rank, tag in plan if tensor is not None]

    p2p_communication._batched_p2p_ops = exchange


def peak_memory_bytes() -> int:
    """Largest memory of this process since the last reset: allocated on the GPU, else resident on the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if os.path.exists("/proc/self/status"):  # Linux, whose getrusage counts what the parent held at the start, too
        with open("/proc/self/status") as stream:
            return next(1024 * int(line.split()[1]) for line in stream if line.startswith("VmHWM:"))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory() -> bool:
    """Start a new measurement; False where the system keeps the peak since the process began (other than Linux)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return True
    if libc := _glibc():
        libc.malloc_trim(0)  # what is free but kept must not count in the new measurement
    try:
        with open("/proc/self/clear_refs", "w") as stream:
            stream.write("5")  # 5 resets the peak of resident memory, see proc(5)
    except OSError:
        return False
    return True


def processor_name() -> str:
    """Model of the CPU, as far as the system tells."""
    try:
        with open("/proc/cpuinfo") as stream:
            names = [line.partition(":")[2].strip() for line in stream if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else python_platform.processor() or python_platform.machine()


def describe_machine() -> dict[str, str | int]:
    """Versions and hardware, for summary.json and benchmark tables."""
    cuda = torch.cuda.is_available()
    return {
        "python": python_platform.python_version(),
        "torch": torch.__version__,
        "megatron_core": metadata.version("megatron-core"),
        "device": torch.cuda.get_device_name() if cuda else processor_name(),
        "gpus": torch.cuda.device_count() if cuda else 0,
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
    }
