"""How hypothesis looks for examples: the same ones everywhere and every time."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "wantrim",
    deadline=None,
    max_examples=200,
    derandomize=True,
    database=None,
    # files and models are fixtures, and are not changed
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("wantrim")
few = settings(settings.get_profile("wantrim"), max_examples=60)
