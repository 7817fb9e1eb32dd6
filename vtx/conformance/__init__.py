"""Running a build of kvm-unit-tests: from the suite's own configuration to a verdict for each test and each check.

`vtx.conformance.suite` reads the configuration, `vtx.conformance.plan` turns each test into a job for a machine or a
reason to skip it, `vtx.conformance.runner` runs the jobs, each in a process of its own (`vtx.conformance.worker`), and
`vtx.conformance.results` judges how they ended. `vtx.conformance.junit` writes the file that build servers read.
"""
