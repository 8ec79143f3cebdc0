"""The same on a GPU. Each test runs in a process of its own, because the others hide the GPU to give the same numbers everywhere."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.skipif(not shutil.which("nvidia-smi"), reason="needs an NVIDIA GPU")


def run(*command: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_training_and_resuming(data_folder: Path, tmp_path: Path):
    flags = ["--data", str(data_folder), "--logdir", str(tmp_path / "run"), "-i", "4", "-vi", "2", "-b", "2", "-v", "16384", "--device", "cuda"]
    assert "on cuda" in run("train.py", *flags)
    assert (tmp_path / "run" / "results.json").is_file()
    run("train.py", "--resume", str(tmp_path / "run" / "model-2.pt"), "--logdir", str(tmp_path / "again"), "--device", "cuda")
    assert (tmp_path / "again" / "results.json").is_file()


@pytest.mark.parametrize("model", ["baseline", "rnn", "crnn", "onf", "harmonic"])
def test_a_gpu_hears_what_a_cpu_hears(model: str):
    """In float32 without TF32, on two seconds of noise; the rest is the order of additions."""
    difference = run("-c", f"""
import contextlib
import torch
import layers, model
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
model.autocast, model.multiplies_bytes = lambda device: contextlib.nullcontext(), lambda device: False
torch.manual_seed(0)
transcriber = model.build_model({model!r}).eval()
transcriber.level.fill_(0.01)  # as if trained: recordings are brought to its level and colour
audio = 0.1 * torch.randn(32000)
cpu, gpu = transcriber.infer(audio), transcriber.to("cuda").infer(audio)
layers.LONG_FRAMES = 16
pieces = transcriber.infer(audio)
print(max(float((a - b).abs().max()) for other in (gpu, pieces) for a, b in zip(cpu, other)))
""")
    assert float(difference) < 1e-3


def test_the_gradients_of_the_recurrent_layers_survive_autocast():
    """In float16, which is what autocast makes of an LSTM, nine in ten of them would be zero."""
    difference = run("-c", """
import torch
import model
torch.manual_seed(0)
transcriber = model.build_model("onf").to("cuda").eval()  # without dropout
for lstm in (transcriber.onset_lstm, transcriber.combined_lstm):
    lstm.train()  # cuDNN gives no gradient of one in eval mode
batch = {"audio": 0.1 * torch.randn(4, 102400), "onset": (torch.rand(4, 200, 88) < 0.004).float(),
         "frame": (torch.rand(4, 200, 88) < 0.03).float()}
batch = {name: value.to("cuda") for name, value in batch.items()}
gradients = []
for fast in (True, False):
    if not fast:
        model.autocast = lambda device: torch.autocast("cuda", enabled=False)
    transcriber.zero_grad()
    with model.autocast(torch.device("cuda")):
        logits = transcriber(batch["audio"])
    for logit, head in zip(logits, ("frame", "onset")):
        torch.nn.functional.binary_cross_entropy_with_logits(logit.float(), batch[head]).backward(retain_graph=True)
    gradients.append(torch.cat([p.grad.flatten().clone() for name, p in transcriber.named_parameters() if "lstm" in name]))
print(float((gradients[0] - gradients[1]).norm() / gradients[1].norm()))
""")
    assert float(difference) < 0.1


def test_augmentation_stays_on_the_gpu():
    assert run("-c", """
import torch
from augment import augment, transposed
from spectrogram import shifted_filters
audio = 0.1 * torch.randn(2, 16384, device="cuda")
keys = torch.tensor([-1, 2], device="cuda")
for part in (augment(audio, 12, 6, 1, 1), shifted_filters(keys + 0.2), transposed(torch.ones(2, 3, 88, device="cuda"), keys)):
    print(part.device.type, bool(torch.isfinite(part).all()))
""").split() == ["cuda", "True"] * 3
