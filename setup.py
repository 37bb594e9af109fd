"""The part of the packaging that pyproject.toml cannot say: the stages beside graft/ install as its subpackages.

Packages are found, not listed, so a nested package needs no entry here.
"""

from setuptools import find_packages, setup

STAGES = ("compiler", "passes", "codegen", "runtime")

setup(
    packages=[
        *find_packages(include=["graft", "graft.*"]),
        *(f"graft.{name}" for name in find_packages(include=[p for stage in STAGES for p in (stage, f"{stage}.*")])),
    ],
    package_dir={f"graft.{stage}": stage for stage in STAGES},
)
