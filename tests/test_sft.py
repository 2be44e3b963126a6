"""Warm-up batches: demonstrations as they are, in batches of one padded length."""

from itertools import islice

import numpy as np
import pytest

from deltal_jax.config import load_config
from deltal_jax.training.setup import make_setup
from deltal_jax.training.sft import demonstration_batches

CONFIG = load_config("countdown-tiny", {"sft.tokens_per_batch": 512})


@pytest.fixture(scope="module")
def setup():
    return make_setup(CONFIG)


def batches(setup, count):
    return list(islice(demonstration_batches(CONFIG, setup.task, setup.tokenizer), count))


def test_rows_are_the_demonstrations_and_only_responses_are_trained(setup):
    shown = {}
    for prompt, response in islice(setup.task.demonstrations(CONFIG.seed), 3000):
        shown.setdefault(prompt, set()).add(response)
    widths = set()
    for bucket in batches(setup, 60):
        widths.add(bucket.tokens.shape[1])
        assert bucket.tokens.size <= 512
        for row, mask in zip(np.asarray(bucket.tokens), np.asarray(bucket.loss_mask), strict=True):
            trained = row[mask].tolist()
            start = int(mask.argmax())
            assert row[0] == setup.tokenizer.bos_id
            assert trained[-1] == setup.tokenizer.eos_ids[0]
            assert mask.sum() == mask[start:].argmin() or mask[start:].all()
            prompt = setup.tokenizer.decode(row[1:start].tolist())
            assert setup.tokenizer.decode(trained[:-1]) in shown[prompt]
    assert len(widths) >= 2


def test_the_loss_of_a_batch_is_the_mean_over_its_response_tokens(setup):
    for bucket in batches(setup, 10):
        np.testing.assert_allclose(bucket.weights, 1.0 / float(bucket.loss_mask.sum()), rtol=1e-6)
        np.testing.assert_array_equal(bucket.advantages, 1.0)


def test_the_stream_is_the_same_every_time(setup):
    for first, second in zip(batches(setup, 20), batches(setup, 20), strict=True):
        np.testing.assert_array_equal(first.tokens, second.tokens)
        np.testing.assert_array_equal(first.positions, second.positions)
