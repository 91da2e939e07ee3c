import pytest
from command_line import check_bad_options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sizes", "1,a"], "expected four sizes, as in 5000,1000,1000,1000, got '1,a'"),
        (["--search", "annealing"], "invalid choice: 'annealing'"),
    ],
)
def test_bad_values_exit_with_2_and_write_nothing(tmp_path, capsys, options, message):
    check_bad_options(tmp_path, capsys, options, message)
