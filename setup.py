"""Settings are in setup.cfg. With EFSGD_NATIVE_WHEEL=1 a wheel carries the native passes ready-made."""

import os
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

IS_NATIVE = os.environ.get("EFSGD_NATIVE_WHEEL", "0") != "0"


class BuildWithPasses(build_py):
    def run(self) -> None:
        super().run()
        sys.path.insert(0, str(Path(__file__).parent))
        from efsgd.algorithms.low_rank.native import build

        build.require_processor()
        for rank in range(1, 9):
            target = Path(self.build_lib, "efsgd", *build.HERE.parts[-3:], build.ready_made(rank).name)
            build.make(rank, build.compiler_at_hand(), target)


class OfThisPlatform(Distribution):
    def has_ext_modules(self) -> bool:
        return True


if IS_NATIVE:
    setup(cmdclass={"build_py": BuildWithPasses}, distclass=OfThisPlatform)
else:
    setup()
