"""Importing this module takes MMRazor's names over: the form that a config or a command line can ask for.

    custom_imports = dict(imports=["kdops.integrations.mmrazor.stock_names"])
"""
from kdops.integrations.mmrazor import take_over

take_over()
