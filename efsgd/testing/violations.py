"""How it is said that a compressor breaks a law."""


class Violation(Exception):
    """What a law has found, before it is said of which compressor.

    Args:
        found: what was found, and where: shape, worker, step. The end of a sentence.
        remedy: what must hold, and what the compressor's author can do. Sentences.
    """

    def __init__(self, found: str, remedy: str) -> None:
        super().__init__(found, remedy)
        self.found, self.remedy = found, remedy


class CompressorLawError(AssertionError):
    """A compressor breaks a law that holds for all of them, or a claim of its own.

    Attributes:
        law: the name of the law, a function in `efsgd.testing.LAWS`.
        compressor: that breaks it.
    """

    def __init__(self, law: str, compressor: object, violation: Violation) -> None:
        found = violation.found.rstrip(".")
        super().__init__(f"{compressor!r} breaks the law {law}: {found}. {violation.remedy}")
        self.law, self.compressor = law, compressor
