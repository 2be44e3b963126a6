"""The controls of a comparison: apart from the methods, each beside what it should show.

A control is an entry of the plan's `controls` with, besides what a method may have,

    of: NAME        the method or control that it is compared with; left out, the reference
    kind: KIND      how it is read, below; left out, a pair like any other
    expect: TEXT    what it should show, printed beside what was found

    kind       what is found
    null       the largest differences, and the step of the first: the two compute the same, so a
               significant difference is a BUG, and no win may be claimed
    seeds      `of` once more with other seeds, so unpaired: how often equal methods seem to differ
    lr         `of` at another learning rate: highest and lowest of its sweep, and the methods
               compared at each one's highest, which is chosen on the problems that it is judged by
    the others a paired comparison, corrected over all such controls: permuted, eps, sgd, …

A control that others name in `of` and that has neither `of` nor `kind` is only what they are
compared with (for instance the other half of a null control).
"""

import itertools
from typing import Any

from deltal_jax.analysis.paired import smallest_two_sample_p, two_sample_test
from deltal_jax.compare.endpoints import PRIMARY, common_spans, endpoints, figures
from deltal_jax.compare.pairs import ALPHA, Cells, compare, judge
from deltal_jax.errors import UserError

#: Differences up to this are rounding.
ROUNDING = 1e-6
Found = dict[str, Any]


def find_controls(
    controls: dict[str, Found], everything: dict[str, Cells], reference: str
) -> Found:
    """What each control shows, by kind. `everything`: the cells of methods and controls by name.

    Raises UserError for an `of` that is no name of the plan.
    """
    named = {one.get("of") for one in controls.values()}
    found: Found = {"null": {}, "seeds": {}, "lr": {}, "pairs": {}, "bases": []}
    sweeps: dict[str, list[str]] = {}
    for name, entry in controls.items():
        kind, of = entry.get("kind"), entry.get("of") or reference
        if of not in everything:
            raise UserError(f"controls.{name}.of: no method or control {of!r} in the plan")
        if name in named and not entry.get("of") and not kind:
            found["bases"].append(name)
            continue
        ours, theirs = everything[name], everything[of]
        head = {"of": of, "kind": kind or "pair", "expect": entry.get("expect", "")}
        if kind == "null":
            found["null"][name] = head | _null(ours, theirs)
        elif kind == "seeds":
            found["seeds"][name] = head | _other_seeds(ours, theirs)
        elif kind == "lr":
            sweeps.setdefault(of, []).append(name)
        else:
            found["pairs"][name] = head | _pair(ours, theirs)
    judge(found["pairs"])
    found["false_positives"] = _false_positives(found["seeds"], everything)
    found["lr"] = _sweeps(sweeps, everything, reference)
    found["lr"]["expect"] = {
        name: controls[name].get("expect", "") for of in sweeps for name in sweeps[of]
    }
    return found


def _pair(ours: Cells, theirs: Cells) -> Found:
    shared = set(ours) & set(theirs)
    cells = [some[seed] for seed in sorted(shared) for some in (ours, theirs)]
    return compare(ours, theirs, common_spans(cells) if cells else {})


def _null(ours: Cells, theirs: Cells) -> Found:
    """Differences of the two runs of each seed: of Avg@k at every evaluation and of reward at
    every step.

    `bug`: they differ significantly, or before the first update could have made them differ.
    """
    found = _pair(ours, theirs)
    curves = [_differences(ours[seed], theirs[seed]) for seed in found["seeds"]]
    firsts = [step for one in curves for step in one["first"]]
    p = found["endpoints"][PRIMARY]["p"] if curves else 1.0
    return found | {
        "largest_accuracy_difference": max((one["accuracy"] for one in curves), default=None),
        "largest_reward_difference": max((one["reward"] for one in curves), default=None),
        "first_difference_step": min(firsts, default=None),
        "bug": p < ALPHA or any(one["early"] for one in curves),
        "p": p,
    }


