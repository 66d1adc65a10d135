"""Copies the seven notebooks into the built package as medcot_utils/notebooks; everything else stands in pyproject.toml.

An editable install copies nothing: the package finds notebooks/ beside itself."""

import re
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

OURS = re.compile(r"0[1-7]_[a-z_]+\.ipynb")  # not a copy that somebody keeps beside them


class BuildWithNotebooks(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "medcot_utils", "notebooks")
            self.mkpath(str(target))
            for notebook in sorted(Path("notebooks").glob("*.ipynb")):
                if OURS.fullmatch(notebook.name):
                    self.copy_file(str(notebook), str(target))


setup(cmdclass={"build_py": BuildWithNotebooks})
