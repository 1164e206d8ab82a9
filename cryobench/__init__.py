"""cryobench: course and benchmark suite on denoising single-particle cryo-EM images."""

__version__ = "0.1.0"
