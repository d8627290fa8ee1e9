"""Every attack of the list is contained, and the next run is as always; also without namespaces."""

import pytest

from openqwen.sandbox import best_tier, tiers
from openqwen.sandbox.attacks import attacks, try_attacks
from openqwen.support.errors import OpenQwenError


def test_the_list_is_long():
    assert len(attacks()) >= 100


@pytest.mark.parametrize("tier", ["strict", pytest.param("process", marks=pytest.mark.slow)])
def test_attacks_are_contained(tier):
    if tiers._ORDER.index(best_tier()) < tiers._ORDER.index(tier):
        pytest.skip(f"the strongest tier here is {best_tier()}")
    outcomes = list(try_attacks(tier))
    assert [(o.attack.name, o.verdict) for o in outcomes if not o.contained] == []


def test_nothing_runs_below_the_tier(monkeypatch):
    weak = tiers.Protections(namespaces=False, landlock=0, seccomp=True, groups=None)
    monkeypatch.setattr(tiers, "protections", lambda: weak)
    for tier in ("strict", "process"):
        with pytest.raises(OpenQwenError, match=r"the strongest is 'none'(.|\n)*No untrusted code"):
            tiers.required(tier)
