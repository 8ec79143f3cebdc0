"""Which device is picked, and that freed memory is kept."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import devices
from devices import pick_device


def test_an_unknown_device_is_named():
    with pytest.raises(ValueError, match="device 'abacus'"):
        pick_device("abacus")
    assert pick_device("cpu") == pick_device("cpu", 3) == torch.device("cpu")
    with pytest.raises(ValueError, match="device 'mps': several processes"):
        pick_device("mps", 0)
    with pytest.raises(ValueError, match="device 'cuda:99'"):  # of a hundred processes the last, with fewer GPUs or none
        pick_device("cuda", 99)


def test_processes_that_train_together_on_a_mac_use_its_cpu(monkeypatch):
    """Neither of the ways in which they could talk to each other knows of its GPU."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto", 1) == torch.device("cpu")


@pytest.mark.parametrize("name, amx, avx512, enabled", [("Intel Xeon", True, True, True), ("Intel Xeon", False, True, False), ("Intel Core i7", False, False, False),
                                                       ("AMD EPYC 9R14", False, True, True), ("AMD EPYC 7R13", False, False, False)])
def test_bfloat16_is_used_where_it_is_faster(name, amx, avx512, enabled, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name})
    with devices.autocast(torch.device("cpu")):
        assert torch.is_autocast_enabled("cpu") == enabled


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or not Path("/proc/self/statm").exists(), reason="memory is kept where glibc is, and measured on Linux")
@pytest.mark.parametrize("call, mib, kept", [("devices.keep_pages(all_blocks=True)", 64, True), ("devices.keep_pages()", 64, False),
                                             ("devices.keep_pages()", 16, True), ("", 16, False)])
def test_freed_memory_is_kept(call, mib, kept):
    """In a process of its own, for it cannot be undone: a block that was filled and freed still belongs to it, or not."""
    code = f"""
import resource, torch, devices
{call}
def pages():
    return int(open("/proc/self/statm").read().split()[1])
block = torch.ones({mib} << 18)
filled = pages()
del block
print((filled - pages()) * resource.getpagesize())
"""
    freed = int(subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True).stdout)
    assert (freed < 1 << 20) if kept else (freed > (mib - 4) << 20)


@pytest.mark.parametrize("error", [OSError, AttributeError, TypeError])
def test_where_there_is_no_glibc_nothing_is_kept(error, monkeypatch):
    """ctypes.CDLL(None) is a TypeError on Windows."""
    def missing(_):
        raise error

    monkeypatch.setattr(devices.ctypes, "CDLL", missing)
    devices.keep_pages()
