"""The one tree of errors. Every message says what is wrong, where, and what to do next."""


class LlmcError(Exception):
    """Base of every error that a user's input can cause; the command line prints it as one line."""


class IRError(LlmcError):
    """A graph or an op that breaks a rule of the IR."""


class DimError(IRError):
    """A comparison of symbolic sizes that is false or cannot be settled."""


class FrontendError(LlmcError):
    """A model that cannot be read or lifted."""


class CompileError(LlmcError):
    """A graph that cannot be compiled as asked."""


class ArtifactError(LlmcError):
    """An artifact that cannot be written, read or trusted."""


class RuntimeStateError(LlmcError):
    """A request that the runtime cannot serve: out of context, out of cache pages, bad token ids."""
