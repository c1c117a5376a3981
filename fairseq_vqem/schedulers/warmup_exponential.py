"""Linear warm-up, then exponential decay of the learning rate."""

from dataclasses import dataclass, field
from typing import Any

from fairseq.dataclass import FairseqDataclass
from fairseq.optim.lr_scheduler import FairseqLRScheduler, register_lr_scheduler
from omegaconf import II

from fairseq_vqem.errors import UserError


@dataclass
class WarmupExponentialConfig(FairseqDataclass):
    """Options of ``--lr-scheduler warmup_exponential``."""

    warmup_updates: int = field(
        default=10_000, metadata={"help": "raise the learning rate linearly for this many updates"}
    )
    warmup_init_lr: float = field(
        default=0.0, metadata={"help": "learning rate at update 0, if there is a warm-up"}
    )
    lr_half_life: float = field(
        default=50_000.0,
        metadata={"help": "after the warm-up, halve the learning rate every so many updates"},
    )
    min_lr: float = field(
        default=0.0, metadata={"help": "let the decay go no lower than this learning rate"}
    )
    lr: list[float] = II("optimization.lr")  # noqa: RUF009


@register_lr_scheduler("warmup_exponential", dataclass=WarmupExponentialConfig)
class WarmupExponential(FairseqLRScheduler):
    """``--lr`` at update ``w`` (the end of the warm-up) and ``lr * 2 ** -((u - w) / h)`` after it.

    Raises:
        UserError: more than one ``--lr``, a negative number of updates or learning rate, or a
            half-life of zero.
    """

    def __init__(self, cfg: WarmupExponentialConfig, optimizer: Any) -> None:
        super().__init__(cfg, optimizer)
        rates = [cfg.lr] if isinstance(cfg.lr, float) else list(cfg.lr)
        if len(rates) != 1:
            raise UserError("--lr-scheduler warmup_exponential takes exactly one --lr.")
        if cfg.lr_half_life <= 0:
            raise UserError(f"--lr-half-life {cfg.lr_half_life:g} must be greater than 0.")
        if min(cfg.warmup_updates, cfg.warmup_init_lr, cfg.min_lr) < 0:
            raise UserError("--warmup-updates, --warmup-init-lr and --min-lr must not be negative.")
        self.peak = float(rates[0])
        self.step_update(0)

    def rate(self, update: int) -> float:
        """The learning rate at an update; it depends on nothing else."""
        cfg = self.cfg
        if update < cfg.warmup_updates:
            share = update / cfg.warmup_updates
            return float(cfg.warmup_init_lr + share * (self.peak - cfg.warmup_init_lr))
        decayed = self.peak * 2.0 ** -((update - cfg.warmup_updates) / cfg.lr_half_life)
        return float(max(decayed, cfg.min_lr))

    def step_update(self, num_updates: int) -> float:
        """Set and return the learning rate for the next update."""
        self.optimizer.set_lr(self.rate(num_updates))
        return float(self.optimizer.get_lr())

    def step(self, epoch: int, val_loss: float | None = None) -> float:
        """Note the validation loss; the learning rate does not change between epochs."""
        super().step(epoch, val_loss)
        return float(self.optimizer.get_lr())
