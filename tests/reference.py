"""Onsets and Frames as a course would write it, for bench.py to measure against: clear, correct and in no hurry.

Everything is float32 in torch's own memory layout; piano rolls of whole recordings stay in memory; a batch is collated item by
item; every parameter's gradient is clipped by itself; a recording goes through the model in one piece; notes are
followed through the rolls frame by frame, and scored all at once. The model is that of `build_model("onf", recipe=RECIPES["course"])`, whose weights it loads.
"""

import json
from pathlib import Path

import mir_eval
import numpy as np
import pretty_midi
import soundfile
import torch
import torchaudio
from torch import Tensor, nn

from constants import F_MAX, F_MIN, HOP_SIZE, MAX_MIDI, MIN_MIDI, N_FFT, N_KEYS, N_MELS, SAMPLE_RATE
from dataset import Recording
from notes import Notes, frames_to_seconds, seconds_to_frames

LEARNING_RATE = 6e-4
MAX_NORM = 3.0
N_PITCHES = 128  # rows of a MIDI roll, before those off the keyboard are cut away


class LogMelSpectrogram(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.melspectrogram = torchaudio.transforms.MelSpectrogram(
            SAMPLE_RATE, N_FFT, hop_length=HOP_SIZE, f_min=F_MIN, f_max=F_MAX, n_mels=N_MELS, center=False)

    def forward(self, audio: Tensor) -> Tensor:
        """(B, S) -> (B, T, M)."""
        side = (N_FFT - HOP_SIZE) // 2
        mel = self.melspectrogram(nn.functional.pad(audio, (side, side)))
        return torch.log(torch.clamp(mel, min=1e-9)).transpose(1, 2)


class ConvStack(nn.Module):
    def __init__(self, cnn_unit: int, fc_unit: int) -> None:
        super().__init__()
        self.cnn = nn.Sequential(
            nn.Conv2d(1, cnn_unit, 3, padding=1), nn.BatchNorm2d(cnn_unit), nn.ReLU(),
            nn.Conv2d(cnn_unit, cnn_unit, 3, padding=1), nn.BatchNorm2d(cnn_unit), nn.ReLU(),
            nn.MaxPool2d((1, 2)), nn.Dropout(0.25),
            nn.Conv2d(cnn_unit, cnn_unit * 2, 3, padding=1), nn.BatchNorm2d(cnn_unit * 2), nn.ReLU(),
            nn.MaxPool2d((1, 2)), nn.Dropout(0.25))
        self.fc = nn.Sequential(nn.Linear(cnn_unit * 2 * (N_MELS // 4), fc_unit), nn.Dropout(0.5))

    def forward(self, mel: Tensor) -> Tensor:
        x = self.cnn(mel.unsqueeze(1))                       # (B, T, M) -> (B, 1, T, M) -> (B, C, T, M // 4)
        return self.fc(x.transpose(1, 2).flatten(-2))        # -> (B, T, C * M // 4) -> (B, T, fc_unit)


class OnsetsAndFrames(nn.Module):
    """Hawthorne et al., ISMIR 2018, figure 1, less the first sigmoid."""

    def __init__(self, cnn_unit: int = 48, fc_unit: int = 256, lstm_unit: int = 88) -> None:
        super().__init__()
        self.melspectrogram = LogMelSpectrogram()
        self.frame_conv_stack, self.onset_conv_stack = ConvStack(cnn_unit, fc_unit), ConvStack(cnn_unit, fc_unit)
        self.frame_fc = nn.Linear(fc_unit, N_KEYS)
        self.onset_lstm = nn.LSTM(fc_unit, lstm_unit, num_layers=2, batch_first=True, bidirectional=True)
        self.onset_fc = nn.Linear(2 * lstm_unit, N_KEYS)
        self.combined_lstm = nn.LSTM(2 * N_KEYS, lstm_unit, num_layers=2, batch_first=True, bidirectional=True)
        self.combined_fc = nn.Linear(2 * lstm_unit, N_KEYS)

    def forward(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S) -> frame logits and onset logits, (B, T, K) each."""
        mel = self.melspectrogram(audio)
        frame = self.frame_fc(self.frame_conv_stack(mel))
        onset = self.onset_fc(self.onset_lstm(self.onset_conv_stack(mel))[0])
        combined, _ = self.combined_lstm(torch.cat([frame, onset.detach()], dim=-1))
        return self.combined_fc(combined), onset


def whole_rolls(notes: Notes, n_frames: int) -> tuple[np.ndarray, np.ndarray]:
    """The onset roll and the frame roll of a whole recording, (T, 88) float64 each."""
    onset_roll, frame_roll = np.zeros((n_frames, N_PITCHES)), np.zeros((n_frames, N_PITCHES))
    for (onset, offset), pitch in zip(notes.intervals, notes.pitches):
        first = int(seconds_to_frames(onset))
        last = max(int(seconds_to_frames(offset - 1 / SAMPLE_RATE)), first)
        onset_roll[first : first + 1, pitch] = 1
        frame_roll[first : last + 1, pitch] = 1
    return onset_roll[:, MIN_MIDI : MAX_MIDI + 1], frame_roll[:, MIN_MIDI : MAX_MIDI + 1]


class Recordings(torch.utils.data.Dataset):
    """One random segment of each recording, whose audio and rolls are all in memory."""

    def __init__(self, recordings: list[Recording], sequence_length: int, seed: int = 0) -> None:
        self.random, self.n_frames = np.random.RandomState(seed), sequence_length // HOP_SIZE
        self.items = [(torch.from_numpy(recording.audio), *map(torch.from_numpy, whole_rolls(recording.notes, recording.n_frames)))
                      for recording in recordings]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.cut(index, self.random.randint(len(self.items[index][1]) - self.n_frames + 1))

    def cut(self, index: int, start: int) -> dict[str, Tensor]:
        """The segment of that recording that begins with that frame."""
        audio = self.items[index][0][start * HOP_SIZE : (start + self.n_frames) * HOP_SIZE]
        return {"audio": audio.float() / 32768, **self.labels(index, start)}

    def labels(self, index: int, start: int) -> dict[str, Tensor]:
        _, onset, frame = self.items[index]
        onset, frame, stop = onset >= 1, frame >= 1, start + self.n_frames
        return {"onset": onset[start:stop].float(), "frame": frame[start:stop].float()}


def load_recordings(folder: Path) -> list[Recording]:
    """The recordings of a data folder of 16 kHz mono files without pedal, decoded and parsed every time."""
    recordings = []
    for row in json.loads((folder / "data.json").read_text()):
        audio, _ = soundfile.read(folder / row["audio_filename"], dtype="int16")
        notes = pretty_midi.PrettyMIDI(str(folder / row["midi_filename"])).instruments[0].notes
        recordings.append(Recording(row["audio_filename"], audio, Notes(
            [(note.start, note.end) for note in notes], [note.pitch for note in notes], [note.velocity for note in notes])))
    return recordings


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> float:
    """One step on a batch; gives the loss."""
    bce = nn.BCEWithLogitsLoss()
    frame_logit, onset_logit = model(batch["audio"])
    loss = bce(frame_logit, batch["frame"]) + bce(onset_logit, batch["onset"])
    optimizer.zero_grad()
    loss.backward()
    for parameter in model.parameters():
        nn.utils.clip_grad_norm_([parameter], MAX_NORM)
    optimizer.step()
    return loss.item()


def read_audio(path: Path) -> np.ndarray:
    """(S,) float32 of a 16 kHz mono file."""
    return soundfile.read(path, dtype="float32")[0]


def extract_notes(onset: np.ndarray, frame: np.ndarray, onset_threshold: float = 0.5, frame_threshold: float = 0.5) -> Notes:
    """Notes in two rolls of probabilities, (T, 88) each, by the rules of `evaluate.extract_notes` for onsets of one frame, a frame at a time."""
    onset, frame = onset >= onset_threshold, frame >= frame_threshold
    rises = np.concatenate([onset[:1], onset[1:] & ~onset[:-1]])
    intervals, pitches = [], []
    for first, key in np.argwhere(rises):
        last = first
        while last + 1 < len(onset) and (onset[last + 1, key] or frame[last + 1, key]) and not rises[last + 1, key]:
            last += 1
        start = frames_to_seconds(first)
        intervals.append((start, max(frames_to_seconds(last), start + 0.5 * HOP_SIZE / SAMPLE_RATE)))
        pitches.append(key + MIN_MIDI)
    return Notes(intervals, pitches, [80] * len(pitches))


def note_scores(ref: Notes, est: Notes) -> list[tuple[float, ...]]:
    """Precision, recall, F1 and overlap by mir_eval, without offsets and with them; the numbers of `evaluate.note_metrics`."""
    hertz = [mir_eval.util.midi_to_hz(notes.pitches) for notes in (ref, est)]
    return [mir_eval.transcription.precision_recall_f1_overlap(ref.intervals, hertz[0], est.intervals, hertz[1], offset_ratio=ratio)
            for ratio in (None, 0.2)]


def write_midi(path: Path, notes: Notes) -> None:
    midi = pretty_midi.PrettyMIDI()
    piano = pretty_midi.Instrument(program=0)
    for (onset, offset), pitch, velocity in zip(notes.intervals, notes.pitches, notes.velocities):
        piano.notes.append(pretty_midi.Note(int(velocity), int(pitch), float(onset), float(offset)))
    midi.instruments.append(piano)
    midi.write(str(path))
