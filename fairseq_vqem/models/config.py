"""Options of ``vqem_transformer`` and the check of their combination."""

import logging
from argparse import SUPPRESS, BooleanOptionalAction
from dataclasses import dataclass, field, fields
from typing import Any, Optional

from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.models.transformer import TransformerConfig
from fairseq.models.transformer.transformer_config import DecoderConfig, EncDecBaseConfig

from fairseq_vqem.bottlenecks import BottleneckOptions
from fairseq_vqem.bottlenecks.base import BOTTLENECKS, CHOICES, Bottleneck, find_bottleneck
from fairseq_vqem.errors import UserError
from fairseq_vqem.models.defaults import check_sizes
from fairseq_vqem.modules.convolutions import EXPANDER_KINDS, RESIDUAL_PLACEMENTS
from fairseq_vqem.schedules import parse_schedule

log = logging.getLogger(__name__)

LATENT_LENGTHS = ("end", "source")
CODE_STREAMS = ("auto", "joint", "factorised")
OUTPUTS = ("positions", "ctc")
LARGEST_JOINT_CODEBOOK = 2**16


def option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class VQEMTransformerConfig(FairseqDataclass):
    """One flat set of options, so that fairseq-train and fairseq-hydra-train both read it."""

    embed_dim: int = option(512, "hidden size D of every part, the codebook included")
    ffn_embed_dim: int = option(2048, "inner size of the feed-forward blocks")
    attention_heads: int = option(8, "attention heads of every Transformer layer")
    encoder_layers: int = option(6, "layers of the source encoder")
    latent_layers: int = option(6, "layers of the latent predictor")
    decoder_layers: int = option(6, "layers of the parallel decoder")
    dropout: float = option(0.1, "dropout probability")
    attention_dropout: float = option(0.0, "dropout probability of attention weights")
    activation_dropout: float = option(0.0, "dropout probability inside the feed-forward blocks")
    latent_dropout: Optional[float] = option(
        None, "dropout probability of the latent predictor (default: that of --dropout)"
    )
    max_source_positions: int = option(1024, "longest source in tokens")
    max_target_positions: int = option(1024, "longest target in tokens")
    share_all_embeddings: bool = option(
        True, "one embedding matrix for source, target and output; needs a joined dictionary"
    )

    bottleneck: str = option(
        "soft-em",
        "discretisation: soft-em, hard-em, gradient-vq, gumbel, semhash, gm-vq,"
        " or package.module:Class",
    )
    codebook_size: int = option(4096, "number of codes K")
    em_samples: int = option(10, "samples m per latent in the E step of soft-em")
    codebook_decay: float = option(0.999, "decay λ of the codebook's moving averages")
    codebook_update: ChoiceEnum(CHOICES["codebook_update"]) = option(  # type: ignore[valid-type]
        "sums-counts", "moving averages of sums and counts, or Eq. 4-5 as printed"
    )
    codebook_init: ChoiceEnum(CHOICES["codebook_init"]) = option(  # type: ignore[valid-type]
        "latest", "first codebook: the newest encoder outputs of the warm-up, or k-means++ on them"
    )
    dead_code_threshold: float = option(
        0.0, "codes whose moving count falls below are restarted at encoder outputs; 0: never"
    )
    posterior_temperature: float = option(
        1.0, "temperature of the posterior of soft-em, gm-vq and hard-em with a learned prior"
    )
    cluster_prior: ChoiceEnum(CHOICES["cluster_prior"]) = option(  # type: ignore[valid-type]
        "uniform", "prior over codes in the E step; learned: from the moving counts"
    )
    num_codebooks: int = option(1, "codebooks n of K^(1/n) codes each (product or residual VQ)")
    codebook_split: ChoiceEnum(CHOICES["codebook_split"]) = option(  # type: ignore[valid-type]
        "slice", "what each codebook sees: a slice, a random projection, the level's residual"
    )
    code_stream: ChoiceEnum(CODE_STREAMS) = option(  # type: ignore[valid-type]
        "auto",
        "what the latent predictor writes per latent: one joint code or one per codebook;"
        f" auto: joint up to {LARGEST_JOINT_CODEBOOK} codes",
    )
    gumbel_temperature: str = option("1.2:0.2@20k", "temperature of gumbel and gm-vq, by update")
    gumbel_noise: str = option("0:1@2000", "scale of the noise of gumbel and gm-vq, by update")
    semhash_discrete: str = option(
        "0:0.5@2000", "share of latents of semhash that the decoder sees as bits, by update"
    )
    gm_gamma: float = option(1.0, "weight γ of the latent-codeword distance of gm-vq")
    gm_beta: float = option(1.0, "weight β of the aggregated posterior's divergence of gm-vq")
    bottleneck_args: str = option(
        "{}", "JSON options of a bottleneck of another package (package.module:Class)"
    )
    compress_steps: int = option(3, "halvings n_c of the target length")
    residual_blocks: int = option(1, "residual convolution blocks per compress step")
    residual_placement: ChoiceEnum(RESIDUAL_PLACEMENTS) = option(  # type: ignore[valid-type]
        "between", "residual blocks between the strided convolutions, or all before the first"
    )
    expander: ChoiceEnum(EXPANDER_KINDS) = option(  # type: ignore[valid-type]
        "projection", "how latents are brought back to the target length"
    )
    decoder_attend_source: bool = option(True, "the parallel decoder attends to the source")
    target_encoder_attend_source: bool = option(False, "the target encoder attends to the source")
    causal_decoder: bool = option(False, "causal self-attention in the parallel decoder")
    latent_length: ChoiceEnum(LATENT_LENGTHS) = option(  # type: ignore[valid-type]
        "end",
        "end: the latents cover the target and an explicit end symbol is predicted; "
        "source: they cover max(|y|, 2|x|) positions, as in the released code",
    )

    output: ChoiceEnum(OUTPUTS) = option(  # type: ignore[valid-type]
        "positions",
        "positions: the latents are expanded to the target's length, a word each; ctc: words are"
        " read off frames of the source, which see the latents as a plan",
    )
    upsample_scale: int = option(2, "frames per source token of --output ctc")
    hidden_codes: float = option(
        0.0, "share of sentences whose latents the decoder of --output ctc does not see in training"
    )

    quantise_schedule: str = option(
        "0:1@1000-2000", "share of latents that is quantised, by update; 0 is the warm-up"
    )
    gold_schedule: str = option(
        "0.9:0.0@1000-20k",
        "share of decoder inputs replaced by gold embeddings, by update; with --output ctc"
        " relative to the frames that are wrong (glancing)",
    )
    predicted_schedule: str = option(
        "0", "share of latents fed to the decoder as the predictor would write them, by update"
    )
    predictor_prior: str = option(
        "0",
        "weight of the latent predictor as the E step's prior (soft-em, hard-em), by update: what"
        " a nat of its log-probability is worth in mean squared distances to the nearest code",
    )
    init_from: Optional[str] = option(
        None, "AR Transformer checkpoint whose encoder, decoder and embeddings start the student"
    )


