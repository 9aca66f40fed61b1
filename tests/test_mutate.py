"""tools/mutate.py on a toy project, and: every mutation of tests/mutations/ fits the code."""

import re
import textwrap

import pytest

from tools import mutate

CODE = """\
import os, time

def double(x):
    return 2 * x

def triple(x):
    return 3 * x
"""
TESTS = """\
import pytest
import toy

def test_double():
    assert toy.double(2) == 4

def test_triple():
    assert toy.triple(0) == 0

@pytest.mark.skip
def test_skipped():
    assert toy.double(2) == 4

def test_always_red():
    assert toy.double(2) == 5
"""
DOUBLE = ("return 2 * x", "return 3 * x", "test_double")


@pytest.fixture
def toy(tmp_path):
    (tmp_path / "tests" / "mutations").mkdir(parents=True)
    (tmp_path / "toy.py").write_text(CODE)
    (tmp_path / "tests" / "test_toy.py").write_text(TESTS)
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\npythonpath = ["."]\n')
    return tmp_path


def write(root, *entries, head='file = "toy.py"\ntests = "tests/test_toy.py"', stem="toy"):
    blocks = [
        "\n".join(["[[mutation]]", *(f"{k} = '''{v}'''" for k, v in ({"breaks": "it"} | entry).items())])
        for entry in entries
    ]
    (root / "tests" / "mutations" / f"{stem}.toml").write_text("\n\n".join([head, *blocks]) + "\n")


def entry(search, replace, red, **more):
    return {"search": search, "replace": replace, "red": red} | more


def run(root, capsys, *options):
    status = mutate.main(list(options), root)
    return status, capsys.readouterr().out


def test_a_mutation_that_its_test_notices_is_red(toy, capsys):
    write(toy, entry(*DOUBLE))
    status, out = run(toy, capsys)
    assert status == 0 and "1 red, 0 survived, 0 errors" in out
    assert (toy / "toy.py").read_text() == CODE, "the tree itself was changed"


def test_a_survivor_is_reported(toy, capsys):
    write(toy, entry(*DOUBLE), entry("return 3 * x", "return 4 * x", "test_triple", breaks="triple"))
    status, out = run(toy, capsys)
    assert status == 1 and "survived toy: triple" in out and "1 red, 1 survived, 0 errors" in out


def test_a_killed_process_is_red_and_a_slow_one_an_error(toy, capsys):
    write(
        toy,
        entry("return 2 * x", "return os.abort()", "test_double", breaks="abort"),
        entry("return 2 * x", "return time.sleep(60)", "test_double", breaks="sleep"),
    )
    status, out = run(toy, capsys, "--limit", "20")  # on a busy machine a run takes more than 5
    assert status == 1 and "red      toy: abort (killed by SIGABRT)" in out
    assert "error    toy: sleep (beyond the time limit)" in out


@pytest.mark.parametrize(
    "mutation, message",
    [
        (entry("return 2 * x", "return y", "test_double"), "NameError: a typing error fails every test"),
        (entry("import os", "import no_such_module", "test_double"), "pytest ended with status 4"),
        (entry("return 2 * x", "return x", "test_always_red"), "test_always_red is not green without it"),
        (entry("return 2 * x", "return x", "test_skipped"), "test_skipped is not green without it"),
        (entry("return 2 * x", "return x", "test_gone"), "test_gone is not green without it: no result"),
        (entry("return 5 * x", "return x", "test_double"), "occurs 0 times in toy.py"),
        (entry("* x", "+ x", "test_double"), "occurs 2 times in toy.py"),
        (entry("* x", "+ x", "test_double", inside="half"), "0 functions or classes are called half"),
        (entry("return 2 * x", "return 2 *", "test_double"), "toy.py does not parse with it"),
        (entry("return 2 * x", "return 2 * x", "test_double"), "it changes nothing"),
        (entry("x", "y", "test_double", file="gone.py"), "there is no gone.py"),
    ],
)
def test_a_mutation_that_proves_nothing_is_an_error(mutation, message, toy, capsys):
    write(toy, mutation)
    status, out = run(toy, capsys)
    assert status == 1 and message in out


def test_the_place_of_a_mutation_is_a_function_or_a_method(toy, capsys):
    write(toy, entry("* x", "+ x", "test_triple", inside="triple"))
    (mutation,) = mutate.read(toy)
    assert mutation.apply(toy) == CODE.replace("3 * x", "3 + x")
    (toy / "toy.py").write_text(
        "class A:\n    def f():\n        return 1\n\n    def g():\n        return 1\n"
    )
    write(toy, entry("return 1", "return 2", "test_triple", inside="A.g"))
    (mutation,) = mutate.read(toy)
    assert mutation.apply(toy).splitlines()[-1] == "        return 2"


