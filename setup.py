"""The one thing pyproject.toml cannot say: optional C extensions (without a compiler their twins in Python serve)."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(f"vtx.engine.{name}", [f"vtx/engine/{name}.c"], optional=True, extra_compile_args=["-O2"])
        for name in ("_blockclock", "_fills", "_transfer")
    ]
)
