"""What the unit tests share: a tiny dictionary, task and model, and fairseq's batches."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.data.data_utils import collate_tokens

from fairseq_vqem.corpora.subwords import SubwordModel, train_subwords
from fairseq_vqem.errors import UserError
from fairseq_vqem.models.config import VQEMTransformerConfig
from fairseq_vqem.models.vqem_transformer import VQEMTransformer
from fairseq_vqem.tasks.translation_vqem import TranslationVQEMConfig, TranslationVQEMTask

Pairs = list[tuple[list[int], list[int]]]
SIZES = dict(embed_dim=16, ffn_embed_dim=32, attention_heads=2, encoder_layers=1, latent_layers=1)
SIZES |= dict(decoder_layers=1, codebook_size=12, compress_steps=2, em_samples=4)
PLAIN = dict(dropout=0.0, codebook_decay=0.9, quantise_schedule="1", gold_schedule="0")


class Tiny:
    """Factories of tiny things. Sentences are lists of word ids, without the end of sentence."""

    @staticmethod
    def dictionary(words: int = 20) -> Dictionary:
        dictionary = Dictionary()
        for number in range(words):
            dictionary.add_symbol(f"w{number}")
        return dictionary

    @classmethod
    def task(
        cls, source: Dictionary | None = None, target: Dictionary | None = None, **options: Any
    ) -> TranslationVQEMTask:
        source = source or cls.dictionary()
        config = TranslationVQEMConfig(source_lang="en", target_lang="de", **options)
        return TranslationVQEMTask(config, source, target or source)

    @classmethod
    def model(
        cls, task: TranslationVQEMTask | None = None, seed: int = 0, **options: Any
    ) -> VQEMTransformer:
        """A random model without dropout, warm-up or gold inputs, in evaluation mode."""
        torch.manual_seed(seed)
        config = VQEMTransformerConfig(**{**SIZES, **PLAIN, **options})
        model: VQEMTransformer = VQEMTransformer.build_model(config, task or cls.task())
        for parameter in model.parameters():  # biases and norms start at 0 and 1, which hides bugs
            parameter.data.add_(0.05 * torch.randn_like(parameter))
        for embedding in (model.encoder.embed_tokens, model.decoder.embed_tokens):
            embedding.weight.data[embedding.padding_idx] = 0
        return model.eval()

    @staticmethod
    def pairs(count: int, seed: int = 0, longest: int = 11) -> Pairs:
        draw = random.Random(seed)

        def sentence() -> list[int]:
            return [draw.randrange(4, 24) for _ in range(draw.randint(1, longest))]

        return [(sentence(), sentence()) for _ in range(count)]

    @staticmethod
    def batch(pairs: Pairs, source_padding: int = 0, target_padding: int = 0) -> dict[str, Any]:
        """Left-padded sources, right-padded targets; ``*_padding`` adds columns of padding."""
        pad, end = 1, 2
        sources = [torch.tensor([*source, end]) for source, _ in pairs]
        targets = [torch.tensor([*target, end]) for _, target in pairs]
        width = max(map(len, sources)) + source_padding
        return {
            "id": torch.arange(len(pairs)),
            "nsentences": len(pairs),
            "ntokens": sum(map(len, targets)),
            "net_input": {
                "src_tokens": collate_tokens(sources, pad, left_pad=True, pad_to_length=width),
                "src_lengths": torch.tensor([len(source) for source in sources]),
                "prev_output_tokens": None,
            },
            "target": collate_tokens(
                targets, pad, pad_to_length=max(map(len, targets)) + target_padding
            ),
        }


@pytest.fixture(scope="session")
def tiny() -> type[Tiny]:
    return Tiny


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Models so small only wait for a second thread, for long if the machine is busy."""
    torch.set_num_threads(1)


@cache
def has_integer_products() -> bool:
    try:
        from fairseq_vqem.export.artefact import need_integer_products

        need_integer_products()
    except UserError:
        return False
    except ModuleNotFoundError as error:
        if error.name not in ("onnx", "onnxruntime"):
            raise
        return False
    return True


def pytest_runtest_teardown() -> None:
    torch.set_num_threads(1)  # commands choose other numbers


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("int8") and not has_integer_products():
        pytest.skip("int8 weights need exact products and the extra [export]")


@pytest.fixture(scope="module")
def few_subwords(tmp_path_factory: pytest.TempPathFactory) -> SubwordModel:
    """Byte pairs of a handful of words."""
    folder = tmp_path_factory.mktemp("subwords")
    (folder / "text").write_text("low lower lowest new newer newest\n" * 3, encoding="utf-8")
    return train_subwords("subword-nmt", [folder / "text"], 5, folder)
