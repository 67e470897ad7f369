"""The fixture with every irregularity, and its plan."""

from __future__ import annotations

import pytest

from jmt_dist.affwild2.fixture import FixtureReport, plan_fixture
from jmt_dist.affwild2.fixture_plan import UnitPlan, VideoPlan

from ..conftest import IRREGULAR


@pytest.fixture(scope="session")
def made(irregular: FixtureReport) -> FixtureReport:
    """To be read only: tests of packing read it too."""
    return irregular


@pytest.fixture(scope="session")
def plans() -> dict[str, tuple[VideoPlan, UnitPlan]]:
    return {u.name: (v, u) for v in plan_fixture(IRREGULAR.model_copy(update={"out": "-"})) for u in v.people}


@pytest.fixture(scope="session")
def by_gotcha(plans: dict[str, tuple[VideoPlan, UnitPlan]]) -> dict[str, tuple[VideoPlan, UnitPlan]]:
    return {u.gotcha: (v, u) for v, u in plans.values()}
