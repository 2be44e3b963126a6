"""Shapes that are known beforehand are those of the published models."""

import pytest

from deltal_jax.model.families import architecture_of
from deltal_jax.model.published import PUBLISHED
from deltal_jax.model.transformer import parameter_count

#: Numbers in the checkpoints' tensors, an output head that is the embedding counted once.
PARAMETERS = {
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_shape_has_the_published_number_of_parameters(name):
    arch = architecture_of(PUBLISHED[name])
    assert parameter_count(arch) == PARAMETERS[name]
    assert arch.qkv_bias and not arch.qk_norm and arch.rope_theta == 1e6
