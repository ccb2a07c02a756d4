"""The API reference: ``sphinx-build -W -n docs/api build/api``. Everything in it comes from docstrings."""

from timm_zzz import __version__

project = 'timm_zzz'
author = 'the authors of timm_zzz'
version = release = __version__

extensions = ['sphinx.ext.autodoc', 'sphinx.ext.napoleon']
templates_path = []
html_theme = 'alabaster'
html_show_copyright = False

autodoc_member_order = 'bysource'
autodoc_typehints = 'signature'
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

napoleon_use_ivar = True

# What is documented elsewhere; without a network there is nothing to link to
nitpick_ignore = [('py:class', 'timm_zzz.models.attach.ModelT')]
nitpick_ignore_regex = [(r'py:.*', r'(torch|timm|huggingface_hub|os|pathlib|PIL)\..*')]
