"""Names: an unknown one is answered in one line, with its name here or the nearest one."""

import pytest

from deltal_jax.objective.advantages import ADVANTAGES
from deltal_jax.objective.aggregation import AGGREGATIONS
from deltal_jax.objective.divergence import DIVERGENCES
from deltal_jax.objective.names import FOREIGN_NAMES, Catalogue, unknown_name
from deltal_jax.objective.surrogate import SURROGATES

CATALOGUES = [AGGREGATIONS, ADVANTAGES, SURROGATES, DIVERGENCES]


def refusal(catalogue: Catalogue, name: object) -> str:
    with pytest.raises(ValueError, match="is not one of") as caught:
        catalogue[name]
    return str(caught.value)


@pytest.mark.parametrize("catalogue", CATALOGUES, ids=lambda catalogue: catalogue.kind)
def test_an_unknown_name_is_answered_with_its_kind_and_all_valid_names_in_one_line(catalogue):
    message = refusal(catalogue, "zzz")
    assert message == f"{catalogue.kind}: 'zzz' is not one of {', '.join(catalogue)}"


@pytest.mark.parametrize(
    ("catalogue", "theirs", "ours"),
    [
        (AGGREGATIONS, "seq-mean-token-mean", "sequence_mean"),
        (AGGREGATIONS, "dr_grpo", "constant_length"),
        (AGGREGATIONS, "Dr_GRPO", "constant_length"),
        (AGGREGATIONS, "bnpo", "local_token_mean"),
        (AGGREGATIONS, "luspo", "sequence_sum"),
        (AGGREGATIONS, "sequence-mean-token-scale", "constant_length"),
        (AGGREGATIONS, "VL_Norm", "delta_l"),
        (ADVANTAGES, "dr_grpo", "group_center"),
        (ADVANTAGES, "rloo", "leave_one_out"),
        (ADVANTAGES, "reinforce++", "batch_standardize"),
        (SURROGATES, "vanilla", "clipped"),
        (SURROGATES, "geo_mean", "gmpo"),
        (DIVERGENCES, "low_var_kl", "kl_k3"),
        (DIVERGENCES, "k3+", "kl_k3_straight_through"),
    ],
)
def test_a_name_of_another_library_is_answered_with_ours(catalogue, theirs, ours):
    assert refusal(catalogue, theirs).endswith(f"; its name here is {ours!r}")


def test_one_foreign_name_has_a_meaning_for_each_kind():
    answers = [refusal(catalogue, "grpo") for catalogue in CATALOGUES[:3]]
    for answer, ours in zip(
        answers, ["sequence_mean", "group_standardize", "clipped"], strict=True
    ):
        assert answer.endswith(f"; its name here is {ours!r}")
    assert "its name here" not in refusal(DIVERGENCES, "grpo")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("delta_1", "delta_l"),
        ("delta_L", "delta_l"),
        ("Token-Means", "token_mean"),
        ("gsp0", "gspo"),
    ],
)
def test_a_slip_is_answered_with_the_nearest_name(typed, meant):
    catalogue = SURROGATES if meant == "gspo" else AGGREGATIONS
    assert refusal(catalogue, typed).endswith(f"; did you mean {meant!r}?")


def test_what_is_no_string_is_refused_in_the_same_way():
    assert refusal(AGGREGATIONS, 3).startswith("aggregation: 3 is not one of delta_l, ")
    assert refusal(AGGREGATIONS, None).startswith("aggregation: None is not one of delta_l, ")


def test_a_catalogue_is_otherwise_a_plain_dict():
    assert isinstance(AGGREGATIONS, dict)
    assert list(AGGREGATIONS)[:4] == ["delta_l", "sequence_mean", "token_mean", "constant_length"]
    assert AGGREGATIONS.get("grpo") is None
    assert "grpo" not in AGGREGATIONS
    assert dict(AGGREGATIONS) == {name: AGGREGATIONS[name] for name in AGGREGATIONS}


def test_every_foreign_name_leads_to_at_most_one_name_of_each_kind_and_to_no_other():
    ours = [name for catalogue in CATALOGUES for name in catalogue]
    for theirs, meanings in FOREIGN_NAMES.items():
        assert theirs == theirs.lower(), "it is looked up in lower case"
        assert set(meanings) <= set(ours)
        for catalogue in CATALOGUES:
            found = [name for name in meanings if name in catalogue]
            assert len(found) <= 1
            assert not (found and theirs in catalogue), "a valid name is never a foreign one"


def test_the_sentence_serves_any_field_and_any_choices():
    said = unknown_name("objective.scope", "grup", ("batch", "minibatch", "group"))
    assert said == (
        "objective.scope: 'grup' is not one of batch, minibatch, group; did you mean 'group'?"
    )
    assert unknown_name("n", 3, [1, 2]) == "n: 3 is not one of 1, 2"
