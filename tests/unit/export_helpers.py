"""What the tests of exported models share: tiny translators, their exports, comparisons."""

from __future__ import annotations

import copy
import itertools
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from teacher_helpers import tiny_teacher

from fairseq_vqem.corpora.subwords import SubwordModel
from fairseq_vqem.export.artefact import write_artefact
from fairseq_vqem.export.command import decoding_options
from fairseq_vqem.export.standalone import StandaloneTranslator
from fairseq_vqem.generation.latent_generator import LatentGenerator
from fairseq_vqem.generation.records import LatentSearchOptions
from fairseq_vqem.models import VQEMTransformer
from fairseq_vqem.peers.generator import ParallelGenerator

BOS, EOS, FIRST_WORD, WORDS = 0, 2, 4, 20
MAX_SOURCE = 40
SEARCHES = {
    "greedy": LatentSearchOptions(marginal_end=True),
    "joint": LatentSearchOptions(max_ratio=1.3, max_offset=3),
    "beam": LatentSearchOptions(beam=3, marginal_end=True),
    "joint beam": LatentSearchOptions(beam=4),
    "rewarded beam": LatentSearchOptions(beam=4, length_reward=1.5),
    "candidates": LatentSearchOptions(beam=2, candidates=3),
}

Sources = list[list[int]]


def sentences(count: int, seed: int = 0, longest: int = 24) -> Sources:
    """Random source ids; the fourth is the empty line."""
    draw = random.Random(seed)
    made = [
        [*(draw.randrange(FIRST_WORD, FIRST_WORD + WORDS) for _ in range(draw.randint(1, longest)))]
        for _ in range(count)
    ]
    made[3:4] = [[]]
    return [[*words, EOS] for words in made]


def translator_of(
    tiny: Any, student: Any, subwords: SubwordModel, search: str, **options: Any
) -> Any:
    """What ``Translator.from_checkpoint`` makes of ``student``, as far as an export looks at it.

    A list is a student and its teacher.
    """
    task = tiny.task()
    models = student if isinstance(student, list) else [student]
    generator = LatentGenerator(task.target_dictionary, models, SEARCHES[search], **options)
    return SimpleNamespace(
        models=models,
        task=task,
        generator=generator,
        subwords=subwords,
        max_source_tokens=MAX_SOURCE,
    )


def unchecked(folder: Path) -> None:
    """No check of an export: the test makes its own."""


def exported(translator: Any, folder: Path, weights: str = "float32") -> StandaloneTranslator:
    out = folder / "exported"
    write_artefact(out, translator, decoding_options(translator), weights, unchecked)
    return StandaloneTranslator(out, threads=1)


def generated(tiny: Any, translator: Any, sources: Sources) -> Sources:
    """fairseq's own translations; its NAT task begins sources and translations with BOS."""
    start = [BOS] if isinstance(translator.generator, ParallelGenerator) else []
    batch = tiny.batch([([*start, *source[:-1]], [FIRST_WORD]) for source in sources])
    batch["target"] = None
    found = translator.generator.generate(translator.models, batch)
    outputs = [hypotheses[0]["tokens"].tolist() for hypotheses in found]
    return [output[len(start) :] for output in outputs]


def assert_same(tiny: Any, translator: Any, sources: Sources, found: Sources) -> None:
    """``found`` is what fairseq translates, but for ties, which processors break differently."""
    expected = generated(tiny, translator, sources)
    assert len(found) == len(expected)
    others = [i for i, output in enumerate(found) if output != expected[i]]
    assert len(others) <= 1 + len(sources) // 100
    for i in others:
        assert is_tie(tiny, translator, sources[i]), (found[i], expected[i])


def is_tie(tiny: Any, translator: Any, source: list[int]) -> bool:
    """Whether the last digits of the parameters decide about the translation."""
    outputs = set()
    for seed in range(20):
        torch.manual_seed(seed)
        changed = copy.copy(translator)
        changed.models = copy.deepcopy(translator.models)
        with torch.no_grad():
            for parameter in itertools.chain(*(model.parameters() for model in changed.models)):
                parameter.mul_(1 + 1e-6 * torch.randn_like(parameter))
        outputs.add(tuple(generated(tiny, changed, [source])[0]))
    return len(outputs) > 1


def student_of(tiny: Any, seed: int = 3, **options: Any) -> VQEMTransformer:
    """A random student whose output depends on its input."""
    student: VQEMTransformer = tiny.model(seed=seed, **options)
    with torch.no_grad():
        for parameter in student.latent_predictor.parameters():
            parameter.mul_(1.5)
    return student


def peer_translator(
    tiny: Any,
    subwords: SubwordModel,
    model: Any,
    task: Any,
    penalty: float,
    *,
    beam: int = 1,
    teacher: bool = False,
) -> Any:
    """A model without latents as ``Translator.from_checkpoint`` has it."""
    generation = SimpleNamespace(
        iter_decode_eos_penalty=penalty,
        iter_decode_with_beam=beam,
        iter_decode_with_external_reranker=teacher,
    )
    models: list[Any] = [model]
    if teacher:
        models.append(tiny_teacher(tiny.task(), layers=2, normalize_before=True))
    return SimpleNamespace(
        models=models,
        task=task,
        generator=task.build_generator(models, generation),
        subwords=subwords,
        max_source_tokens=MAX_SOURCE - 1,  # beside BOS
    )
