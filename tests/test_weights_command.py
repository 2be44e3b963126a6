"""`deltal weights`: a worked example by hand, methods where their input is, one-line refusals."""

import io
import json
import types

import numpy as np
import pytest

from deltal_jax.cli.main import main


@pytest.fixture
def weights(tmp_path, capsys):
    """Write a file and run the command on it: (exit code, standard output, standard error)."""

    def weights(content, *options: str) -> tuple[int, str, str]:
        path = tmp_path / "lengths.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        code = main(["weights", str(path), *options])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return weights


@pytest.fixture
def rows(weights):
    """The rows of --json by method (and exponent), all of them checked to come from exit code 0."""

    def rows(content, *options: str) -> dict[str, dict]:
        code, out, err = weights(content, "--json", *options)
        assert (code, err) == (0, "")
        found = json.loads(out)
        return {
            f"{row['method']} {row['alpha']:g}" if "alpha" in row else row["method"]: row
            for row in found["methods"]
        }

    return rows


def test_the_meters_and_weights_of_lengths_1_2_4_by_hand(rows):
    """L^-1 is 1, 1/2, 1/4, in sum 7/4: shares 4/7, 2/7, 1/7; M is the longest, 4."""
    found = rows([1, 2, 4], "--alpha", "0,1")
    harmonic, constant = found["delta_l 1"], found["delta_l 0"]
    assert harmonic["weights"] == pytest.approx([1 / 7, 1 / 14, 1 / 28])
    assert harmonic["bias_factor"] == pytest.approx(1.0)
    assert harmonic["predicted_cv"] == pytest.approx(np.sqrt(28) / 7)
    assert harmonic["ess"] == pytest.approx(49 / 21)
    assert harmonic["weight_shortest_decile"] == pytest.approx(0.3 * 4 / 7)
    assert harmonic["weight_longest_decile"] == pytest.approx(0.3 * 1 / 7)
    assert constant["weights"] == pytest.approx([1 / 12] * 3)
    assert constant["predicted_cv"] == pytest.approx(np.sqrt(7) / 3)
    assert constant["weights"] == pytest.approx(found["constant_length"]["weights"])
    assert found["sequence_mean"]["weights"] == pytest.approx([1 / 3, 1 / 6, 1 / 12])
    assert found["sequence_mean"]["bias_factor"] == pytest.approx(7 / 3)
    assert found["token_mean"]["weights"] == pytest.approx([1 / 7] * 3)
    assert found["token_mean"]["bias_factor"] == pytest.approx(12 / 7)
    assert found["sequence_sum"]["bias_factor"] == pytest.approx(4)
    assert found["token_sum"]["bias_factor"] == pytest.approx(12)
    assert all("zero_advantage_weight" not in row for row in found.values())


def test_methods_that_need_more_than_lengths_appear_with_their_input(rows):
    lengths, plain = [1, 2, 4], {"prompt_mean", "balanced", "local_token_mean"}
    assert not plain & rows(lengths).keys()
    grouped = rows({"lengths": lengths, "group_ids": [7, 7, -2]})
    assert plain & grouped.keys() == {"prompt_mean"}
    assert grouped["prompt_mean"]["weights"] == pytest.approx([1 / 6, 1 / 6, 1 / 8])
    signed = rows({"lengths": lengths, "advantages": [1.5, 0, -2]})
    assert plain & signed.keys() == {"balanced"}
    assert signed["balanced"]["weights"] == pytest.approx([1 / 2, 0, 1 / 8])
    assert signed["delta_l 1"]["zero_advantage_weight"] == pytest.approx(2 / 7)
    split = rows(lengths, "--microbatch-size", "2")
    assert plain & split.keys() == {"local_token_mean"}
    assert split["local_token_mean"]["weights"] == pytest.approx([1 / 6, 1 / 6, 1 / 8])


def test_exponents_may_be_listed_repeated_and_negative(rows):
    found = rows([1, 2, 4], "--alpha", "0.5,1", "--alpha=-1", "--alpha", "1")
    assert [name for name in found if name.startswith("delta_l")] == [
        "delta_l 0.5",
        "delta_l 1",
        "delta_l -1",
    ]
    assert found["delta_l -1"]["weights"] == pytest.approx([1 / 28, 2 / 28, 4 / 28])