def check_config(cfg: VQEMTransformerConfig) -> None:
    """Raise ``UserError`` for options that do not go together."""
    check_codebook_size(cfg)
    bottleneck_options(cfg)
    prior = parse_schedule(cfg.predictor_prior, minimum=0.0, option="--predictor-prior")
    if max(prior.start, prior.end) > 0 and (
        cfg.num_codebooks > 1 or not find_bottleneck(cfg.bottleneck).takes_prior
    ):
        raise UserError(
            f"--predictor-prior {cfg.predictor_prior} needs soft-em or hard-em with one codebook:"
            " leave it out, or choose one of these with --bottleneck"
        )
    _check_output(cfg)
    check_sizes(cfg)


def _check_output(cfg: VQEMTransformerConfig) -> None:
    if not 0.0 <= cfg.hidden_codes <= 1.0:
        raise UserError(f"--hidden-codes is {cfg.hidden_codes}: it must be in [0, 1]")
    if cfg.upsample_scale < 1:
        raise UserError(f"--upsample-scale is {cfg.upsample_scale}: it must be at least 1")
    if str(cfg.output) != "ctc" and cfg.hidden_codes:
        raise UserError(
            f"--hidden-codes {cfg.hidden_codes} leaves the decoder nothing to read: add --output"
            " ctc, whose frames also show the source"
        )
    if str(cfg.output) == "ctc" and cfg.causal_decoder:
        raise UserError("--output ctc aligns whole sentences: leave out --causal-decoder")


def _check_frames(cfg: Any) -> None:
    if str(cfg.output) != "ctc" and cfg.upsample_scale != VQEMTransformerConfig.upsample_scale:
        raise UserError(
            f"--upsample-scale {cfg.upsample_scale} changes nothing without --output ctc: leave it"
            " out"
        )


def _check_read(cfg: Any, kind: type[Bottleneck], name: str) -> None:
    """Refuse what other bottlenecks read and this one does not."""
    if kind.reads is None:
        return
    if str(cfg.bottleneck_args) != "{}":
        raise UserError(
            f"--bottleneck-args {cfg.bottleneck_args} is for a class of another package; {name}"
            " has options of its own"
        )
    for each in fields(BottleneckOptions):
        readers = [
            other for other, known in BOTTLENECKS.items() if each.name in (known.reads or ())
        ]
        value = str(getattr(cfg, each.name, each.default))
        if readers and each.name not in kind.reads and value != str(each.default):
            raise UserError(
                f"--{each.name.replace('_', '-')} {value} changes nothing with --bottleneck"
                f" {name}: it is for {' and '.join(readers)}"
            )


def factorises(cfg: VQEMTransformerConfig) -> bool:
    """Whether the latent predictor writes one symbol per codebook instead of a joint code."""
    if str(cfg.code_stream) != "auto":
        return str(cfg.code_stream) == "factorised"
    return cfg.codebook_size > LARGEST_JOINT_CODEBOOK


