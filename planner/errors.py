"""What a user asked for that cannot be planned."""


class PlannerError(ValueError):
    """A topology, model or workload that cannot be planned; the text says the rule, the value seen and what to do."""


class CompilerMissing(PlannerError):
    """The compiler for a topology is not installed; the text says what to install."""


class CompileFailed(PlannerError):
    """The compiler, or the code that builds the step, refused; the text holds its reason."""
