"""How many examples a fuzzing test runs: few in every run of the suite, very many in the nightly profile."""

from hypothesis import HealthCheck, Phase, settings

NIGHTLY = settings.default.max_examples > settings.get_profile("ci").max_examples


def examples(ci: int, nightly: int) -> settings:
    """Settings of a fuzzing test, by the profile that tests/conftest.py has loaded."""
    slow = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    phases = [Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink]  # without explain, which takes minutes
    return settings(phases=phases, max_examples=nightly if NIGHTLY else ci, suppress_health_check=slow)
