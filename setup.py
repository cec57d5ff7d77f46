"""Build script: `kernels/` at the top of the repository is installed as `fastdiff.kernels`."""

from pathlib import Path

from setuptools import find_packages, setup

OURS = ["fastdiff", "fastdiff.*"]
packages = [p for p in find_packages(include=OURS) if not p.startswith("fastdiff.kernels")]
kernel_packages = ["fastdiff.kernels", *(f"fastdiff.kernels.{p}" for p in find_packages("kernels"))]
# folders of data, without code: named as packages, since setuptools warns about them otherwise
assets = [f"fastdiff.assets.{p.name}" for p in sorted(Path("fastdiff/assets").iterdir())]

setup(
    packages=packages + kernel_packages + assets,
    package_dir={"fastdiff": "fastdiff", "fastdiff.kernels": "kernels"},
    package_data={
        "fastdiff": ["py.typed"],
        "fastdiff.kernels": ["tuned/*.json"],
        **{name: ["*"] for name in assets},
    },
)
