"""Shared by all tests: how Hypothesis runs, and that an interrupt interrupts.

Where CI is set, its examples are the same in every run, so that a verdict belongs to the commit and not to the hour.
Everywhere else they are new each time: that is where new counterexamples are found and become tests.
"""

import os
import signal

from hypothesis import HealthCheck, settings

settings.register_profile("ci", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("developer", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ci" if os.environ.get("CI") else "developer")

# In the background of a shell SIGINT is ignored, and what the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
