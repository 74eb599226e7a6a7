"""How it is said that a compressor breaks a law."""


class Violation(Exception):
    """What a law has found: shape, worker and step, as the end of a sentence.

    `remedy` says in sentences what must hold; without one it is that of the law.
    """

    def __init__(self, found: str, remedy: str = "") -> None:
        super().__init__(found, remedy)
        self.found, self.remedy = found, remedy


class CompressorLawError(AssertionError):
    """A compressor breaks a law that holds for all of them, or a claim of its own.

    Attributes:
        law: the name of the law, a function in `efsgd.testing.LAWS`.
        compressor: that breaks it.
    """

    def __init__(self, law: str, compressor: object, found: str, remedy: str) -> None:
        super().__init__(f"{compressor!r} breaks the law {law}: {found.rstrip('.')}. {remedy}")
        self.law, self.compressor = law, compressor
