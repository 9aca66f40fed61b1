"""`make test-cpus`: no setting passes that a library ignored, that this CPU lacks or whose tests are red."""

import pytest

from nvembed_fast import ops
from tools import cpus
from tools.cpus import Setting


@pytest.fixture
def test_file(tmp_path):
    def write(text):
        path = tmp_path / "test_here.py"
        path.write_text(text)
        return [str(path)]

    return write


HONOURED = Setting("here", {"HERE": "yes"}, "", "import os; print('took', os.environ['HERE'])", ("took yes",))


def test_a_setting_reaches_the_tests(test_file):
    tests = test_file("import os\n\ndef test_here():\n    assert os.environ['HERE'] == 'yes'\n")
    passed, line = cpus.run(HONOURED, tests, 1, set())
    assert passed and line.startswith("1 passed")


def test_a_red_test_is_red(test_file):
    passed, line = cpus.run(HONOURED, test_file("def test_here():\n    assert 1 == 2\n"), 1, set())
    assert not passed and "assert 1 == 2" in line


def test_a_setting_that_is_ignored_is_an_error():
    setting = Setting("core", {"OPENBLAS_CORETYPE": ""}, "", cpus.OPENBLAS, ("no such core",))
    passed, line = cpus.run(setting, ["tests/test_here_there_is_none.py"], 1, set())
    assert not passed and line.startswith("ignored: the library should take 'no such core', but it says '")


def test_instructions_that_the_cpu_lacks_are_skipped():
    setting = Setting("new", {}, "avx4096", "raise SystemExit(1)", ("",))
    assert cpus.run(setting, [], 1, {"avx2"}) == (True, "skipped: this CPU has no avx4096")


def test_a_setting_that_every_cpu_has(test_file):
    (setting,) = (s for s in cpus.SETTINGS if s.name == "aten-default")
    passed, line = cpus.run(setting, test_file("def test_here(): pass\n"), 1, set())
    assert passed and line.startswith("1 passed")


def test_every_kernel_is_tested():
    stems = {test.removeprefix("tests/test_").removesuffix(".py") for test in cpus.kernel_tests()}
    kernels = {stem.removesuffix("_backward").removesuffix("_gradients") for stem in stems}
    assert {f"flash_attention{part}" for part in ("", "_gradients", "_backward")} < stems
    assert kernels <= {*ops.OPERATIONS, "gated", "library", "streams"}


def test_a_setting_that_does_not_exist(capsys):
    with pytest.raises(SystemExit):
        cpus.main(["Pentium"])
    assert "no such setting: Pentium" in capsys.readouterr().err