def _differences(ours: Found, theirs: Found) -> Found:
    evaluations = zip(ours["evaluations"], theirs["evaluations"], strict=False)
    accuracy = {a["step"]: abs(a["avg_at_k"] - b["avg_at_k"]) for a, b in evaluations}
    # Rewards of step n are of responses that n − 1 updates have shaped.
    both = zip(ours["train"]["reward/mean"], theirs["train"]["reward/mean"], strict=False)
    reward = {
        step: abs(a - b)
        for step, (a, b) in enumerate(both, start=1)
        if a is not None and b is not None
    }
    curves = (accuracy, reward)
    return {
        "accuracy": max(accuracy.values()),
        "reward": max(reward.values(), default=0.0),
        "first": [step for curve in curves for step, value in curve.items() if value > ROUNDING],
        "early": accuracy.get(0, 0.0) > ROUNDING or reward.get(1, 0.0) > ROUNDING,
    }


def _other_seeds(ours: Cells, theirs: Cells) -> Found:
    """The unpaired test of the primary endpoint between the runs of one method and other runs."""
    ours = {seed: cell for seed, cell in ours.items() if seed not in theirs}
    found: Found = {"runs": [len(ours), len(theirs)]}
    if not (ours and theirs):
        return found | dict.fromkeys(("difference", "p", "smallest_p", "significant"))
    left, right = ([some[seed] for seed in sorted(some)] for some in (ours, theirs))
    spans = common_spans([*left, *right])
    a, b = (endpoints(some, spans)[PRIMARY].mean(axis=1) for some in (left, right))
    return found | {
        "difference": float(a.mean() - b.mean()),
        "p": (p := two_sample_test(a, b)),
        "smallest_p": smallest_two_sample_p(len(a), len(b)),
        "significant": p < ALPHA,
    }


def _false_positives(seeds: Found, everything: dict[str, Cells]) -> Found:
    """How many of all pairs of equal methods seem to differ at the level, uncorrected."""
    groups: dict[str, list[str]] = {}
    for name, one in seeds.items():
        groups.setdefault(one["of"], [one["of"]]).append(name)
    pairs = [pair for group in groups.values() for pair in itertools.combinations(group, 2)]
    found = [_other_seeds(everything[b], everything[a])["significant"] for a, b in pairs]
    known = [one for one in found if one is not None]
    return {"pairs": len(known), "significant": sum(known), "level": ALPHA}


def _sweeps(sweeps: dict[str, list[str]], everything: dict[str, Cells], reference: str) -> Found:
    """Each method's areas by learning rate, and the methods compared at the highest of each.

    A sweep is of the seeds that all its members have; one abscissa for all sweeps.
    """
    members = {
        of: {name: everything[name] for name in (of, *names)} for of, names in sweeps.items()
    }
    seeds = {of: sorted(set.intersection(*map(set, some.values()))) for of, some in members.items()}
    members = {of: some for of, some in members.items() if seeds[of]}
    cells = [one[s] for of, some in members.items() for one in some.values() for s in seeds[of]]
    if not cells:
        return {"sweeps": {}, "at_highest": {}}
    spans, found = common_spans(cells), {}
    for of, some in members.items():
        rates = {
            name: figures([one[s] for s in seeds[of]], spans)[PRIMARY] for name, one in some.items()
        }
        order = sorted(rates, key=lambda name: rates[name]["mean"])
        found[of] = {
            "seeds": seeds[of], "rates": rates, "lowest": order[0], "highest": order[-1]
        }  # fmt: skip
    chosen = {of: members[of][one["highest"]] for of, one in found.items()}
    chosen = {of: {s: cells[s] for s in seeds[of]} for of, cells in chosen.items()}
    at_highest = {
        of: {
            "chosen": found[of]["highest"],
            "against": found[reference]["highest"],
            **compare(cells, chosen[reference], spans),
        }
        for of, cells in chosen.items()
        if of != reference and reference in chosen
    }
    judge(at_highest)
    return {"sweeps": found, "at_highest": at_highest}
