"""Names: tables that answer an unknown name, and what other libraries call the things of ours.

The names on the left of `FOREIGN_NAMES` are values of these settings: verl `loss_agg_mode`,
`adv_estimator`, `policy_loss.loss_mode`, `kl_loss_type`; TRL `loss_type`; SkyRL `loss_reduction`,
`advantage_estimator`, `policy_loss_type`; Tunix `loss_agg_mode`, `loss_algo`; OpenRLHF
`advantage_estimator`; or the papers' words. `objective/README.md` has the tables. A name may have
several meanings: TRL's `grpo` is an aggregation, verl's an advantage.
"""

import difflib
from collections.abc import Iterable
from typing import TypeVar

Function = TypeVar("Function")

#: Name elsewhere → its names here: at most one of each kind.
FOREIGN_NAMES: dict[str, tuple[str, ...]] = {
    # aggregations
    "grpo": ("sequence_mean", "group_standardize", "clipped"),
    "seq-mean-token-mean": ("sequence_mean",),
    "sequence-mean-token-mean": ("sequence_mean",),
    "dapo": ("token_mean",),
    "token-mean": ("token_mean",),
    "bnpo": ("local_token_mean",),
    "dr_grpo": ("constant_length", "group_center"),
    "drgrpo": ("constant_length", "group_center"),
    "seq-mean-token-sum-norm": ("constant_length",),
    "sequence-mean-token-scale": ("constant_length",),
    "seq_mean_token_sum_norm": ("constant_length",),
    "seq-mean-token-sum": ("sequence_sum",),
    "sequence-mean-token-sum-norm": ("sequence_sum",),
    "luspo": ("sequence_sum",),
    "vl_norm": ("delta_l",),
    "vl-norm": ("delta_l",),
    "delta-l": ("delta_l",),
    "δl": ("delta_l",),
    # advantages
    "group_norm": ("group_standardize",),
    "rloo": ("leave_one_out",),
    "reinforce_plus_plus": ("batch_standardize",),
    "reinforce++": ("batch_standardize",),
    "opo": ("length_weighted_baseline",),
    "maxrl": ("max_rl",),
    # surrogates
    "ppo": ("clipped",),
    "vanilla": ("clipped",),
    "regular": ("clipped",),
    "dual_clip": ("clipped",),
    "gspo-token": ("gspo_token",),
    "geo_mean": ("gmpo",),
    "dppo_tv": ("dppo",),
    # divergences
    "kl": ("kl_k1",),
    "k1": ("kl_k1",),
    "mse": ("kl_k2",),
    "mse_kl": ("kl_k2",),
    "k2": ("kl_k2",),
    "low_var_kl": ("kl_k3",),
    "k3": ("kl_k3",),
    "low_var_kl+": ("kl_k3_straight_through",),
    "k3+": ("kl_k3_straight_through",),
}


def unknown_name(kind: str, name: object, valid: Iterable[object]) -> str:
    """The sentence that answers a name that is not valid.

    It says what the name is called here if another library has it, or else the nearest valid name.
    """
    choices = [str(choice) for choice in valid]
    return f"{kind}: {name!r} is not one of {', '.join(choices)}{_hint(str(name), choices)}"


def _hint(name: str, choices: list[str]) -> str:
    spelled = name.strip().lower()
    for ours in FOREIGN_NAMES.get(spelled, ()):
        if ours in choices:
            return f"; its name here is {ours!r}"
    # A hyphen is the commonest difference between two libraries' spellings of one name.
    near = difflib.get_close_matches(spelled.replace("-", "_"), choices, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


class Catalogue(dict[str, Function]):
    """A dict of functions by name; an unknown name raises ValueError of one line.

        >>> AGGREGATIONS["seq-mean-token-mean"]
        ValueError: aggregation: 'seq-mean-token-mean' is not one of delta_l, …; its name here is
        'sequence_mean'

    It is not a KeyError, whose message Python prints as a quoted repr. `in` and `get` are a dict's.
    """

    def __init__(self, kind: str, functions: dict[str, Function]) -> None:
        super().__init__(functions)
        self.kind = kind

    def __missing__(self, name: object) -> Function:
        raise ValueError(unknown_name(self.kind, name, self))
