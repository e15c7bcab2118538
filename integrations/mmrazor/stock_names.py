"""Importing this module calls `take_over`: the form for a config or a command line.

    custom_imports = dict(imports=["kdops.integrations.mmrazor.stock_names"])
"""
from kdops.integrations.mmrazor import take_over

take_over()
