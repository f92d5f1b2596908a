"What stands beside the package in a checkout and inside it where it is installed; all else is in pyproject.toml."

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["modelfactory*"]), "modelfactory.params", "modelfactory.notebooks"],
    package_dir={"modelfactory.params": "params", "modelfactory.notebooks": "nbs"},
    package_data={
        "modelfactory.params": ["models/*.yaml", "grids/*.yaml"],
        "modelfactory.notebooks": ["train.ipynb", "compare.ipynb", "study.ipynb"],
    },
)
