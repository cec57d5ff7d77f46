"""Build script: `kernels/` at the top of the repository is installed as `fastdiff.kernels`."""

from setuptools import find_packages, setup

OURS = ["fastdiff", "fastdiff.*"]
packages = [p for p in find_packages(include=OURS) if not p.startswith("fastdiff.kernels")]
kernel_packages = ["fastdiff.kernels", *(f"fastdiff.kernels.{p}" for p in find_packages("kernels"))]

setup(
    packages=packages + kernel_packages,
    package_dir={"fastdiff": "fastdiff", "fastdiff.kernels": "kernels"},
)