def test_the_default_exponents_are_the_papers(rows):
    assert [name for name in rows([3, 5]) if "delta_l" in name] == ["delta_l 0.75", "delta_l 1"]


def test_beta_is_the_growth_of_the_variance(rows):
    found = rows([1, 2, 4], "--beta", "0", "--alpha", "0")
    assert found["constant_length"]["predicted_cv"] == pytest.approx(1 / np.sqrt(3))
    assert found["inverse_variance"]["variance"] == {"beta": 0.0}
    assert found["inverse_variance"]["weights"] == pytest.approx(found["delta_l 0"]["weights"])


def test_the_normalizer_is_the_largest_length_or_the_given_one_and_the_output_says_which(weights):
    _, out, _ = weights([1, 2, 4])
    assert out.startswith(
        "3 responses, M = 4 (the largest length; set it with --normalizer), β = 1\n"
    )
    _, out, _ = weights([1, 2, 4], "--normalizer", "8192")
    assert out.startswith("3 responses, M = 8192 (given), β = 1\n")
    _, out, _ = weights([1, 2, 4], "--normalizer", "8192", "--json")
    found = json.loads(out)
    assert (found["normalizer"], found["normalizer_is"]) == (8192.0, "given")
    assert found["responses"] == 3 and found["beta"] == 1.0
    first = found["methods"][1]
    assert sum(first["weights"]) * 8192 == pytest.approx(1.0)


def test_the_table_has_one_line_a_method_with_the_figures_of_the_json(weights):
    content = {"lengths": [1, 2, 4, 0], "advantages": [1, 0, -1, 0], "group_ids": [0, 0, 1, 1]}
    code, out, err = weights(content)
    assert (code, err) == (0, "")
    header, *lines = out.split("\n\n")[1].splitlines()
    assert header.split() == "Σw·M CV ESS shortest longest A = 0".split()
    listed = json.loads(weights(content, "--json")[1])["methods"]
    assert len(lines) == len(listed) == 10
    for line, row in zip(lines, listed, strict=True):
        figures = [value for key, value in row.items() if isinstance(value, float)]
        figures = figures[1:] if "alpha" in row else figures
        assert line.startswith(row["method"])
        assert [float(cell) for cell in line.split()[-6:]] == pytest.approx(figures, rel=1e-3)


def test_weights_are_printed_for_small_batches_alone(weights):
    table = weights([1, 2, 4])[1].split("\n\n")[-1].splitlines()
    assert table[0].split()[0] == "length"
    assert [line.split()[0] for line in table[1:]] == ["1", "2", "4"]
    assert [line.split()[2] for line in table[1:]] == ["0.1429", "0.07143", "0.03571"]
    large = weights([3] * 21)[1]
    assert "\n    length" not in large
    assert "add --json" in large
    assert len(json.loads(weights([3] * 21, "--json")[1])["methods"][0]["weights"]) == 21


def test_a_dash_reads_standard_input(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(b"[2, 2]")))
    assert main(["weights", "-", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["methods"]
    assert found[0]["weights"] == [0.25, 0.25]
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(b"")))
    assert main(["weights", "-"]) == 2
    assert capsys.readouterr().err == (
        "deltal: standard input: not JSON; expected a list such as [312, 87, 1024]\n"
    )


def test_whole_numbers_written_as_floats_and_empty_responses_are_fine(rows):
    assert rows([1.0, 2.0, 4.0, 0])["delta_l 1"]["weights"] == pytest.approx(
        [1 / 7, 1 / 14, 1 / 28, 0]
    )


def test_extreme_lengths_and_exponents_give_finite_figures(rows):
    found = rows([1, 2**31 - 1, 10**6], "--alpha", "3", "--alpha=-1", "--beta", "3")
    for row in found.values():
        assert np.isfinite([value for value in row.values() if isinstance(value, float)]).all()
    assert found["delta_l 3"]["bias_factor"] == pytest.approx(1.0)


