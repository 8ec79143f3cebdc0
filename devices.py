"""Where the models run: which device, in which precision, beside how many others, and how a process keeps its memory."""

import contextlib
import ctypes
import platform

import torch
import torch.distributed as dist

X86 = ("x86_64", "AMD64")
BIG_BLOCK = 32 << 20  # bytes; glibc takes no larger M_MMAP_THRESHOLD


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 where the hardware multiplies it faster than float32: NVIDIA's GPUs of compute capability 8.0 and more, and CPUs with AMX
    or AVX512-BF16. Of the latter not Intel's, which take twice as long for it: a Xeon whose AMX a virtual machine hides."""
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = (device.type == "cpu" and platform.machine() in X86
                and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported() and "Intel" not in torch.cpu.get_capabilities().get("cpu_name", "")))
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=fast)


def multiplies_bytes(device: torch.device) -> bool:
    """Whether convolutions of 8-bit integers are faster than those of floats: on x86 CPUs with AVX2, by oneDNN."""
    return device.type == "cpu" and torch.cpu._is_avx2_supported() and torch.backends.mkldnn.is_available()


def keeps_bfloat16(device: torch.device) -> bool:
    """Whether features between convolutions are bfloat16 in training where autocast is off: on x86 CPUs, where that takes no longer."""
    return device.type == "cpu" and platform.machine() in X86


def has_avx2_alone() -> bool:
    """Whether this is an x86 CPU with AVX2 and nothing newer, as most laptops have."""
    return torch.cpu._is_avx2_supported() and not torch.cpu._is_avx512_supported()


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many train together; (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def keep_pages(all_blocks: bool = False) -> None:
    """Let glibc keep freed memory for the next step: handing fresh pages to each was nearly half of a step on the CPU.

    Unless `all_blocks`, as training needs it, those of BIG_BLOCK and more are given back: what grows with a recording is needed
    once, and no hole that an earlier block left may be large enough for it.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc: nothing to tune
        mallopt = ctypes.CDLL(None).mallopt
        if all_blocks:
            mallopt(-4, 0)          # M_MMAP_MAX: no big block gets a mapping of its own, to be unmapped when freed
        else:
            mallopt(-3, BIG_BLOCK)  # M_MMAP_THRESHOLD: only blocks from here on get one
        mallopt(-1, -1)             # M_TRIM_THRESHOLD: never give the top of the heap back
        mallopt(-2, 64 << 20)       # M_TOP_PAD: grow by 64 MiB at a time
        mallopt(-8, 1)              # M_ARENA_MAX: no heap for each thread, which would be unmapped when it is empty


def pick_device(name: str = "auto", number: int | None = None) -> torch.device:
    """The device of that name, or the best there is; of several GPUs that of this `number`, which only processes that train together have.

    Raises:
        ValueError: this machine has no such device, or it is one on which processes cannot train together.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() and number is None else "cpu"
    if name == "mps" and number is not None:
        raise ValueError("device 'mps': several processes cannot share it; leave out torchrun, or take --device cpu")
    if name == "cuda" and number is not None:  # before anything is put on the first, where each process would take up memory
        name = f"cuda:{number}"
    try:
        torch.ones(1, device=name).item()  # "meta" can be made, but holds nothing
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r}: {str(error).splitlines()[0]}") from error
    return torch.device(name)
