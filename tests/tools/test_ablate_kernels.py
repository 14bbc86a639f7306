"""Every tuning can be switched off, and its plain form computes the same."""

import pytest

from tools import ablate_kernels
from tools.ablate_kernels import TUNINGS
from tools.beside_pytorch import material


@pytest.mark.parametrize("name", TUNINGS)
def test_the_functions_that_a_plain_form_replaces_exist(name):
    for replaced in TUNINGS[name].plain:
        owner, attribute = ablate_kernels._find(replaced)
        assert callable(getattr(owner, attribute))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_plain_form_computes_what_the_tuned_one_does(tmp_path):
    material.make(str(tmp_path), "tiny")
    for name, tuning in TUNINGS.items():
        row = ablate_kernels.measure(name, str(tmp_path), "tiny", rounds=1)  # raises for other numbers
        assert row["tuning"] == name and min(row["with"], row["without"]) > 0
        assert row["work"] == ("compiling" if tuning.compiles else tuning.work)