def check_codebook_size(cfg: Any) -> None:
    """Raise ``UserError`` for a codebook too small, or too large for one symbol per latent."""
    if cfg.codebook_size < 2:
        raise UserError(
            f"--codebook-size is {cfg.codebook_size}: a codebook needs at least 2 codes"
        )
    joint = cfg.num_codebooks == 1 or not factorises(cfg)
    if cfg.codebook_size > LARGEST_JOINT_CODEBOOK and joint:
        raise UserError(
            f"--codebook-size {cfg.codebook_size} is too large for one codebook: use at most"
            f" {LARGEST_JOINT_CODEBOOK} codes or several codebooks (--num-codebooks), and no"
            " --code-stream joint"
        )


def check_effective(cfg: Any) -> None:
    """Raise ``UserError`` for options that would change nothing in a training.

    A finished checkpoint may have them all the same.
    """
    if hasattr(cfg, "upsample_scale"):  # pictures have none
        _check_frames(cfg)
    kind, name = find_bottleneck(cfg.bottleneck), str(cfg.bottleneck)
    single = cfg.num_codebooks == 1
    if str(cfg.codebook_split) != "slice" and single:
        raise UserError(
            f"--codebook-split {cfg.codebook_split} is for several codebooks: add --num-codebooks"
        )
    if str(cfg.code_stream) == "factorised" and single:
        raise UserError(
            "--code-stream factorised writes one symbol per codebook, but there is only one: leave"
            " it out"
        )
    _check_read(cfg, kind, name)
    if str(cfg.codebook_init) == "kmeans++" and parse_schedule(cfg.quantise_schedule).start > 0:
        log.warning(
            "--codebook-init kmeans++ changes nothing: with --quantise-schedule %s no update is"
            " without quantisation, and no codebook is made",
            cfg.quantise_schedule,
        )
    share = parse_schedule(cfg.quantise_schedule)
    if share.end < share.start:
        raise UserError(
            f"--quantise-schedule {cfg.quantise_schedule} falls, but a codebook is filled once, at"
            " the beginning: let it rise, as in 0:1@1000-2000"
        )
    learned = str(cfg.cluster_prior) == "learned"
    if learned and not kind.has_codebook_care:
        raise UserError(
            f"--bottleneck {name} does not know --cluster-prior: use it with soft-em or hard-em"
        )
    unread = set(BOTTLENECKS) - {"soft-em", "gm-vq", *(["hard-em"] if learned else [])}
    if cfg.posterior_temperature != 1.0 and name in unread:
        raise UserError(
            f"--posterior-temperature {cfg.posterior_temperature} changes nothing with --bottleneck"
            f" {name}: it is for soft-em, gm-vq and, with --cluster-prior learned, hard-em"
        )


def bottleneck_options(cfg: VQEMTransformerConfig) -> BottleneckOptions:
    named = {each.name for each in fields(BottleneckOptions)} - {"dimension"}
    values = {name: getattr(cfg, name) for name in named}
    texts = {name: str(value) for name, value in values.items() if name in CHOICES}
    return BottleneckOptions(**{**values, **texts, "dimension": cfg.embed_dim})


def transformer_config(cfg: VQEMTransformerConfig, decoder_layers: int) -> TransformerConfig:
    """fairseq's configuration of a pre-norm Transformer with ``decoder_layers`` layers."""
    result = TransformerConfig()
    shared = dict(
        embed_dim=cfg.embed_dim,
        ffn_embed_dim=cfg.ffn_embed_dim,
        attention_heads=cfg.attention_heads,
        normalize_before=True,
    )
    result.encoder = EncDecBaseConfig(layers=cfg.encoder_layers, **shared)
    result.decoder = DecoderConfig(layers=decoder_layers, **shared)
    result.dropout = cfg.dropout
    result.attention_dropout = cfg.attention_dropout
    result.activation_dropout = cfg.activation_dropout
    result.max_source_positions = cfg.max_source_positions
    result.max_target_positions = cfg.max_target_positions
    result.share_decoder_input_output_embed = True
    return result


def predictor_config(cfg: VQEMTransformerConfig) -> TransformerConfig:
    """`transformer_config` of the latent predictor."""
    result = transformer_config(cfg, cfg.latent_layers)
    if cfg.latent_dropout is not None:
        result.dropout = cfg.latent_dropout
    return result


def add_switches(parser: Any) -> None:
    """Turn every boolean option into ``--NAME/--no-NAME``.

    fairseq makes of a boolean that defaults to true a flag of the same name that turns it *off*.
    """
    for each in fields(VQEMTransformerConfig):
        if each.type is not bool:
            continue
        flag = "--" + each.name.replace("_", "-")
        action = parser._option_string_actions.pop(flag)
        parser._remove_action(action)
        parser.add_argument(
            flag, action=BooleanOptionalAction, default=SUPPRESS, help=each.metadata["help"]
        )
