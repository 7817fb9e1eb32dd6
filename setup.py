"""The one thing pyproject.toml cannot say: an optional C extension (without a compiler the Python fallback serves)."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension("vtx.engine._blockclock", ["vtx/engine/_blockclock.c"], optional=True, extra_compile_args=["-O2"])
    ]
)
