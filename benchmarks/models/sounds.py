"""Synthesised sound as network input: speech-like syllables, played notes, and Whisper's log-mel features, with
NumPy only.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]

# First three formants of a, e, i, o, u in Hz (Peterson and Barney 1952, men).
VOWELS_HZ = ((730, 1090, 2440), (530, 1840, 2480), (270, 2290, 3010), (570, 840, 2410), (300, 870, 2240))
WHISPER_RATE_HZ = 16_000
WHISPER_SAMPLES = 480_000
WHISPER_FFT = 400
WHISPER_HOP = 160


def speech(n_samples: int, rate_hz: int, seed: int) -> FloatArray:
    """Voiced syllables of 120 to 300 ms with falling pitch, formants and pauses, over faint noise."""
    rng = np.random.default_rng(seed)
    sound = rng.normal(0, 0.003, n_samples)
    at = 0
    while at < n_samples:
        length = int(rate_hz * rng.uniform(0.12, 0.30))
        syllable = _syllable(length, rate_hz, rng)[: n_samples - at]
        sound[at : at + len(syllable)] += syllable
        at += length + int(rate_hz * rng.choice([0.02, 0.05, 0.25]))
    return _scaled_to(0.6, sound)


def _syllable(n_samples: int, rate_hz: int, rng: np.random.Generator) -> NDArray[np.float64]:
    seconds = np.arange(n_samples) / rate_hz
    pitch_hz = rng.uniform(100, 160) * (1 - 0.2 * seconds / max(seconds[-1], 1e-9))
    phase = 2 * np.pi * np.cumsum(pitch_hz) / rate_hz
    formants = VOWELS_HZ[rng.integers(len(VOWELS_HZ))]
    voice = np.zeros(n_samples)
    for harmonic in range(1, 30):
        centre_hz = harmonic * pitch_hz.mean()
        if centre_hz < rate_hz / 2:
            gain = sum(np.exp(-(((centre_hz - f) / 150) ** 2)) for f in formants) + 0.03
            voice += gain / harmonic**0.5 * np.sin(harmonic * phase)
    return voice * np.sin(np.pi * np.linspace(0, 1, n_samples)) ** 0.5


def notes(n_samples: int, rate_hz: int, seed: int) -> FloatArray:
    """Plucked notes and chords of a minor scale with decaying harmonics; amplitude below 1."""
    rng = np.random.default_rng(seed)
    sound = np.zeros(n_samples)
    scale = np.array([0, 2, 3, 5, 7, 8, 10, 12])
    for start in range(0, n_samples, rate_hz // 4):
        seconds = np.arange(n_samples - start) / rate_hz
        for semitone in rng.choice(scale, size=rng.integers(1, 4), replace=False):
            note_hz = 220.0 * 2 ** (semitone / 12)
            for harmonic in range(1, 7):
                sound[start:] += (
                    np.exp(-3 * harmonic**0.5 * seconds) / harmonic * np.sin(2 * np.pi * harmonic * note_hz * seconds)
                )
    return _scaled_to(0.7, sound)


def _scaled_to(peak: float, sound: NDArray[np.float64]) -> FloatArray:
    return np.asarray(peak / np.abs(sound).max() * sound, np.float32)


def speech_windows(shape: tuple[int, ...], rate_hz: int, seed: int) -> FloatArray:
    """`f32[N,samples]`: windows from the middle of different utterances."""
    n, n_samples = shape
    return np.stack([speech(4 * n_samples, rate_hz, seed * 31 + i)[n_samples : 2 * n_samples] for i in range(n)])


def note_windows(shape: tuple[int, ...], rate_hz: int, seed: int) -> FloatArray:
    """`f32[N,samples,1]`."""
    return np.stack([notes(shape[1], rate_hz, seed * 31 + i) for i in range(shape[0])])[:, :, None]


def whisper_features(shape: tuple[int, ...], seed: int) -> FloatArray:
    """`f32[N,80,3000]`: the log-mel spectrogram of 11 s of speech and 19 s of silence."""
    sounds = [speech(11 * WHISPER_RATE_HZ, WHISPER_RATE_HZ, seed * 31 + i) for i in range(shape[0])]
    return np.stack([log_mel(sound, shape[1]) for sound in sounds])


def log_mel(sound: FloatArray, n_mels: int) -> FloatArray:
    """Whisper's features of 30 s of sound (padded with silence).

    Source: openai/whisper `audio.py`, `log_mel_spectrogram` (25 ms windows every 10 ms, 8 decades kept).
    """
    padded = np.zeros(WHISPER_SAMPLES)
    padded[: len(sound)] = sound[:WHISPER_SAMPLES]
    mirrored = np.pad(padded, WHISPER_FFT // 2, mode="reflect")
    framed = np.lib.stride_tricks.sliding_window_view(mirrored, WHISPER_FFT)[::WHISPER_HOP]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WHISPER_FFT) / WHISPER_FFT)
    power = np.abs(np.fft.rfft(framed[:-1] * window)) ** 2
    decades = np.log10(np.maximum(power @ _mel_bands(n_mels).T, 1e-10)).T
    return np.asarray((np.maximum(decades, decades.max() - 8) + 4) / 4, np.float32)


def _mel_bands(n_mels: int) -> NDArray[np.float64]:
    """Triangular filters on Slaney's mel scale (linear below 1 kHz), each of unit area, `[n_mels, 201]`."""
    bins_hz = np.linspace(0, WHISPER_RATE_HZ / 2, WHISPER_FFT // 2 + 1)
    top_mel = 15 + 27 * np.log(8) / np.log(6.4)
    mels = np.linspace(0, top_mel, n_mels + 2)
    edges_hz = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp((mels - 15) * np.log(6.4) / 27))
    low, centre, high = edges_hz[:-2, None], edges_hz[1:-1, None], edges_hz[2:, None]
    rising, falling = (bins_hz - low) / (centre - low), (high - bins_hz) / (high - centre)
    bands: NDArray[np.float64] = np.maximum(0, np.minimum(rising, falling)) * 2 / (high - low)
    return bands
