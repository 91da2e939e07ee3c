import pytest
from command_line import check_bad_options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "mnits"], "unknown data set 'mnits': did you mean mnist"),
        (
            ["--num-layers", "5", "--bank", "independent"],
            "a multiple of depth for kind 'independent', got 5 and 2",
        ),
        (["--num-heads", "0"], "expected num_heads to be at least 1, got 0"),
        (["--num-layers", "0"], "expected num_layers to be at least 1, got 0"),
        (["--num-heads", "2", "--bank", "snapshots"], "expected num_heads=1 for kind 'snapshots'"),
        (["--channels", "8"], "expected --channels only for images, got data of shape [13]"),
    ],
)
def test_search_rejects_options_that_do_not_fit_the_data_or_bank(
    tmp_path, capsys, options, message
):
    check_bad_options(tmp_path, capsys, options, message)
