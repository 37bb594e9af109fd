"""graft compiles LLM decoding: capture, transform, lower, run."""

from pkgutil import extend_path

# In a checkout the folder graft/ holds the face alone and the four stages stand beside it; the installed package
# holds them all. Extending the path lets `python -m graft` work from the checkout's root too.
__path__ = extend_path(__path__, __name__)