LENGTHS = "expected a whole number in 0 … 2147483647"
BAD_FILES = {
    "not json": ("[1, 2", "not JSON; expected a list such as [312, 87, 1024]"),
    "not text": ("\x00", "not JSON; expected"),
    "nested too deep": ("[" * 100_000, "not JSON; expected"),
    "a number": (7, "expected a list of lengths, or an object with 'lengths'"),
    "empty": ([], "lengths: no response has a token; give at least one above 0"),
    "no tokens": ([0, 0], "lengths: no response has a token"),
    "negative": ([3, -1], f"lengths[1]: {LENGTHS}, got -1"),
    "fractional": ([3.5], f"lengths[0]: {LENGTHS}, got 3.5"),
    "huge": ([1, 2**31], f"lengths[1]: {LENGTHS}, got 2147483648"),
    "enormous": ([10**50], f"lengths[0]: {LENGTHS}, got 1000000000000000000000000000000000000…"),
    "not a number": ("[NaN]", f"lengths[0]: {LENGTHS}, got NaN"),
    "infinite": ("[1e999]", f"lengths[0]: {LENGTHS}, got Infinity"),
    "text": (["3"], f'lengths[0]: {LENGTHS}, got "3"'),
    "true": ([True], f"lengths[0]: {LENGTHS}, got true"),
    "nested": ([[1, 2]], f"lengths[0]: {LENGTHS}, got [1, 2]"),
    "no lengths": ({"advantages": [1]}, "lengths: missing; give the trained tokens of each"),
    "unknown field": (
        {"length": [1]},
        "no field 'length'; the fields are lengths, advantages, group_ids",
    ),
    "no list": ({"lengths": {"a": 1}}, 'lengths: expected a list, got {"a": 1}'),
    "null": ({"lengths": [1], "advantages": None}, "advantages: expected a list, got null"),
    "wrong size": (
        {"lengths": [1, 2], "advantages": [1]},
        "advantages: has 1 values for 2 lengths; give one a response",
    ),
    "bad advantage": (
        {"lengths": [1], "advantages": ["x"]},
        'advantages[0]: expected a finite number, got "x"',
    ),
    "endless advantage": (
        '{"lengths": [1], "advantages": [Infinity]}',
        "advantages[0]: expected a finite number, got Infinity",
    ),
    "bad group": (
        {"lengths": [1], "group_ids": [0.5]},
        "group_ids[0]: expected a whole number, got 0.5",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
@pytest.mark.parametrize("option", [[], ["--json"]], ids=["plain", "json"])
def test_a_bad_file_is_refused_in_one_line_that_names_the_field_and_the_fix(
    weights, tmp_path, case, option
):
    content, message = BAD_FILES[case]
    code, out, err = weights(content, *option)
    assert (code, out) == (2, "")
    assert err.startswith(f"deltal: {tmp_path / 'lengths.json'}: {message}")
    assert err.count("\n") == 1 and err.endswith("\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--alpha", "x"], "--alpha: expected a number, got 'x'"),
        (["--alpha", "1,"], "--alpha: expected a number, got ''"),
        (["--alpha", "nan"], "--alpha: must be finite, got nan"),
        (["--alpha", "3.5"], "--alpha: must be in -1 … 3, got 3.5"),
        (["--normalizer", "0"], "--normalizer: must be above 0, got 0"),
        (["--normalizer", "-4"], "--normalizer: must be above 0, got -4"),
        (["--normalizer", "many"], "--normalizer: expected a number, got 'many'"),
        (["--normalizer", "inf"], "--normalizer: must be finite, got inf"),
        (["--beta", "9"], "--beta: must be in -1 … 3, got 9"),
        (["--microbatch-size", "0"], "--microbatch-size: expected a whole number in 1 … 999999999"),
        (["--microbatch-size", "2.5"], "--microbatch-size: expected a whole number"),
    ],
)
def test_a_bad_option_is_refused_in_one_line(weights, options, message):
    code, out, err = weights([1, 2], *options)
    assert (code, out) == (2, "")
    assert err.startswith(f"deltal: {message}")
    assert err.count("\n") == 1


def test_a_file_that_is_not_there_or_a_folder_is_refused(tmp_path, capsys):
    assert main(["weights", str(tmp_path / "none.json")]) == 2
    assert capsys.readouterr().err.endswith(
        "none.json: no such file; name one that holds a JSON list\n"
    )
    assert main(["weights", str(tmp_path)]) == 2
    assert "cannot be read (Is a directory)" in capsys.readouterr().err
