"""``fairseq-vqem export``: a student as a folder that translates without fairseq and torch."""

from __future__ import annotations

import argparse
import random
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fairseq_vqem.errors import UserError, need_packages

if TYPE_CHECKING:
    from fairseq_vqem.export.standalone.manifest import Options
    from fairseq_vqem.generation.api import Translator

WEIGHTS = ("float32", "int8")
CHECKED_SENTENCES = 16
LONGEST_CHECKED = 24
SMALLEST_AGREEMENT = {"float32": 0.9, "int8": 0.3}  # on random words, where int8 is at its worst
FIRST_ORDINARY = 4  # fairseq's special symbols come before


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``fairseq-vqem export``."""
    parser = subparsers.add_parser(
        "export", help="write a student that translates without fairseq and torch (ONNX Runtime)"
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="the student")
    parser.add_argument(
        "--teacher", type=Path, help="autoregressive teacher that chooses among the candidates"
    )
    parser.add_argument("--data", type=Path, required=True, help="its binarised data")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must be new")
    parser.add_argument(
        "--weights",
        choices=WEIGHTS,
        default="float32",
        help="float32 gives the tokens of fairseq-generate; int8 has less than half the size, is"
        " faster and changes some tokens",
    )
    parser.add_argument(
        "--iter-decode-with-beam",
        type=int,
        default=1,
        help="of CTC: sentences kept by prefix beam search, of DAG: lengths of its path, of which"
        " --teacher chooses, or else the likeliest is taken",
    )
    parser.add_argument("--latent-beam", type=int, help="beam of the latent search; 1 is greedy")
    parser.add_argument(
        "--latent-length-reward", type=float, help="added to a beam's log-probability for each code"
    )
    parser.add_argument(
        "--latent-candidates", type=int, help="code sequences decoded, for --teacher to choose from"
    )
    parser.add_argument(
        "--latent-end",
        choices=("marginal", "joint"),
        help="end where that is likelier than all codes together, or than the best one",
    )
    parser.add_argument(
        "--latent-max-ratio", type=float, help="longest output, as a multiple of the source length"
    )
    parser.add_argument("--latent-max-offset", type=int, help="… plus this many tokens")
    parser.add_argument(
        "--iter-decode-eos-penalty",
        type=float,
        default=0.0,
        help="of CTC: taken from the blank's log-probability",
    )
    parser.add_argument(
        "--rescore", choices=("none",), help="none: take the likeliest codes, without re-scoring"
    )
    parser.add_argument(
        "--latent-temperature", type=float, help="0, where the checkpoint's own would sample codes"
    )
    for flag, text in (
        ("--stop-at-pad-latent", "end at the EOS/PAD latent of Appendix C"),
        ("--remove-repeats", "collapse runs of one token"),
    ):
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    decoding = (
        *("latent_beam", "latent_candidates", "latent_length_reward", "latent_end"),
        *("latent_max_ratio", "latent_max_offset", "stop_at_pad_latent", "remove_repeats"),
        *("rescore", "latent_temperature"),
    )
    given = {name: getattr(arguments, name) for name in decoding}
    overrides = {name: value for name, value in given.items() if value is not None}
    agreement = export(
        arguments.checkpoint,
        arguments.data,
        arguments.out,
        weights=arguments.weights,
        teacher=arguments.teacher,
        eos_penalty=arguments.iter_decode_eos_penalty,
        frame_beam=arguments.iter_decode_with_beam,
        task_overrides=overrides,
    )
    print(f"{arguments.out}: {agreement:.1%} of the tokens of random sentences are the model's own")
    return 0


def export(
    checkpoint: Path,
    data: Path,
    out: Path,
    *,
    weights: str = "float32",
    teacher: Path | None = None,
    eos_penalty: float = 0.0,
    frame_beam: int = 1,
    task_overrides: dict[str, Any] | None = None,
) -> float:
    """Write the student ``checkpoint`` to the folder ``out``.

    Args:
        data: binarised data with both dictionaries and the subword model.
        weights: ``float32`` or ``int8``.
        teacher: an autoregressive model that chooses among ``latent_candidates``, or among the
            sentences of the ``frame_beam``.
        eos_penalty: taken from the blank's log-probability of a CTC model.
        frame_beam: sentences kept by the search of a ``ctc_nat`` or ``dag_nat``; 1 takes the words
            of its best path.
        task_overrides: decoding options where they are not the checkpoint's.

    Returns:
        The share of tokens that ``out`` and the model agree on, on sentences of random ids.

    Raises:
        UserError: a package is missing, ``out`` exists, the checkpoint cannot be loaded, or it or
            its decoding options cannot be exported.
    """
    need_packages("exporting", "onnx", "onnxruntime")
    if weights not in WEIGHTS:
        raise UserError(f"weights are {weights!r}: choose {' or '.join(WEIGHTS)}")
    if out.exists():
        raise UserError(f"{out} exists already; delete it or give another --out.")
    from fairseq_vqem.export.artefact import need_integer_products, write_artefact
    from fairseq_vqem.export.standalone import StandaloneError
    from fairseq_vqem.generation.api import Translator, task_of

    if weights == "int8":
        need_integer_products()
    models = str(checkpoint) if teacher is None else f"{checkpoint}:{teacher}"
    overrides = dict(task_overrides or {})
    generation: dict[str, Any] = {"iter_decode_eos_penalty": eos_penalty}
    if task_of(checkpoint) == "translation_nat":
        generation["iter_decode_with_beam"] = frame_beam
        generation["iter_decode_with_external_reranker"] = teacher is not None
    elif frame_beam != 1:
        raise UserError(
            f"--iter-decode-with-beam {frame_beam} is for ctc_nat and dag_nat: vqem_transformer"
            " has --latent-candidates"
        )
    elif teacher is not None:
        if overrides.get("rescore", "teacher") != "teacher":
            raise UserError("--rescore none contradicts --teacher: leave one of them out")
        overrides["rescore"] = "teacher"
    translator = Translator.from_checkpoint(models, data, task_overrides=overrides, **generation)
    check = partial(_checked_agreement, translator, weights=weights)
    try:
        return write_artefact(out, translator, decoding_options(translator), weights, check)
    except StandaloneError as error:  # the runtime cannot load what was written
        raise UserError(str(error)) from error


def decoding_options(translator: Translator) -> Options:
    """How ``translator`` decodes, as an artefact says it.

    Raises:
        UserError: it decodes in a way that cannot be exported.
    """
    from fairseq_vqem.export.standalone.manifest import Options, StandaloneError
    from fairseq_vqem.generation.latent_generator import LatentGenerator

    generator = translator.generator
    if not isinstance(generator, LatentGenerator):
        return _peer_options(translator)
    _check_exportable(translator, generator)
    student, search = translator.models[0], generator.search
    try:
        return Options(
            latent_beam=max(search.beam, search.candidates),
            marginal_end=search.marginal_end,
            fixed_length=student.cfg.latent_length == "source",
            max_ratio=search.max_ratio,
            max_offset=search.max_offset,
            stop_code=search.stop_code,
            remove_repeats=generator.remove_repeats,
            positions_per_code=student.multiple,
            codes=student.cfg.codebook_size,
            max_source_tokens=translator.max_source_tokens,
            max_target_tokens=student.cfg.max_target_positions,
            candidates=search.candidates if generator.rescore == "teacher" else 1,
            collapse=student.planned_frames is not None,
            length_reward=search.length_reward,
        )
    except StandaloneError as error:
        raise UserError(str(error)) from error


def _peer_options(translator: Translator) -> Options:
    """The options of a ``ctc_nat`` or ``dag_nat``, which have no latents."""
    from fairseq_vqem.export.standalone.manifest import Options
    from fairseq_vqem.peers.ctc_nat import CTCNAT
    from fairseq_vqem.peers.dag_nat import DAGNAT

    model, generator = translator.models[0], translator.generator
    if type(model) not in (CTCNAT, DAGNAT):  # of another's own pass nothing is known here
        raise UserError(
            "Only vqem_transformer, ctc_nat and dag_nat models can be exported; use CTranslate2's"
            " fairseq converter for an autoregressive one."
        )
    return Options(
        latent_beam=1,
        marginal_end=False,
        fixed_length=False,
        max_ratio=float(model.scale),
        max_offset=0,
        stop_code=None,
        remove_repeats=generator.remove_repeats,
        positions_per_code=1,
        codes=0,
        max_source_tokens=translator.max_source_tokens + 1,  # and BOS
        max_target_tokens=model.cfg.max_target_positions,
        collapse=type(model) is CTCNAT,
        graph=type(model) is DAGNAT,
        source_start=True,
        frame_beam=generator.beam_size,
        candidates=generator.beam_size if len(translator.models) > 1 else 1,
    )


def _check_exportable(translator: Translator, generator: Any) -> None:
    from fairseq_vqem.models.config import LARGEST_JOINT_CODEBOOK
    from fairseq_vqem.models.vqem_transformer import VQEMTransformer

    student = translator.models[0]
    if type(student) is not VQEMTransformer:  # of another's own pass nothing is known here
        raise UserError(
            f"{type(student).__name__} is of another package and cannot be exported: only"
            " vqem_transformer, ctc_nat and dag_nat can"
        )
    if len(generator.students(translator.models)) > 1:
        raise UserError(
            "An ensemble cannot be exported; give one student (average checkpoints of a run to join"
            " them)."
        )
    if generator.rescore == "latent":
        raise UserError(
            "Re-scoring by the student itself (--rescore latent) cannot be exported: choose"
            " --rescore none, or give a --teacher."
        )
    if generator.search.temperature:
        raise UserError("Sampled codes cannot be exported: give --latent-temperature 0.")
    if student.latent_dictionary.digits > 1:
        raise UserError(
            "A student whose latent predictor writes one symbol per codebook (--code-stream"
            " factorised) cannot be exported; train one with --code-stream joint."
        )
    if student.cfg.codebook_size > LARGEST_JOINT_CODEBOOK:
        raise UserError(
            f"A student of {student.cfg.codebook_size} joint codes cannot be exported; the most is"
            f" {LARGEST_JOINT_CODEBOOK}."
        )


def _checked_agreement(translator: Translator, out: Path, *, weights: str) -> float:
    """Share of positions at which ``out`` writes what ``translator`` writes."""
    from fairseq_vqem.export.standalone import StandaloneTranslator

    draw = random.Random(1)
    words = len(translator.task.source_dictionary)
    eos = translator.task.source_dictionary.eos()
    bos = translator.task.target_dictionary.bos()
    longest = max(1, min(LONGEST_CHECKED, translator.max_source_tokens - 2))
    sources = [
        [*(draw.randrange(FIRST_ORDINARY, words) for _ in range(draw.randint(1, longest))), eos]
        for _ in range(CHECKED_SENTENCES)
    ]
    outputs = translator.translate_tokens([torch.tensor(source) for source in sources])
    # what fairseq's NAT task decodes begins with BOS
    expected = [[token for token in output.tolist() if token != bos] for output in outputs]
    found = StandaloneTranslator(out, torch.get_num_threads()).translate_ids(sources)
    equal = positions = 0
    for own, other in zip(expected, found, strict=True):
        equal += sum(a == b for a, b in zip(own, other, strict=False))
        positions += max(len(own), len(other))
    agreement = equal / positions
    if agreement < SMALLEST_AGREEMENT[weights]:
        raise UserError(
            f"the export agrees with the model on {agreement:.0%} of the tokens only and was not"
            " kept; report the model's options."
        )
    return agreement
