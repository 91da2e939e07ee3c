import numpy as np
import pytest

import jchain as jc


@pytest.mark.parametrize("name", jc.tasks.TASKS)
def test_tasks_depend_only_on_the_seed(name):
    first, again, other = (jc.tasks.make(name, seed) for seed in (0, 0, 1))
    assert first.name == name
    np.testing.assert_array_equal(first.data.search.x, again.data.search.x)
    assert not np.array_equal(first.data.search.x, other.data.search.x)


def test_an_unknown_task_lists_the_tasks():
    with pytest.raises(ValueError, match=r"expected the name of a task \(repair\), got 'x'$"):
        jc.tasks.make("x")
    with pytest.raises(ValueError, match="did you mean repair"):
        jc.tasks.make("repairs")
