"""Who does what: the one plan file.

Owns ``Plan``, its TOML form, ``check`` and ``explain``. In goes a shorthand, a file or a search result; out comes the only decision
that anyone reads. It refuses to know how a plan is executed, and runs without torch.
"""
