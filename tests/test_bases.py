"""A base model's configuration, read without its weights."""

import pytest
from transformers import Gemma2Config, LlamaConfig, MistralConfig, Qwen2Config

from data.bases import base_problem


class Nested:
    """A model of several parts, with its text's configuration inside."""

    def __init__(self, text: object):
        self.text = text

    def get_text_config(self) -> object:
        return self.text


@pytest.mark.parametrize("shape", [LlamaConfig(), MistralConfig(), Qwen2Config(), Nested(LlamaConfig())])
def test_a_plain_model_serves(shape):
    assert base_problem("base", shape, 512) == ""


@pytest.mark.parametrize("shape", [Gemma2Config(), Nested(Gemma2Config())])
def test_logits_that_are_capped_are_found_wherever_the_configuration_has_them(shape):
    assert base_problem("base", shape, 512).startswith("base scales or caps its logits (final_logit_softcapping 30.0)")


def test_a_sliding_window_shorter_than_a_row_is_refused():
    """Trees are attended to by a mask of their own, which a window would not cut: scores would be another model's."""
    shape = MistralConfig(sliding_window=256)
    assert "attends to 256 tokens alone (sliding_window), fewer than max_length 512" in base_problem("base", shape, 512)
    assert base_problem("base", shape, 256) == ""
    assert base_problem("base", Qwen2Config(sliding_window=256, use_sliding_window=False), 512) == ""
