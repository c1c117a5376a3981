"""Learning-rate schedulers; importing this package registers them."""

from fairseq_vqem.schedulers.warmup_exponential import WarmupExponential, WarmupExponentialConfig

__all__ = ["WarmupExponential", "WarmupExponentialConfig"]
