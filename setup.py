"What stands beside the package in a checkout and inside it where it is installed; all else is in pyproject.toml."

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT_FILES = ("settings.ini", "constraints.txt")


class BuildWithRootFiles(build_py):
    "Copies files of the root folder into the package; an editable installation reads them where they are."

    def run(self):
        super().run()
        if not self.editable_mode:
            for name in ROOT_FILES:
                self.copy_file(name, f"{self.build_lib}/modelfactory/{name}")

    def get_source_files(self):
        return [*super().get_source_files(), *ROOT_FILES]


setup(
    cmdclass={"build_py": BuildWithRootFiles},
    packages=[*find_packages(include=["modelfactory*"]), "modelfactory.params", "modelfactory.notebooks"],
    package_dir={"modelfactory.params": "params", "modelfactory.notebooks": "nbs"},
    package_data={
        "modelfactory.params": ["models/*.yaml", "grids/*.yaml"],
        "modelfactory.notebooks": [
            *("train.ipynb", "compare.ipynb", "study.ipynb"),
            *("tutorials/*.ipynb", "reference/*.ipynb"),  # `modelfactory init` copies them
        ],
    },
    exclude_package_data={"modelfactory.notebooks": ["reference/models.ipynb"]},  # it reads the source notebooks
)
