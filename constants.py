"""The numbers that audio and labels share. They travel inside every checkpoint."""

SAMPLE_RATE = 16000  # samples per second; every recording is brought to it
HOP_SIZE = 512       # samples between frames, 32 ms at 16 kHz
N_FFT = 2048         # samples in one Fourier window, 128 ms
N_MELS = 229         # mel bands, as in Hawthorne et al., ISMIR 2018
F_MIN = 30           # Hz, lower edge of the lowest band; the lowest key sounds at 27.5 Hz
F_MAX = 8000         # Hz, upper edge of the highest band: half the sample rate
MIN_MIDI = 21        # MIDI pitch of the lowest key, A0
MAX_MIDI = 108       # MIDI pitch of the highest key, C8
N_KEYS = MAX_MIDI - MIN_MIDI + 1  # 88, the columns of a piano roll