def test_a_mutation_may_add_a_file(toy, capsys):
    write(toy, {"file": "tests/conftest.py", "replace": "import toy; toy.double = str", "red": "test_double"})
    assert run(toy, capsys)[0] == 0
    assert not (toy / "tests" / "conftest.py").exists()


def test_check_runs_nothing_and_names_what_is_stale(toy, capsys):
    write(toy, entry(*DOUBLE), entry("return 5 * x", "return x", "test_gone", breaks="five"))
    status, out = run(toy, capsys, "--check")
    assert status == 1 and "toy: five: the text to replace occurs 0 times" in out
    assert "no such test: tests/test_toy.py::test_gone" in out and "2 mutations, 2 problems" in out


def test_mutations_whose_tests_need_a_missing_package_wait_for_it(toy, capsys):
    write(toy, entry(*DOUBLE), entry(*DOUBLE, breaks="here", needs="pytest"))
    write(
        toy,
        entry("return 2 * x", "return x", "test_gone"),
        head='file = "toy.py"\nneeds = "no_such"',
        stem="b",
    )
    status, out = run(toy, capsys)
    assert status == 0 and "1 mutations need no_such, which is not installed" in out
    assert "2 red, 0 survived, 0 errors" in out
    # their text is held to the code all the same
    assert run(toy, capsys, "--check") == (0, "3 mutations, 0 problems\n")
    (toy / "toy.py").write_text(CODE.replace("2 * x", "x + x"))
    assert "b: it: the text to replace occurs 0 times" in run(toy, capsys, "--check")[1]
    # asked for by name, they must run
    with pytest.raises(SystemExit):
        mutate.main(["b"], toy)
    assert "need no_such, which is not installed: make mutate-integrations" in capsys.readouterr().err


def test_a_draw_is_repeated_by_its_seed():
    everything = range(1000)
    drawn = mutate.draw(everything, 10, seed=1)
    assert len(set(drawn)) == 10 and drawn == mutate.draw(everything, 10, seed=1)
    assert drawn != mutate.draw(everything, 10, seed=2)
    assert sorted(mutate.draw(everything, 2000, seed=1)) == list(everything)


def test_a_run_at_random_prints_what_repeats_it(toy, capsys):
    write(toy, *(entry(*DOUBLE, breaks=str(i)) for i in range(20)))
    out = run(toy, capsys, "--number", "1")[1]
    (options,) = re.findall(r"--number 1 --seed \d+", out)
    assert "1 red, 0 survived, 0 errors" in out
    assert re.findall(r"toy: (\d+)", out) == re.findall(r"toy: (\d+)", run(toy, capsys, *options.split())[1])


@pytest.mark.parametrize(
    "head, message",
    [
        ("files = 'x'", "toy.toml, mutation 1: unknown: files"),
        ("", "toy.toml, mutation 1: missing: file"),
    ],
)
def test_a_wrong_key_is_named(head, message, toy, capsys):
    write(toy, entry(*DOUBLE), head=head)
    with pytest.raises(SystemExit):
        mutate.main([], toy)
    assert message in capsys.readouterr().err


def test_an_unknown_stem_is_named(toy, capsys):
    write(toy)
    with pytest.raises(SystemExit):
        mutate.main(["gate"], toy)
    assert "no mutations of gate; there are toy" in capsys.readouterr().err


def test_every_mutation_fits_the_code():
    mutations = mutate.read(mutate.ROOT)
    assert mutations
    problems = mutate.check(mutate.ROOT, mutations)
    assert not problems, textwrap.indent("\n".join(problems), "  ")


def test_the_self_check_is_asked_about_kernels_alone():
    files = {mutation.file for mutation in mutate.of_kernels(mutate.read(mutate.ROOT))}
    assert "kernels/gated.py" in files and not files & {"kernels/library.py", "kernels/errors.py"}


@pytest.mark.parametrize(
    ("file", "operations"),
    [("gated", ("geglu", "swiglu")), ("streams", ()), ("layout", ()), ("_common", ())],
)
def test_a_fault_of_what_kernels_share_is_put_to_all_operations(file, operations):
    assert tuple(sorted(mutate._operations(mutate.ROOT, f"kernels/{file}.py"))) == operations
